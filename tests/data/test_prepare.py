"""Prepared stores: the same records as in memory, the same bytes always."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from dptrain.data import prepare
from dptrain.data import prepared
from dptrain.data import shards
from dptrain.data import store as store_lib
from dptrain.data.corpus import Document

TOLD = {"task": "words"}


def make(folder, documents, vocabulary, splits=("train",), **options):
  """Prepares the same documents for each split."""
  options = {"sequence_length": 16, "shard_chars": 2000, **options}
  settings = prepare.PrepareSettings(
    processes=options.pop("processes", 1), progress=False, **options
  )
  return prepare.prepare_store(
    folder, lambda _: iter(documents), splits, vocabulary, settings, TOLD
  )


def contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, documents, vocabulary):
  """A finished store in many shards; never to be changed."""
  place = tmp_path_factory.mktemp("prepared") / "store"
  make(place, documents, vocabulary, ("train", "validation"))
  return place


def test_the_same_records_as_in_memory(folder, documents, vocabulary):
  expected = store_lib.build_store(documents, vocabulary, 16)
  found = prepared.PreparedStore(folder, "train")
  found.check()
  assert found.num_examples == expected.num_examples
  assert found.sequence_length == 16
  assert found.content_digest() == expected.content_digest()
  assert found.token_range() == expected.token_range()
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  manifest = prepared.read_manifest(folder)
  assert len(manifest["splits"]["train"]["shards"]) > 10
  assert manifest["dtype"] == "uint16"
  assert manifest["task"] == "words"
  draw = np.random.default_rng(1)
  for size in (0, 1, 7, 300):
    indices = draw.integers(found.num_examples, size=size)
    for each in (indices, np.sort(indices)):
      rows = found.gather(each)
      assert rows.dtype == np.int32
      np.testing.assert_array_equal(rows, expected.gather(each))


def test_any_numpy_reads_a_shard(folder):
  manifest = json.loads((folder / "manifest.json").read_text())
  (shard, *_) = manifest["splits"]["train"]["shards"]
  tokens = np.load(folder / shard["tokens"]["file"])
  assert tokens.shape == (shard["records"], 16)
  np.testing.assert_array_equal(
    tokens, prepared.PreparedStore(folder, "train").gather(range(len(tokens)))
  )


@pytest.mark.parametrize("stranger", [-1, 10**6])
def test_refuses_strangers(folder, stranger):
  found = prepared.PreparedStore(folder, "train")
  some = found.subset(np.arange(4))
  for read, last in ((found, found.num_examples - 1), (some, 3)):
    with pytest.raises(ValueError, match=f"{stranger}.*records 0 to {last}"):
      read.gather(np.array([0, stranger]))


def test_processes_change_no_byte(folder, tmp_path, documents, vocabulary):
  splits = ("train", "validation")
  make(tmp_path / "two", documents, vocabulary, splits, processes=2)
  assert contents(tmp_path / "two") == contents(folder)


def test_a_wide_vocabulary_takes_a_wide_dtype():
  assert shards.token_dtype(2**16) == np.uint16
  assert shards.token_dtype(2**16 + 1) == np.int32


def of_authors(documents, missing=()):
  return [
    each._replace(
      unit="" if i in missing else f"author {i % 7}", document=f"book {i % 15}"
    )
    for i, each in enumerate(documents)
  ]


@pytest.mark.parametrize("missing", [(), (0,), range(40)])
def test_documents_and_users_are_those_of_memory(
  tmp_path, documents, vocabulary, missing
):
  told = of_authors(documents, missing)
  manifest = make(tmp_path / "units", told, vocabulary)
  found = prepared.PreparedStore(tmp_path / "units", "train")
  found.check()
  expected = store_lib.build_store(told, vocabulary, 16)
  np.testing.assert_array_equal(found.documents, expected.documents)
  assert (found.users is None) == (expected.users is None) == bool(missing)
  counted = {"documents": 15}
  if not missing:
    np.testing.assert_array_equal(found.users, expected.users)
    counted["users"] = 7
  assert manifest["splits"]["train"]["units"] == counted
  assert found.content_digest() == expected.content_digest()
  files = contents(tmp_path / "units")
  assert any("users" in name for name in files) == (not missing)
  assert not any(b"author" in data for data in files.values())
  some = np.random.default_rng(0).permutation(found.num_examples)[:50]
  part, whole = found.subset(some), expected.subset(some)
  assert part.content_digest() == whole.content_digest()
  assert part.num_examples == 50
  assert part.record_shape == found.record_shape == (16,)
  for indices in (np.arange(50), np.array([7, 3])):
    np.testing.assert_array_equal(part.gather(indices), whole.gather(indices))


def test_a_store_whose_users_are_dropped_can_be_finished_again(
  tmp_path, documents, vocabulary, monkeypatch
):
  told = of_authors(documents, missing=[39])

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(prepare, "_content", killed)
    with pytest.raises(KeyboardInterrupt):
      make(tmp_path / "s", told, vocabulary)
  make(tmp_path / "s", told, vocabulary)
  make(tmp_path / "again", told, vocabulary)
  assert contents(tmp_path / "s") == contents(tmp_path / "again")


def test_keys_are_counted_in_rounds(tmp_path, monkeypatch):
  draw = np.random.default_rng(0)
  parts = [draw.integers(0, 900, 700).astype(np.uint64) for _ in range(3)]
  monkeypatch.setattr(prepare, "_KEYS_AT_ONCE", 100)
  paths = [tmp_path / f"{number}.npy" for number in range(3)]
  for path, part in zip(paths, parts, strict=True):
    np.save(path, part)
  assert prepare._count(paths) == len(np.unique(np.concatenate(parts)))


def test_a_finished_store_is_checked_and_left_alone(
  tmp_path, documents, vocabulary
):
  first = make(tmp_path / "s", documents, vocabulary)
  before = contents(tmp_path / "s")
  assert make(tmp_path / "s", documents, vocabulary) == first
  assert contents(tmp_path / "s") == before
  with pytest.raises(ValueError, match=r"sequence_length=16, but .*=20"):
    make(tmp_path / "s", documents, vocabulary, sequence_length=20)


def test_an_unfinished_store_goes_on_with_the_same_settings_and_documents(
  tmp_path, documents, vocabulary, folder
):
  class Killed(Exception):
    pass

  def interrupted():
    yield from documents[:25]
    raise Killed

  with pytest.raises(Killed):
    make(tmp_path / "s", interrupted(), vocabulary)
  begun = contents(tmp_path / "s")
  assert not (tmp_path / "s" / "manifest.json").exists()
  with pytest.raises(ValueError, match="holds no prepared corpus"):
    prepared.PreparedStore(tmp_path / "s", "train")
  with pytest.raises(ValueError, match=r"shard_chars=2000, but shard_chars=9"):
    make(tmp_path / "s", documents, vocabulary, shard_chars=9)
  changed = [documents[0]._replace(text="other"), *documents[1:]]
  with pytest.raises(ValueError, match=r"train-000000 are not .*has changed"):
    make(tmp_path / "s", changed, vocabulary)
  made = [name for name in begun if name.endswith("tokens.npy")]
  times = {name: (tmp_path / "s" / name).stat().st_mtime_ns for name in made}
  # A shard that was lost meanwhile is made again.
  (tmp_path / "s" / made[0]).unlink()
  make(tmp_path / "s", documents, vocabulary)
  for name in made[1:]:
    assert (tmp_path / "s" / name).stat().st_mtime_ns == times[name]
  make(tmp_path / "again", documents, vocabulary)
  assert contents(tmp_path / "s") == contents(tmp_path / "again")


def test_two_at_once_are_refused(tmp_path, documents, vocabulary):
  def nested():
    make(tmp_path / "s", documents, vocabulary)
    yield from documents

  with pytest.raises(ValueError, match="another preparation is at work"):
    make(tmp_path / "s", nested(), vocabulary)


KILLED = """
import pathlib, sys
from dptrain.data import prepare
from dptrain.data.corpus import Document
from dptrain.data.vocabulary import load_vocabulary

