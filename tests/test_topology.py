"""A step for chips that are not there: what devices exchange in it, and what it is said to cost."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from dpojax.kernels.platform import at_most, built_for, platform
from dpojax.models import transformer
from dpojax.plan import compiling, needs, program, roofline, topology
from dpojax.ppo import step as ppo_step
from dpojax.ppo.config import Settings
from dpojax.sample import decoding, rollouts
from dpojax.training import config as config_lib
from dpojax.training import parallel, reference, resolve, step
from dpojax.training.chips import CHIPS
from tests import worlds

LENGTHS = np.random.default_rng(0).integers(20, 60, (2000, 3))
"""Of comparisons, such that a row holds several."""

SIZES = dict(vocab_size=1024, width=256, layers=3, heads=4, kv_heads=2)


def config_of(devices, cache="cache", **changes):
  changes = {
    **{f"model.{name}": value for name, value in SIZES.items()},
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "model.tie_embeddings": False,
    "parallel.strategy": "mesh",
    "parallel.fsdp": devices,
    "batch_size": 4 * devices,
    "row_length": 256,
    "rows_at_once": 1,
    "data.max_length": 128,
    "data.max_prompt_length": 64,
    "eval_every": 0,
  } | changes
  return worlds.run_config("dpo", "words", "pairs.jsonl", str(cache), **changes)


def exchanged(jaxpr, times=1):
  """Yields what each collective of a traced program works on, and how often; in loops that count, once."""
  for equation in jaxpr.eqns:
    name, scans = equation.primitive.name, times * equation.params.get("length", 1)
    if name in ("all_gather", "reduce_scatter", "all_to_all", "psum", "psum_invariant", "pmax"):
      for x in equation.invars:
        yield name, x.aval.dtype.name, x.aval.shape, times
    for inner in jaxprs_in_params(equation.params):
      yield from exchanged(inner, scans if name == "scan" else times)


def exchanged_by(config, chips):
  """Returns the setup of a config, and the numbers gathered and scattered in a step over so many chips."""
  devices = parallel.Mesh(fsdp=chips, devices=chips)
  setup = resolve.make_setup_of_shapes(config)
  tx, train_step = resolve.make_train_step(config, setup.objective, devices)
  state = devices.placed(jax.eval_shape(lambda x: step.init_state(x, tx), setup.params))
  batches = resolve.make_loader(config, needs.Lengths(LENGTHS), devices)
  stored = config.reference.mode == "stored"
  rows = needs.largest_rows(batches, 2, devices, stored=stored and not config.lora.rank)
  reference = None if stored else devices.placed(setup.reference)
  return setup, *counted(train_step.trace(state, reference, rows), chips)


def counted(traced, chips):
  """Returns the numbers gathered and scattered by a traced program of so many chips."""
  totals = collections.Counter()
  for name, dtype, shape, times in exchanged(traced.jaxpr.jaxpr):
    if name == "all_gather" and dtype != "int32":
      assert dtype == "bfloat16"
      totals["gathered"] += chips * int(np.prod(shape)) * times
    if name == "reduce_scatter":
      assert dtype == "float32"
      totals["scattered"] += int(np.prod(shape)) * times
  return totals["gathered"], totals["scattered"]


def weights_of(tree):
  """The numbers of all matrices but the table of embeddings, which stays where it is."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree["layers"]) if leaf.ndim > 2) + (
    tree["head"].size if "head" in tree else 0
  )


@pytest.mark.parametrize("chips", [256, 512])
def test_a_step_for_many_chips_is_traced_in_seconds_and_gathers_each_weight_once_a_pass(chips):
  config = config_of(chips, **{"model.width": 2 * chips, "rows_at_once": 0, "batch_size": chips})
  setup, gathered, scattered = exchanged_by(config, chips)
  weights = weights_of(setup.params)
  assert gathered == 3 * weights  # the policy forward and backward, the reference forward
  assert scattered == weights


