"""Text becomes ids with an exact boundary, is cut as in the paper's code, and is accounted for."""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings, strategies

from dpojax.data import builders, tokenization
from dpojax.data.examples import DataError, Example
from dpojax.data.tokenization import Reading, Truncation
from dpojax.data.truncation import TRUNCATION_SIDE

ROOMY = Truncation(100_000, 50_000, "end")
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA_CHAT = (
  "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} "
  "{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": "Which way?"}


@pytest.fixture(scope="session")
def load(data_folder):
  return lambda name: tokenization.load_tokenizer(str(data_folder / "tokenizers" / name))


@pytest.fixture(scope="session")
def both(load):
  return {name: load(name) for name in ("gpt2", "llama2")}


@pytest.fixture(params=["gpt2", "llama2"])
def tokenizer(request, both):
  return both[request.param]


@pytest.fixture
def chat(load):
  """GPT-2's tokenizer with ChatML: its EOS is the end of a turn."""
  tokenizer = load("gpt2")
  tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
  tokenizer.chat_template = CHATML
  return tokenizer


@pytest.fixture
def comparisons(tmp_path):
  number = itertools.count()

  def prepare(*records):
    path = tmp_path / f"{next(number)}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return builders.prepare("jsonl", path=path, data_dir=tmp_path / "prepared")

  return prepare


@pytest.fixture(scope="session")
def hh(data_folder, tmp_path_factory):
  path = data_folder / "hh_harmless_base_test.jsonl.gz"
  return builders.prepare("hh", path=path, data_dir=tmp_path_factory.mktemp("hh"))


def words(count, word="a"):
  """A text of `count` GPT-2 tokens."""
  return f" {word}" * count


def decoded(tokenizer, prompt, response):
  """The text of ids between BOS, or the EOS that stands in for it, and EOS."""
  assert response[-1] == tokenizer.eos_token_id
  start = 1 if prompt[:1] in ([tokenizer.bos_token_id], [tokenizer.eos_token_id]) else 0
  return tokenizer.decode(prompt[start:] + response[:-1], clean_up_tokenization_spaces=False)


def test_real_pairs_decode_to_their_text_with_one_bos_and_one_eos(tokenizer, hh):
  pairs = list(hh)
  adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
  for example, (prompt, responses) in zip(pairs, tokenization.encode(pairs, tokenizer)):
    assert prompt.count(tokenizer.bos_token_id) == adds_bos and prompt[0] == (
      tokenizer.bos_token_id if adds_bos else prompt[0]
    )
    for text, ids in zip(example.responses, responses):
      assert decoded(tokenizer, prompt, ids) == example.prompt + text
      assert ids.count(tokenizer.eos_token_id) == 1
      assert tokenizer.bos_token_id not in ids[:-1]


TEXT = strategies.text(
  strategies.one_of(
    strategies.sampled_from(" \n\tIa.'<>|/s"),
    strategies.characters(codec="utf-8", exclude_characters="\u2581"),
  ),
  max_size=12,
)


@settings(deadline=None)
@given(TEXT, TEXT)
def test_any_text_decodes_to_itself_over_the_boundary(both, prompt, response):
  for tokenizer in both.values():
    if response:
      ((prompt_ids, (ids,)),) = tokenization.encode([Example(prompt, (response,))], tokenizer)
      assert decoded(tokenizer, prompt_ids, ids) == prompt + response


@settings(deadline=None)
@given(TEXT, TEXT.filter(bool), TEXT.filter(bool))
def test_the_prompt_is_the_same_ids_whatever_follows(both, prompt, one, other):
  for tokenizer in both.values():
    (first, _), (second, _), (joint, _) = tokenization.encode(
      [Example(prompt, responses) for responses in ((one,), (other,), (one, other))], tokenizer
    )
    assert first == second == joint


def test_a_leading_space_neither_vanishes_nor_appears(both):
  for tokenizer in both.values():
    (_, (with_space,)), (_, (without,)), (_, (two,)) = tokenization.encode(
      [Example("He said:", (text,)) for text in (" I am", "I am", "  I am")], tokenizer
    )
    assert len({tuple(with_space), tuple(without), tuple(two)}) == 3
  llama = both["llama2"]
  assert llama(" I am")["input_ids"] == llama("I am")["input_ids"]  # what would go wrong
  tokens = llama.convert_ids_to_tokens
  ((prompt, (ids,)),) = tokenization.encode([Example(" I am", ("I am",))], llama)
  assert tokens(prompt) == ["<s>", "▁▁", "I", "▁am"]
  assert tokens(ids) == ["I", "▁am", "</s>"]


