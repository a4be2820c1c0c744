"""Data sets are prepared once, from what is there, with every unusable record accounted for."""

import concurrent.futures
import functools
import gzip
import http.server
import json
import os
import pathlib
import pickle
import subprocess
import sys
import threading

import pyarrow
import pyarrow.parquet
import pytest

from dpojax.data import builders
from dpojax.data.builders import base, hh, imdb, shp, stack_exchange, tldr
from dpojax.data.examples import DataError, Example
from tests import made_data

TURN = "\n\nHuman: {}\n\nAssistant:"


def plain(i):
  return {"prompt": f"Q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"}


def write(path, *records):
  """Writes records as JSON lines; bytes and strings as they are."""
  opened = gzip.open if path.suffix == ".gz" else open
  with opened(path, "wb") as file:
    for record in records:
      line = record if isinstance(record, (bytes, str)) else json.dumps(record)
      file.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
  return str(path)


@pytest.fixture
def prepare(tmp_path):
  return functools.partial(builders.prepare, data_dir=tmp_path / "prepared")


@pytest.fixture
def served(tmp_path):
  """A folder, and the address a server offers it under."""
  folder = tmp_path / "served"
  folder.mkdir()

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  handler = functools.partial(Quiet, directory=folder)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def python(code, *arguments, **environment):
  """Runs code in a new process from the project's root."""
  root = pathlib.Path(__file__).parents[1]
  return subprocess.run(
    [sys.executable, "-c", code, *map(str, arguments)],
    capture_output=True,
    text=True,
    cwd=root,
    timeout=120,
    env={**os.environ, "PYTHONPATH": str(root), **environment},
  )


@pytest.fixture(scope="session")
def counts(data_folder):
  """The HH dialogues of the data folder, by what becomes of them."""
  published = {"used": 2303, "empty_response": 4, "different_prompts": 5}
  return made_data.HH if data_folder.name == made_data.NAME else published


def test_hh_has_a_prompt_and_two_responses_but_in_nine_records(prepare, data_folder, counts):
  data = prepare("hh", path=data_folder / "hh_harmless_base_test.jsonl.gz")
  assert data.report == counts
  assert len(data) == counts["used"]
  for example in data:
    assert example.prompt.startswith("\n\nHuman:") and example.prompt.endswith("\n\nAssistant:")
    assert all(response.startswith(" ") and response.strip() for response in example.responses)
    assert "\n\nAssistant:" not in "".join(example.responses)


def test_every_form_comes_back_from_disk_as_it_was_parsed(prepare, tmp_path):
  user, yes, no = (
    {"role": role, "content": text}
    for role, text in (("user", "Où?"), ("assistant", "Là 🧭"), ("assistant", "\0"))
  )
  path = write(
    tmp_path / "a.jsonl",
    plain(0),
    {"chosen": [user, yes], "rejected": [user, no]},
    {"prompt": "", "responses": ["a\r\n", " b", "c", "d"]},
  )
  data = prepare("jsonl", path=path)
  assert list(data) == [
    Example("Q0", ("yes 0", "no 0")),
    Example([user], ([yes], [no])),
    Example("", ("a\r\n", " b", "c", "d")),
  ]
  assert data[-1] == data[2]
  with pytest.raises(IndexError, match="comparison 3 of 3"):
    data[3]


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(prepare, tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(plain(i)) for i in (0, 1)).encode())
  assert [example.prompt for example in prepare("jsonl", path=path)] == ["Q0", "Q1"]


def test_a_second_call_reads_what_the_first_prepared(prepare, tmp_path):
  path = write(tmp_path / "a.jsonl", plain(0), "{", plain(1))
  first = prepare("jsonl", path=path)
  files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*array_record*")}
  os.rename(path, tmp_path / "b.jsonl")
  second = prepare("jsonl", path=tmp_path / "b.jsonl")
  assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*array_record*")} == files
  assert second.report == first.report == {"used": 2, "broken_json": 1, "forms": {"preference": 2}}
  assert second.fingerprint == first.fingerprint
  assert list(second) == list(first)


