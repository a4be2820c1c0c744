"""Sums on CPUs: as NumPy adds them in every command, and told where they are not."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from configs import dpo
from dpojax.runtime import xla
from dpojax.training import resolve

COMPILED = """
import contextlib, json, sys
import jax, jax.numpy as jnp, numpy as np
from dpojax.runtime import xla
from dpojax.runtime.command import command

def rms_norm(x): return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))

def layer_norm(x): return rms_norm(x - x.mean(-1, keepdims=True))

SUMS = {
  "a product with a constant matrix": lambda x, w: jnp.sum((x @ jnp.full((64, 64), 0.4)) * x, -1),
  "a norm's scale": lambda x, w: jax.grad(lambda w: jnp.sum((rms_norm(x) * w) @ jnp.ones((64, 7))))(w),
  "below a norm": lambda x, w: jax.grad(lambda x: jnp.sum((layer_norm(x) * w) @ jnp.outer(w, w)))(x),
  "vectors squared": lambda x, w: jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(x.reshape(-1, 3)),
}
with command() if sys.argv[1] == "command" else contextlib.nullcontext():
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(3, 50, 64)).astype("f"), rng.normal(size=64).astype("f")
  sums = {name: np.asarray(jax.jit(f)(x, w)).tolist() for name, f in SUMS.items()}
  print(json.dumps({"right": xla.sums_are_right(), "sums": sums}))
"""


def right(name: str) -> np.ndarray:
  """The sums of the script above by NumPy, in float64."""
  rng = np.random.default_rng(0)
  x, w = (rng.normal(size=shape).astype("f").astype(float) for shape in ((3, 50, 64), 64))
  if name == "a product with a constant matrix":
    return 0.4 * x.sum(-1) ** 2
  normed = x / np.sqrt((x * x).mean(-1, keepdims=True))
  if name == "a norm's scale":
    return 7 * normed.sum((0, 1))
  if name == "vectors squared":
    return (x.reshape(-1, 3) ** 2).sum(-1)
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt((centred * centred).mean(-1, keepdims=True))
  normed, wanted = centred / deviation, w * w * w.sum()
  return (wanted - wanted.mean() - normed * (wanted * normed).mean(-1, keepdims=True)) / deviation


def compiled(how: str) -> dict:
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command = [sys.executable, "-c", COMPILED, how]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  return json.loads(done.stdout)


def agrees(name: str, values: list) -> bool:
  wanted = right(name)
  return np.allclose(values, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_a_command_adds_up_right():
  found = compiled("command")
  assert found["right"]
  assert [name for name, values in found["sums"].items() if not agrees(name, values)] == []


def test_whether_sums_are_right_is_found_out():
  """Under whatever jax this is: of 0.10.2 to 0.12.0 they are not."""
  found = compiled("alone")
  assert found["right"] == agrees("a norm's scale", found["sums"]["a norm's scale"])


@pytest.mark.parametrize(
  "flags, then",
  [
    ("", "--xla_cpu_experimental_ynn_fusion_type=-reduce"),
    ("--xla_a=1", "--xla_a=1 --xla_cpu_experimental_ynn_fusion_type=-reduce"),
    ("--xla_cpu_experimental_ynn_fusion_type=", "--xla_cpu_experimental_ynn_fusion_type="),
  ],
)
def test_what_xla_flags_say_stands(monkeypatch, flags, then):
  monkeypatch.setenv("XLA_FLAGS", flags)
  xla.keep_sums_right()
  assert os.environ["XLA_FLAGS"] == then


@pytest.mark.parametrize("are_right", [False, True])
def test_a_run_tells_that_its_sums_are_wrong(monkeypatch, capsys, are_right):
  monkeypatch.setattr(xla, "sums_are_right", lambda: are_right)
  resolve.make_devices(dpo.get_config())
  told = capsys.readouterr().out
  assert told == ("" if are_right else f"warning: {xla.WRONG_SUMS}\n")