def test_it_does_not_matter_how_a_tokenizer_adds_its_space(load):
  always, normalizing, bytewise = load("llama2"), load("llama2"), load("gpt2")
  always.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
    prepend_scheme="always", split=False
  )
  normalizing.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([])
  normalizing.backend_tokenizer.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
  )
  bytewise.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
  for tokenizer in (always, normalizing, bytewise):
    assert tokenizer.decode(tokenizer("a", add_special_tokens=False)["input_ids"]).strip() == "a"
    for prompt, response in itertools.product(("", "a", " a", "\na "), ("a", " a", "  a", "\na")):
      ((ids, (answer,)),) = tokenization.encode([Example(prompt, (response,))], tokenizer)
      added = " " * (tokenizer is bytewise)  # its decoder leaves the space it added
      assert decoded(tokenizer, ids, answer) == added + prompt + response


def test_usual_text_gets_the_ids_of_the_whole_text(both):
  for tokenizer in both.values():
    prompt, response = "\n\nHuman: Which way?\n\nAssistant:", " That way."
    ((first, (ids,)),) = tokenization.encode([Example(prompt, (response,))], tokenizer)
    assert first + ids == tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]


def test_names_of_special_tokens_in_text_are_text(both):
  for tokenizer in both.values():
    name = tokenizer.eos_token
    example = Example(f"a{name}b {name}", (f"{name} c{name}",))
    ((prompt, (ids,)),) = tokenization.encode([example], tokenizer)
    assert not {tokenizer.eos_token_id, tokenizer.unk_token_id} & {*prompt, *ids[:-1]}
    assert decoded(tokenizer, prompt, ids) == f"a{name}b {name}{name} c{name}"


def test_an_empty_prompt_starts_with_bos_or_with_eos_where_there_is_none(both, comparisons):
  data = comparisons({"prompt": "", "responses": [" yes", "no"]})
  for name, tokenizer in both.items():
    tokens = tokenization.tokenize(data, tokenizer, truncation=ROOMY)
    (prompt, responses) = tokens[0]
    assert prompt.tolist() == [tokenizer.bos_token_id]
    assert tokens.report["prompts_started_with_eos"] == (name == "gpt2")
    texts = [decoded(tokenizer, prompt.tolist(), ids.tolist()) for ids in responses]
    assert texts == [" yes", "no"]


def test_a_chat_has_the_ids_of_its_template(both, chat, monkeypatch):
  llama = both["llama2"]
  for tokenizer, template in ((chat, CHATML), (llama, LLAMA_CHAT)):
    turns = [USER, {"role": "assistant", "content": "Left."}, {"role": "user", "content": "And then?"}]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    ((prompt, responses),) = tokenization.encode([Example(turns, ("Right.", "Wrong."))], tokenizer)
    for ids, text in zip(responses, ("Right.", "Wrong.")):
      answered = [*turns, {"role": "assistant", "content": text}]
      whole = tokenizer.apply_chat_template(answered, return_dict=False)
      assert prompt + ids == whole[: len(prompt) + len(ids)]
      assert tokenizer.decode(whole[len(prompt) + len(ids) :]).strip() == ""
      assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
      assert prompt.count(llama.bos_token_id if tokenizer is llama else -1) == (tokenizer is llama)


