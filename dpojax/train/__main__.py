"""Trains a model on comparisons: SFT, DPO or a reward model; see `dpojax.train.loop`.

python -m dpojax.train --config=FILE[:arg] --workdir=DIR [--config.key=value ...] [--dry_run]

DIR/config.json  DIR/data_report.json  DIR/metrics.jsonl  DIR/checkpoints/  DIR/tensorboard/
DIR/samples.jsonl

With --dry_run the data are read, reported and three comparisons shown as they will be scored; nothing is
compiled, and nothing written but to the cache.
"""

from absl import flags

from dpojax.runtime import command_line


def main():
  given = flags.FLAGS
  from dpojax.training import config as config_lib  # here, as the loop below: --help and errors need no jax

  # One process of several checks once it has joined them, or they would wait for it in vain.
  if not given.config.get("parallel", {}).get("coordinator"):
    config_lib.check_values(given.config)
  from dpojax.runtime.command import command
  from dpojax.train import loop

  with command():
    loop.join_processes(given.config)
    if given.dry_run:
      loop.dry_run(given.config, given.workdir or "")
    else:
      loop.run(given.config, given.workdir)


def cli():
  """Trains as the command line says: `dpojax-train`, and `python -m dpojax.train`."""
  command_line.define_config()
  command_line.define_workdir()
  flags.DEFINE_bool("dry_run", False, "Report on the data, show three comparisons, and stop.")
  flags.register_multi_flags_validator(
    ["workdir", "dry_run"], lambda given: given["workdir"] or given["dry_run"], "--workdir is missing"
  )
  command_line.start(main, __doc__)


if __name__ == "__main__":
  cli()
