"""DPO on the policy's own samples, round after round; see `dpojax.online.loop`.

python -m dpojax.online --config=configs/online.py --workdir=DIR [--config.key=value ...]
"""

from absl import flags

from dpojax.runtime import command_line


def main():
  from dpojax.online import loop  # here, for --help and an error of the command line need none of it
  from dpojax.runtime.command import command

  with command():
    loop.run(flags.FLAGS.config, flags.FLAGS.workdir)


def cli():
  """Trains as the command line says: `dpojax-online`, and `python -m dpojax.online`."""
  command_line.define_config()
  command_line.define_workdir()
  flags.mark_flag_as_required("workdir")
  command_line.start(main, __doc__)


if __name__ == "__main__":
  cli()
