"""The experiments at the paper's scale: their plans hold its numbers, and every line runs in small."""

import importlib.util
import re

import numpy as np
import pytest
import tokenizers
import transformers

from dpojax.data.examples import DataError, Example
from dpojax.evaluate import judging
from dpojax.runtime.errors import ConfigError
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.metrics import read_lines
from experiments.paper import hh, imdb, methods, siebert, stages, tldr
from tests import test_evaluate, worlds

URL = "--judge=http://127.0.0.1:9/v1"
SIZES = {  # of every run here: what `tests.worlds.run_config` changes, and one device's step
  "model.dtype": "float32",
  "model.remat": "none",
  "parallel.fsdp": 1,
  "rows_at_once": 0,
  "row_length": 64,
  "data.max_length": 32,
  "data.max_prompt_length": 16,
  "data.eval_size": 8,
  "batch_size": 16,
  "steps": 2,
  "eval_every": 0,
  "checkpoint_every": 2,
  "optimizer.warmup_steps": 0,
  "optimizer.learning_rate": 3e-3,
  "check_memory": False,
  "data.unique_prompts": False,
}
REWARD = {"steps": 2, "eval_every": 2, "checkpoint_every": 2, "data.eval_size": 8}


def flags_of(changes, kind="config"):
  return [f"--{kind}.{key}={value}" for key, value in changes.items()]


@pytest.fixture
def small(words, compiled, tmp_path):
  """Arguments that make an experiment small."""
  folders = {"tokenizer": words, "data.cache_dir": tmp_path / "cache", "compile_cache": compiled}
  return [f"--workdir={tmp_path / 'run'}", *flags_of(SIZES | folders), *flags_of(REWARD, "reward")]


def kinder(request, headers):
  """The judge at the server who prefers kind words."""
  text = request["messages"][0]["content"]
  first, second = re.search(r" A:\n(.*)\n\n\w+ B:\n(.*)\n\nFIRST", text, re.DOTALL).groups()
  letter = {"A": "A", "B": "B", "tie": "tie"}[test_evaluate.kinder("", first, second)]
  return f"Comparison: {letter} is kind.\nPreferred: {letter}"


def told(module, capsys, *arguments):
  """What an experiment says that it would do."""
  module.main(["--workdir=/nowhere", "--dry_run", *arguments])
  return capsys.readouterr().out


# The plans.

PAPER = "64, rmsprop at 1e-06 after 150 steps of warm-up, beta"


def test_the_plan_of_imdb_is_the_papers(capsys):
  text = told(imdb, capsys)
  assert "25000 prefixes of 2 to 8 tokens of train reviews" in text and "--num_samples=4" in text
  assert "150000 pairs, 6 of the 4 samples of each of 25000 prefixes" in text
  assert "experiments.paper.siebert:p_positive" in text and PAPER in text
  runs = imdb.methods_of(imdb.Plan(), stages.Given(None))
  assert runs.betas == (0.05, 0.1, 1, 5) and runs.alphas == (0.05, 0.1, 0.5, 1)
  assert runs.ppo_axis == "target_kl" and runs.ppo_values == (3, 6, 9, 12)
  assert runs.ppo.prompts_per_step * runs.ppo.num_samples == 1024 and runs.measure_every == 100
  assert runs.reward_model["steps"] == 3 * 150_000 // 64
  count = len(runs.betas) + len(runs.alphas) + 2 * len(runs.ppo_values) + len(runs.preferred_ft_seeds)
  assert count == 22 - 4  # the paper's runs less those of another library's PPO
  config = stages.config_of("imdb:sft", {})
  assert config.model.checkpoint == "openai-community/gpt2-large"


def test_the_plan_of_tldr_is_the_papers(capsys):
  text = told(tldr, capsys, "--also=PPO=ppo")
  assert f"2400 steps of {PAPER} 0.5" in text and "256 of test posts" in text
  for temperature in (0, 0.25, 0.5, 0.75, 1):
    for policy in ("dpo", "sft", "preferred_ft", "gpt_j", "ppo", "best_of_128"):
      assert f"/posts_{policy}_temperature_{temperature:g}:" in text
  assert text.count("--question=concise_summary") == 30 and text.count("--num_samples=128") == 5
  assert text.count("--question=concise_news_summary") == 10 and "256 of news articles" in text
  for name in ("CarperAI/openai_summarize_tldr_sft", "EleutherAI/gpt-j-6b"):
    assert f"--workdir={name}" in text


