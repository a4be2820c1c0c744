"""DPO on the policy's own samples, round after round; see `dpojax.online.loop`.

python -m dpojax.online --config=configs/online.py --workdir=DIR [--config.key=value ...]
"""

from dpojax.runtime import command_line


def cli():
  """Trains as the command line says: `dpojax-online`, and `python -m dpojax.online`."""
  command_line.start_run("dpojax.online", __doc__)


if __name__ == "__main__":
  cli()
