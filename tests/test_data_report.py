"""What a run says of its data before anything is compiled, keeps in its workdir, and holds its resume to."""

import datetime
import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest

from dpojax.data import report, templates
from dpojax.data.examples import DataError
from dpojax.evaluate import scorers
from dpojax.ppo import config as ppo_config
from dpojax.runtime.errors import ConfigError
from dpojax.sample.generator import make_mesh
from dpojax.sample.prompts import encode, reading_of
from dpojax.train import loop as train
from dpojax.training import checkpoint, resolve, weights
from tests import chats, conftest, worlds

WORDS = "the sea way left right fox dog help first lazy".split()


def records(count, rng):
  text = lambda: " ".join(rng.choice(WORDS, size=rng.integers(1, 5)))
  message = lambda role: [{"role": role, "content": text()}]
  return [
    {"prompt": message("user"), "chosen": message("assistant"), "rejected": message("assistant")}
    for _ in range(count)
  ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tokenizer with a template that writes the date, and pairs."""
  folder = tmp_path_factory.mktemp("dated")
  made = records(40, np.random.default_rng(0))
  made[3]["prompt"][0]["content"] = made[4]["prompt"][0]["content"] = "the </s> fox"
  worlds.write_jsonl(folder / "pairs.jsonl", made)
  chats.tokenizer("byte_level", chats.TEMPLATES["dates"]).save_pretrained(folder / "tokenizer")
  return folder


def config_of(folder, kind="sft", **changes):
  return worlds.run_config(
    kind,
    str(folder / "tokenizer"),
    str(folder / "pairs.jsonl"),
    folder / "cache",
    **{
      "data.max_length": 120,
      "data.max_prompt_length": 90,
      "row_length": 240,
      "data.eval_size": 8,
      "batch_size": 4,
      "steps": 2,
      **changes,
    },
  )


def test_a_run_keeps_the_day_of_its_template_and_a_report_of_its_data(folder, tmp_path, capsys):
  train.run(config_of(folder), tmp_path)
  said = capsys.readouterr().out
  settings = checkpoint.load_settings(tmp_path)
  assert settings.data.template_date == datetime.date.today().isoformat()
  written = json.loads((tmp_path / "data_report.json").read_text())
  tokens = written["training"]["tokens"]
  assert tokens["with_special_tokens_in_text"] == 2 and tokens["ended_by"] == {"<|end|>": tokens["used"]}
  assert "2 with a special token's name in their text; see data.special_tokens" in said
  assert written["held-out comparisons"] + written["training comparisons"] == tokens["used"]
  assert tokens["inputs"]["data.template_date"] == settings.data.template_date
  end = chats.tokenizer("byte_level").convert_tokens_to_ids("<|end|>")
  assert weights.load(str(tmp_path)).stop_ids == (end,) and tokens["stop_ids"] == [end]


def test_a_resumed_run_has_the_day_it_was_started_on(folder, tmp_path, monkeypatch):
  class Earlier(datetime.date):
    @classmethod
    def today(cls):
      return cls(2024, 7, 26)

  with monkeypatch.context() as patch:
    patch.setattr(datetime, "date", Earlier)
    train.run(config_of(folder), tmp_path)
  assert checkpoint.load_settings(tmp_path).data.template_date == "2024-07-26"
  train.run(config_of(folder, steps=4), tmp_path)
  assert checkpoint.load_policy(tmp_path).step == 4
  with pytest.raises(ConfigError, match="config.data.template_date='2024-07-26', not '2024-07-27'"):
    train.run(config_of(folder, steps=4, **{"data.template_date": "2024-07-27"}), tmp_path)
  assert reading_of(weights.load(str(tmp_path))) == templates.Reading(date="2024-07-26")


def test_a_run_whose_ids_have_changed_says_what_differs(folder, tmp_path):
  mine = tmp_path / "mine"
  mine.mkdir()
  pairs = folder / "pairs.jsonl"
  tokenizer = chats.tokenizer("byte_level", chats.TEMPLATES["dates"])
  tokenizer.save_pretrained(mine / "tokenizer")
  (mine / "pairs.jsonl").write_text(pairs.read_text())
  train.run(config_of(mine), tmp_path / "run")
  tokenizer.chat_template = chats.TEMPLATES["trim"]
  tokenizer.save_pretrained(mine / "tokenizer")
  with pytest.raises(
    checkpoint.CheckpointError, match="other ids of its data .*; what differs is chat_template of the"
  ):
    train.run(config_of(mine, steps=4), tmp_path / "run")
  tokenizer.chat_template = chats.TEMPLATES["dates"] + "{# other words, the same ids #}"
  tokenizer.save_pretrained(mine / "tokenizer")
  train.run(config_of(mine, steps=4), tmp_path / "run")


def test_template_arguments_are_the_run_s_in_training_sampling_and_scores(folder, tmp_path):
  mine = tmp_path / "mine"
  mine.mkdir()
  chats.tokenizer("byte_level", "{{ mood or 'none' }}" + chats.TEMPLATES["trim"]).save_pretrained(
    mine / "tokenizer"
  )
  (mine / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text())
  config = config_of(mine, "reward", **{"data.template_arguments": {"mood": "the sea"}})
  train.run(config, tmp_path / "run")
  model = weights.load(str(tmp_path / "run"))
  reading = reading_of(model)
  assert reading.arguments == {"mood": "the sea"}
  tokenizer = chats.tokenizer("byte_level", "{{ mood or 'none' }}" + chats.TEMPLATES["trim"])
  prompt = [{"role": "user", "content": "fox"}]
  (ids,), _ = encode([prompt], tokenizer, longest=50, keep="end", path="p", reading=reading)
  assert tokenizer.decode(ids).startswith("the sea<|start|>user")
  data = resolve.load_data(config)
  assert tokenizer.decode(data.train.comparison(0)[0]).startswith("the sea<|start|>user")
  with_mood = scorers.RewardModel(model, make_mesh(1, 1))([prompt], ["dog"])
  settings = model.settings.copy_and_resolve_references()
  with settings.unlocked():
    settings.data.template_arguments = {"mood": "the lazy dog"}
  other = scorers.RewardModel(model._replace(settings=settings), make_mesh(1, 1))([prompt], ["dog"])
  assert with_mood[0] != other[0]


def test_ids_beyond_the_embedding_are_refused_where_they_occur_and_not_before(folder, tmp_path):
  tokenizer = chats.tokenizer("byte_level", chats.TEMPLATES["dates"])
  occurring = 1 + max(int(each.data.ids.max()) for each in resolve.load_data(config_of(folder))[:2])
  longer = len(tokenizer) + 10
  tokenizer.add_tokens([f"<more{i}>" for i in range(10)])
  mine = tmp_path / "mine"
  mine.mkdir()
  tokenizer.save_pretrained(mine / "tokenizer")
  (mine / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text())
  assert occurring <= longer - 10
  train.run(config_of(mine, **{"model.vocab_size": longer - 10}), tmp_path / "run")
  made = records(40, np.random.default_rng(1))
  made[7]["chosen"][0]["content"] = "way <more3>"
  worlds.write_jsonl(mine / "pairs.jsonl", made)
  with pytest.raises(
    ConfigError,
    match=rf"comparison 7 has id {longer - 7} \('<more3>'\) of the tokenizer .* but the "
    rf"model has embeddings of {longer - 10} ids",
  ):
    train.run(config_of(mine, **{"model.vocab_size": longer - 10}), tmp_path / "other")
  with pytest.raises(DataError, match=r"p prompt 2 has id .*'<more3>'.*take its own tokenizer"):
    encode(["a", "<more3>"], tokenizer, longest=9, keep="end", path="p", vocab_size=longer - 10)


def test_what_unique_prompts_leaves_out_is_said_and_all_held_out_is_refused(folder, tmp_path, capsys):
  made = records(8, np.random.default_rng(2))
  for each in made:
    each["prompt"] = made[0]["prompt"]
  path = worlds.write_jsonl(tmp_path / "pairs.jsonl", made)
  config = config_of(folder, **{"data.path": path, "data.unique_prompts": True, "eval_every": 0})
  assert len(resolve.load_data(config).train) == 1
  assert "7 left out by data.unique_prompts" in capsys.readouterr().out
  config = config_of(folder, **{"data.path": path})
  with pytest.raises(
    DataError, match="config.data.eval_size is 8 and all of 8 comparisons would be held out; lower"
  ):
    resolve.load_data(config)
  with config.unlocked():
    config.data.eval_size = 2
  with pytest.raises(DataError, match="because a prompt is on one side only"):
    resolve.load_data(config)


def test_a_dry_run_shows_what_is_scored_and_writes_no_workdir(folder, tmp_path):
  arguments = [
    sys.executable,
    "-m",
    "dpojax.train",
    "--config=configs/dpo.py",
    f"--config.tokenizer={folder / 'tokenizer'}",
    f"--config.data.path={folder / 'pairs.jsonl'}",
    f"--config.data.cache_dir={folder / 'cache'}",
    "--config.data.eval_size=8",
    "--config.data.template_date=2024-07-26",
    "--dry_run",
    "--config.data.template_arguments={'enable_thinking': False}",
    f"--workdir={tmp_path / 'run'}",
  ]
  done = subprocess.run(arguments, cwd=conftest.ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "training comparisons in ids: " in done.stdout and not (tmp_path / "run").exists()
  shown = done.stdout[done.stdout.index("comparison ") :].splitlines()
  prompts = [line for line in done.stdout.splitlines() if line.startswith("  prompt ")]
  scored = [line for line in done.stdout.splitlines() if line.startswith("  scored ")]
  assert len(prompts) == len(scored) == 6 and shown
  assert "Friday, 26 July 2024" in prompts[0] and prompts[0].endswith('<|start|>assistant\\n"')
  assert all(line.endswith('<|end|>"') for line in scored)
  main, other = pty.openpty()
  with subprocess.Popen(arguments, cwd=conftest.ROOT, stdout=other, stderr=subprocess.DEVNULL) as coloured:
    os.close(other)
    text = b""
    while True:
      try:
        part = os.read(main, 65536)
      except OSError:
        break
      if not part:
        break
      text += part
  os.close(main)
  assert coloured.returncode == 0 and text.count(b"\033[32m") == 7 and b"\033[34mprompt" in text


def test_parts_that_are_not_scored_are_shown_as_such():
  tokenizer = chats.tokenizer("byte_level")
  ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
  prompt, first, second = ids("Q"), ids(" not"), ids(" but")
  shown = report.shown(
    tokenizer,
    (prompt, [first + second, []]),
    [[False] * len(first) + [True] * len(second), []],
    coloured=False,
  )
  assert [line.split(maxsplit=1)[-1] for line in shown.splitlines()[1:4]] == [
    '"Q"',
    'scored  " not"',
    '" but"',
  ]
  assert shown.endswith("response 2 of 2: absent")


def test_a_date_and_arguments_that_cannot_be_are_refused_with_their_key(folder):
  for changes, words in (
    ({"data.template_date": "today"}, "config.data.template_date is 'today'"),
    ({"data.score": "first"}, "config.data.score is 'first'"),
    ({"data.special_tokens": "drop"}, "config.data.special_tokens is 'drop'"),
    ({"data.template_arguments": {"tools": 1}}, "config.data.template_arguments has 'tools'"),
  ):
    with pytest.raises(ConfigError, match=words):
      train.dry_run(config_of(folder, **changes))
  assert ppo_config.defaults().data.score == "all"