def test_files_hold_so_many_each_in_the_order_of_the_source_and_are_read_in_any(
  prepare, tmp_path, monkeypatch
):
  monkeypatch.setattr(base, "SHARD", 4)
  data = prepare("jsonl", path=write(tmp_path / "a.jsonl", *map(plain, range(10))))
  assert sorted(file.name[-15:] for file in (tmp_path / "prepared").rglob("*array_record*")) == [
    f"-0000{i}-of-00003" for i in range(3)
  ]
  prompts = [f"Q{i}" for i in range(10)]
  assert [example.prompt for example in data] == [data[i].prompt for i in range(10)] == prompts
  assert [example.prompt for example in data[3:9]] == prompts[3:9] and data[4:4] == []
  there = pickle.loads(pickle.dumps(data))  # as processes that tokenize get it
  assert [example.prompt for example in there[8:20]] == prompts[8:]


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "empty"])
def test_damaged_prepared_data_are_named_and_prepared_again(damage, prepare, tmp_path, capsys):
  """Whichever file it is."""
  path = write(tmp_path / "a.jsonl", *map(plain, range(200)), "{")
  want = prepare("jsonl", path=path)
  (folder,) = {file.parent for file in (tmp_path / "prepared").rglob("*array_record*")}
  names = sorted(file.name for file in folder.iterdir())
  assert "digests.json" in names and len(names) == 5
  for name in names:
    file = folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    if damage == "delete":
      file.unlink()
    else:
      file.write_bytes({"flip": content, "cut": content[:-3], "empty": b""}[damage])
    got = prepare("jsonl", path=path)
    told = capsys.readouterr().err
    assert "it is made again" in told and (str(file) in told or damage == "delete" and name == "digests.json")
    assert (list(got), got.report, got.fingerprint) == (list(want), want.report, want.fingerprint)
    assert list(prepare("jsonl", path=path)) == list(want) and not capsys.readouterr().err


def test_a_changed_file_is_prepared_again(prepare, tmp_path):
  first = prepare("jsonl", path=write(tmp_path / "a.jsonl", plain(0)))
  second = prepare("jsonl", path=write(tmp_path / "a.jsonl", plain(1)))
  assert (first[0].prompt, second[0].prompt) == ("Q0", "Q1")
  assert first.fingerprint != second.fingerprint


def test_several_files_are_given_as_a_list_or_with_commas_or_as_a_glob(prepare, tmp_path):
  paths = [write(tmp_path / "a, b.jsonl", plain(0)), write(tmp_path / "c.jsonl.gz", plain(1))]
  assert [example.prompt for example in prepare("jsonl", path=paths)] == ["Q0", "Q1"]
  assert len(prepare("jsonl", path=tmp_path / "*.jsonl*")) == 2
  assert len(prepare("jsonl", path=paths[0])) == 1
  assert len(prepare("jsonl", path=f"{paths[1]}, {paths[1]}")) == 2


def test_unusable_records_are_counted_by_reason(prepare, tmp_path):
  path = write(
    tmp_path / "a.jsonl",
    plain(0),
    "",
    "not json",
    b'{"prompt": "\xff"}',
    "[1]",
    "[" * 100_000,
    {**plain(1), "chosen": " "},
    {**plain(2), "rejected": "yes 2"},
    {"prompt": "Q"},
    {**plain(3), "prompt": 3},
    plain(4),
  )
  assert prepare("jsonl", path=path).report == {
    "used": 2,
    "broken_json": 2,
    "broken_utf8": 1,
    "wrong_type": 2,
    "empty_response": 1,
    "identical_responses": 1,
    "missing_key": 1,
    "forms": {"preference": 2},
  }