def test_without_rematerialisation_weights_are_gathered_again_and_not_kept():
  setup, gathered, scattered = exchanged_by(
    config_of(16, rows_at_once=0, batch_size=16, **{"model.remat": "none"}), 16
  )
  assert (gathered, scattered) == (3 * weights_of(setup.params), weights_of(setup.params))


def test_a_stored_reference_is_not_gathered_and_of_an_adapter_no_base_is_scattered():
  shapes = {"rows_at_once": 0, "batch_size": 16}
  setup, gathered, scattered = exchanged_by(config_of(16, **shapes, **{"reference.mode": "stored"}), 16)
  assert (gathered, scattered) == (2 * weights_of(setup.params), weights_of(setup.params))
  setup, gathered, scattered = exchanged_by(config_of(16, **shapes, **{"lora.rank": 4}), 16)
  base, adapter = weights_of(setup.reference), sum(leaf.size for leaf in jax.tree.leaves(setup.params))
  assert 3 * base < gathered < 3 * base + 2 * adapter
  assert 0 < scattered < adapter < base / 10


def test_an_evaluation_and_a_stored_reference_gather_each_weight_once_and_scatter_nothing():
  config, devices = config_of(16, rows_at_once=0, batch_size=16), parallel.Mesh(fsdp=16, devices=16)
  setup = resolve.make_setup_of_shapes(config)
  params, weights = devices.placed(setup.params), weights_of(setup.params)
  rows = needs.largest_rows(
    resolve.make_loader(config, needs.Lengths(LENGTHS), devices), 2, devices, stored=False
  )
  evaluate = step.make_eval_step(setup.objective, sum_rows=devices.sum_rows)
  traced = devices.lift(evaluate, donate_state=False).trace(params, params, rows)
  assert counted(traced, 16) == (2 * weights, 0)  # of policy and reference
  score = reference.make_score_step(transformer.make_apply(setup.model), num_responses=2, chunk_size=None)
  traced = devices.lift(devices.map_rows(score), donate_state=False).trace(params, rows)
  assert counted(traced, 16) == (weights, 0)


def test_a_step_of_ppo_gathers_each_weight_once_a_pass_and_scatters_its_gradients():
  policy, devices = resolve.make_setup_of_shapes(config_of(16)).model, parallel.Mesh(fsdp=16, devices=16)
  networks = [policy, dataclasses.replace(policy, reward_head=True)]
  settings = Settings(prompts_per_step=16, num_samples=2, max_new_tokens=4)
  rows = rollouts.rows_of(*rolled_out(16, 2, 4))
  applies = [transformer.make_apply(each) for each in networks]
  params = [devices.placed(worlds.shapes_of(each)) for each in networks]
  whole = weights_of(params[0])
  layers = whole - params[0]["head"].size  # of a critic no logits are asked for
  score = devices.map_rows(rollouts.make_score(*applies, num_samples=2), trees=3)
  traced = devices.lift(score, donate_state=False).trace(*params, params[0], devices.placed_rows(rows))
  assert counted(traced, 16) == (2 * whole + layers, 0)
  aims = ppo_step.Targets(*[np.zeros((16, 8), np.float32)] * 4)
  experience = devices.placed_rows(ppo_step.Experience(rows, aims))
  objectives = ppo_step.policy_objective, ppo_step.critic_objective
  for make, apply, placed, moved in zip(objectives, applies, params, (whole, layers)):
    _, tx = ppo_step.make_optimizer(settings, 1e-5)
    update = step.make_train_step(make(apply, settings), tx, over_rows=devices.over_rows)
    state = devices.placed(jax.eval_shape(lambda x, tx=tx: step.init_state(x, tx), placed))
    traced = devices.lift(update, donate_state=True).trace(state, (), experience)
    assert counted(traced, 16) == (2 * moved, moved)


def rolled_out(prompts, samples, room):
  """Prompts of 8 tokens, their lengths, samples, and theirs."""
  ids = lambda *shape: np.zeros(shape, np.int32)
  return ids(prompts, 8), ids(prompts) + 8, ids(prompts, samples, room), ids(prompts, samples) + room


