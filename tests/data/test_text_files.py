"""Text files: found, cut, divided and checked (seqio itself stays out)."""

import os
import re
import tempfile
import tracemalloc
from unittest import mock

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from dptrain.tasks import raw_text
from dptrain.tasks import text_files


def register(files, **arguments):
  """Registers without seqio; returns (name, {split: [(source, text)]})."""
  with mock.patch.object(raw_text, "add_task") as add_task:
    text_files.register(files, **arguments)
  name, documents, splits = add_task.call_args.args
  return name, {
    split: [each[:2] for each in documents(split)] for split in splits
  }


def write(folder, files):
  for name, text in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@settings(max_examples=60, deadline=None)
@given(
  text=st.text(st.sampled_from("ab\n é"), max_size=80),
  passage_chars=st.integers(1, 12),
)
def test_passages_cover_the_file_and_end_at_lines(
  tmp_path_factory, text, passage_chars
):
  path = tmp_path_factory.mktemp("text") / "one.txt"
  path.write_text("x\n" + text, encoding="utf-8", newline="")
  _, found = register(
    str(path), passage_chars=passage_chars, validation_fraction=0
  )
  passages = [passage for _, passage in found["train"]]
  assert all(0 < len(each) <= passage_chars for each in passages)
  # Blank passages are left out; nothing else is.
  squeezed = re.sub(r"\s", "", "".join(passages))
  assert squeezed == re.sub(r"\s", "", "x\n" + text)
  for line in text.split("\n")[:-1]:
    if len(line) < passage_chars and line.strip():
      assert any(line in each for each in passages)


def test_long_lines_are_cut_hard(tmp_path):
  write(tmp_path, {"a.txt": "ab\ncd\nefghijkl\nm\n"})
  _, found = register(
    str(tmp_path / "a.txt"), passage_chars=6, validation_fraction=0
  )
  assert found["train"] == [
    ("a.txt:0", "ab\ncd\n"),
    ("a.txt:1", "efghij"),
    ("a.txt:2", "kl\nm\n"),
  ]


def test_splits_are_disjoint_complete_and_stable(tmp_path):
  lines = [f"line number {i}\n" for i in range(4000)]
  write(tmp_path / "here", {"big.txt": "".join(lines)})
  write(tmp_path / "moved", {"big.txt": "".join(lines)})
  arguments = {"passage_chars": 20, "validation_fraction": 0.1}
  _, found = register(str(tmp_path / "here" / "*.txt"), **arguments)
  sources = {split: {s for s, _ in found[split]} for split in found}
  assert not sources["train"] & sources["validation"]
  assert sorted(t for each in found.values() for _, t in each) == sorted(lines)
  assert 320 < len(found["validation"]) < 480
  _, moved = register(str(tmp_path / "moved" / "*.txt"), **arguments)
  assert moved == found


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_small_corpus_has_both_splits(tmp_path, count):
  write(tmp_path, {f"{i}.txt": f"text {i}" for i in range(count)})
  _, found = register(str(tmp_path / "*.txt"), validation_fraction=1e-6)
  assert len(found["validation"]) == 1
  assert len(found["train"]) == count - 1


def test_globs(tmp_path, monkeypatch):
  write(
    tmp_path,
    {"a.txt": "a", "deep/er/b.txt": "b", "deep/[c].txt": "c", "d.md": "d"},
  )
  os.symlink(tmp_path / "a.txt", tmp_path / "link.txt")
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path / "deep")

  def texts(files):
    _, found = register(files, validation_fraction=0)
    return sorted(text for _, text in found["train"])

  assert texts("~/**/*.txt") == ["a", "b", "c"]
  assert texts("[c].txt") == ["c"]
  assert texts(["er/*.txt", "../*.md", "../d.md"]) == ["b", "d"]


def test_a_reading_that_stops_early_changes_nothing(tmp_path):
  write(tmp_path, {"a.txt": "".join(f"line {n}\n" for n in range(200))})
  arguments = {"passage_chars": 20, "validation_fraction": 0.2}
  whole = register(str(tmp_path / "a.txt"), **arguments)
  assert whole == register(
    str(tmp_path / "a.txt"), **arguments, read_through=False
  )


def test_names_follow_the_arguments(tmp_path):
  write(tmp_path, {"a.txt": "a\nb\n", "b.txt": "c\n"})
  files = str(tmp_path / "*.txt")
  name, _ = register(files)
  assert re.fullmatch(r"dptrain_text_files_[0-9a-f]{10}", name)
  assert register([files])[0] == name
  others = [
    register(str(tmp_path / "a*"), passage_chars=2)[0],
    register(files, passage_chars=3)[0],
    register(files, validation_fraction=0.5)[0],
    register(files, encoding_errors="replace")[0],
  ]
  assert len({name, *others}) == 5