def test_raise_names_file_line_and_fix_even_after_a_skipping_run(prepare, tmp_path):
  path = write(tmp_path / "a.jsonl", plain(0), plain(1), "", {**plain(2), "chosen": ""}, "{")
  message = (
    rf"^data.path {path} line 4: \"chosen\" is empty; drop the record or set "
    r"data.on_error='skip'$"
  )
  with pytest.raises(DataError, match=message):
    prepare("jsonl", path=path, on_error="raise")
  assert not list(tmp_path.rglob("*array_record*"))
  assert len(prepare("jsonl", path=path)) == 2
  with pytest.raises(DataError, match=message):
    prepare("jsonl", path=path, on_error="raise")


def test_no_usable_record_is_an_error_with_the_counts(prepare, tmp_path):
  path = write(tmp_path / "a.jsonl", {"text": "a"}, "{")
  with pytest.raises(DataError, match="no usable record in .*broken_json 1, missing_key 1, used 0"):
    prepare("jsonl", path=path)
  with pytest.raises(DataError, match="no usable record"):
    prepare("jsonl", path=write(tmp_path / "empty.jsonl"))


def test_unusable_files_are_named(prepare, tmp_path):
  whole = pathlib.Path(write(tmp_path / "a.jsonl.gz", *map(plain, range(99)))).read_bytes()
  cases = {
    "missing.jsonl": (None, "no such file"),
    "*.parquet": (None, "no such file"),
    "plain.jsonl.gz": (b'{"prompt": "Q"}', "is not gzip"),
    "cut.jsonl.gz": (whole[:-20], "is cut off or damaged"),
    "bad.jsonl.gz": (whole[:100] + b"\0\0\0\0" + whole[104:], "is cut off or damaged"),
    "bad.parquet": (b"PAR1 and nothing else", "is cut off or damaged"),
    "": (None, "is a folder"),
  }
  for name, (content, words) in cases.items():
    if content is not None:
      (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
      prepare("jsonl", path=str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_unknown_names_are_answered_with_the_known_ones(prepare, tmp_path):
  with pytest.raises(DataError, match="'hhh'; it is one of hh, imdb, jsonl, shp, stack_exchange, tldr"):
    prepare("hhh")
  with pytest.raises(DataError, match="'harmles'; hh has all, harmless-base, helpful-base"):
    prepare("hh", config="harmles")
  with pytest.raises(DataError, match="set data.path"):
    prepare("jsonl")
  with pytest.raises(DataError, match="data.on_error is 'ignore'"):
    prepare("jsonl", path=write(tmp_path / "a.jsonl", plain(0)), on_error="ignore")


def test_preparing_and_reading_import_no_tensorflow_and_no_jax(tmp_path, data_folder, counts):
  poison = tmp_path / "poison" / "tensorflow"
  poison.mkdir(parents=True)
  (poison / "__init__.py").write_text("raise AssertionError('tensorflow was imported')")
  code = """
import sys
sys.path.insert(0, sys.argv[3])
from dpojax.data import builders, tokenization
path = sys.argv[1] + "/hh_harmless_base_test.jsonl.gz"
data = builders.prepare("hh", path=path, data_dir=sys.argv[2])
tokenizer = tokenization.load_tokenizer(sys.argv[1] + "/tokenizers/gpt2")
truncation = tokenization.Truncation(512, 256, "end")
tokenized = tokenization.tokenize(data, tokenizer, truncation=truncation)
loaded = [m for m in ("tensorflow", "jax") if m in sys.modules]
print(len(data), len(data[0].responses), len(tokenized), loaded)
"""
  done = python(code, data_folder, tmp_path / "prepared", tmp_path / "poison")
  assert done.stdout == "{used} 2 {used} []\n".format(**counts), done.stderr
  assert done.stderr == ""


def test_what_a_killed_process_leaves_behind_is_not_used(prepare, tmp_path):
  path = write(tmp_path / "a.jsonl", *map(plain, range(20_000)))
  code = """
import os, pathlib, signal, sys, threading, time
from dpojax.data import builders
def kill():
  while not any("incomplete" in str(p) for p in pathlib.Path(sys.argv[2]).rglob("*")):
    time.sleep(0.001)
  os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill).start()
builders.prepare("jsonl", path=sys.argv[1], data_dir=sys.argv[2])
"""
  assert python(code, path, tmp_path / "prepared").returncode == -9
  assert list((tmp_path / "prepared").rglob("incomplete*"))
  assert len(prepare("jsonl", path=path)) == 20_000


def test_two_processes_that_prepare_at_once_both_get_the_data(prepare, tmp_path):
  path = write(tmp_path / "a.jsonl", *map(plain, range(5_000)))
  code = """
import os, sys, time
from dpojax.data import builders
open(sys.argv[3], "w").close()
while len(os.listdir(os.path.dirname(sys.argv[3]))) < 2:
  time.sleep(0.001)
print(len(builders.prepare("jsonl", path=sys.argv[1], data_dir=sys.argv[2])))
"""
  (tmp_path / "started").mkdir()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    both = list(
      pool.map(lambda name: python(code, path, tmp_path / "prepared", tmp_path / "started" / name), "ab")
    )
  assert [done.stdout for done in both] == ["5000\n"] * 2, both[0].stderr + both[1].stderr
  assert not list((tmp_path / "prepared").rglob("incomplete*"))


def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(tmp_path):
  path = write(tmp_path / "a.jsonl", *(plain(str(i) * 500) for i in range(2_000)))
  code = """
import resource, sys
from dpojax.data import builders
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
  builders.prepare("jsonl", path=sys.argv[1], data_dir=sys.argv[2])
except builders.DataError as error:
  print(error)
"""
  done = python(code, path, tmp_path / "prepared")
  assert f"could not write prepared data to {tmp_path / 'prepared'}" in done.stdout, done.stderr
  assert "set data.cache_dir to a folder with room" in done.stdout
  assert not list((tmp_path / "prepared").rglob("*record*"))


def test_a_data_dir_that_is_a_file_is_named(prepare, tmp_path):
  path = write(tmp_path / "a.jsonl", plain(0))
  with pytest.raises(DataError, match="could not write prepared data to .*a.jsonl"):
    prepare("jsonl", path=path, data_dir=path)


def test_without_a_network_the_error_says_which_files_to_bring(prepare, monkeypatch):
  monkeypatch.setattr(hh, "URL", "http://127.0.0.1:9/hh-rlhf")
  with pytest.raises(DataError, match=r"cannot be downloaded .*train.jsonl.gz.* set data.path"):
    prepare("hh", config="harmless-base")


def test_a_published_split_is_downloaded_once(prepare, served, monkeypatch):
  folder, url = served
  monkeypatch.setattr(hh, "URL", url)
  (folder / "harmless-base").mkdir()
  for split, answers in (("train", "ab"), ("test", "cd")):
    dialogues = [TURN.format(split) + f" {text}" for text in answers]
    write(
      folder / "harmless-base" / f"{split}.jsonl.gz",
      dict(zip(("chosen", "rejected"), dialogues)),
      {"chosen": dialogues[0]},
    )
  train = prepare("hh", config="harmless-base")
  assert list(train) == [Example(TURN.format("train"), (" a", " b"))]
  assert train.report == {"used": 1, "missing_key": 1}
  monkeypatch.setattr(hh, "URL", "http://127.0.0.1:9")
  test = prepare("hh", config="harmless-base", split="test")
  assert list(test) == [Example(TURN.format("test"), (" c", " d"))]
  assert test.fingerprint != train.fingerprint
  with pytest.raises(DataError, match="hh has no split 'validation'; it has test, train"):
    prepare("hh", config="harmless-base", split="validation")


def test_a_file_that_is_not_there_is_named_with_its_address(prepare, served, monkeypatch):
  monkeypatch.setattr(hh, "URL", served[1])
  with pytest.raises(DataError, match=r"cannot be downloaded .*404.*harmless-base/train.jsonl.gz"):
    prepare("hh", config="harmless-base")


def test_all_of_hh_is_its_four_subsets():
  (config,) = (config for config in hh.HH.BUILDER_CONFIGS if config.name == "all")
  assert config is hh.HH.BUILDER_CONFIGS[0]
  assert {config.name for config in hh.HH.BUILDER_CONFIGS} == {"all", *hh.SUBSETS}


def test_shp_keeps_pairs_of_which_one_scores_twice_as_high(prepare, tmp_path):
  def record(a, b, labels):
    return {
      "history": "Why?",
      "human_ref_A": "A",
      "human_ref_B": "B",
      "score_A": a,
      "score_B": b,
      "labels": labels,
      "score_ratio": 1.0,
    }

  path = write(
    tmp_path / "train.json",
    record(10, 5, 1),
    record(2, 8, 0),
    record(9, 5, 1),
    {**record(9, 1, 1), "score_A": "9"},
  )
  data = prepare("shp", path=path, on_error="skip")
  assert data.report == {"used": 2, "score_ratio": 1, "wrong_type": 1}
  assert list(data) == [
    Example(TURN.format("Why?"), (" A", " B")),
    Example(TURN.format("Why?"), (" B", " A")),
  ]


def test_what_a_data_set_leaves_out_is_no_error(prepare, tmp_path):
  record = {"history": "Why?", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}
  path = write(
    tmp_path / "train.json", {**record, "score_A": 5, "score_B": 4}, {**record, "score_A": 5, "score_B": 1}
  )
  assert len(prepare("shp", path=path, on_error="raise")) == 1


def test_tldr_puts_the_chosen_summary_first(prepare, tmp_path):
  def record(choice, split="train"):
    return {
      "info": {"subreddit": "tea", "title": "T", "post": "P"},
      "split": split,
      "summaries": [{"text": " one"}, {"text": "two"}],
      "choice": choice,
    }

  path = write(tmp_path / "batch3.json", record(1), record(0, "valid1"), record(2))
  data = prepare("tldr", path=path)
  prompt = "SUBREDDIT: r/tea\nTITLE: T\nPOST: P\nTL;DR:"
  assert list(data) == [Example(prompt, (" two", " one")), Example(prompt, (" one", " two"))]
  assert data.report == {"used": 2, "wrong_type": 1}


def test_tldr_splits_as_published(prepare, served, monkeypatch):
  folder, url = served
  monkeypatch.setattr(tldr, "URL", url)
  monkeypatch.setattr(tldr, "BATCHES", (3, 4))
  for number, split in ((3, "train"), (4, "valid2")):
    write(
      folder / f"batch{number}.json",
      *(
        {
          "info": {"subreddit": "tea", "title": which, "post": "P"},
          "split": which,
          "choice": 0,
          "summaries": [{"text": "a"}, {"text": "b"}],
        }
        for which in (split, "valid1")
      ),
    )
  assert [("train" in e.prompt, len(prepare("tldr"))) for e in prepare("tldr")] == [(True, 1)]
  assert len(prepare("tldr", split="test")) == 3


def test_imdb_gives_two_to_eight_words_of_a_review_and_keeps_the_rest(prepare, tmp_path):
  reviews = [
    f"It is{'<br /><br />' if i % 2 else ' '}film number {i} of many, and{i * ' so'} good." for i in range(60)
  ]
  path = str(tmp_path / "train.parquet")
  pyarrow.parquet.write_table(
    pyarrow.Table.from_pylist([{"text": text, "label": 1} for text in (*reviews, "Very short.")]), path
  )
  data = prepare("imdb", path=path)
  assert data.report == {"used": 60, "too_short": 1}
  assert [e.prompt + e.responses[0] for e in data] == [text.replace("<br />", "\n") for text in reviews]
  assert {len(e.prompt.split()) for e in data} == set(range(2, 9))
  assert all(e.prompt == e.prompt.strip() and e.responses[0][0].isspace() for e in data)
  assert list(
    prepare("imdb", path=write(tmp_path / "same.jsonl", *({"text": text} for text in reviews)))
  ) == list(data)


def test_imdb_of_sentences_uses_all_that_are_long_enough(prepare, data_folder):
  data = prepare("imdb", path=data_folder / "movie_review_sentences.jsonl.gz", on_error="raise")
  made = data_folder.name == made_data.NAME
  sentences, least = (made_data.SENTENCES, 0.1) if made else (10662, 0.11)
  assert data.report.keys() == {"used", "too_short"} and sum(data.report.values()) == sentences
  counts = [sum(len(e.prompt.split()) == n for e in data) for n in range(2, 9)]
  assert min(counts) > least * sentences  # a seventh, less those that are too short


def test_imdb_is_downloaded_as_its_lists_say(prepare, served, monkeypatch):
  folder, url = served
  for split in ("train", "test"):
    pyarrow.parquet.write_table(
      pyarrow.Table.from_pylist([{"text": f"{split} " + "word " * 9}]), folder / f"{split}.parquet"
    )
    (folder / split).write_text(json.dumps([f"{url}/{split}.parquet"]))
  monkeypatch.setattr(imdb, "URL", url)
  for split in ("train", "test"):
    assert [e.prompt.split()[0] for e in prepare("imdb", split=split)] == [split]


def question(i, *answers):
  return {
    "qid": i,
    "question": f"<p>Why {i}?</p>",
    "answers": [{"text": f"<p>{text}</p>", "pm_score": score, "selected": False} for text, score in answers],
  }


def test_stack_exchange_pairs_answers_by_score(prepare, tmp_path):
  records = [
    question(0, ("low", 1), ("high", 7), ("tied", 1)),
    question(1, ("alone", 3)),
    question(2, ("same", 3), ("same", 4)),
  ]
  files = write(tmp_path / "a.jsonl", *records), str(tmp_path / "a.parquet")
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), files[1])
  for path in files:
    data = prepare("stack_exchange", path=path)
    assert list(data) == [
      Example(TURN.format("Why 0?"), pair) for pair in ((" high", " low"), (" high", " tied"))
    ]
    assert data.report == {"used": 2, "equal_score": 1, "too_few_responses": 1, "identical_responses": 1}