def test_sampling_gathers_each_weight_once_a_batch_or_sends_vectors_alone():
  model, devices = resolve.make_setup_of_shapes(config_of(16)).model, parallel.Mesh(fsdp=16, devices=16)
  params = devices.placed(worlds.shapes_of(model))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 16))
  rows = (*devices.placed_rows(rolled_out(16, 2, 4)[:2]), keys)

  def traced(in_place):
    sample = decoding.make_program(devices, model, max_new_tokens=4, num_samples=2, in_place=in_place)
    return counted(sample.trace(params, rows, (1.0, 1.0, 0)), 16)

  whole = weights_of(params)
  assert traced(False) == (whole + params["embed"]["embedding"].size, 0)
  # In place prompts are read layer by layer; then, counted once, a step of 32 samples of all devices.
  width, key_width = model.width, model.kv_heads * model.head_size
  gathered = 32 * model.layers * (width + model.mlp_width)
  scattered = 32 * (model.layers * (width + 2 * key_width + 2 * model.mlp_width) + model.vocab_size)
  assert traced(True) == (whole - params["head"].size + gathered, scattered)


def hlo():
  """A program in which two loops gather, multiply, and sum what is then cut."""
  near = "bf16[8,16]{1,0:T(8,128)(2,1)S(1)}"
  part, carry = "bf16[2,16]{1,0:T(8,128)(2,1)}", "(s32[]{:T(128)}, bf16[2,16]{1,0:T(8,128)(2,1)})"
  loop = "condition=%condition, body=%body"
  return f"""
HloModule step, is_scheduled=true, num_partitions=4

%cut (p.0: f32[8,16], p.1: s32[]) -> f32[2,16] {{
  %p.0 = f32[8,16]{{1,0:T(8,128)}} parameter(0)
  %p.1 = s32[]{{:T(128)}} parameter(1)
  %sum = f32[8,16]{{1,0:T(8,128)}} all-reduce(%p.0), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %own = f32[2,16]{{1,0:T(8,128)}} dynamic-slice(%sum, %p.1, %p.1), dynamic_slice_sizes={{2,16}}
}}

%body (x: (s32[], bf16[2,16])) -> (s32[], bf16[2,16]) {{
  %x = {carry} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%x), index=0
  %w = {part} get-tuple-element(%x), index=1
  %start = ({part}, {near}) all-gather-start(%w), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  %done = {near} all-gather-done(%start)
  %dot = f32[8,8]{{1,0:T(8,128)}} dot(%done, %done), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}
  %fusion = f32[2,16]{{1,0:T(8,128)}} fusion(%dot, %i), kind=kCustom, calls=%cut
  ROOT %t = {carry} tuple(%i, %w)
}}

%condition (x: (s32[], bf16[2,16])) -> pred[] {{
  %x = {carry} parameter(0)
  ROOT %less = pred[]{{:T(512)}} constant(true)
}}

ENTRY %main (a: bf16[2,16]) -> bf16[2,16] {{
  %a = {part} parameter(0)
  %zero = s32[]{{:T(128)}} constant(0)
  %first = {carry} tuple(%zero, %a)
  %known = {carry} while(%first), {loop}, backend_config={{"known_trip_count":{{"n":"5"}}}}
  %named = {carry} while(%known), {loop}, metadata={{op_name="jit(step)/at_most_3/while"}}
  ROOT %out = {part} get-tuple-element(%named), index=1
}}
"""


def test_a_program_is_read_with_its_loops():
  costs = program.costs(hlo())
  assert costs.flops == 8 * 2 * 8 * 8 * 16
  gather, scatter = sorted(costs.collectives, key=lambda each: each.kind)
  assert (gather.kind, gather.dims, gather.devices, gather.times) == ("all-gather", (8, 16), 4, 8)
  assert gather.bytes == 8 * (3 / 4) * 8 * 16 * 2
  # A sum of which each device keeps a part.
  assert (scatter.kind, scatter.dims, scatter.bytes) == ("reduce-scatter", (8, 16), 8 * (3 / 4) * 8 * 16 * 4)
  assert costs.unbounded == 0
  assert program.from_json(program.to_json(costs)) == costs