def test_a_chat_template_without_eos_gets_one_and_no_bos_that_it_does_not_write(both, monkeypatch):
  llama = both["llama2"]
  monkeypatch.setattr(
    llama,
    "chat_template",
    (
      "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
      "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
  )
  ((prompt, (ids,)),) = tokenization.encode([Example([USER], ("Left.",))], llama)
  whole = llama.apply_chat_template([USER, {"role": "assistant", "content": "Left."}], return_dict=False)
  assert prompt + ids == [*whole, llama.eos_token_id]
  data = Memory([Example([USER], ("Left.", "Right."))])
  report = tokenization.tokenize(data, llama, truncation=ROOMY).report
  assert (report["without_bos"], report["responses_ended_with_eos_that_the_template_lacks"]) == (1, 2)


def test_names_of_special_tokens_in_a_message_are_text(both, chat, monkeypatch):
  monkeypatch.setattr(both["llama2"], "chat_template", LLAMA_CHAT)
  for tokenizer in (chat, both["llama2"]):
    name, eos = tokenizer.eos_token, tokenizer.eos_token_id
    safe, unsafe = (
      tokenization.encode([Example([{**USER, "content": f"What is {text}?"}], (f"{text} ends",))], tokenizer)[
        0
      ]
      for text in ("it", name)
    )
    assert unsafe[0].count(eos) == safe[0].count(eos)
    assert unsafe[1][0].count(eos) == 1
    assert tokenizer.decode(unsafe[0]) == tokenizer.decode(safe[0]).replace("it", name)


def test_chats_that_cannot_be_rendered_are_answered(load, chat, comparisons):
  records = [{"prompt": [USER], "responses": [[{"role": "assistant", "content": text}]]} for text in "ab"]
  with pytest.raises(DataError, match="has no chat template"):
    tokenization.tokenize(comparisons(*records), load("gpt2"), truncation=ROOMY)
  chat.chat_template = "{{ messages | length }}: {{ messages[-1].content | length }}"
  with pytest.raises(DataError, match=r'no_clear_span.*record 0 \("Which way\?"\).*where the answer stands'):
    tokenization.tokenize(comparisons(*records), chat, truncation=ROOMY)
  chat.chat_template = CHATML + (
    "{% if messages[-1].content == 'b' %}{{ raise_exception('no b') }}{% endif %}"
  )
  tokens = tokenization.tokenize(comparisons(*records), chat, truncation=ROOMY)
  assert tokens.report["dropped"] == {"refused_by_template": 1}
  assert tokens.report["first"]["refused_by_template"] == (
    'record 1 ("Which way?"): the chat template says: no b'
  )
  assert tokens.example.tolist() == [0]


@pytest.mark.parametrize("keep", ["start", "end"])
@pytest.mark.parametrize("max_length, max_prompt_length", [(12, 4), (12, 9), (6, 1), (25, 12)])
def test_truncation_is_the_papers_code_s(both, rng, max_length, max_prompt_length, keep):
  tokenizer = both["gpt2"]
  sizes = rng.integers(1, 13, size=(300, 4))
  texts = [[words(size, letter) for size, letter in zip(row, "abcd")] for row in sizes]
  data = Memory(Example(row[0], tuple(row[1:])) for row in texts)
  result = tokenization.tokenize(data, tokenizer, truncation=Truncation(max_length, max_prompt_length, keep))
  prompts_cut = responses_cut = 0
  for row, (ids, branches) in zip(texts, result, strict=True):
    prompt, *responses = (tokenizer(text)["input_ids"] for text in row)
    responses = [ids + [tokenizer.eos_token_id] for ids in responses]
    whole, longest = len(prompt), max(len(ids) for ids in responses)
    if len(prompt) + longest > max_length:
      prompt = prompt[:max_prompt_length] if keep == "start" else prompt[-max_prompt_length:]
    if len(prompt) + longest > max_length:
      responses = [ids[: max_length - max_prompt_length] for ids in responses]
    prompts_cut += len(prompt) < whole
    responses_cut += sum(ids[-1] != tokenizer.eos_token_id for ids in responses)
    assert ids.tolist() == prompt
    assert [branch.tolist() for branch in branches] == responses
  assert result.report["prompts_cut"] == prompts_cut
  assert result.report["responses_cut"] == result.report["responses_without_eos"] == responses_cut


class Memory(list):
  """Comparisons that were never on disk."""

  fingerprint = "memory"


def test_bos_stays_in_front_of_a_cut_prompt(both):
  llama = both["llama2"]
  data = Memory([Example("one two three four five", (" six", " seven"))])
  whole = tokenization.tokenize(data, llama, truncation=ROOMY)[0][0].tolist()
  for keep, rest in (("end", whole[-2:]), ("start", whole[1:3])):
    prompt, _ = tokenization.tokenize(data, llama, truncation=Truncation(6, 3, keep))[0]
    assert prompt.tolist() == [llama.bos_token_id, *rest]
  prompt, _ = tokenization.tokenize(data, llama, truncation=Truncation(4, 1, "end"))[0]
  assert prompt.tolist() == [llama.bos_token_id]


def test_responses_that_truncation_makes_the_same_are_dropped(both):
  data = Memory([Example(words(4), (words(5, "b") + " c", words(5, "b") + " d")), Example("", (" e", " f"))])
  tokens = tokenization.tokenize(data, both["gpt2"], truncation=Truncation(8, 4, "end"))
  assert tokens.report["dropped"] == {"identical_after_truncation": 1}
  assert tokens.report["responses_cut"] == 0
  assert tokens.example.tolist() == [1]


def test_only_the_best_responses_are_kept(both):
  data = Memory(Example("Q", responses) for responses in ((" a", " b", " c"), (" d",), (" e", " f")))
  read = lambda tokens: [
    [both["gpt2"].decode(ids[:-1]).strip() for ids in tokens[i][1]] for i in range(len(tokens))
  ]
  for count, kept, dropped in (
    (None, [["a", "b", "c"], ["d", "", ""], ["e", "f", ""]], {}),
    (1, [["a"], ["d"], ["e"]], {}),
    (2, [["a", "b"], ["e", "f"]], {"too_few_responses": 1}),
  ):
    tokens = tokenization.tokenize(data, both["gpt2"], truncation=ROOMY, num_responses=count)
    assert read(tokens) == kept
    assert tokens.report["dropped"] == dropped
    assert tokens.lengths.shape == (len(kept), 1 + max(map(len, kept)))
  dtypes = [getattr(tokens, name).dtype for name in ("lengths", "ids", "example", "offsets")]
  assert dtypes == [np.int32, np.int32, np.int32, np.int64]
  with pytest.raises(IndexError, match="comparison 2 of 2"):
    tokens[2]
  with pytest.raises(DataError, match=r"none of 1 comparisons can be used .*too_few_responses': 1"):
    tokenization.tokenize(Memory(data[1:2]), both["gpt2"], truncation=ROOMY, num_responses=2)


def test_a_response_alone_keeps_its_side_and_needs_a_loss_that_reads_it(both):
  data = Memory([Example("Q", (" a", "")), Example("Q", ("", " b")), Example("Q", (" c", " d"))])
  tokenize = functools.partial(tokenization.tokenize, data, both["gpt2"], truncation=ROOMY, num_responses=2)
  alone = tokenize(fewest=1)
  assert [[len(ids) for ids in alone[i][1]] for i in range(3)] == [[2, 0], [0, 2], [2, 2]]
  assert (alone.lengths[:, 1:] > 0).tolist() == [[True, False], [False, True], [True, True]]
  assert both["gpt2"].decode(alone[1][1][1][:-1]) == " b"
  pairs = tokenize()
  assert len(pairs) == 1 and pairs.report["dropped"] == {"too_few_responses": 2}


def test_the_report_of_real_pairs_agrees_with_their_ids(tokenizer, hh):
  whole = tokenization.tokenize(hh, tokenizer, truncation=ROOMY, num_responses=2)
  short = Truncation(256, 128, "end")
  cut = tokenization.tokenize(hh, tokenizer, truncation=short, num_responses=2)
  before, after = whole.lengths[cut.example], cut.lengths
  assert cut.report["examples"] == len(hh)
  assert cut.report["used"] == len(cut) == len(hh) - sum(cut.report["dropped"].values())
  assert cut.report["prompts_cut"] == (after[:, 0] < before[:, 0]).sum() > 0
  assert cut.report["responses_cut"] == (after[:, 1:] < before[:, 1:]).sum() > 0
  last = np.stack([cut.ids[cut.offsets[1:] - 1], cut.ids[cut.offsets[1:] - 1 - after[:, 2]]])
  assert cut.report["responses_without_eos"] == (last != tokenizer.eos_token_id).sum()
  assert cut.report["changed_by_tokenizer"] == 0 < cut.report["checked"]
  assert (after[:, 0] + after[:, 1:].max(axis=1)).max() <= 256
  assert cut.report["lengths"]["prompt"]["100"] == after[:, 0].max()
  assert cut.report["lengths"]["comparison"]["50"] == np.percentile(after.sum(axis=1), 50, method="nearest")


def test_text_that_the_tokenizer_changes_is_counted(load, comparisons):
  tokenizer = load("gpt2")
  tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
  data = comparisons(*({"prompt": prompt, "responses": [" way"]} for prompt in ("Which", "this")))
  report = tokenization.tokenize(data, tokenizer, truncation=ROOMY).report
  assert (report["checked"], report["changed_by_tokenizer"]) == (2, 1)


def test_the_cache_gives_the_same_arrays_memory_mapped(both, hh, tmp_path):
  fresh, stored, again = (
    tokenization.tokenize(hh, both["gpt2"], truncation=ROOMY, cache_dir=folder)
    for folder in (None, tmp_path, tmp_path)
  )
  assert isinstance(again.ids, np.memmap) and not isinstance(fresh.ids, np.memmap)
  for name in ("lengths", "ids", "offsets", "example"):
    np.testing.assert_array_equal(getattr(again, name), getattr(fresh, name))
  assert again.report == stored.report == fresh.report
  assert again.fingerprint == stored.fingerprint == fresh.fingerprint
  assert len(list(tmp_path.iterdir())) == 1


def test_of_two_at_once_one_tokenizes_and_the_other_reads_what_it_made(
  both, hh, tmp_path, monkeypatch, capsys
):
  calls, tokenize = [], tokenization._tokenize

  def slowly(*args):
    calls.append(args)
    time.sleep(0.5)
    return tokenize(*args)

  monkeypatch.setattr(tokenization, "_tokenize", slowly)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    one, other = pool.map(
      lambda _: tokenization.tokenize(hh, both["gpt2"], truncation=ROOMY, cache_dir=tmp_path), range(2)
    )
  assert len(calls) == 1 and one.fingerprint == other.fingerprint
  np.testing.assert_array_equal(one.ids, other.ids)
  assert f"waiting for the token cache {tmp_path}/" in capsys.readouterr().out


def test_what_a_killed_process_left_of_an_entry_is_removed_aloud_and_of_others_is_not(
  both, comparisons, tmp_path, capsys
):
  data = comparisons({"prompt": "Q", "responses": [" a", " b"]})
  tokenize = lambda: tokenization.tokenize(data, both["gpt2"], truncation=ROOMY, cache_dir=tmp_path)
  tokenize()
  (folder,) = (path for path in tmp_path.iterdir() if (path / "ids.npy").exists())
  left, others = (tmp_path / f"unfinished-{name}-x" for name in (folder.name[:16], "0" * 16))
  for path in (left, others):
    path.mkdir()
    (path / "ids.npy").write_bytes(b"half")
  shutil.rmtree(folder)
  tokenize()
  assert not left.exists() and others.exists()
  assert f"removed {left}" in capsys.readouterr().err


def test_a_damaged_cache_is_named_and_made_again(both, comparisons, tmp_path, capsys):
  data = comparisons(*({"prompt": f"Q{i}", "responses": [" a", " b c"]} for i in range(20)))
  tokenize = lambda folder: tokenization.tokenize(data, both["gpt2"], truncation=ROOMY, cache_dir=folder)
  want = tokenize(None)
  cache = tmp_path / "tokenized"
  tokenize(cache)
  (folder,) = (path for path in cache.iterdir() if path.is_dir())  # beside it is its lock
  damages = {
    "lengths.npy": "flip",
    "ids.npy": "flip",
    "offsets.npy": "cut",
    "example.npy": "empty",
    "prompts.npy": "flip",
    "report.json": "delete",
    "digests.json": "flip",
  }
  assert damages.keys() == {file.name for file in folder.iterdir()}
  for name, damage in damages.items():
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).unlink()
    if damage != "delete":
      (folder / name).write_bytes({"flip": content, "cut": content[:-3], "empty": b""}[damage])
    got = tokenize(cache)
    told = capsys.readouterr().err
    assert str(folder / name) in told and "it is made again" in told
    for each in ("lengths", "ids", "offsets", "example", "kept_prompts"):
      np.testing.assert_array_equal(getattr(got, each), getattr(want, each))
    assert got.report == want.report
  tokenize(cache)
  assert not capsys.readouterr().err
  (folder / "digests.json").unlink()  # as an earlier version has left it
  tokenize(cache)
  assert f"{folder} has no digests: it is made again" in capsys.readouterr().err


