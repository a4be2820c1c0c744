"""Files in every format give the same records, and what cannot be read is named."""

import bz2
import csv
import datetime
import decimal
import gzip
import json

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies

from dpojax.data import builders, files, hub, records
from dpojax.data.examples import DataError, Example, RecordError

PAIRS = [
  {"prompt": f'Q{i}\u2028\u0085 of, "many"\r\nlines', "chosen": f"yes {i}", "rejected": "no"}
  for i in range(3)
]


def lines(ensure_ascii=False):
  return "\n".join(json.dumps(pair, ensure_ascii=ensure_ascii) for pair in PAIRS).encode()


def table(separator=","):
  rows = [list(PAIRS[0]), *(list(pair.values()) for pair in PAIRS)]
  quoted = lambda text: '"' + text.replace('"', '""') + '"'
  return "\n".join(separator.join(map(quoted, row)) for row in rows).encode()


def parquet(rows, **schema):
  sink = pyarrow.BufferOutputStream()
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, **schema), sink)
  return sink.getvalue().to_pybytes()


CONTENTS = {
  "a.jsonl": lines(),
  "a.ascii.jsonl": lines(ensure_ascii=True),
  "a.json": json.dumps(PAIRS).encode(),
  "indented.json": json.dumps(PAIRS, indent=1, ensure_ascii=False).encode(),
  "lines.json": lines(),
  "bom.jsonl": b"\xef\xbb\xbf" + lines(),
  "bom.json": b"\xef\xbb\xbf " + json.dumps(PAIRS).encode(),
  "windows.jsonl": lines().replace(b"\n", b"\r\n") + b"\r\n\r\n",
  "array.jsonl": json.dumps(PAIRS).encode(),
  "a.csv": table(),
  "bom.csv": b"\xef\xbb\xbf" + table(),
  "a.tsv": table("\t"),
  "a.parquet": parquet(PAIRS),
}


def compressions(name, content):
  yield name, content
  if name != "a.parquet":
    yield name + ".gz", gzip.compress(content)
    yield name + ".zst", pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("name, content", [each for item in CONTENTS.items() for each in compressions(*item)])
def test_every_format_gives_the_same_records(name, content, tmp_path):
  (tmp_path / name).write_bytes(content)
  assert [record for _, record in files.read_records(str(tmp_path / name))] == PAIRS


@settings(deadline=None)
@given(strategies.lists(strategies.text(), min_size=1, max_size=4))
def test_lines_end_at_a_line_feed_alone(tmp_path_factory, texts):
  path = tmp_path_factory.mktemp("texts") / "a.jsonl"
  path.write_bytes(
    b"".join(json.dumps({"prompt": text}, ensure_ascii=False).encode() + b"\n" for text in texts)
  )
  assert [(where, record["prompt"]) for where, record in files.read_records(str(path))] == [
    (f"line {i + 1}", text) for i, text in enumerate(texts)
  ]


@settings(deadline=None)
@given(
  strategies.lists(
    strategies.lists(
      strategies.text(strategies.characters(exclude_categories=("Cs",), exclude_characters="\0")),
      min_size=2,
      max_size=2,
    ),
    min_size=1,
  )
)
def test_a_table_is_read_as_pythons_own_writer_writes_it(tmp_path_factory, rows):
  path = tmp_path_factory.mktemp("tables") / "a.csv"
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, quoting=csv.QUOTE_ALL)
    writer.writerows([["a", "b"], *rows])
  assert [list(record.values()) for _, record in files.read_records(str(path))] == rows


