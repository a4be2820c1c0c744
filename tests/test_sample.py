"""The sampling command: what it writes, how it goes on, and what it refuses."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dpojax.data import tokenization
from dpojax.data.examples import DataError, Example
from dpojax.runtime.errors import ConfigError
from dpojax.sample import files
from dpojax.sample.draws import Draw
from dpojax.sample.prompts import encode, read_prompts
from dpojax.training import weights
from dpojax.training.checkpoint import CheckpointError
from tests import conftest, worlds

pytestmark = pytest.mark.usefixtures("compiled")

DRAW = Draw(num_samples=2, max_new_tokens=6, seed=3)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
  """Prompts of 3 and of 17 words, so that two widths are drawn, and a pair that has a prompt."""
  nouns = worlds.NOUNS * 2
  records = [
    {"prompt": f"the {noun} is" if i % 3 else f"the {noun} is the {' the '.join(worlds.NOUNS[:7])}"}
    for i, noun in enumerate(nouns)
  ]
  records.append({"prompt": "the plot is", "chosen": " warm", "rejected": " cold"})
  return worlds.write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", records)


@pytest.fixture(scope="module")
def drawn(runs, prompts, tmp_path_factory):
  """The file of samples of the DPO run."""
  out = tmp_path_factory.mktemp("drawn") / "samples.jsonl"
  means = files.run(runs.dpo, prompts, str(out), DRAW, batch_size=8)
  return out, means


def records_of(path):
  return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def test_samples_stand_in_the_order_of_the_prompts_with_log_probs_of_both_models(drawn, prompts):
  out, means = drawn
  records = records_of(out)
  texts = [record["prompt"] for record in records_of(prompts)]
  assert [(r["index"], r["sample"], r["prompt"]) for r in records] == [
    (i, k, text) for i, text in enumerate(texts) for k in range(2)
  ]
  ratios = [r["log_prob"] - r["reference_log_prob"] for r in records]
  assert means["kl"] == pytest.approx(np.mean(ratios)) and means["kl"] > 0.1
  assert means["samples"] == 2 * len(texts)
  assert any(r["finished"] for r in records)
  for record in records:
    words = record["response"].split()
    assert set(words) <= {*worlds.GOOD, *worlds.BAD, *worlds.NOUNS, "the", "is", "<unk>"}
    if words and "<unk>" not in words:
      assert record["response"].startswith(" ")
      assert record["tokens"] == len(words) + record["finished"]


def test_the_policy_of_dpo_says_kind_words(drawn):
  words = [word for record in records_of(drawn[0]) for word in record["response"].split()]
  assert sum(word in worlds.GOOD for word in words) > 5 * sum(word in worlds.BAD for word in words)


@pytest.mark.parametrize("share", [0.4, 0.93])
def test_an_interrupted_file_goes_on_to_the_same_file(share, drawn, runs, prompts, tmp_path):
  whole = drawn[0].read_bytes()
  out = tmp_path / "samples.jsonl"
  out.write_bytes(whole[: int(share * len(whole))])
  out.with_suffix(".config.json").write_bytes(drawn[0].with_suffix(".config.json").read_bytes())
  means = files.run(runs.dpo, prompts, str(out), DRAW, batch_size=8)
  assert out.read_bytes() == whole and means == drawn[1]


def test_a_finished_file_is_left_as_it_is(drawn, runs, prompts, capsys):
  before = drawn[0].read_bytes()
  files.run(runs.dpo, prompts, str(drawn[0]), DRAW, batch_size=8)
  assert drawn[0].read_bytes() == before
  assert "0 samples drawn (34 were there)" in capsys.readouterr().out


def test_samples_of_a_run_that_has_no_reference_have_no_log_prob_under_it(runs, prompts, tmp_path):
  means = files.run(
    runs.sft, prompts, str(tmp_path / "out.jsonl"), Draw(max_new_tokens=2, temperature=0.0), limit=2
  )
  assert "kl" not in means
  assert {r["reference_log_prob"] for r in records_of(tmp_path / "out.jsonl")} == {None}


def test_a_policy_is_at_no_distance_from_itself(runs, prompts, tmp_path):
  means = files.run(
    runs.dpo, prompts, str(tmp_path / "out.jsonl"), Draw(max_new_tokens=2), reference=runs.dpo, limit=2
  )
  assert means["kl"] == 0


def test_prompts_with_the_name_of_a_special_token_are_counted_aloud(data_folder, capsys):
  tokenizer = tokenization.load_tokenizer(str(data_folder / "tokenizers" / "gpt2"))
  encode(["plain", f"a{tokenizer.eos_token}b"], tokenizer, longest=50, keep="end", path="p.jsonl")
  assert (
    "1 of 2 prompts of p.jsonl have a special token's name in their text, which is read as "
    "data.special_tokens='text' says"
  ) in capsys.readouterr().out
  encode(["plain"], tokenizer, longest=50, keep="end", path="p.jsonl")
  assert not capsys.readouterr().out


def test_a_conversation_is_prompted_as_the_template_has_it(data_folder):
  tokenizer = tokenization.load_tokenizer(str(data_folder / "tokenizers" / "llama2"))
  tokenizer.chat_template = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
  )
  ((ids, cut),) = tokenization.encode_prompts(
    [[{"role": "user", "content": "hello"}]], tokenizer, longest=50, keep="end"
  )
  assert not cut and tokenizer.decode(ids) == "[user]hello</s>[assistant]"
  assert ids == tokenizer.apply_chat_template(
    [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
  )


@pytest.mark.parametrize("written, stop_ids", [([7, 9], (7, 9)), (7, (7,)), (None, ())])
def test_a_published_models_own_stop_ids_end_samples_too(written, stop_ids):
  published = json.dumps({"generation_config": {"eos_token_id": written} if written else {}})
  model = weights.Loaded(worlds.llama(published=published), {}, "", "")
  assert model.stop_ids == stop_ids
  assert model._replace(config=worlds.llama()).stop_ids == ()


@pytest.mark.parametrize("keep, want", [("end", "<s> d e f"), ("start", "<s> a b c")])
def test_a_long_prompt_is_cut_as_in_training(keep, want, data_folder):
  tokenizer = tokenization.load_tokenizer(str(data_folder / "tokenizers" / "llama2"))
  ((ids, cut),) = tokenization.encode_prompts(["a b c d e f"], tokenizer, longest=4, keep=keep)
  assert cut and tokenizer.decode(ids) == want


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
@pytest.mark.parametrize("response", [" yes, it is.", "yes", "\n\nNo", " na\u00efve \u2603"])
def test_a_response_is_decoded_with_the_space_it_has_behind_its_prompt(name, response, data_folder):
  tokenizer = tokenization.load_tokenizer(str(data_folder / "tokenizers" / name))
  ((prompt, (ids,)),) = tokenization.encode(
    [tokenization.Example("Is it? Assistant:", (response,))], tokenizer
  )
  assert tokenization.decode_response(tokenizer, prompt, ids) == response


def test_a_file_goes_on_whatever_ends_of_lines_stand_in_its_prompts(runs, tmp_path):
  prompts = worlds.write_jsonl(
    tmp_path / "prompts.jsonl",
    [{"prompt": f"the film{end}is"} for end in ("\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\n")],
  )
  out = tmp_path / "samples.jsonl"
  files.run(runs.dpo, prompts, str(out), Draw(max_new_tokens=2), batch_size=8)
  whole = out.read_bytes()
  assert [json.loads(line)["prompt"] for line in whole.decode().split("\n")[:-1]] == [
    each.prompt for each in read_prompts(prompts).values()
  ]
  files.run(runs.dpo, prompts, str(out), Draw(max_new_tokens=2), batch_size=8)
  assert out.read_bytes() == whole
  out.write_bytes(whole[: len(whole) // 2])
  files.run(runs.dpo, prompts, str(out), Draw(max_new_tokens=2), batch_size=8)
  assert out.read_bytes() == whole


MESSAGES = [{"role": "user", "content": "Q"}]


@pytest.mark.parametrize(
  "name, content, prompt",
  [
    ("a.jsonl", b'\xef\xbb\xbf{"prompt": "Q"}\r\n', "Q"),
    ("a.csv", b"prompt,chosen\nQ,a\n", "Q"),
    ("a.json", b'[{"prompt": "Q"}]', "Q"),
    (
      "a.jsonl",
      json.dumps(
        {
          "chosen": [*MESSAGES, {"role": "assistant", "content": "a"}],
          "rejected": [*MESSAGES, {"role": "assistant", "content": "b"}],
        }
      ).encode(),
      MESSAGES,
    ),
    ("a.jsonl", json.dumps({"input": {"messages": MESSAGES}}).encode(), MESSAGES),
    ("a.jsonl", b'{"chosen": "\\n\\nAssistant: a", "rejected": "\\n\\nAssistant: b"}', "\n\nAssistant:"),
  ],
)
def test_prompts_are_read_from_what_can_be_trained_on(name, content, prompt, tmp_path):
  (tmp_path / name).write_bytes(content)
  assert read_prompts(tmp_path / name) == {0: Example(prompt, ())}


def test_other_settings_do_not_go_into_the_same_file(drawn, runs, prompts):
  with pytest.raises(ConfigError, match="holds samples of temperature 1.0, not 0.5; give another --out"):
    files.run(
      runs.dpo,
      prompts,
      str(drawn[0]),
      Draw(num_samples=2, max_new_tokens=6, seed=3, temperature=0.5),
      batch_size=8,
    )


def test_a_file_of_something_else_is_not_overwritten(runs, prompts, tmp_path):
  (tmp_path / "notes.jsonl").write_text("mine\n")
  with pytest.raises(ConfigError, match="was not written by this command"):
    files.run(runs.dpo, prompts, str(tmp_path / "notes.jsonl"), DRAW)
  assert (tmp_path / "notes.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "has no records"),
    ('{"prompt": "a"}\n{"prompt": 1}\n', 'line 2: "prompt" is a number, not a string or a list'),
    ('{"text": "a"}\n', 'line 1: "prompt" is missing'),
    ('{"prompt": "a"\n', "line 1: not JSON"),
    ('{"prompt": []}\n', 'line 1: "prompt" has no messages'),
  ],
)
def test_bad_prompts_are_named_by_their_line(text, message, tmp_path):
  (tmp_path / "prompts.jsonl").write_text(text)
  with pytest.raises(DataError, match=message):
    read_prompts(tmp_path / "prompts.jsonl")
  with pytest.raises(DataError, match="^--prompts .*missing.jsonl: no such file"):
    read_prompts(tmp_path / "missing.jsonl")


def test_records_without_a_prompt_are_left_out_aloud_and_numbers_stay(runs, tmp_path, capsys):
  lines = [{"prompt": "the film is"}, {"prompt": 1}, {"prompt": "the <eos> is"}, {"prompt": "the plot is"}]
  prompts, out = worlds.write_jsonl(tmp_path / "prompts.jsonl", lines), tmp_path / "out.jsonl"
  draw = Draw(max_new_tokens=2)
  with pytest.raises(DataError, match='line 2: "prompt" is a number.*; correct the record or drop it'):
    files.run(runs.sft, prompts, str(out), draw)
  files.run(runs.sft, prompts, str(out), draw, on_error="skip")
  assert f'1 records left out: wrong_type 1; first: {prompts} line 2: "prompt" is a number' in (
    said := capsys.readouterr().out
  )
  assert f"1 records left out: eos_in_text 1; first: {prompts} prompt 2: the tokenizer makes EOS" in said
  assert [(line["index"], line["prompt"]) for line in records_of(out)] == [
    (0, "the film is"),
    (3, "the plot is"),
  ]
  whole = out.read_bytes()
  out.write_bytes(whole[: whole.index(b"\n") + 1])
  files.run(runs.sft, prompts, str(out), draw, on_error="skip")
  assert out.read_bytes() == whole


def test_what_cannot_be_drawn_is_refused(runs, prompts, tmp_path):
  for values, message in (
    (dict(top_p=0.0), "--top_p is 0.0; it must be above 0"),
    (dict(temperature=-1.0), "--temperature is -1.0"),
    (dict(num_samples=0), "--num_samples is 0"),
  ):
    with pytest.raises(ConfigError, match=message):
      Draw(**values)
  with pytest.raises(CheckpointError, match="holds no checkpoint of step 7"):
    files.run(runs.dpo, prompts, str(tmp_path / "out.jsonl"), DRAW, step=7)
  with pytest.raises(ConfigError, match="data x --fsdp x --tensor is 2 x 3 x 1 = 6 but there are 8"):
    files.run(runs.dpo, prompts, str(tmp_path / "out.jsonl"), DRAW, fsdp=3)


def test_an_error_of_the_command_is_one_line(tmp_path):
  result = subprocess.run(
    [sys.executable, "-m", "dpojax.sample", f"--workdir={tmp_path}", "--prompts=x", f"--out={tmp_path}/y"],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 1 and result.stderr.count("\n") == 1
  assert result.stderr.startswith("error: ") and "is not the workdir of a run" in result.stderr
