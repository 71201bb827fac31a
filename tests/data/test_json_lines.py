"""JSON lines: read, divided, refused by line and field; prepared by unit."""

import gzip
import json
import os
import re
import tempfile
import tracemalloc
from unittest import mock

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
import units_of_tasks

from dptrain import cli
from dptrain.data import corpus
from dptrain.tasks import json_lines
from dptrain.tasks import raw_text
import gin


@pytest.fixture(autouse=True)
def _clean_gin():
  yield
  gin.clear_config()


def register(files, **arguments):
  """Registers without seqio; returns (name, {split: [quadruples]})."""
  with mock.patch.object(raw_text, "add_task") as add_task:
    json_lines.register(str(files), **arguments)
  name, documents, splits = add_task.call_args.args
  return name, {split: list(documents(split)) for split in splits}


def write(path, objects, zipped=False):
  path.parent.mkdir(parents=True, exist_ok=True)
  text = "".join(json.dumps(each) + "\n" for each in objects).encode()
  path.write_bytes(gzip.compress(text) if zipped else text)
  return path


def rows(count, users=5, books=12):
  return [
    {"text": f"text {n} é", "who": f"user{n % users}", "book": n % books}
    for n in range(count)
  ]


def test_lines_in_plain_and_compressed_files(tmp_path):
  every = rows(20)
  write(tmp_path / "a.jsonl", every[:8])
  write(tmp_path / "deep" / "b.jsonl.gz", every[8:], zipped=True)
  _, found = register(tmp_path / "**" / "*.jsonl*", validation_fraction=0)
  assert [each[:2] for each in found["train"]] == [
    (f"a.jsonl:{n + 1}" if n < 8 else f"deep/b.jsonl.gz:{n - 7}", each["text"])
    for n, each in enumerate(every)
  ]
  # Without a field each line is a document, and nobody's.
  assert all(each[2:] == (each[0], "") for each in found["train"])


@settings(max_examples=50, deadline=None)
@given(
  texts=st.lists(st.text(), min_size=1, max_size=5), ascii_only=st.booleans()
)
def test_any_text_comes_back(texts, ascii_only):
  texts = ["first", *texts]
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "a.jsonl")
    with open(path, "w", encoding="utf-8", newline="") as file:
      for text in texts:
        told = {"id": {"text": "not this"}, "text": text}
        file.write(json.dumps(told, ensure_ascii=ascii_only) + "\n")
    _, found = register(path, validation_fraction=0)
  kept = [each for each in texts if each.strip()]
  assert [each[1] for each in found["train"]] == kept


