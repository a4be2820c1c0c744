"""The fused form gives the dense rule's numbers, skips what it may, and lowers for its platforms."""

import contextlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dpojax.kernels import backends, fused
from dpojax.kernels.attention import TokenIds, attention
from dpojax.kernels.blockwise import blockwise_attention
from dpojax.models import transformer
from dpojax.training import config as config_lib
from dpojax.training import resolve
from tests import worlds

BLOCK, HEADS, KEY_HEADS = 32, 4, 2
EVERYTHING = {"scale": 0.9, "window": 12, "soft_cap": 3.0}


def packed_ids(rng, num_responses=2, length=150, count=5):
  rows = worlds.packed(worlds.comparisons(rng, count, num_responses, longest=40), length)
  return TokenIds(*map(jnp.asarray, (rows.positions, rows.comparison, rows.branch)))


def inputs(rng, ids, dtype=jnp.float32, head_size=6):
  draw = lambda heads: jnp.asarray(rng.normal(size=(*ids.comparison.shape, heads, head_size)), dtype)
  return draw(HEADS), draw(KEY_HEADS), draw(KEY_HEADS)


def interpreted(q, k, v, ids, platform="gpu", **form):
  return fused.fused_attention(q, k, v, ids, platform=platform, interpret=True, block=BLOCK, **form)


def dense(q, k, v, ids, **form):
  """The dense form, with zeros for padding as the fused one has."""
  out = attention(q, k, v, ids, ids, **form)
  return jnp.where((ids.comparison > 0)[..., None, None], out, 0)


def values_and_gradients(function, q, k, v, cotangent):
  def total(q, k, v):
    out = function(q, k, v)
    return jnp.sum(out * cotangent), out

  (_, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return out, *grads


@pytest.mark.parametrize(
  "platform, num_responses, form",
  [("gpu", 2, {}), ("tpu", 1, {"window": 7}), ("gpu", 4, EVERYTHING), ("tpu", 2, EVERYTHING)],
)
def test_values_and_gradients_are_the_dense_ones(platform, num_responses, form, rng):
  with jax.enable_x64(True):
    ids = packed_ids(rng, num_responses)
    q, k, v = inputs(rng, ids, jnp.float64)
    cotangent = jnp.asarray(rng.normal(size=q.shape))
    want = values_and_gradients(lambda *x: dense(*x, ids, **form), q, k, v, cotangent)
    got = values_and_gradients(lambda *x: interpreted(*x, ids, platform, **form), q, k, v, cotangent)
    for ours, theirs in zip(got, want):
      np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_float32_is_exact_to_its_rounding_and_bfloat16_to_its_own(rng):
  ids = packed_ids(rng)
  q, k, v = inputs(rng, ids)
  cotangent = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
  want = values_and_gradients(lambda *x: dense(*x, ids), q, k, v, cotangent)
  for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.1)):
    got = values_and_gradients(
      lambda *x: interpreted(*x, ids), *(x.astype(dtype) for x in (q, k, v)), cotangent
    )
    for ours, theirs in zip(got, want):
      assert ours.dtype == dtype
      np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=tolerance)


def test_a_row_of_padding_alone_is_zero_and_has_no_gradient(rng):
  zero = jnp.zeros((1, 64), jnp.int32)
  ids = TokenIds(zero, zero, zero)
  q, k, v = inputs(rng, ids)
  out, *grads = values_and_gradients(lambda *x: interpreted(*x, ids), q, k, v, jnp.ones(q.shape))
  assert not np.any(out) and not any(np.any(grad) for grad in grads)


def ids_in_whole_blocks(comparisons):
  """One row, in which prompt, first and second response of each comparison fill a block each."""
  position = np.concatenate([np.arange(2 * BLOCK), np.arange(BLOCK, 2 * BLOCK)])
  return TokenIds(
    *(
      jnp.asarray(x, jnp.int32)[None]
      for x in (
        np.tile(position, comparisons),
        np.repeat(np.arange(1, comparisons + 1), 3 * BLOCK),
        np.tile(np.repeat(np.arange(3), BLOCK), comparisons),
      )
    )
  )


