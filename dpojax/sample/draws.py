"""How samples are drawn: temperature and the like, and the flags that say so."""

import argparse
import dataclasses

from dpojax.runtime.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Draw:
  """How samples are drawn; see `sampling.make_sampler`.

  `stop_ids` come to the tokenizer's EOS and to those of a published model's generation_config.json.
  """

  num_samples: int = 1
  max_new_tokens: int = 256
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  stop_ids: tuple[int, ...] = ()
  seed: int = 0

  def __post_init__(self):
    for name, fits, what in (
      ("num_samples", self.num_samples >= 1, "at least 1"),
      ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
      ("temperature", 0 <= self.temperature < float("inf"), "at least 0; 0 is greedy"),
      ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
      ("top_k", self.top_k >= 0, "at least 0; 0 is all ids"),
      ("seed", self.seed >= 0, "at least 0"),
    ):
      if not fits:
        raise ConfigError(f"--{name} is {getattr(self, name)}; it must be {what}")


def add_draw_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `Draw` and of `run` that are not files."""
  for field in dataclasses.fields(Draw):
    if field.name != "stop_ids":
      parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
  parser.add_argument("--stop_ids", default="", help="ids that end a sample besides EOS: 1,2")
  parser.add_argument("--step", type=int, help="of the run's checkpoint; by default the last")
  parser.add_argument("--reference", default="", help="by default the run's own; 'none' for none")
  parser.add_argument("--batch_size", type=int, default=16, help="prompts drawn together")
  parser.add_argument("--fsdp", type=int, default=1)
  parser.add_argument("--tensor", type=int, default=1)


def draw_of(options: argparse.Namespace) -> Draw:
  """Returns the `Draw` of parsed flags.

  Raises:
    ConfigError: a value is impossible.
  """
  names = [field.name for field in dataclasses.fields(Draw) if field.name != "stop_ids"]
  try:
    stop_ids = tuple(int(each) for each in options.stop_ids.split(",") if each)
  except ValueError as error:
    raise ConfigError(f"--stop_ids is {options.stop_ids!r}; give ids such as 1,2") from error
  return Draw(**{name: getattr(options, name) for name in names}, stop_ids=stop_ids)
