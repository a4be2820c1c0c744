"""Trains as a JSON file of dotted keys says, in rounds where its kind is online; tests start it and kill it.

python -m tests.run_training SETTINGS WORKDIR
"""

import json
import pathlib
import resource
import signal
import sys
import time

import configs.online
from dpojax.online import loop as online
from dpojax.runtime import processes
from dpojax.runtime.command import command
from dpojax.train import loop as train
from dpojax.training.log import Log
from tests import worlds


def main(settings, workdir):
  settings = json.loads(pathlib.Path(settings).read_text())
  slow = settings.pop("slow", 0.0)
  if slow:
    advance = Log.advance

    def slowly(*args):
      time.sleep(slow)
      advance(*args)

    Log.advance = slowly
  largest = settings.pop("largest_file", 0)
  if largest:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
  versions = settings.pop("versions", {})
  if versions:
    real = processes.versions
    processes.versions = lambda: real() | versions
  with command():
    if settings["kind"] == "online":
      config, loop = configs.online.get_config(), online
      with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict({k: v for k, v in settings.items() if k != "kind"})
    else:
      config, loop = worlds.run_config(**settings), train
    train.join_processes(config)
    loop.run(config, workdir)


if __name__ == "__main__":
  main(*sys.argv[1:])
