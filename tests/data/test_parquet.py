"""Parquet: read in parts, divided, refused by row and column; by unit."""

import re
import subprocess
import sys
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import units_of_tasks

from dptrain.tasks import parquet
from dptrain.tasks import raw_text
import gin


@pytest.fixture(autouse=True)
def _clean_gin():
  yield
  gin.clear_config()


def register(files, **arguments):
  """Registers without seqio; returns (name, {split: [quadruples]})."""
  with mock.patch.object(raw_text, "add_task") as add_task:
    parquet.register(str(files), **arguments)
  name, documents, splits = add_task.call_args.args
  return name, {split: list(documents(split)) for split in splits}


def write(path, columns, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.table(columns), path, **options)
  return path


def columns(count, users=5, books=12):
  return {
    "id": [1.5] * count,
    "text": [f"text {n} é" for n in range(count)],
    "who": [n % users for n in range(count)],
    "book": [f"book{n % books}" for n in range(count)],
  }


def test_rows_of_several_groups_and_files(tmp_path, monkeypatch):
  monkeypatch.setattr(parquet, "_PART_ROWS", 3)
  write(tmp_path / "a.parquet", columns(20), row_group_size=7)
  write(tmp_path / "b" / "c.parquet", columns(4))
  _, found = register(
    tmp_path / "**" / "*.parquet", unit_column="who", validation_fraction=0
  )
  expected = [
    (f"{file}:{n + 1}", f"text {n} é", f"{file}:{n + 1}", str(n % 5))
    for file, count in (("a.parquet", 20), ("b/c.parquet", 4))
    for n in range(count)
  ]
  assert found["train"] == expected


@pytest.mark.parametrize("split_by", ["document", "user"])
def test_documents_and_users_are_in_one_split(tmp_path, split_by):
  path = write(tmp_path / "a.parquet", columns(300, users=40, books=60))
  arguments = {
    "unit_column": "who",
    "document_column": "book",
    "split_by": split_by,
    "validation_fraction": 0.3,
  }
  name, found = register(path, **arguments)
  place = {"document": 2, "user": 3}[split_by]
  train, validation = (
    {each[place] for each in found[split]} for split in found
  )
  assert train
  assert validation
  assert not train & validation
  assert len(found["train"]) + len(found["validation"]) == 300
  assert re.fullmatch(r"dptrain_parquet_[0-9a-f]{10}", name)
  again = register(path, **arguments, read_through=False)
  assert again == (name, found)