@pytest.mark.parametrize(
  "name, content, words",
  [
    ("a.jsonl", "a".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ("a.zst", b"plain", "is not zstd"),
    ("a.gz", b"plain", "is not gzip"),
    ("cut.gz", gzip.compress(lines() * 9)[:-12], "is cut off or damaged"),
    (
      "damaged.zst",
      pyarrow.compress(lines(), codec="zstd", asbytes=True)[:9] + b"\xff" * 99,
      "is cut off or damaged",
    ),
    ("a.parquet.gz", gzip.compress(parquet(PAIRS)), "is Parquet inside another compression; unpack it"),
    ("a.json", b'[{"prompt": "a"},', "is no JSON array (Expecting value"),
    ("a.csv", b"a,a\n1,2\n", "has two columns of one name (a, a); rename one"),
    ("a.csv", b'a,b\n"1,2\n', "line 2 is no CSV"),
  ],
)
def test_what_cannot_be_read_is_named(name, content, words, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError) as caught:
    list(files.read_records(str(tmp_path / name)))
  assert str(tmp_path / name) in str(caught.value) and words in str(caught.value)


def test_every_cut_of_a_compressed_file_is_told_apart_from_its_end(tmp_path):
  whole = lines() * 500
  for suffix, packed in (
    ("gz", gzip.compress(whole)),
    ("zst", pyarrow.compress(whole, codec="zstd", asbytes=True)),
  ):
    path = tmp_path / f"a.jsonl.{suffix}"
    for end in range(20, len(packed), 37):
      path.write_bytes(packed[:end])
      with pytest.raises(DataError, match="is cut off or damaged"):
        list(files.read_records(str(path)))


@pytest.mark.parametrize(
  "name, content, problems",
  [
    (
      "a.jsonl",
      b'{"a": 1, "a": 2}\n{"a": {"b": 1, "b": 1}}\n{"a": 1}',
      {"line 1": ("duplicate_key", '"a" stands twice'), "line 2": ("duplicate_key", '"b" stands twice')},
    ),
    (
      "a.json",
      b'[{"a": 1, "a": 2}, {"a": [{"b": 1, "b": 1}]}, {"a": 1}]',
      {
        "element 1": ("duplicate_key", '"a" stands twice'),
        "element 2": ("duplicate_key", '"b" stands twice'),
      },
    ),
    (
      "a.csv",
      b"a\n1,2\n\xff\n5\n",
      {"row 1": ("wrong_columns", "2 fields under 1 names; quote"), "row 2": ("broken_utf8", "not UTF-8")},
    ),
  ],
)
def test_a_record_that_lost_something_is_an_error_of_its_own(name, content, problems, tmp_path):
  (tmp_path / name).write_bytes(content)
  found = dict(files.read_records(str(tmp_path / name)))
  assert len(found) == 3 and not isinstance(found.popitem()[1], RecordError)
  for where, (reason, words) in problems.items():
    assert found[where].reason == reason and words in str(found[where])


def test_lists_in_lines_are_records_and_no_array(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b'[1]\n{"prompt": "a"}\n')
  assert [record for _, record in files.read_records(str(tmp_path / "a.jsonl"))] == [[1], {"prompt": "a"}]


ASKED = [{"role": "user", "content": "Q"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def prepared(tmp_path, name, content, **given):
  (tmp_path / name).write_bytes(content)
  return builders.prepare("jsonl", path=tmp_path / name, data_dir=tmp_path / "prepared", **given)


def test_nulls_by_which_parquet_fills_its_objects_are_left_out(tmp_path):
  answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
  other = {"role": "assistant", "content": "a"}
  data = prepared(
    tmp_path,
    "a.parquet",
    parquet([{"prompt": ASKED, "chosen": [answer], "rejected": [other], "tools": None, "score": None}]),
  )
  assert list(data) == [Example(ASKED, ([answer], [other]))]
  assert data.report == {"used": 1, "forms": {"preference": 1}, "ignored_keys": {"score": 1}}


def test_what_json_lacks_is_dropped_where_no_template_reads_it(tmp_path):
  when, paid = datetime.datetime(2024, 1, 2), decimal.Decimal("1.5")
  row = {
    "prompt": [ASKED[0] | {"timestamp": when, "paid": paid, "raw": b"a"}],
    "chosen": "a",
    "rejected": "b",
    "at": when,
  }
  data = prepared(tmp_path, "a.parquet", parquet([row, row]))
  assert list(data) == 2 * [
    Example(ASKED, ([{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]))
  ]
  assert data.report["dropped_values"] == {"timestamp": 2, "paid": 2, "raw": 2}
  assert data.report["ignored_keys"] == {"at": 2}


def test_times_that_python_has_not_are_dropped_like_others(tmp_path):
  message = pyarrow.struct(
    {
      "role": pyarrow.string(),
      "content": pyarrow.string(),
      "at": pyarrow.timestamp("ns", "Mars/Base"),
      "took": pyarrow.duration("ns"),
      "clock": pyarrow.time64("ns"),
    }
  )
  schema = pyarrow.schema(
    {"prompt": pyarrow.large_list(message), "chosen": pyarrow.large_string(), "rejected": pyarrow.string()}
  )
  asked = ASKED[0] | {"at": 1_704_164_645_123_456_789, "took": 1, "clock": 3}
  data = prepared(
    tmp_path, "a.parquet", parquet([{"prompt": [asked], "chosen": "a", "rejected": "b"}], schema=schema)
  )
  assert data[0].prompt == ASKED
  assert data.report["dropped_values"] == {"at": 1, "took": 1, "clock": 1}


def test_a_row_that_cannot_be_read_leaves_the_others(tmp_path):
  texts = pyarrow.array([b"P", b"\xff", b"Q"])
  sink = pyarrow.BufferOutputStream()
  pyarrow.parquet.write_table(
    pyarrow.table(
      {
        "prompt": pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers()),
        "chosen": ["a"] * 3,
        "rejected": ["b"] * 3,
      }
    ),
    sink,
  )
  data = prepared(tmp_path, "a.parquet", sink.getvalue().to_pybytes())
  assert [example.prompt for example in data] == ["P", "Q"]
  assert (
    data.report["unreadable_value"] == 1 and "a.parquet row 2: a value" in data.problems["unreadable_value"]
  )


@settings(deadline=None, max_examples=200)
@given(
  strategies.sampled_from(["a.parquet", "a.jsonl.zst", "a.jsonl.gz", "a.csv", "a.json"]), strategies.data()
)
def test_damage_is_told_and_never_a_traceback(tmp_path_factory, name, data):
  content = bytearray(dict(each for item in CONTENTS.items() for each in compressions(*item))[name])
  for _ in range(data.draw(strategies.integers(1, 4))):
    content[data.draw(strategies.integers(0, len(content) - 1))] ^= 1 << data.draw(strategies.integers(0, 7))
  path = tmp_path_factory.mktemp("damaged") / name
  path.write_bytes(content[: data.draw(strategies.integers(1, len(content)))])
  try:
    for _, record in files.read_records(str(path)):
      assert isinstance(record, (dict, RecordError)) or name == "a.json"
  except DataError as error:
    assert str(path) in str(error)


@pytest.mark.parametrize(
  "row, words",
  [
    (
      {"prompt": [{"role": "user", "content": "Q", "name": datetime.date(2024, 1, 2)}]},
      '"prompt"[0]["name"] holds a value of type date, which JSON lacks; write it as text',
    ),
    ({"prompt": [{"role": "user", "content": b"Q"}]}, '"prompt"[0]["content"] holds a value of type bytes'),
    ({"prompt": datetime.datetime(2024, 1, 2)}, '"prompt" is a value of type datetime, not a string'),
    ({"prompt": ASKED, "tools": [{"since": datetime.datetime(2024, 1, 2)}]}, '"tools" holds what JSON lacks'),
  ],
)
def test_what_json_lacks_is_an_error_of_its_row_where_a_template_reads_it(row, words, tmp_path):
  content = parquet([row | {"chosen": "a", "rejected": "b"}])
  with pytest.raises(DataError) as caught:
    prepared(tmp_path, "a.parquet", content, on_error="raise")
  assert f"{tmp_path}/a.parquet row 1: {words}" in str(caught.value)


def test_everything_a_template_may_read_comes_back_from_disk(tmp_path):
  asked = [{"role": "user", "content": "Q", "name": "é", "of its own": {"x": [1.5, None, True]}}]
  answer = [
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "content": {"rain": 2}},
    {"role": "assistant", "content": "a"},
  ]
  record = {
    "prompt": asked,
    "completion": answer,
    "label": False,
    "tools": [{"type": "function", "z": 1, "a": 2}],
    "chat_template_kwargs": {"enable_thinking": False},
  }
  (example,) = prepared(tmp_path, "a.jsonl", json.dumps(record).encode())
  assert example == Example(asked, ([], answer), record["tools"], record["chat_template_kwargs"])
  assert list(example.tools[0]) == ["type", "z", "a"]  # in which order a template writes them


def test_the_report_lists_forms_keys_changes_and_the_first_problem_of_each_reason(tmp_path):
  pair = {"prompt": "Q", "chosen": "a", "rejected": "b", "score": 1}
  messages = {
    "messages": [*ASKED, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
    "id": 1,
  }
  content = [
    pair,
    pair,
    messages,
    pair | {"rejected": "a"},
    pair | {"images": ["a"]},
    pair | {"images": ["b"]},
  ]
  data = prepared(tmp_path, "a.jsonl", "\n".join(map(json.dumps, content)).encode())
  assert data.report == {
    "used": 3,
    "identical_responses": 1,
    "media": 2,
    "forms": {"preference": 2, "conversation": 1},
    "ignored_keys": {"score": 2, "id": 1},
    "converted": {"text_parts_joined": 1},
  }
  assert data.problems == {
    "identical_responses": f'{tmp_path}/a.jsonl line 4: "chosen" and "rejected" are the same text',
    "media": f'{tmp_path}/a.jsonl line 5: "images" holds images, and dpojax trains on text alone; '
    "drop the record or the key",
  }


def test_a_form_that_is_named_gives_other_data_than_one_recognised(tmp_path):
  content = json.dumps({"prompt": "P", "question": "Q", "chosen": "a", "rejected": "b"}).encode()
  found, named = prepared(tmp_path, "a.jsonl", content), prepared(tmp_path, "a.jsonl", content, form="orca")
  assert found[0].prompt == "P" and named[0].prompt == ASKED
  assert found.fingerprint != named.fingerprint
  with pytest.raises(DataError, match="data.form is 'orc' .*it is one of openai"):
    prepared(tmp_path, "a.jsonl", content, form="orc")
  with pytest.raises(DataError, match="data.form is 'orca' and data.source 'hh'"):
    builders.prepare("hh", path=tmp_path / "a.jsonl", data_dir=tmp_path, form="orca")


def test_the_same_bytes_under_another_kind_of_name_are_read_as_that_kind(tmp_path):
  content = b"prompt,chosen,rejected\nQ,a,b\n"
  assert prepared(tmp_path, "a.csv", content)[0] == Example("Q", ("a", "b"))
  with pytest.raises(DataError, match="no usable record"):
    prepared(tmp_path, "a.jsonl", content)


# The hub.


def folder_of(tmp_path, *names, card=""):
  for name in names:
    path = tmp_path / "set" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(parquet([{"prompt": name, "chosen": "a", "rejected": "b"}]))
  if card:
    (tmp_path / "set" / "README.md").write_text(f"---\n{card}---\n# A set\n")
  return tmp_path / "set"


SHARDED = (
  "data/train-00000-of-00002.parquet",
  "data/train-00001-of-00002.parquet",
  "data/test-00000-of-00001.parquet",
)
BINARIZED = ("data/train_prefs-00000-of-00001-cb7a.parquet", "data/train_sft-00000-of-00001-ab1.parquet")
CARD = """configs:
- config_name: easy
  data_files:
  - split: train
    path: a/*
- config_name: hard
  data_files:
  - split: train
    path: [b/one.parquet]
  - split: held
    path: b/two.parquet
"""


@pytest.mark.parametrize(
  "names, card, split, found",
  [
    (SHARDED, "", "", SHARDED[:2]),
    (SHARDED, "", ":test", SHARDED[2:]),
    (BINARIZED, "", ":train_sft", BINARIZED[1:]),
    (("train.parquet", "test.parquet"), "", "", ("train.parquet",)),
    (("some.parquet",), "", "", ("some.parquet",)),
    (
      ("default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"),
      "",
      "",
      ("default/train/0000.parquet", "default/train/0001.parquet"),
    ),
    (
      ("a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"),
      "",
      ":b/train",
      ("b/train-00000-of-00001.parquet",),
    ),
    (("a/x.parquet", "b/one.parquet", "b/two.parquet"), CARD, ":easy/train", ("a/x.parquet",)),
    (("a/x.parquet", "b/one.parquet", "b/two.parquet"), CARD, ":held", ("b/two.parquet",)),
  ],
)
def test_a_split_is_the_files_that_the_hubs_layout_says(names, card, split, found, tmp_path):
  folder = folder_of(tmp_path, *names, card=card)
  assert files.local_files(f"hub:{folder}{split}") == [str(folder / name) for name in found]


@pytest.mark.parametrize(
  "names, card, split, words",
  [
    (SHARDED, "", ":dev", "has no split 'dev'; it has test, train: give hub:.*/set:SPLIT"),
    (BINARIZED, "", "", "has no split 'train'; it has train_prefs, train_sft"),
    (
      ("a/x.parquet", "b/one.parquet"),
      CARD,
      "",
      "split of several configs, easy/train, hard/train; give hub:.*CONFIG/SPLIT",
    ),
    ((), "license: mit\n", "", "has no Parquet files"),
    (
      SHARDED[1:2],
      "",
      "",
      "has 1 of the 2 files that data/train-00001-of-00002.parquet is one of; fetch the others",
    ),
    (("a.parquet",), "configs: [1]\n", "", "README.md cannot be read"),
  ],
)
def test_a_split_that_is_not_there_is_answered_with_those_that_are(names, card, split, words, tmp_path):
  (tmp_path / "set").mkdir()
  with pytest.raises(DataError, match=words):
    files.local_files(f"hub:{folder_of(tmp_path, *names, card=card)}{split}")


def test_a_name_on_the_hub_is_fetched_file_by_file_or_as_it_was_converted(tmp_path, monkeypatch):
  folder = folder_of(tmp_path, *SHARDED)
  fetched, revisions = [], {"main": ["README.md", "a.jsonl"], hub.CONVERTED: sorted(SHARDED)}

  def list_repo_files(self, repo_id, *, repo_type, revision):
    assert (repo_id, repo_type) == ("org/name", "dataset")
    return revisions[revision]

  def download(*, repo_id, repo_type, revision, filename):
    fetched.append((revision, filename))
    return str(folder / filename)

  monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  assert files.local_files("hub:org/name:test") == [str(folder / SHARDED[2])]
  assert fetched == [(hub.CONVERTED, SHARDED[2])]
  revisions["main"] = [name for name in SHARDED]
  assert files.local_files("hub:org/name") == [str(folder / name) for name in SHARDED[:2]]
  assert fetched[1:] == [("main", name) for name in SHARDED[:2]]


def test_what_was_fetched_before_is_read_without_a_network(tmp_path, monkeypatch):
  folder = folder_of(tmp_path, *SHARDED)
  snapshot = lambda **given: str(folder) if given["local_files_only"] else pytest.fail("it asked the network")
  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
  assert files.local_files("hub:org/name:test") == [str(folder / SHARDED[2])]  # the suite is offline


def test_a_hub_out_of_reach_names_the_fix(tmp_path):
  with pytest.raises(
    DataError, match="hub:org/no-such-set cannot be fetched from the hub .*folder: hub:FOLDER"
  ):
    files.local_files("hub:org/no-such-set")
  with pytest.raises(DataError, match="neither a folder nor a name on the hub; give hub:ORG/NAME"):
    files.local_files("hub:nowhere")
  with pytest.raises(DataError, match="is a folder; name its files, .*or hub:"):
    files.local_files(tmp_path)


def test_a_split_of_the_hub_is_prepared_as_its_files_are(tmp_path):
  folder = folder_of(tmp_path, *SHARDED)
  data = builders.prepare("jsonl", path=f"hub:{folder}", data_dir=tmp_path / "prepared")
  assert [example.prompt for example in data] == list(SHARDED[:2])
  test = builders.prepare("jsonl", path=f"hub:{folder}", data_dir=tmp_path / "prepared", split="test")
  assert [example.prompt for example in test] == [SHARDED[2]]
  ((number, example),) = records.read_file(f"hub:{folder}:test", records.parse_prompt)
  assert (number, example.prompt) == (0, SHARDED[2])


def test_an_unknown_compression_is_no_record(tmp_path):
  with pytest.raises(DataError, match="no usable record in .*broken_"):
    prepared(tmp_path, "a.jsonl.bz2", bz2.compress(lines()))