def test_the_plan_of_hh_is_the_papers(capsys):
  text = told(hh, capsys)
  assert f"3300 steps of {PAPER} 0.1" in text and "256 of test dialogues of one turn" in text
  for temperature in (0.25, 0.7, 1):
    best = [f"best_of_{n}" for n in (1, 4, 16, 64, 128)]
    for policy in ("dpo_step_2400", "preferred_ft", "pythia_2_shots", *best):
      assert f"/dialogues_{policy}_temperature_{temperature:g}:" in text
  for step in range(300, 3301, 300):
    for temperature in (0.7, 1):
      assert f"/dialogues_dpo_step_{step}_temperature_{temperature:g}:" in text
  assert "--question=dialogue" in text and "--workdir=EleutherAI/pythia-2.8b" in text
  assert text.count("--num_samples=128") == 3


# Every line, in small.


def reviews(rng, count):
  sentence = lambda: f"the {rng.choice(worlds.NOUNS)} is {rng.choice(worlds.GOOD + worlds.BAD)}"
  return [{"text": " ".join(sentence() for _ in range(3)), "label": 1} for _ in range(count)]


def test_imdb_runs_from_reviews_to_the_frontier(runs, small, tmp_path, rng, capsys):
  paths = [worlds.write_jsonl(tmp_path / f"{name}.jsonl", reviews(rng, 40)) for name in ("train", "test")]
  arguments = [
    *small,
    f"--sft.model.checkpoint={runs.sft}",
    "--dpo.reference.mode=inline",
    f"--reviews={paths[0]}",
    f"--test_reviews={paths[1]}",
    "--reward=tests.test_evaluate:kindness",
    "--prefixes=30",
    "--test_prefixes=8",
    "--max_new_tokens=6",
    "--prompts_at_once=8",
    "--betas=0.1",
    "--alphas=0.1",
    "--target_kls=3",
    "--preferred_ft_seeds=0",
    "--ppo_measure_every=1",
    *flags_of(
      {
        "steps": 1,
        "prompts_per_step": 16,
        "num_samples": 4,
        "epochs": 1,
        "minibatches": 1,
        "rows_at_once": 0,
      },
      "ppo",
    ),
  ]
  imdb.main(arguments)
  out, folder = capsys.readouterr().out, tmp_path / "run"
  lines = read_lines(folder / "frontier.jsonl")
  assert {line["method"] for line in lines} == {"DPO", "Unlikelihood", "Preferred-FT", "PPO", "PPO-GT"}
  assert all(np.isfinite(line["reward"]) for line in lines)
  assert [line["kl"] for line in lines if not line["step"]] == [0] * 5
  assert all(line["kl"] > 0 for line in lines if line["step"])
  assert "configurations tried: DPO 1, Unlikelihood 1, Preferred-FT 1, PPO-GT 1, PPO 1" in out
  assert (folder / "frontier.png").stat().st_size > 10_000
  pairs = read_lines(folder / "pairs" / "pairs.jsonl")
  assert len(read_lines(folder / "prefixes" / "prefixes.jsonl")) == 30 and 16 < len(pairs) <= 180
  for pair in pairs:
    chosen, rejected = (test_evaluate.kindness("", pair[key]) for key in ("chosen", "rejected"))
    assert [chosen, rejected] == pair["rewards"] and chosen > rejected
  imdb.main(arguments)  # everything is there
  assert read_lines(folder / "frontier.jsonl") == lines and "-- " not in capsys.readouterr().out


def comparisons(rng, count, before=""):
  """Records of questions; every third has something before it."""

  def record(i, each):
    start = f"{before if i % 3 == 0 else ''}\n\nHuman: {i} {each['prompt']}\n\nAssistant:"
    return each | {"prompt": start}

  return [record(i, each) for i, each in enumerate(worlds.pairs(rng, count))]


EARLIER = "\n\nHuman: what of it?\n\nAssistant: the plot"


