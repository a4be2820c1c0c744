"""DPO on the policy's own samples; see `dpojax.online.loop`.

python -m dpojax.online --config=configs/online.py --workdir=DIR [--config.key=value ...]
"""

from absl import app, flags, logging

from dpojax import train
from dpojax.online import loop
from dpojax.runtime.command import command


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]}")
  logging.set_verbosity(logging.WARNING)
  with command():
    loop.run(train.CONFIG.value, train.WORKDIR.value)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