def documents(split):
  for i in range(160):
    yield Document(f"d{i}", f"ba{i % 7} kelimo " * 150)

if __name__ == "__main__":
  folder, model, processes = sys.argv[1:]
  settings = prepare.PrepareSettings(
    sequence_length=16, shard_chars=8000, processes=int(processes),
    progress=False)
  print("ready", flush=True)
  prepare.prepare_store(
    folder, documents, ["train"], load_vocabulary(model), settings, {})
"""


def test_killed_at_five_moments_it_ends_with_the_same_bytes(
  tmp_path, vocabulary
):
  program, model = tmp_path / "program.py", tmp_path / "model"
  program.write_text(KILLED)
  vocabulary.save(model)
  command = [sys.executable, str(program)]
  draw = random.Random(5)

  def started(folder, processes=1):
    process = subprocess.Popen(
      [*command, str(folder), str(model), str(processes)],
      stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    return process

  begin = time.monotonic()
  assert started(tmp_path / "whole").wait() == 0
  lasted = time.monotonic() - begin
  whole = contents(tmp_path / "whole")
  killed = 0
  for moment in range(5):
    folder = tmp_path / str(moment)
    process = started(folder, processes=1 + moment % 2)
    # In the life of the run, or once so many of its 33 shards are made.
    goal = draw.randrange(0, 33)
    end = time.monotonic() + 10 * lasted
    while process.poll() is None and time.monotonic() < end:
      if len(list(folder.glob("*.tokens.npy"))) >= goal:
        break
      time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    killed += process.wait() == -signal.SIGKILL
    assert started(folder).wait() == 0
    assert contents(folder) == whole
  assert killed >= 3


def flip(path, place):
  data = bytearray(path.read_bytes())
  data[place] ^= 16
  path.write_bytes(data)


@pytest.mark.parametrize("kind", ["tokens", "documents"])
def test_a_flipped_byte_is_named(tmp_path, documents, vocabulary, kind):
  make(tmp_path / "s", documents, vocabulary)
  path = tmp_path / "s" / f"train-000003.{kind}.npy"
  flip(path, -5)
  found = prepared.PreparedStore(tmp_path / "s", "train")
  with pytest.raises(ValueError, match=rf"{path.name} does not hold .*backup"):
    found.check()
  with pytest.raises(ValueError, match=path.name):
    make(tmp_path / "s", documents, vocabulary)


def test_a_missing_or_short_shard_is_named_at_once(
  tmp_path, documents, vocabulary
):
  make(tmp_path / "s", documents, vocabulary)
  path = tmp_path / "s" / "train-000003.tokens.npy"
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(ValueError, match=rf"{path.name} has \d+ bytes instead"):
    prepared.PreparedStore(tmp_path / "s", "train")
  path.unlink()
  with pytest.raises(ValueError, match=f"{path.name} is missing.*prepare the"):
    prepared.PreparedStore(tmp_path / "s", "train")


def test_a_damaged_or_foreign_manifest(tmp_path, documents, vocabulary):
  make(tmp_path / "s", documents, vocabulary)
  path = tmp_path / "s" / "manifest.json"
  text = path.read_text()
  with pytest.raises(ValueError, match="no split 'test'; it has 'train'"):
    prepared.PreparedStore(tmp_path / "s", "test")
  for wrong in (text.replace('"records": ', '"records": 1'), text[:-9], "[]"):
    path.write_text(wrong)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
      prepared.PreparedStore(tmp_path / "s", "train")
  manifest = json.loads(text) | {"format": 99}
  manifest.pop("sha256")
  manifest["sha256"] = prepared.manifest_digest(manifest)
  path.write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match=r"has format 99.* reads format 1"):
    prepared.PreparedStore(tmp_path / "s", "train")


def test_an_empty_corpus(tmp_path, vocabulary):
  for number, documents in enumerate([[], [Document("a", " \n")] * 3]):
    with pytest.raises(ValueError, match="split 'train': the corpus is empty"):
      make(tmp_path / str(number), documents, vocabulary)


def test_documents_without_a_token_leave_no_record(
  tmp_path, documents, vocabulary
):
  empty = Document("empty", "  ")
  spread = [empty, *documents[:9], empty, *documents[9:], *[empty] * 2000]
  manifest = make(tmp_path / "s", spread, vocabulary)
  found = prepared.PreparedStore(tmp_path / "s", "train")
  whole = store_lib.build_store(documents, vocabulary, 16)
  assert found.content_digest() == whole.content_digest()
  assert manifest["splits"]["train"]["documents_read"] == len(spread)


def test_a_very_long_text_is_cut_between_words(
  tmp_path, vocabulary, monkeypatch
):
  text = "".join(
    f"ba{i % 3}ke{'' if i % 5 else chr(10)} limo " for i in range(900)
  )
  whole = store_lib.build_store([Document("a", text)], vocabulary, 16)
  monkeypatch.setattr(store_lib, "_LONGEST_TEXT", 50)
  parts = list(store_lib._parts(text))
  assert "".join(parts) == text
  assert all(len(part) <= 50 for part in parts)
  cut = store_lib.build_store([Document("a", text)], vocabulary, 16)
  assert cut.content_digest() == whole.content_digest()
  unbroken = list(store_lib._parts("x" * 120))
  assert [len(part) for part in unbroken] == [50, 50, 20]
  make(tmp_path / "s", [Document("a", text)], vocabulary)
  found = prepared.PreparedStore(tmp_path / "s", "train")
  assert found.content_digest() == whole.content_digest()


def test_memory_does_not_follow_the_corpus(tmp_path, vocabulary):
  def corpus(count):
    return (Document(f"d{i}", "bake limo " * 300) for i in range(count))

  make(tmp_path / "warm", corpus(5), vocabulary)
  peaks = []
  for count in (60, 600):
    tracemalloc.start()
    try:
      folder = tmp_path / str(count)
      make(folder, corpus(count), vocabulary, shard_chars=30_000)
      peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
      tracemalloc.stop()
  # Entries and manifest grow by some hundred bytes a shard.
  assert peaks[1] < peaks[0] + 600_000


@pytest.mark.parametrize(
  ("options", "told"),
  [
    ({"sequence_length": 7}, "sequence_length=7"),
    ({"min_tokens": 0}, "min_tokens=0"),
    ({"shard_chars": 0}, "shard_chars=0 must be at least 1"),
    ({"processes": 0}, "processes=0 must be at least 1"),
    ({"splits": ("a.b", "a-b")}, "'a.b', 'a-b' cannot be told apart"),
  ],
)
def test_bad_settings(tmp_path, documents, vocabulary, options, told):
  with pytest.raises(ValueError, match=told):
    make(tmp_path / "s", documents, vocabulary, **options)


def test_a_worker_that_fails_tells_why(tmp_path, documents, vocabulary):
  class Refusing:
    fingerprint, size, model = "f", 120, b"no model"

  with pytest.raises(Exception, match=r"SentencePiece|terminated abruptly"):
    make(tmp_path / "s", documents, Refusing(), processes=2)


def test_workers_end_with_a_killed_parent(tmp_path, vocabulary):
  program, model = tmp_path / "program.py", tmp_path / "model"
  program.write_text(KILLED.replace("range(160)", "range(10**9)"))
  vocabulary.save(model)
  process = subprocess.Popen(
    [sys.executable, str(program), str(tmp_path / "s"), str(model), "2"]
  )

  def children():
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
      try:
        fields = path.read_text().rpartition(")")[2].split()
      except OSError:
        continue
      if int(fields[1]) == process.pid and fields[0] != "Z":
        found.add(int(path.parent.name))
    return found

  while len(list((tmp_path / "s").glob("*.tokens.npy"))) < 3:
    assert process.poll() is None
    time.sleep(0.01)
  workers = children()
  assert len(workers) >= 2
  process.kill()
  process.wait()

  def alive(number):
    try:
      os.kill(number, 0)
      stat = pathlib.Path(f"/proc/{number}/stat").read_text()
    except OSError:
      return False
    return stat.rpartition(")")[2].split()[0] != "Z"

  end = time.monotonic() + 20
  while any(map(alive, workers)) and time.monotonic() < end:
    time.sleep(0.05)
  assert not any(map(alive, workers))