@pytest.mark.parametrize(
  "kind",
  [
    pa.string(),
    pa.large_string(),
    pa.binary(),
    pa.large_binary(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
  ],
  ids=str,
)
def test_every_kind_of_string(tmp_path, kind):
  values = pa.array(["one", "two é", " "]).cast(kind)
  path = write(tmp_path / "a.parquet", {"text": values})
  _, found = register(path, validation_fraction=0)
  assert [each[1] for each in found["train"]] == ["one", "two é"]


def with_row(column, value):
  """Good rows, and one that is not in row 3."""
  kept = columns(9)
  kept[column][2] = value
  return kept


@pytest.mark.parametrize(
  ("table", "options", "message"),
  [
    (
      columns(3),
      {"text_column": "body"},
      r"has no column 'body' \(it has 'id'",
    ),
    (
      columns(3),
      {"text_column": "id"},
      r"holds double and no strings \(columns",
    ),
    (
      columns(3),
      {"text_column": "who"},
      r"'text', 'book'\): name .*TEXT_COLUMN",
    ),
    (columns(3), {"unit_column": "id"}, "double and no strings or whole num"),
    (with_row("text", None), {}, r"row 3, has null in column 'text', which"),
    (
      with_row("who", None),
      {"unit_column": "who"},
      "row 3, has null in column",
    ),
    (with_row("book", ""), {"document_column": "book"}, "row 3, has an empty"),
    (
      with_row("text", "x" * 2000),
      {"max_bytes": 1000},
      r"row 3, has 2000 bytes in column 'text', more than max_bytes=1000",
    ),
    ({"text": [b"a", b"caf\xe9"]}, {}, r"row 2, column 'text', is not UTF-8"),
    (
      pa.table({"text": pa.array([], pa.string())}),
      {},
      "is empty: it has columns but no row",
    ),
    (columns(3), {"split_by": "user"}, "needs unit_column, the column that na"),
  ],
)
def test_what_is_wrong_is_named(tmp_path, table, options, message):
  path = tmp_path / "bad.parquet"
  pq.write_table(pa.table(table), path)
  with pytest.raises(ValueError, match=message) as caught:
    register(path, **options)
  assert "\n" not in str(caught.value)
  if "split_by" not in options:
    assert "bad.parquet" in str(caught.value)


def test_text_that_is_not_utf8_can_be_replaced(tmp_path):
  path = write(tmp_path / "a.parquet", {"text": [b"caf\xe9"]})
  _, found = register(path, encoding_errors="replace", validation_fraction=0)
  assert found["train"][0][1] == "caf\ufffd"


def test_files_that_are_no_parquet_or_damaged(tmp_path):
  path = tmp_path / "bad.parquet"
  for content in (b"", b"plain words, and many of them", b"\0" * 999):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.parquet is no Parquet file"):
      register(path)
  write(path, columns(2000), compression="snappy", use_dictionary=False)
  data = bytearray(path.read_bytes())
  data[200:4000] = b"\xff" * 3800
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r"row group 0 of .*bad\.parquet is dam"):
    register(path, text_column="text")
  path.write_bytes(bytes(data[:-100]))
  with pytest.raises(ValueError, match=r"bad\.parquet is no Parquet file"):
    register(path)


MEASURED = """
import sys
import pyarrow
from dptrain.tasks import parquet, tables
table = tables.Table(
  words=parquet._WORDS, globs=(), text="text", unit=None, document=None,
  unit_pattern=None, validation_fraction=0.0, split_by="document",
  encoding_errors="strict", max_bytes=10**6)
count = sum(1 for _ in parquet._rows(table, sys.argv[1]))
print(count, pyarrow.default_memory_pool().max_memory())
"""


def test_one_large_row_group_takes_little_memory(tmp_path):
  path = tmp_path / "a.parquet"
  schema = pa.schema({"text": pa.string(), "unread": pa.string()})
  with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
    rows = [str(n) * 1000 for n in range(20_000)]
    table = pa.table({"text": rows, "unread": rows}, schema)
    writer.write_table(table, row_group_size=len(rows))
  assert pq.ParquetFile(path).num_row_groups == 1
  done = subprocess.run(
    [sys.executable, "-c", MEASURED, str(path)],
    capture_output=True,
    text=True,
    check=True,
  )
  count, peak = map(int, done.stdout.split())
  assert count == 20_000
  # 89 MB of text in one group; Arrow writes pages of 1024 values.
  assert peak < 40e6


def test_prepared_by_document_and_by_user(tmp_path):
  write(
    tmp_path / "text" / "a.parquet",
    {
      "text": [units_of_tasks.words(n, 30) for n in range(150)],
      "who": [n % 20 for n in range(150)],
      "book": [f"b{n % 50}" for n in range(150)],
    },
    row_group_size=40,
  )
  common = [
    f"--gin.PARQUET_FILES={str(tmp_path / 'text' / '*')!r}",
    "--gin.UNIT_COLUMN=who",
    "--gin.DOCUMENT_COLUMN=book",
    "--gin.RECORDS_PER_UNIT=4",
    "--gin.parquet.register.validation_fraction=0.2",
  ]
  for unit, split_by, kind, whole in (
    ("document", "document", "documents", 50),
    ("user", "user", "users", 20),
  ):
    flags = [*common, f"--gin.UNIT={unit}", f"--gin.SPLIT_BY={split_by}"]
    store = tmp_path / unit
    counted = units_of_tasks.prepare(store, "parquet.gin", flags)
    assert counted["train"][kind] + counted["validation"][kind] == whole
    examples = units_of_tasks.num_examples(store, "parquet.gin", flags)
    assert examples == counted["train"][kind]
