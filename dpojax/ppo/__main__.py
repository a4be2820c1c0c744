"""PPO on the prompts of any data set; see `dpojax.ppo.loop`.

python -m dpojax.ppo --config=configs/ppo.py --workdir=DIR [--config.key=value ...]
"""

from dpojax.runtime import command_line


def cli():
  """Trains as the command line says: `dpojax-ppo`, and `python -m dpojax.ppo`."""
  command_line.start_run("dpojax.ppo", __doc__)


if __name__ == "__main__":
  cli()