def test_bytes_that_are_not_utf8(tmp_path):
  write(tmp_path, {"good.txt": "good\n", "bad.txt": b"fine \xc3\xa9\nb\xe9d\n"})
  files = str(tmp_path / "*.txt")
  with pytest.raises(
    ValueError,
    match=r"bad\.txt is not UTF-8: byte 0xe9 at offset 9.*'replace'",
  ):
    register(files)
  _, found = register(files, encoding_errors="replace", validation_fraction=0)
  assert found["train"][0] == ("bad.txt:0", "fine é\nb\ufffdd\n")


def naive_passages(text, limit):
  """Whole lines, each cut at multiples of the limit; then gathered."""
  held = ""
  for line in text.splitlines(keepends=True):
    if held and len(held) + len(line) > limit:
      yield held
      held = ""
    while len(line) > limit:
      yield line[:limit]
      line = line[limit:]
    held += line
  if held:
    yield held


@given(
  lines=st.lists(
    st.text("aé\U0001f600", min_size=0, max_size=40), min_size=1, max_size=8
  ),
  limit=st.integers(1, 30),
  block=st.integers(1, 12),
  ends=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_long_lines_are_read_in_parts(lines, limit, block, ends):
  text = "\n".join(lines) + "\n" * ends
  with (
    tempfile.TemporaryDirectory() as folder,
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setattr(text_files, "_READ_BYTES", block)
    path = os.path.join(folder, "a.txt")
    with open(path, "w", encoding="utf-8", newline="") as file:
      file.write(text)
    corpus = text_files._TextFiles((path,), 0.0, limit, "strict")
    found = list(text_files._cut(text_files._lines(corpus, path), corpus))
  assert found == [(0, text) for text in naive_passages(text, limit)]


def test_a_line_of_many_megabytes_takes_little_memory(tmp_path):
  path = tmp_path / "a.txt"
  with path.open("wb") as file:
    for _ in range(100):
      file.write("é word ".encode() * 131_072)
  tracemalloc.start()
  try:
    corpus = text_files._TextFiles((str(path),), 0.0, 20_000, "strict")
    found = text_files._passages(corpus, ((str(path), "a.txt"),))
    total = sum(len(text) for _, (_, text, *_) in found)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert total == 100 * 131_072 * 7
  assert peak < 4e6


def test_where_a_long_line_is_not_utf8_and_what_is_binary(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(text_files, "_READ_BYTES", 16)
  bad = b"x" * 99 + "é".encode() + b"\xe9 and more"
  write(tmp_path, {"long.txt": bad, "zero.bin": b"text\0\0more text\n"})
  options = {"passage_chars": 10, "validation_fraction": 0}
  with pytest.raises(ValueError, match=r"long\.txt .* 0xe9 at offset 101"):
    register(str(tmp_path / "long.txt"), **options)
  with pytest.raises(ValueError, match=r"zero\.bin is binary: .* NUL byte"):
    register(str(tmp_path / "zero.bin"), **options)
  _, found = register(
    str(tmp_path / "zero.bin"), encoding_errors="replace", **options
  )
  assert "".join(t for _, t in found["train"]) == "text\0\0more text\n"


def test_byte_order_mark_is_dropped(tmp_path):
  write(tmp_path, {"a.txt": b"\xef\xbb\xbfword\n"})
  _, found = register(str(tmp_path / "a.txt"), validation_fraction=0)
  assert found["train"] == [("a.txt:0", "word\n")]


def test_missing_files_are_named(tmp_path):
  write(tmp_path, {"a.txt": "a"})
  with pytest.raises(FileNotFoundError, match=r"no file matches '.*\*\.md'"):
    register([str(tmp_path / "a.txt"), str(tmp_path / "*.md")])
  with pytest.raises(FileNotFoundError, match=r"a folder: append '/\*\*"):
    register(str(tmp_path))


def test_corpora_that_cannot_serve(tmp_path):
  write(tmp_path, {"blank.txt": " \n\n", "none.txt": "", "one.md": "one"})
  with pytest.raises(ValueError, match=r"2 files .* hold no text"):
    register(str(tmp_path / "*.txt"))
  with pytest.raises(
    ValueError, match=r"train split empty.*passage_chars=20000"
  ):
    register(str(tmp_path / "*.md"))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"files": []}, r"files=\[\] names no file"),
    ({"files": ""}, "files='' names no file"),
    ({"validation_fraction": 1.0}, r"validation_fraction=1\.0"),
    ({"validation_fraction": -0.1}, r"validation_fraction=-0\.1"),
    ({"passage_chars": 0}, "passage_chars=0"),
    ({"encoding_errors": "lenient"}, "encoding_errors='lenient'"),
  ],
)
def test_arguments_out_of_range(arguments, message):
  with pytest.raises(ValueError, match=message):
    register(**{"files": "*.txt", **arguments})