def test_a_block_visits_the_blocks_it_sees_and_no_other():
  ids = jnp.stack(ids_in_whole_blocks(4), axis=1)
  form = fused.Form(1.0, 0, 0.0, BLOCK, "gpu", True)
  count, order = fused._visits(ids, form)
  assert count.ravel().tolist() == [1, 2, 2] * 4
  assert [sorted(order[0, i, 0, : count[0, i, 0, 0]].tolist()) for i in (3, 4, 5)] == [[3], [3, 4], [3, 5]]
  by_keys, _ = fused._visits(ids, form, by_keys=True)
  assert by_keys.ravel().tolist() == [3, 1, 1] * 4


def test_what_stands_in_a_block_reaches_only_those_that_visit_it(rng):
  ids = ids_in_whole_blocks(2)
  q, k, v = inputs(rng, ids)
  run = jax.jit(lambda *x: values_and_gradients(lambda *y: interpreted(*y, ids), *x, jnp.ones(q.shape)))
  poisoned = lambda x: x.at[:, :BLOCK].set(jnp.nan)
  out, q_grad, k_grad, v_grad = run(q, k, v)
  bad_out, bad_q_grad, _, _ = run(q, poisoned(k), poisoned(v))  # the first comparison's prompt
  _, _, bad_k_grad, bad_v_grad = run(poisoned(q), k, v)
  for bad, good, untouched in (
    (bad_out, out, 3),
    (bad_q_grad, q_grad, 3),
    (bad_k_grad, k_grad, 1),
    (bad_v_grad, v_grad, 1),
  ):
    np.testing.assert_array_equal(bad[:, untouched * BLOCK :], good[:, untouched * BLOCK :])
    assert np.isnan(bad[:, : untouched * BLOCK]).all()


def test_a_mesh_computes_rows_and_heads_where_they_are(rng):
  ids = jax.tree.map(lambda x: jnp.tile(x[:2], (2, 1)), packed_ids(rng, length=120))
  q, k, v = inputs(rng, ids)
  cotangent = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
  want = values_and_gradients(lambda *x: dense(*x, ids), q, k, v, cotangent)
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *axes)))
  ids = jax.tree.map(place, ids)
  gradients = jax.jit(
    jax.grad(lambda q, k, v, cotangent: jnp.sum(interpreted(q, k, v, ids) * cotangent), (0, 1, 2))
  )
  with jax.set_mesh(mesh):
    arguments = [place(x, None, "tensor") for x in (q, k, v, cotangent)]
    compiled = gradients.lower(*arguments).compile()
    got = compiled(*arguments)
  for ours, theirs in zip(got, want[1:]):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()


@pytest.mark.parametrize("lift", [lambda f: jax.jit(jax.vmap(f)), jax.pmap], ids=["vmap", "pmap"])
def test_runs_and_replicas_side_by_side_give_the_same(lift, rng):
  ids = jax.tree.map(lambda x: x[:2, None, :64], packed_ids(rng))
  q, k, v = inputs(rng, ids)
  gradient = lambda function: jax.grad(lambda *x: jnp.sum(jnp.square(function(*x))))
  want = jax.jit(jax.vmap(gradient(dense)))(q, k, v, ids)
  np.testing.assert_allclose(lift(gradient(interpreted))(q, k, v, ids), want, atol=1e-5)


@pytest.fixture
def h100():
  """A mesh of one GPU that is not there: since jax 0.12 Triton's kernels ask it what they are lowered for."""
  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
  mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
  "platform, target, call", [("gpu", "cuda", "__gpu$xla.gpu.triton"), ("tpu", "tpu", "tpu_custom_call")]
)
@pytest.mark.parametrize("head_size, form", [(64, {}), (80, {}), (128, {"window": 512, "soft_cap": 30.0})])
def test_forward_and_gradients_lower_for_their_platform(platform, target, call, head_size, form, h100):
  ids = TokenIds(*[jax.ShapeDtypeStruct((2, 2048), jnp.int32)] * 3)
  q, k = (jax.ShapeDtypeStruct((2, 2048, n, head_size), jnp.bfloat16) for n in (8, 2))

  def total(q, k, v, ids):
    return jnp.sum(fused.fused_attention(q, k, v, ids, platform=platform, **form).astype(jnp.float32))

  with h100 if platform == "gpu" else contextlib.nullcontext():
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k, ids)
    assert traced.lower(lowering_platforms=(target,)).as_text().count(f"@{call}") == 3


