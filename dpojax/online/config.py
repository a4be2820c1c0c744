"""The keys of a run on its own samples: those of every run and a group of its own; and their checks."""

import ml_collections

from dpojax.runtime import paths
from dpojax.runtime.errors import ConfigError
from dpojax.sample.draws import Draw
from dpojax.training import config as config_lib

PAIRINGS = ("best_worst", "ranking", "choice")
REFERENCES = ("frozen", "last_round", "moving")


def defaults() -> ml_collections.ConfigDict:
  """Returns every key of a run on its own samples: those of `config.defaults()` and the group `online`."""
  config = config_lib.defaults()
  config.parallel.strategy = "mesh"
  config.online = ml_collections.ConfigDict()
  config.online.offline_steps = 0  # of config.steps, the first, on the data's pairs alone; all: plain DPO
  config.online.steps_per_round = 50  # M; config.steps - offline_steps is so many times as many as rounds
  config.online.prompts_per_round = 256
  config.online.prompts = ""  # .jsonl of prompts, as of dpojax.sample; empty: those of the training data
  config.online.prompts_at_once = 64  # that are sampled to at once
  config.online.num_samples = 2  # K answers to each prompt
  config.online.max_new_tokens = 128
  config.online.temperature = 1.0
  config.online.top_p = 1.0
  config.online.top_k = 0
  config.online.judge = ""  # workdir of a reward model; module:function of (prompt, response) -> number or of
  # (prompt, A, B) -> 'A', 'B' or 'tie'; or the URL of an OpenAI-compatible server, whose answers are kept
  config.online.judge_model = ""  # its name at the URL
  config.online.judge_options = ""  # JSON: further keys of a request, in place of temperature and max_tokens
  config.online.judge_workers = 8  # requests under way at once
  config.online.api_key_env = "OPENAI_API_KEY"  # environment variable with the key for a URL; may be unset
  config.online.question = "dialogue"  # a name in judging.QUESTIONS, or a file with {prompt}, {a} and {b}
  config.online.pairing = "best_worst"  # by score; ranking: all K, for dpo_plackett_luce; choice: 1st and 2nd
  # answer, 3rd and 4th, ..., by a judge's word or by score
  config.online.offline_share = 0.0  # of the comparisons of a round, drawn from the data's
  config.online.reference = "frozen"  # last_round: the policy that sampled; moving: by reference.sync_every
  config.online.max_labels = 0  # scored answers or judged pairs, at most; no round begins beyond; 0: no bound
  return config


