"""Writes prepared corpora: in parallel, resumable, the same bytes each time.

Documents are cut into chunks by their order and length alone; each chunk
becomes one shard, wherever and whenever it is tokenised. The manifest is
written last, from the shards' entries: neither the number of processes nor a
kill changes a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
from pathlib import Path
import shutil
import signal
import sys
import threading
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import tqdm

from dptrain.data import prepared
from dptrain.data import shards
from dptrain.data import store
from dptrain.data.corpus import Document
from dptrain.data.vocabulary import Vocabulary

_SETTINGS: Final = "settings.json"
# Keys compared at once when documents and users are counted.
_KEYS_AT_ONCE: Final = 2**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareSettings:
  """How a corpus is cut and stored.

  Attributes:
    sequence_length: T, at least 8.
    min_tokens: as in `store.build_store`.
    shard_chars: a shard ends with the document that reaches so many characters.
    processes: how many tokenise; None for one per core. Changes no byte.
    progress: whether to show a bar.

  Raises:
    ValueError: if a setting is out of range.
  """

  sequence_length: int
  min_tokens: int = 8
  shard_chars: int = 16_000_000
  processes: int | None = None
  progress: bool = True

  def __post_init__(self) -> None:
    store.check_cut(self.sequence_length, self.min_tokens)
    for name in ("shard_chars", "processes"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def prepare_store(
  folder: str | os.PathLike[str],
  documents: Callable[[str], Iterable[Document]],
  splits: Sequence[str],
  vocabulary: Vocabulary,
  settings: PrepareSettings,
  told: dict[str, Any],
) -> dict[str, Any]:
  """Tokenises a corpus into `folder`, or finishes what was begun there.

  Takes memory for some shards' text per process, whatever the corpus's size. A
  document must fit in memory.

  Args:
    folder: made if missing.
    documents: called with a split's name; gives the same documents in the same
      order each time.
    splits: names of the splits.
    vocabulary: the vocabulary.
    settings: the settings.
    told: more for the manifest, plain data for JSON: whatever distinguishes
      this preparation from others.

  Returns:
    The manifest.

  Raises:
    ValueError: if the folder holds something else, or another preparation is at
      work in it; if a split has no record; whatever `documents` raises.
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  asked = _asked(splits, vocabulary, settings, told)
  with _locked(folder):
    if (folder / prepared.MANIFEST).exists():
      return _finished(folder, asked)
    _begin(folder, asked)
    manifest = asked | {"splits": {}}
    with _pool(vocabulary, settings) as submit:
      for split in splits:
        made = _made(folder, split, documents(split), settings, submit)
        manifest["splits"][split] = _summary(folder, split, made, settings)
    manifest |= {"sha256": prepared.manifest_digest(manifest)}
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    vocabulary.save(folder / prepared.VOCABULARY)
    shards.write(folder / prepared.MANIFEST, text.encode())
    _tidy(folder)
  return prepared.read_manifest(folder)


def is_begun(folder: Path) -> bool:
  """Whether a store is in the folder, finished or not."""
  marks = (folder / prepared.MANIFEST, folder / shards.UNFINISHED / _SETTINGS)
  return any(mark.exists() for mark in marks)


def _asked(
  splits: Sequence[str],
  vocabulary: Vocabulary,
  settings: PrepareSettings,
  told: dict[str, Any],
) -> dict[str, Any]:
  """All that decides the store's bytes, but for the documents."""
  stems = {shards.stem(split): split for split in splits}
  if len(stems) < len(splits) or not splits:
    raise ValueError(
      f"splits {', '.join(map(repr, splits))} cannot be told apart by the names"
      " of their files; give splits whose letters and digits differ"
    )
  return told | {
    "format": prepared.FORMAT,
    "sequence_length": settings.sequence_length,
    "min_tokens": settings.min_tokens,
    "shard_chars": settings.shard_chars,
    "dtype": shards.token_dtype(vocabulary.size).name,
    "split_names": list(splits),
    "vocabulary_sha256": vocabulary.fingerprint,
    "vocabulary_size": vocabulary.size,
  }