def test_the_fingerprint_is_of_the_ids_and_the_cache_of_what_they_are_made_from(
  both, load, chat, comparisons, tmp_path
):
  data, other = (comparisons({"prompt": "Q", "responses": [" A", text]}) for text in (" b", " c"))

  def of(data, tokenizer, truncation=ROOMY, count=2, **reading):
    tokens = tokenization.tokenize(
      data,
      tokenizer,
      truncation=truncation,
      num_responses=count,
      cache_dir=tmp_path / "cache",
      reading=Reading(**reading),
    )
    return tokens.fingerprint, len(list((tmp_path / "cache").iterdir()))

  lower = load("gpt2")
  lower.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
  first, _ = of(data, both["gpt2"])
  others = [
    of(other, both["gpt2"]),
    of(data, both["llama2"]),
    of(data, chat),
    of(data, both["gpt2"], count=1),
    of(data, lower),
    of(data, both["gpt2"], Truncation(2, 1, "end")),
  ]
  assert len({first, *(fingerprint for fingerprint, _ in others)}) == 1 + len(others)
  assert [folders for _, folders in others] == list(range(2, 2 + len(others)))
  folders = 1 + len(others)
  for changes in (
    dict(truncation=dataclasses.replace(ROOMY, keep="start")),
    dict(score="last"),
    dict(special_tokens="parse"),
    dict(arguments={"a": 1}),
  ):
    folders += 1
    assert of(data, both["gpt2"], **changes) == (first, folders)
  assert of(data, both["gpt2"], date="2024-07-26") == (first, folders)  # no template asks for it