def test_stack_exchange_tests_on_one_percent_of_the_questions(prepare, served, monkeypatch):
  folder, url = served
  for part, numbers in enumerate((range(150), range(150, 300))):
    records = [question(i, ("a", 1), ("b", 2)) for i in numbers]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / f"{part}.parquet")
  (folder / "list.json").write_text(json.dumps([f"{url}/{part}.parquet" for part in (0, 1)]))
  monkeypatch.setattr(stack_exchange, "URL", f"{url}/list.json")
  train, test = ({e.prompt for e in prepare("stack_exchange", split=s)} for s in ("train", "test"))
  assert (len(train), len(test)) == (297, 3)
  assert not train & test


@pytest.mark.parametrize(
  "html, text",
  [
    ("<p>One <em>two</em> &lt;3 <a href='x'>three</a></p>\n\n<p>four</p>", "One two <3 three\n\nfour"),
    (
      "<p>a</p><pre class='x'><code>if x &lt; 1:\n  y\n</code></pre><p>b</p>",
      "a\n\n<code>if x < 1:\n  y\n</code>\n\nb",
    ),
    ("<ul><li>a</li><li>b<br>c</li></ul>", "a\n\nb\nc"),
    ("plain & simple", "plain & simple"),
    ("<p>unclosed", "unclosed"),
    ("", ""),
  ],
)
def test_html_is_stripped(html, text):
  assert stack_exchange.strip_html(html) == text


def test_every_source_can_be_asked_for_by_name():
  assert set(builders.BUILDERS) == {"hh", "imdb", "jsonl", "shp", "stack_exchange", "tldr"}
  assert len(shp.SUBREDDITS) == 18
