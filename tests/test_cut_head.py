"""A head whose columns stand on several devices gives the numbers of a whole one, and is whole nowhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dpojax.kernels import cut_head
from dpojax.kernels.cut_head import CutHead
from dpojax.kernels.gathering import MeshAxis
from dpojax.kernels.head import Head
from dpojax.log_probs import token_log_probs

ROWS, SCORED, WIDTH, VOCABULARY, DEVICES = 8, 12, 16, 50, 4


def pieces(rng, *, full):
  """Hidden states, head, targets, which count, and cotangents; the last rows hold nothing."""
  there = rng.random((ROWS, SCORED)) < 0.6
  there[-3:] = False
  return (
    rng.normal(size=(ROWS, SCORED, WIDTH)),
    rng.normal(size=(VOCABULARY, WIDTH)),
    rng.normal(size=VOCABULARY) if full else None,
    rng.integers(VOCABULARY, size=(ROWS, SCORED)),
    there,
    rng.normal(size=(ROWS, SCORED)),
  )


def gradients(make_head, hidden, weights, bias, target, there, cotangent):
  def total(hidden, weights, bias):
    values = token_log_probs(hidden, make_head(weights, bias), target, where=there, chunk_size=5)
    return jnp.sum(values * cotangent), values

  (_, values), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(hidden, weights, bias)
  return values, *grads


@pytest.mark.parametrize("full", [False, True], ids=["plain", "with a bias and a soft cap"])
def test_values_and_gradients_are_those_of_a_whole_head(full, rng, monkeypatch):
  monkeypatch.setattr(cut_head, "WORDS", 16)  # four blocks, the last of which begins within the third
  cap = 3.0 if full else None
  mesh = jax.make_mesh((DEVICES,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
  by_rows, by_columns = PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")

  def of_device(hidden, weights, bias, *rest):
    values, hidden_grad, weights_grad, bias_grad = gradients(
      lambda weights, bias: CutHead(weights, bias, cap, MeshAxis("fsdp")), hidden, weights, bias, *rest
    )
    return values, hidden_grad, weights_grad, jax.lax.psum(bias_grad, "fsdp")

  with jax.enable_x64(True):
    given = pieces(rng, full=full)
    nothing = PartitionSpec()
    got = jax.jit(
      jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(by_rows, by_columns, nothing, by_rows, by_rows, by_rows),
        out_specs=(by_rows, by_rows, by_columns, nothing),
        check_vma=False,
      )
    )(*given)
    want = gradients(lambda weights, bias: Head(weights, bias, cap), *given)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(ours, theirs, atol=1e-12)