def test_a_full_disk_leaves_nothing_half_written(data_folder, tmp_path):
  code = """
import resource, sys
from dpojax.data import builders, tokenization
from dpojax.data.examples import DataError, Example
class Memory(list):
  fingerprint = "memory"
tokenizer = tokenization.load_tokenizer(sys.argv[1] + "/tokenizers/gpt2")
data = Memory(Example(f"Q{i}", (" a" * 50, " b")) for i in range(1000))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
  tokenization.tokenize(
      data, tokenizer, truncation=tokenization.Truncation(512, 256, "end"), cache_dir=sys.argv[2])
except DataError as error:
  print(error)
"""
  root = pathlib.Path(__file__).parents[1]
  done = subprocess.run(
    [sys.executable, "-c", code, str(data_folder), str(tmp_path)],
    capture_output=True,
    text=True,
    cwd=root,
    timeout=120,
    env={**os.environ, "PYTHONPATH": str(root)},
  )
  assert f"could not write tokenized data to {tmp_path}" in done.stdout, done.stderr
  assert not list(tmp_path.iterdir())


def test_tokenizers_that_cannot_be_loaded_are_named(tmp_path, data_folder):
  for name in (str(tmp_path), str(tmp_path / "missing"), "nobody/has-this-tokenizer"):
    with pytest.raises(DataError, match="cannot be loaded .*give a folder with") as caught:
      tokenization.load_tokenizer(name)
    assert repr(name) in str(caught.value)
  with pytest.raises(DataError, match="config.tokenizer is empty"):
    tokenization.load_tokenizer("")
  model = (data_folder / "tokenizers" / "gpt2" / "tokenizer.json").read_bytes()
  (tmp_path / "tokenizer.json").write_bytes(model)
  (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
  with pytest.raises(DataError, match="has no EOS token"):
    tokenization.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
  "values, words",
  [
    ((8, 8, "end"), "leave room for responses"),
    ((8, 0, "end"), "leave room"),
    ((8, 4, "middle"), "'middle'; it is 'start' or 'end'"),
  ],
)
def test_impossible_truncation_is_refused(values, words):
  with pytest.raises(DataError, match=words):
    Truncation(*values)


def test_every_source_has_a_truncation_side():
  assert set(TRUNCATION_SIDE) == set(builders.BUILDERS)
  assert TRUNCATION_SIDE["hh"] == "end"
