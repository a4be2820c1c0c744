"""Rates are of what was counted, a step's time adds up, and a trace holds the steps asked for."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dpojax.runtime.errors import ConfigError
from dpojax.training import config as config_lib
from dpojax.training import throughput


@pytest.mark.parametrize(
  "kind, chip",
  [
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA H100 PCIe", ""),
    ("NVIDIA H100 NVL", ""),
    ("cpu", ""),
    ("NVIDIA GeForce RTX 4090", ""),
  ],
)
def test_a_device_is_known_by_its_kind(kind, chip):
  assert throughput.chip_of(kind) == chip


def test_rates_are_of_what_was_counted_and_parts_of_a_step_add_up():
  clock = throughput.Throughput(flops_per_comparison=1e9)
  for _ in range(4):
    clock.advance(SimpleNamespace(comparisons=3, tokens=50), waited=0.01)
    with clock.on_device():
      time.sleep(0.02)
  rates = clock.rates()
  seconds = rates["step_seconds"] * 4
  assert rates["pairs_per_second"] == pytest.approx(12 / seconds)
  assert rates["tokens_per_second"] == pytest.approx(200 / seconds)
  assert rates["tokens_per_second_per_device"] == pytest.approx(200 / seconds / jax.device_count())
  assert rates["step_seconds/input"] == pytest.approx(0.01)
  assert rates["step_seconds/device"] >= 0.02
  assert set(rates) <= set(throughput.METRICS)
  assert clock.rates()["pairs_per_second"] == 0


def test_mfu_is_the_share_of_the_peak_of_all_chips(monkeypatch):
  monkeypatch.setattr(throughput, "chip_of", lambda kind: "v5e")
  clock = throughput.Throughput(flops_per_comparison=1e9)
  clock.advance(SimpleNamespace(comparisons=8, tokens=0), waited=0.0)
  rates = clock.rates()
  peak = throughput.CHIPS["v5e"].flops * jax.device_count()
  assert rates["mfu"] == pytest.approx(8e9 / rates["step_seconds"] / peak)


def test_a_trace_is_written_of_the_steps_asked_for(tmp_path):
  double = jax.jit(lambda x: 2 * x)
  with throughput.Profile(range(2, 4), tmp_path) as profile:
    for step in range(1, 6):
      profile.before(step, jnp.zeros(()))
      assert profile._running == (step in (2, 3))
      double(jnp.ones(4))
  assert list((tmp_path / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb"))


@pytest.mark.parametrize("text", ["10", "3:2", "0:4", "a:b", "1:2:3", ":"])
def test_steps_to_profile_that_make_no_sense_are_refused(text):
  config = config_lib.defaults()
  config.profile_steps = text
  with pytest.raises(ConfigError, match="profile_steps"):
    config_lib.profiled_steps(config)
  config.profile_steps = "10:15"
  assert list(config_lib.profiled_steps(config)) == [10, 11, 12, 13, 14, 15]