@pytest.mark.parametrize("form", [interpreted, blockwise_attention])
def test_what_is_kept_by_name_gives_the_same_gradients(form, rng):
  ids = packed_ids(rng, length=96)
  q, k, v = inputs(rng, ids)
  run = lambda q, k, v: form(jnp.sin(q), k, v, ids)
  want = values_and_gradients(run, q, k, v, jnp.ones(q.shape))
  kept = jax.checkpoint(run, policy=transformer.REMAT_POLICIES["attention"])
  for ours, theirs in zip(values_and_gradients(kept, q, k, v, jnp.ones(q.shape)), want):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def kernels_of(jaxpr):
  """Names of the kernels of a program whose results are read; XLA drops the others."""
  read = {id(x) for x in (*jaxpr.outvars, *(x for each in jaxpr.eqns for x in each.invars))}
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      if any(id(x) in read for x in equation.outvars):
        yield equation.params["jaxpr"].debug_info.func_name
    else:
      for inner in jaxprs_in_params(equation.params):
        yield from kernels_of(inner)


@pytest.mark.parametrize("remat, forwards", [("none", 1), ("full", 2), ("attention", 1), ("dots", 1)])
def test_rematerialisation_by_name_runs_the_forward_kernel_once(remat, forwards, monkeypatch, h100):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  config = worlds.llama(remat=remat, dtype="bfloat16", layers=3)
  params = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)

  def total(params, *rows):
    hidden = transformer.Transformer(config).apply({"params": params}, *rows)
    return jnp.sum(hidden.astype(jnp.float32))

  with h100:
    traced = jax.jit(jax.grad(total)).trace(params, *[tokens] * 4)
    assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
  assert sorted(kernels_of(traced.jaxpr.jaxpr)) == [
    *["_forward_kernel"] * forwards,
    "_key_kernel",
    "_query_kernel",
  ]  # in the bodies of scans


@pytest.mark.parametrize(
  "asked, platform, length, fits, form",
  [
    ("auto", "cpu", 128, True, "dense"),
    ("auto", "cpu", 129, True, "blockwise"),
    ("auto", "gpu", 128, True, "dense"),
    ("auto", "gpu", 129, True, "fused"),
    ("auto", "tpu", 2048, True, "fused"),
    ("auto", "tpu", 2048, False, "blockwise"),
    ("fused", "gpu", 64, True, "fused"),
    ("blockwise", "tpu", 2048, True, "blockwise"),
  ],
)
def test_the_form_suits_the_machine_unless_it_is_asked_for(asked, platform, length, fits, form):
  assert backends.attention_backend(asked, platform=platform, length=length, fits=fits) == form


def test_a_form_that_cannot_run_is_refused():
  with pytest.raises(ValueError, match="rows of 99999 tokens do not fit this tpu's vector memory"):
    backends.attention_backend("fused", platform="tpu", length=99999, fits=False)
  config = config_lib.defaults()
  config.model.attention = "fused"
  with pytest.raises(
    config_lib.ConfigError,
    match="config.model.attention is 'fused', which under jax .* runs on gpu and tpu, "
    "not on cpu; set model.attention='auto'",
  ):
    resolve.make_devices(config)


def test_where_jax_has_no_triton_gpus_compute_in_blocks():
  """jax 0.12 deprecates it; an import of the package must not end with it."""
  code = (
    "import sys\n"
    "sys.modules['jax.experimental.pallas.triton'] = None\n"
    "from dpojax.kernels import backends\n"
    "print(*(backends.attention_backend('auto', platform=on, length=4096) for on in ('gpu', 'tpu')))\n"
    "backends.attention_backend('fused', platform='gpu')\n"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert result.stdout.split() == ["blockwise", "fused"]
  said = f"under jax {jax.__version__} runs on tpu, not on gpu; set model.attention='auto'"
  assert said in result.stderr.strip().splitlines()[-1]


def test_the_form_is_no_part_of_what_a_model_is():
  assert worlds.llama(attention="fused").as_dict() == worlds.llama().as_dict()