def test_tldr_runs_from_comparisons_to_both_tables(runs, small, serve, tmp_path, rng, capsys):
  server = serve(kinder)
  pairs = worlds.write_jsonl(tmp_path / "pairs.jsonl", comparisons(rng, 40, EARLIER))
  posts = worlds.write_jsonl(
    tmp_path / "posts.jsonl",
    [{"prompt": f"the {noun} is", "label": ("warm", "cold")[i % 2]} for i, noun in enumerate(worlds.NOUNS)],
  )
  news = worlds.write_jsonl(
    tmp_path / "news.jsonl",
    [{"article": " ".join(worlds.NOUNS * 3), "highlights": "the plot is warm"} for _ in range(9)],
  )
  arguments = [
    *small,
    "--config.data.source=jsonl",
    f"--config.data.path={pairs}",
    f"--sft={runs.sft}",
    f"--zero_shot={runs.sft}",
    f"--also=Longer DPO={runs.dpo}",
    f"--test={posts}",
    f"--judge={server.url}",
    "--judge_model=m",
    "--prompts=8",
    "--beta=0.1",
    "--temperatures=1",
    "--best_of=2",
    "--max_new_tokens=4",
    "--prompts_at_once=8",
  ]
  tldr.main(arguments)
  out, folder = capsys.readouterr().out, tmp_path / "run"
  lines = read_lines(folder / "win_rate.jsonl")
  assert [line["method"] for line in lines] == [
    "DPO",
    "SFT",
    "Preferred-FT",
    "GPT-J",
    "Longer DPO",
    "Best of 2",
  ]
  for line in lines:
    rate, n = line["win_rate"], line["n"]
    assert n == 8 and line["left_out"] == 0
    assert line["error"] == pytest.approx((rate * (1 - rate) / n) ** 0.5)
  of = {line["method"]: line["win_rate"] for line in lines}
  assert of["Longer DPO"] > 0.5 and of["GPT-J"] == of["SFT"]
  assert "configurations tried: DPO 1, SFT 1" in out and "Table 1 is left out" in out
  assert (folder / "win_rate.png").stat().st_size > 10_000
  asked = dict(server.asked)
  assert all("forum post" in text for text in asked)

  tldr.main([*arguments, f"--news={news}", "--news_temperatures=0", "--news_prompt_length=12"])
  assert read_lines(folder / "win_rate.jsonl") == lines
  table = read_lines(folder / "news.jsonl")
  assert [line["method"] for line in table] == ["DPO", "SFT", "Preferred-FT", "GPT-J", "Longer DPO"]
  later = [text for text in server.asked if text not in asked]
  assert later and all("given news article" in text for text in later)
  assert all(server.asked[text] == count for text, count in asked.items())  # nobody is asked again


def test_hh_runs_from_dialogues_to_three_figures(runs, small, serve, tmp_path, rng, capsys):
  def dialogues(name, count):
    return worlds.write_jsonl(
      tmp_path / f"{name}.jsonl",
      [
        {key: each["prompt"] + each[key] for key in ("chosen", "rejected")}
        for each in comparisons(rng, count, EARLIER)
      ],
    )

  server = serve(kinder)
  hh.main(
    [
      *small,
      f"--sft.model.checkpoint={runs.sft}",
      f"--train={dialogues('train', 40)}",
      f"--test={dialogues('test', 12)}",
      f"--judge={server.url}",
      "--judge_model=m",
      f"--base={runs.sft}",
      "--dpo_steps=4",
      "--judged_step=4",
      "--every=2",
      "--prompts=8",
      "--temperatures=1",
      "--training_temperatures=1",
      "--best_of=1,2",
      "--max_new_tokens=4",
      "--prompts_at_once=8",
    ]
  )
  out, folder = capsys.readouterr().out, tmp_path / "run"
  left, right, best = (read_lines(folder / f"{name}.jsonl") for name in ("win_rate", "training", "best_of_n"))
  assert [line["method"] for line in left] == ["DPO", "Preferred-FT", "Pythia, 2 shots", "Best of 2"]
  assert [line["step"] for line in right] == [2, 4] and right[1]["win_rate"] == left[0]["win_rate"]
  assert [line["N"] for line in best] == [1, 2] and best[1]["win_rate"] == left[3]["win_rate"]
  assert "configurations tried: DPO 1, Preferred-FT 1" in out
  for name in ("win_rate", "training", "best_of_n"):
    assert (folder / f"{name}.png").stat().st_size > 10_000
  assert all("For the following query to a chatbot" in text and "Human:" not in text for text in server.asked)
  prompts = read_lines(folder / "shots" / "prompts.jsonl")
  assert len(prompts) == 8 and {line["prompt"].count("\n\nHuman:") for line in prompts} == {3}


# The parts.


