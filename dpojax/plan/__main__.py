"""What a run will need, before there are weights, or devices.

python -m dpojax.plan --config=FILE[:arg] [--config.key=value ...] [--devices=8] [--chip=h100]
    [--topology=v5e:16x16] [--lengths=110,70,70]

Compiles the train step that the run would use, over as many simulated CPU devices as asked, and
prints the memory of each and the arithmetic of a step. Weights are neither read nor made: of a
Hugging Face model only the config.json has to be there. With --lengths, the mean tokens of a prompt
and of its responses, no data are read either.

With --topology the compiler is that of the chips named, of which none have to be there: v4, v5e, v5p and
v6e in any shape that they are rented in (libtpu, `pip install 'dpojax[plan]'`), or gpu:8xh100. What it makes
is read for collectives, matrix products and traffic with memory, and held against the chips' published rates.
What was compiled once is kept in the cache folder.
"""

from absl import flags

from dpojax.runtime import command_line
from dpojax.training.chips import CHIPS


def main():
  given = flags.FLAGS
  from dpojax.training import config as config_lib  # here, as all below: --help and errors need no jax

  config_lib.check_values(given.config)
  import jax

  from dpojax.plan import compiling, needs, report, topology
  from dpojax.runtime.command import command, say
  from dpojax.training import parallel, weights

  # Before any other use of jax, which looks for its devices once.
  if given.topology:
    parallel.simulate(1)
  elif given.devices:
    parallel.simulate(given.devices)
  with command():
    chips = topology.described(given.topology) if given.topology else None
    config = weights.with_tokenizer(given.config)
    lengths = needs.drawn_lengths(given.lengths, config) if given.lengths else None
    if chips is None:
      found = needs.plan(config, lengths)
      print(needs.report(found, devices=jax.device_count(), chip=given.chip, utilisation=given.utilisation))
    else:
      print(report.of_chips(chips, compiling.compile_for(config, chips, lengths, say=say)))


def cli():
  """Plans as the command line says: `dpojax-plan`, and `python -m dpojax.plan`."""
  command_line.define_config()
  flags.DEFINE_integer("devices", 0, "Simulated CPU devices; 0: the devices there are.")
  flags.DEFINE_enum("chip", "", ["", *CHIPS], "A chip to hold it against.")
  flags.DEFINE_string("topology", "", "Chips to compile for, such as v5e:16x16; none have to be there.")
  flags.DEFINE_float("utilisation", 0.4, "Share of the chip's rate that is reached.")
  flags.DEFINE_string("lengths", "", "Mean tokens of prompt and responses, in place of data.")
  command_line.start(main, __doc__)


if __name__ == "__main__":
  cli()