def settled(config: ml_collections.ConfigDict, of_two: bool | None = None) -> ml_collections.ConfigDict:
  """Returns the config with the steps that its labels allow, and the reference said in `dpojax.train`'s keys.

  Args:
    config: all keys.
    of_two: whether whoever labels is shown two answers at a time; None asks `online.judge`.

  Raises:
    ConfigError: it cannot run; the message names the key, the value and the fix.
  """
  config_lib.check_group(config, "online", defaults())
  _check(config)
  settings = config.online
  if config.steps > settings.offline_steps:
    if of_two is None:
      _check_judge(config)
      of_two = compares(settings.judge)
    _check_rounds(config, of_two)
  config = config.copy_and_resolve_references()
  with config.unlocked():
    if settings.max_labels:
      most = labels_of_a_round(config, bool(of_two))
      rounds = min(rounds_of(config), settings.max_labels // most)
      config.steps = settings.offline_steps + rounds * settings.steps_per_round
      if not config.steps:
        raise ConfigError(
          f"config.online.max_labels is {settings.max_labels} and a round takes up to "
          f"{most}; lower online.prompts_per_round, or raise it"
        )
    if settings.reference == "last_round":
      config.reference.sync_every, config.reference.sync_alpha = settings.steps_per_round, 1.0
  config_lib.validate(of_training(config))
  return config


def check_values(config: ml_collections.ConfigDict) -> None:
  """Refuses what needs no jax to be refused: the part of `settled` that a command line does first.

  Raises:
    ConfigError: naming the key, the value and the fix.
  """
  config_lib.check_group(config, "online", defaults())
  _check(config)
  if config.steps > config.online.offline_steps:
    _check_judge(config)
  config_lib.check_values(of_training(config))


def of_training(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config of `dpojax.train`'s part of the run."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    del config["online"]
  return config


def rounds_of(config: ml_collections.ConfigDict) -> int:
  """Returns how many rounds a run has."""
  return (config.steps - config.online.offline_steps) // config.online.steps_per_round


def labels_of_a_round(config: ml_collections.ConfigDict, of_two: bool) -> int:
  """Returns how many labels a round takes at most, of two answers or of one; equal answers take fewer."""
  settings = config.online
  return settings.prompts_per_round * settings.num_samples // (2 if of_two else 1)


def kept_responses(config: ml_collections.ConfigDict) -> int:
  """Returns how many answers a comparison of a round holds."""
  return config.online.num_samples if config.online.pairing == "ranking" else 2


def draw_of(config: ml_collections.ConfigDict) -> Draw:
  """Returns how a run's samples are drawn.

  Raises:
    ConfigError: a value is impossible.
  """
  settings = config.online
  names = ("num_samples", "max_new_tokens", "temperature", "top_p", "top_k")
  try:
    return Draw(**{name: settings[name] for name in names}, seed=config.seed)
  except ConfigError as error:
    raise ConfigError(str(error).replace("--", "config.online.", 1)) from error


def compares(judge: str) -> bool:
  """Returns whether a judge is shown two answers, rather than one that it gives a score."""
  from dpojax.evaluate import scorers  # here, for keys and values are checked without jax

  if paths.is_url(judge) or not scorers.is_function(judge):
    return paths.is_url(judge)
  return scorers.arity(scorers.load_function(judge, ("prompt", "response"), ("prompt", "A", "B"))) == 3


def _check(config) -> None:
  """Refuses values of the group, and of others beside it, that cannot run."""
  settings = config.online
  if config.objective != "dpo":
    raise ConfigError(
      f"config.objective is {config.objective!r}; dpojax.online runs objective='dpo', the others are "
      "python -m dpojax.train's"
    )
  for key in ("steps_per_round", "prompts_per_round", "prompts_at_once", "judge_workers"):
    if settings[key] < 1:
      raise ConfigError(f"config.online.{key} is {settings[key]}; it must be at least 1")
  for key in ("offline_steps", "max_labels"):
    if settings[key] < 0:
      raise ConfigError(f"config.online.{key} is {settings[key]}; it must be at least 0")
  for key, allowed in (("pairing", PAIRINGS), ("reference", REFERENCES)):
    if settings[key] not in allowed:
      raise ConfigError(
        f"config.online.{key} is {settings[key]!r}; it must be one of {', '.join(map(repr, allowed))}"
      )
  if not 0 <= settings.offline_share < 1:
    raise ConfigError(f"config.online.offline_share is {settings.offline_share}; it must be in [0, 1)")
  for knob, column in config_lib.columns_of(config).items():
    raise ConfigError(
      f"config.data.columns.{knob} is {column!r}, but pairs of the policy's own samples have no such key; "
      "leave it empty"
    )
  over = config.steps - settings.offline_steps
  if over < 0 or over % settings.steps_per_round:
    raise ConfigError(
      f"config.steps is {config.steps} and online.offline_steps {settings.offline_steps}; the rest must be "
      f"whole rounds of online.steps_per_round={settings.steps_per_round}"
    )
  draw_of(config)


def _check_judge(config) -> None:
  if not config.online.judge:
    raise ConfigError(
      "config.online.judge is empty; name the workdir of a reward model, module:function, or a server's URL"
    )
  if paths.is_url(config.online.judge) and not config.online.judge_model:
    raise ConfigError("config.online.judge_model is empty; give the model's name at the server")


def _check_rounds(config, of_two: bool) -> None:
  """Refuses rounds that cannot be sampled, paired or trained on."""
  settings = config.online
  _check_pairing(config, of_two)
  _check_reference(config)
  most = config.data.max_prompt_length + settings.max_new_tokens
  if most > config.data.max_length:
    raise ConfigError(
      f"config.data.max_prompt_length is {config.data.max_prompt_length} and online.max_new_tokens "
      f"{settings.max_new_tokens}, together more than data.max_length={config.data.max_length}; raise that"
    )
  row = config.data.max_prompt_length + kept_responses(config) * settings.max_new_tokens
  if row > config.row_length:
    raise ConfigError(
      f"config.row_length is {config.row_length}, but a prompt and {kept_responses(config)} answers take up "
      f"to {row} tokens; raise it"
    )
  pairs = settings.prompts_per_round * (settings.num_samples // 2 if settings.pairing == "choice" else 1)
  if pairs / (1 - settings.offline_share) < config.batch_size:
    raise ConfigError(
      f"config.online.prompts_per_round is {settings.prompts_per_round}, which gives {pairs} comparisons a "
      f"round at most, fewer than batch_size={config.batch_size}; raise it"
    )


def _check_pairing(config, of_two: bool) -> None:
  settings = config.online
  if settings.num_samples < 2 or (settings.pairing == "choice" and settings.num_samples % 2):
    raise ConfigError(
      f"config.online.num_samples is {settings.num_samples}; give at least 2, and with pairing='choice' an "
      "even number"
    )
  if of_two and settings.pairing != "choice":
    raise ConfigError(
      f"config.online.pairing is {settings.pairing!r}, but who says of two answers which is better "
      f"({settings.judge or 'the labeller'}) gives no scores; set pairing='choice'"
    )
  ranks = config_lib.losses_of(config) == ["dpo_plackett_luce"]
  if settings.pairing == "ranking" and not (ranks and config.data.num_responses == settings.num_samples):
    raise ConfigError(
      f"config.online.pairing is 'ranking' of num_samples={settings.num_samples}; set "
      f"loss='dpo_plackett_luce' and data.num_responses={settings.num_samples}"
    )


def _check_reference(config) -> None:
  settings, reference = config.online, config.reference
  if reference.mode == "stored":
    raise ConfigError(
      "config.reference.mode is 'stored', but samples are new in each round; set reference.mode='inline'"
    )
  if settings.reference == "last_round" and config.lora.rank:
    raise ConfigError(
      "config.online.reference is 'last_round', but the reference of an adapter is the base below it, which "
      "never moves; set online.reference='frozen'"
    )
  moves = bool(reference.sync_every)
  if settings.reference == "moving" and not moves:
    raise ConfigError(
      "config.online.reference is 'moving' and reference.sync_every 0; set the steps between its updates"
    )
  if settings.reference == "frozen" and moves:
    raise ConfigError(
      f"config.reference.sync_every is {reference.sync_every}; set online.reference='moving', or leave it 0"
    )