def test_a_prefix_has_2_to_8_tokens_that_the_tokenizer_finds_again(words, rng):
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(words)
  texts = [each["text"] for each in reviews(rng, 5)]
  prefixes = imdb.draw_prefixes(tokenizer, texts, 60)
  assert len(prefixes) == 60 and prefixes == imdb.draw_prefixes(tokenizer, texts, 60)
  assert {len(tokenizer(prefix)["input_ids"]) for prefix in prefixes} == set(range(2, 9))
  assert all(any(text.startswith(prefix) for text in texts) for prefix in prefixes)
  with pytest.raises(DataError, match="none of 1 reviews has a beginning of 2 to 8 tokens"):
    imdb.draw_prefixes(tokenizer, ["warm"], 1)


def test_pairs_are_all_of_a_prompts_samples_but_those_of_equal_reward():
  records = [{"index": i, "prompt": "p", "response": response} for i in range(2) for response in "abcd"]
  pairs = imdb.label(records, np.array([0.1, 0.4, 0.3, 0.2, 0.5, 0.5, 0.5, 0.9]))
  assert len(pairs) == 6 + 3
  assert ["".join((each["chosen"], each["rejected"])) for each in pairs] == [
    "ba",
    "ca",
    "da",
    "bc",
    "bd",
    "cd",
    "da",
    "db",
    "dc",
  ]


def test_the_best_evaluation_is_that_of_the_checkpoint_that_is_kept(tmp_path):
  accuracies = [0.5, 0.9, 0.9, 0.1]
  checkpoints = Checkpoints(tmp_path, keep=1, best="rewards/accuracies", owner=True)
  lines = [{"split": "eval", "step": 0, "rewards/accuracies": 1.0}]
  for step, accuracy in enumerate(accuracies, 1):
    lines.append({"split": "eval", "step": step, "rewards/accuracies": accuracy})
    checkpoints.save(step, {"x": np.zeros(1)}, {}, {"rewards/accuracies": accuracy})
  checkpoints.wait()
  assert checkpoints.steps() == [methods.best_evaluation(lines)["step"], 4] == [3, 4]
  checkpoints.close()


def test_an_answer_to_shots_ends_where_the_next_turn_begins(tmp_path):
  prompts = worlds.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "plain"}])
  samples = worlds.write_jsonl(
    tmp_path / "samples.jsonl",
    [{"index": 0, "prompt": "shots plain", "response": " yes\n\nHuman: and\n\nAssistant: no"}],
  )
  (record,) = read_lines(tmp_path / hh.first_turn(stages.Given(tmp_path), "cut", samples, prompts))
  assert record == {"index": 0, "prompt": "plain", "response": " yes"}


@pytest.mark.parametrize(
  "record, prompt, response",
  [
    ({"prompt": "POST: a\nTL;DR:", "label": "b"}, "POST: a\nTL;DR:", " b"),
    ({"article": "a long day.", "highlights": "b"}, "a long day.\n\nTL;DR:", " b"),
    ({"prompt": "a", "responses": [" b"]}, "a", " b"),
  ],
)
def test_test_examples_are_read_in_the_forms_they_are_published_in(record, prompt, response, tmp_path):
  path = worlds.write_jsonl(tmp_path / "test.jsonl", [record])
  assert list(stages.read_examples(path)) == [Example(prompt, (response,))]


def test_a_long_article_is_cut_before_the_end_of_its_prompt(words):
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(words)
  article = Example("the plot is warm\n\nTL;DR:", (" x",))
  assert tldr.shortened(article, tokenizer, 5) == article
  assert tldr.shortened(article, tokenizer, 3).prompt == "the plot\n\nTL;DR:"


def test_the_question_about_news_differs_in_the_paper_s_two_words():
  for name in ("summary", "concise_summary"):
    news = judging.QUESTIONS[name.replace("summary", "news_summary")]
    assert news.replace("news article", "forum post") == judging.QUESTIONS[name]
    assert "forum post" not in news


def test_an_experiment_goes_on_only_with_the_settings_it_has(tmp_path):
  lines = stages.stage(stages.Given(tmp_path), "a", "what", {"count": 1}, lambda: [{"n": 1}])
  again = lambda count: stages.stage(stages.Given(tmp_path), "a", "what", {"count": count}, list)
  assert again(1) == lines == [{"n": 1}]
  with pytest.raises(ConfigError, match="was made with other settings"):
    again(2)