@pytest.mark.parametrize(
  ("devices", "torus", "share"),
  [
    (64, (8, 8), 1),
    (8, (8, 8), 1 / 2),
    (16, (4, 4, 4), 2 / 3),
    (4, (4, 4, 4), 1 / 3),
    (8, (), 1),
    (5, (8, 8), 1),
  ],
)
def test_an_exchange_along_a_ring_goes_over_the_links_of_one_direction(devices, torus, share):
  assert roofline.share_of_links(devices, torus) == share


def test_what_is_built_for_other_chips_is_theirs_and_what_is_built_here_stays():
  seen = []
  function = jax.jit(lambda x: (seen.append(platform()), x)[1])
  function(1.0)
  with built_for("tpu"):
    function(1.0)
  function(1.0)
  assert seen == ["cpu", "tpu"] and platform() == "cpu"


def test_a_loop_that_counts_as_it_runs_is_known_by_its_name():
  def loop(count):
    with at_most(7):
      return jax.lax.fori_loop(0, count, lambda i, x: x + jax.numpy.sin(x), 1.0)

  text = jax.jit(jax.vmap(loop)).lower(np.arange(3)).compile().as_text()
  assert "at_most_7)/while" in text  # within vmap
  assert program.costs(text).unbounded == 0


def test_a_step_that_was_compiled_and_is_larger_than_a_chip_is_refused():
  chips = topology.Topology("v5e:16x16", "v5e", "tpu", [], "")
  compiling.check_fits(15.9 * 2**30, chips)
  with pytest.raises(
    config_lib.ConfigError, match="does not fit a device of v5e:16x16: it takes 20.11G of 16.00G"
  ):
    compiling.check_fits(20.11 * 2**30, chips)


def test_a_name_of_no_chips_is_refused():
  for name in ("v9:2x2", "v5e", "v5e:2", "gpu:8xk80"):
    with pytest.raises(config_lib.ConfigError, match="--topology is"):
      topology.described(name)


topologies = pytest.mark.topology


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@topologies
# On 16 chips, which stand in two directions, as in pods of any size.
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v5e:4x4"])
def test_the_whole_step_exchanges_what_fsdp_needs_and_no_more(name, cache):
  chips = topology.described(name)
  config = config_of(len(chips.devices), cache)
  said = []
  compiled = compiling.compile_for(config, chips, LENGTHS, say=said.append)
  assert not compiled.kept and any("compiling" in line for line in said)
  by_kind = compiled.costs.bytes_by_kind()
  needed = needs.fsdp_bytes(compiled.step)
  assert set(by_kind) <= {"all-gather", "reduce-scatter", "all-to-all", "all-reduce"}
  assert sum(by_kind.values()) <= 1.2 * needed
  weights = lambda kind: [each for each in compiled.costs.collectives if each.kind == kind and each.dims]
  assert {each.dtype for each in weights("reduce-scatter")} == {"f32"}
  # What we sum whole are norms and numbers; what changes places are vectors of tokens, not heads. Sums
  # without a name the compiler has put there itself; their bytes count above.
  whole = [each for each in weights("all-reduce") if each.name]
  assert max(np.prod(each.dims) for each in whole) <= 2 * SIZES["layers"] * SIZES["width"]
  assert not [each for each in weights("all-to-all") if "attention" in each.name]
  again = compiling.compile_for(config, chips, LENGTHS, say=said.append)
  assert again.kept and again.costs == compiled.costs and again.needs == compiled.needs
  found = roofline.roofline(compiled.step, compiled.needs, compiled.costs, chips)
  assert 0 < found.mfu < 1 and found.seconds == max(found[:3])
  assert compiled.needs.peak < CHIPS[chips.chip].memory


@topologies
def test_a_step_that_does_not_fit_is_refused_in_one_line(cache):
  chips = topology.described("v5e:2x2")
  large = config_of(4, cache, **{"model.width": 8192, "model.heads": 64, "model.layers": 24})
  with pytest.raises(config_lib.ConfigError, match="does not fit a device of v5e:2x2: it takes .*G"):
    compiling.compile_for(large, chips, LENGTHS)