def _finished(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
  manifest = prepared.read_manifest(folder)
  _check_same(folder, manifest, asked)
  for split in manifest["splits"]:
    prepared.PreparedStore(folder, split).check()
  _tidy(folder)
  return manifest


def _begin(folder: Path, asked: dict[str, Any]) -> None:
  """Notes what is being prepared, or checks that it is the same."""
  path = folder / shards.UNFINISHED / _SETTINGS
  if path.exists():
    _check_same(folder, json.loads(path.read_text(encoding="utf-8")), asked)
  else:
    path.parent.mkdir(exist_ok=True)
    shards.write(path, json.dumps(asked).encode())
  for partial in path.parent.glob("*.partial"):
    partial.unlink(missing_ok=True)


def _check_same(
  folder: Path, there: dict[str, Any], asked: dict[str, Any]
) -> None:
  for name, value in asked.items():
    if there.get(name) != value:
      raise ValueError(
        f"{folder} holds a corpus prepared with {name}={there.get(name)!r}, but"
        f" {name}={value!r} is asked for: give another folder, or delete that"
        " one"
      )


def _tidy(folder: Path) -> None:
  shutil.rmtree(folder / shards.UNFINISHED, ignore_errors=True)


def _made(
  folder: Path,
  split: str,
  documents: Iterable[Document],
  settings: PrepareSettings,
  submit: Callable[[shards.Chunk], concurrent.futures.Future[dict[str, Any]]],
) -> list[dict[str, Any]]:
  """Makes the shards that are missing; the entries of all, in order."""
  entries: dict[int, dict[str, Any]] = {}
  running: dict[concurrent.futures.Future[dict[str, Any]], int] = {}
  bar = tqdm.tqdm(
    desc=split,
    unit="B",
    unit_scale=True,
    mininterval=0.5 if sys.stderr.isatty() else 15,
    disable=not settings.progress,
  )

  def collect(until: int) -> None:
    while len(running) > until:
      done, _ = concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for each in done:
        number = running.pop(each)
        entries[number] = each.result()
        bar.update(entries[number]["text_bytes"])

  with bar:
    for number, chunk in enumerate(
      shards.chunks(folder, split, documents, settings.shard_chars)
    ):
      noted = shards.entry(chunk)
      if noted is not None:
        entries[number] = noted
        bar.update(noted["text_bytes"])
        continue
      running[submit(chunk)] = number
      # One more than work at once, so that none waits for the reader.
      collect(_processes(settings))
    collect(0)
  return [entries[number] for number in sorted(entries)]


def _summary(
  folder: Path,
  split: str,
  entries: list[dict[str, Any]],
  settings: PrepareSettings,
) -> dict[str, Any]:
  """What the manifest says of one split."""
  full = [entry for entry in entries if entry["records"]]
  if not full:
    raise ValueError(f"split {split!r}: {store.EMPTY_CORPUS}")
  records = sum(entry["records"] for entry in full)
  source = hashlib.sha256("".join(e["source"] for e in entries).encode())
  kept = ["name", "records", "tokens", "documents", "users"]
  if not all("users" in entry for entry in full):
    # Some text's user is not known: then nobody's is told.
    kept.remove("users")
    for entry in full:
      (folder / f"{entry['name']}.users.npy").unlink(missing_ok=True)
  files = {
    kind: [folder / entry[kind]["file"] for entry in full] for kind in kept[2:]
  }
  return {
    "records": records,
    "documents_read": sum(entry["documents_read"] for entry in entries),
    "text_bytes": sum(entry["text_bytes"] for entry in entries),
    "units": {kind: _count(files[kind]) for kind in kept[3:]},
    "token_range": [
      min(entry["token_range"][0] for entry in full),
      max(entry["token_range"][1] for entry in full),
    ],
    "content": _content(records, settings.sequence_length, files),
    "source": source.hexdigest(),
    "shards": [{name: entry[name] for name in kept} for entry in full],
  }


def _arrays(paths: list[Path]) -> Iterator[npt.NDArray[Any]]:
  """One at a time: pages that were read through a map count as memory."""
  for path in paths:
    yield np.load(path, mmap_mode="r")


def _content(
  records: int, sequence_length: int, files: dict[str, list[Path]]
) -> str:
  """`RecordStore.content_digest` of the same records, in bounded memory."""
  digest = store.begun_digest(records, sequence_length)
  for tokens in _arrays(files["tokens"]):
    digest.update(np.ascontiguousarray(tokens, np.int32).data)
  for kind in ("documents", "users"):
    for keys in _arrays(files.get(kind, [])):
      digest.update(np.ascontiguousarray(keys).data)
    if kind not in files:
      digest.update(b"none")
  return str(digest.hexdigest())


def _count(paths: list[Path]) -> int:
  """How many different keys the files hold, in bounded memory."""
  rounds = -(-sum(map(len, _arrays(paths))) // _KEYS_AT_ONCE)
  total = 0
  for turn in range(rounds):
    # Each round takes the keys of one residue, from all files.
    some = [np.unique(each[each % rounds == turn]) for each in _arrays(paths)]
    total += len(np.unique(np.concatenate(some)))
  return total


def _processes(settings: PrepareSettings) -> int:
  return settings.processes or len(os.sched_getaffinity(0))


_worker: shards.ShardMaker | None = None


def _begin_worker(model: bytes, sequence_length: int, min_tokens: int) -> None:
  global _worker
  # Ctrl-C is the first process's to answer.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _worker = shards.ShardMaker(model, sequence_length, min_tokens)


def _end_with_parent() -> None:
  """Ends this process when its parent is killed: nobody else would."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)


def _make_elsewhere(chunk: shards.Chunk) -> dict[str, Any]:
  if _worker is None:
    raise RuntimeError("the worker was not begun")
  return _worker.make(chunk)


@contextlib.contextmanager
def _pool(
  vocabulary: Vocabulary, settings: PrepareSettings
) -> Iterator[
  Callable[[shards.Chunk], concurrent.futures.Future[dict[str, Any]]]
]:
  """Yields what makes a chunk's shard, now or later."""
  given = vocabulary.model, settings.sequence_length, settings.min_tokens
  if _processes(settings) == 1:
    worker = shards.ShardMaker(*given)

    def here(chunk: shards.Chunk) -> concurrent.futures.Future[dict[str, Any]]:
      done: concurrent.futures.Future[dict[str, Any]] = (
        concurrent.futures.Future()
      )
      done.set_result(worker.make(chunk))
      return done

    yield here
    return
  pool = concurrent.futures.ProcessPoolExecutor(
    _processes(settings),
    # A fork would copy TensorFlow's threads, locked as they are.
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_begin_worker,
    initargs=given,
  )
  try:
    yield lambda chunk: pool.submit(_make_elsewhere, chunk)
  finally:
    pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise ValueError(
      f"another preparation is at work in {folder}: wait for it, or end it"
    ) from error
  else:
    yield
  finally:
    os.close(handle)