def keyed(files, **arguments):
  """{split: [(document, unit)]}, in order and each once."""
  with mock.patch.object(raw_text, "add_task") as add_task:
    text_files.register(str(files), **arguments)
  _, documents, splits = add_task.call_args.args
  return {
    split: list(dict.fromkeys(each[2:] for each in documents(split)))
    for split in splits
  }


@pytest.mark.parametrize("split_by", ["document", "user"])
def test_units_are_in_one_split_with_all_their_text(tmp_path, split_by):
  text = "".join(f"line {n}\n" for n in range(9))
  names = [f"{y}-{who}.txt" for y in range(6) for who in ("Ann", "Bob", "Cy")]
  write(tmp_path, dict.fromkeys(names, text))
  found = keyed(
    tmp_path / "*.txt",
    unit="-([A-Za-z]+)[.]txt",
    split_by=split_by,
    passage_chars=20,
    validation_fraction=0.3,
  )
  place = {"document": 0, "user": 1}[split_by]
  train, validation = (
    {each[place] for each in part} for part in found.values()
  )
  assert train
  assert validation
  assert not train & validation
  everyone = {each for part in found.values() for each in part}
  assert everyone == {(n, n.split("-")[1].removesuffix(".txt")) for n in names}


def test_without_units_a_file_is_a_document(tmp_path):
  write(tmp_path, {"a.txt": "x\n" * 30, "b.txt": "y\n" * 30})
  found = keyed(tmp_path / "*.txt", passage_chars=10, validation_fraction=0)
  assert found["train"] == [("a.txt", ""), ("b.txt", "")]


@pytest.mark.parametrize(
  ("document", "expected"),
  [
    (None, ["a.txt", "b.txt"]),
    (" = [^=]", ["a.txt#1", "a.txt#2", "b.txt#0"]),
    ("[ ]*$", ["a.txt#1", "a.txt#2", "a.txt#3", "b.txt#0"]),
    ("", [f"a.txt#{n}" for n in (2, 3, 5, 6, 8)] + ["b.txt#1"]),
  ],
)
def test_documents_within_a_file(tmp_path, document, expected):
  text = "\n = One = \nfirst\n\n = = Part = = \ntext\n\n = Two = \n"
  write(tmp_path, {"a.txt": text, "b.txt": "of = all\n"})
  options = {"document": document, "validation_fraction": 0}
  found = keyed(tmp_path / "*.txt", **options)
  assert [name for name, _ in found["train"]] == expected
  _, texts = register(str(tmp_path / "*.txt"), **options)
  assert (
    "".join(t for _, t in texts["train"]).split()
    == (text + "of = all\n").split()
  )


def test_a_part_of_a_long_line_begins_no_document(tmp_path):
  write(tmp_path, {"a.txt": "x" * 25 + "\nx\n"})
  options = {"passage_chars": 10, "validation_fraction": 0}
  found = keyed(tmp_path / "a.txt", document="x", **options)
  assert [name for name, _ in found["train"]] == ["a.txt#1", "a.txt#2"]


def test_too_few_documents_for_both_splits(tmp_path):
  write(tmp_path, {"one.txt": "line\n" * 30})
  told = r"split_by='document', .*; tell where documents begin in a file"
  with pytest.raises(ValueError, match=told):
    keyed(tmp_path / "*.txt", split_by="document", passage_chars=20)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"split_by": "line"}, "split_by='line' must be 'record', 'document' or"),
    ({"split_by": "user"}, "split_by='user' needs unit"),
    ({"document": "("}, "document='(' is no regular expression"),
    ({"unit": "no group"}, "has 0 groups; it needs one"),
    ({"unit": "(a)(b)"}, "has 2 groups; it needs one"),
    ({"unit": "("}, "is no regular expression"),
    ({"unit": "-([A-Z])"}, "finds no user in the path 'a.txt'"),
  ],
)
def test_what_finds_no_users(tmp_path, arguments, message):
  write(tmp_path, {"a.txt": "x\n" * 30})
  with pytest.raises(ValueError, match=re.escape(message)):
    keyed(tmp_path / "*.txt", **arguments)