@pytest.mark.parametrize(
  "module, arguments, message",
  [
    (imdb, ["--dpo.learning_rate=1"], "--dpo.learning_rate=1 is no argument; keys of configs are set by"),
    (imdb, ["--ppo.loss=dpo"], "--ppo.loss=dpo is no argument"),
    (imdb, ["--prefix=3"], "--prefix=3 is no argument"),
    (imdb, ["--sft.steps=many"], "configs/imdb.py does not take"),
    (hh, ["--dpo.batch_size=0", "--dry_run"], "config.batch_size is 0; it must be at least 1"),
    (hh, ["--test=missing.jsonl"], "data.path missing.jsonl: no such file"),
    (tldr, [], "--test is missing"),
    (tldr, ["--also=dpo", "--dry_run"], "--also is 'dpo'; give NAME=MODEL"),
    (tldr, ["--test={few}"], "there are 2, fewer than --prompts=256; lower it"),
    (tldr, ["--test={broken}"], 'line 1: "prompt" is missing'),
  ],
)
def test_what_cannot_be_used_is_one_line(module, arguments, message, tmp_path):
  files = {
    "few": worlds.write_jsonl(tmp_path / "few.jsonl", [{"prompt": "a", "label": "b"}] * 2),
    "broken": worlds.write_jsonl(tmp_path / "broken.jsonl", [{"responses": ["b"]}]),
  }
  with pytest.raises(SystemExit, match=re.escape(message)):
    module.main([f"--workdir={tmp_path / 'run'}", *(each.format(**files) for each in arguments)])


def test_a_judge_without_a_verdict_is_an_error(tmp_path):
  paths = [
    worlds.write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "a", "responses": [name]}])
    for name in ("ours", "theirs")
  ]
  given = stages.Given(tmp_path, judge={"judge": "tests.test_paper:undecided"})
  with pytest.raises(judging.JudgeError, match="gave no verdict"):
    stages.judged(given, "a", {"method": "m", "temperature": 1.0}, *paths, "dialogue")


def undecided(prompt, a, b):
  """A judge who says neither."""
  return "?"


def test_the_true_reward_is_the_score_of_the_label_positive():
  said = []

  def classify(texts):
    said.extend(texts)
    return [[{"label": "NEGATIVE", "score": 0.25}, {"label": "POSITIVE", "score": 0.75}]]

  assert siebert.positive(classify, "the plot is warm") == 0.75 and said == ["the plot is warm"]
  with pytest.raises(ConfigError, match="has the labels JOY, not POSITIVE"):
    siebert.positive(lambda texts: [[{"label": "joy", "score": 1.0}]], "")


def test_the_true_reward_needs_torch_and_says_so(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match="runs in PyTorch, which is not installed; pip install torch"):
    siebert.p_positive("the plot is", " warm")


def save_classifier(folder):
  """Saves a RoBERTa of random weights that tells positive from negative."""
  import torch  # only where it is installed

  words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "the", "plot", "is", "warm"])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
    unk_token="<unk>",
    cls_token="<s>",
    sep_token="</s>",
  ).save_pretrained(folder)
  torch.manual_seed(0)
  transformers.RobertaForSequenceClassification(
    transformers.RobertaConfig(
      vocab_size=8,
      hidden_size=16,
      num_hidden_layers=1,
      num_attention_heads=2,
      intermediate_size=16,
      max_position_embeddings=520,
      id2label={0: "NEGATIVE", 1: "POSITIVE"},
      label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
  ).save_pretrained(folder)


def test_the_true_reward_is_read_from_a_folder_where_torch_is_installed(monkeypatch, tmp_path):
  """Without torch the same call says that it is missing."""
  monkeypatch.setenv("DPOJAX_SENTIMENT", str(tmp_path))
  if importlib.util.find_spec("torch") is None:
    with pytest.raises(ConfigError, match="pip install torch"):
      siebert.p_positive("the plot is", " warm")
    return
  with pytest.raises(ConfigError, match="cannot be loaded"):
    siebert.p_positive("the plot is", " warm")
  save_classifier(tmp_path)
  reward = siebert.p_positive("the plot is", " warm")
  assert 0 < reward < 1 and reward == siebert.p_positive("the plot", " is warm")
  assert reward != siebert.p_positive("the plot is", " the plot")
  long = siebert.p_positive("the", " plot" * 600)  # cut to 512 tokens
  assert long == siebert.p_positive("the", " plot" * 700)