def test_blank_lines_a_mark_and_line_ends_of_windows(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(
    b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": " "}\n{"text": "two"}'
  )
  _, found = register(path, validation_fraction=0)
  assert [each[:2] for each in found["train"]] == [
    ("a.jsonl:1", "one"),
    ("a.jsonl:5", "two"),
  ]


@pytest.mark.parametrize("split_by", ["document", "user"])
def test_documents_and_users_are_in_one_split(tmp_path, split_by):
  every = rows(300, users=40, books=60)
  write(tmp_path / "a.jsonl", every[:100])
  write(tmp_path / "b.jsonl", every[100:])
  arguments = {
    "unit_field": "who",
    "document_field": "book",
    "split_by": split_by,
    "validation_fraction": 0.3,
  }
  name, found = register(tmp_path / "*.jsonl", **arguments)
  place = {"document": 2, "user": 3}[split_by]
  train, validation = (
    {each[place] for each in found[split]} for split in found
  )
  assert train
  assert validation
  assert not train & validation
  told = sorted(each[1:] for part in found.values() for each in part)
  assert told == sorted((r["text"], str(r["book"]), r["who"]) for r in every)
  # The hash alone decides, and how far the first reading went does not.
  assert validation == {
    each for each in train | validation if raw_text.stable_fraction(each) <= 0.3
  }
  assert register(tmp_path / "*.jsonl", **arguments, read_through=False) == (
    name,
    found,
  )


def test_a_small_corpus_has_both_splits(tmp_path):
  path = write(tmp_path / "a.jsonl", rows(3))
  _, found = register(path, validation_fraction=1e-9)
  assert [len(found[split]) for split in found] == [2, 1]


def test_a_pattern_finds_the_user(tmp_path):
  urls = ["https://a.org/x", "https://a.org/y", "http://b.org/"]
  path = write(tmp_path / "a.jsonl", [{"text": "t", "url": u} for u in urls])
  arguments = {"unit_field": "url", "validation_fraction": 0}
  _, found = register(path, unit_pattern="https?://([^/]+)", **arguments)
  assert [each[3] for each in found["train"]] == ["a.org", "a.org", "b.org"]
  with pytest.raises(
    ValueError, match=r"finds no user in field 'url' of .*a\.jsonl, line 3;"
  ):
    register(path, unit_pattern="https://([^/]+)", **arguments)


def test_names_follow_the_arguments(tmp_path):
  path = write(tmp_path / "a.jsonl", rows(30))
  name, _ = register(path)
  assert re.fullmatch(r"dptrain_json_lines_[0-9a-f]{10}", name)
  others = [
    register(path, unit_field="who")[0],
    register(path, document_field="book")[0],
    register(path, validation_fraction=0.5)[0],
    register(path, encoding_errors="replace")[0],
  ]
  assert len({name, *others}) == 5
  assert register(path)[0] == name


GOOD = b'{"text": "good", "who": "ann"}\n'


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b'{"txet": "a", "who": "b"}', r"has no field 'text' \(it has 'txet', 'w"),
    (b'{"text": 3, "who": "b"}', "has a whole number in field 'text', which"),
    (b'{"text": null, "who": "b"}', "has null in field 'text', which must be"),
    (b'{"text": ["a"], "who": "b"}', r"has an array .*--gin.TEXT_FIELD=\.\.\."),
    (b'{"text": "a"}', r"has no field 'who' .*--gin\.UNIT_FIELD=\.\.\."),
    (b'{"text": "a", "who": true}', "has true or false in field 'who', which"),
    (b'{"text": "a", "who": 1.5}', "a number with a fraction in field 'who'"),
    (b'{"text": "a", "who": ""}', "has an empty field 'who', which names no"),
    (b'{"text": "a"', r"is not JSON \(Expecting ',' delimiter at column 13\)"),
    (b"plain words", r"is not JSON .* one object on each line"),
    (b'["a", "b"]', r"is an array and no JSON object; .*\{\"text\": \.\.\.\}"),
    (b"7", "is a single value and no JSON object"),
    (b"[" * 100_000, "holds JSON that cannot be read"),
    (b"1" * 5_000, "holds JSON that cannot be read"),
    (b'{"text": "caf\xe9"}', r"is not UTF-8: byte 0xe9 at offset 13; .*repl"),
    (b'{"text": "\0\0"}', "holds a NUL byte: the file is binary"),
    (
      b'{"text": "' + b"x" * 2_000 + b'"}',
      "is longer than max_bytes=1000; cut",
    ),
  ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_bad_lines_are_named(tmp_path, line, message, zipped):
  text = GOOD * 2 + line + b"\n" + GOOD
  path = tmp_path / "bad.jsonl"
  path.write_bytes(gzip.compress(text) if zipped else text)
  big = 1000 if b"xxx" in line else 10**6
  with pytest.raises(
    ValueError, match=rf"bad\.jsonl, line 3,? (\b.*)?{message}"
  ) as caught:
    register(path, unit_field="who", max_bytes=big)
  assert "\n" not in str(caught.value)
  assert len(str(caught.value)) < 400 + len(str(path))


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"text": "caf\xe9"}\n')
  _, found = register(path, encoding_errors="replace", validation_fraction=0)
  assert found["train"][0][1] == "caf\ufffd"


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", r"bad\.jsonl is empty: no line holds anything; .*leave it out"),
    (b"\n \n", r"bad\.jsonl is empty"),
    (gzip.compress(b"", mtime=0), r"bad\.jsonl is empty"),
    (
      b"\x9b\x01\xe2" * 5 + b"\xff\0" * 8,
      r"bad\.jsonl, line 1, (is not|holds a NUL)",
    ),
    (
      gzip.compress(GOOD * 9, mtime=0)[:-9],
      r"damaged or cut short: .*beyond line \d+",
    ),
    (
      gzip.compress(GOOD, mtime=0)[:10] + b"no",
      r"damaged or cut short: .*line 0 ",
    ),
    (json.dumps(rows(2), indent=1).encode(), r"line 1, is not JSON .*jq -c"),
  ],
)
def test_bad_files_are_named(tmp_path, content, message):
  write(tmp_path / "a.jsonl", rows(9))
  (tmp_path / "bad.jsonl").write_bytes(content)
  with pytest.raises(ValueError, match=message):
    register(tmp_path / "*.jsonl")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"files": ""}, "files='' names no file; give a glob such as 'corpus/**/"),
    ({"text_field": ""}, "text_field='' must be the name of a field"),
    ({"unit_field": 3}, "unit_field=3 must be the name of a field"),
    ({"split_by": "user"}, "split_by='user' needs unit_field, the field that"),
    (
      {"split_by": "line"},
      "split_by='line' must be 'record', 'document' or 'user'",
    ),
    ({"unit_pattern": "(a)"}, "unit_pattern='(a)' needs unit_field"),
    ({"unit_pattern": "a"}, "unit_pattern='a' has 0 groups"),
    ({"unit_pattern": ""}, "unit_pattern='' has 0 groups"),
    ({"validation_fraction": 1.0}, "validation_fraction=1.0 must be"),
    ({"encoding_errors": "no"}, "encoding_errors='no' must be one of"),
    ({"max_bytes": 0}, "max_bytes=0 must be at least 1"),
  ],
)
def test_arguments_out_of_range(arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    json_lines.register(**{"files": "*.jsonl", **arguments})


def test_corpora_that_cannot_serve(tmp_path):
  path = write(tmp_path / "a.jsonl", [{"text": " ", "who": "x"}] * 3)
  with pytest.raises(ValueError, match=r"1 files that match .* hold no text"):
    register(path)
  path = write(tmp_path / "a.jsonl", [{"text": "a", "who": "x"}] * 3)
  with pytest.raises(
    ValueError,
    match=r"3 line\(s\), divided by user\(s\), in .*leave the train split ",
  ):
    register(path, unit_field="who", split_by="user")
  with pytest.raises(FileNotFoundError, match=r"append '/\*\*/\*\.jsonl\*'"):
    register(tmp_path)


def test_memory_is_that_of_a_line_even_of_one_that_is_refused(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  with gzip.open(path, "wb", compresslevel=1) as file:
    for _ in range(300):
      file.write(json.dumps({"text": "word " * 4_000}).encode() + b"\n")
    file.write(b'{"text": "')
    for _ in range(100):
      file.write(b"x" * 1_000_000)
    file.write(b'"}\n')
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=r"line 301, is longer than max_bytes"):
      register(path, max_bytes=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 4e6


def test_what_is_wrong_further_on_is_told_when_it_is_reached(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(GOOD * 99 + b"oops\n")
  task = json_lines.register(
    str(path), validation_fraction=0, read_through=False
  )
  documents = corpus.read_documents(task, "train")
  assert next(documents).text == "good"
  with pytest.raises(
    ValueError, match=r"beyond \d+ document\(s\): .*line 100, is not JSON"
  ) as caught:
    list(documents)
  assert "Traceback" not in str(caught.value)


def test_prepared_by_document_and_by_user(tmp_path, capsys):
  write(
    tmp_path / "text" / "a.jsonl.gz",
    [
      {"body": units_of_tasks.words(n, 30), "who": n % 20, "book": f"b{n % 50}"}
      for n in range(150)
    ],
    zipped=True,
  )
  common = [
    f"--gin.JSON_FILES={str(tmp_path / 'text' / '*')!r}",
    "--gin.TEXT_FIELD=body",
    "--gin.UNIT_FIELD=who",
    "--gin.DOCUMENT_FIELD=book",
    "--gin.RECORDS_PER_UNIT=4",
    "--gin.json_lines.register.validation_fraction=0.2",
  ]
  for unit, split_by, kind, whole in (
    ("document", "document", "documents", 50),
    ("user", "user", "users", 20),
  ):
    flags = [*common, f"--gin.UNIT={unit}", f"--gin.SPLIT_BY={split_by}"]
    store = tmp_path / unit
    counted = units_of_tasks.prepare(store, "json_lines.gin", flags)
    assert counted["train"][kind] + counted["validation"][kind] == whole
    examples = units_of_tasks.num_examples(store, "json_lines.gin", flags)
    assert examples == counted["train"][kind]
  by_user = [*common, "--gin.UNIT=user", "--gin.SPLIT_BY=document"]
  with pytest.raises(ValueError, match=r"user\(s\) have records in both spl"):
    units_of_tasks.num_examples(
      tmp_path / "document", "json_lines.gin", by_user
    )
  capsys.readouterr()
  assert (
    cli.main(
      [
        "vocab",
        "--gin_file=json_lines.gin",
        f"--output={tmp_path / 'private.model'}",
        "--unit=user",
        "--words_per_unit=40",
        "--noise_multiplier=0.05",
        "--delta=1e-6",
        "--size=285",
        *common,
        "--gin.UNIT=user",
        "--gin.SPLIT_BY=user",
      ]
    )
    == 0
  )
  assert "285 tokens" in capsys.readouterr().out
