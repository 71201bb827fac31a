"""Where replicas leave their weights for each other: a folder or a bucket.

  EXCHANGE/group                               names the replicas that meet here
  EXCHANGE/replica_0/description.json          what it trains, for the others
  EXCHANGE/replica_0/00000007-00000350-5a...npz  its 7th publication: update 350

A publication is one file: weights, where they come from, and the ledger that
prices them. It gets its name when it is whole, and the name has a digest of its
content. Nothing here reads a clock: age is counted in updates, order in
publications.
"""

from collections.abc import Callable, Mapping
import contextlib
import hashlib
import io
import json
import re
import secrets
from typing import Any, NamedTuple, Protocol

from etils import epath
import numpy as np

_NAME = re.compile(r"(\d{8,})-(\d{8,})-([0-9a-f]{16})\.npz")
_DESCRIPTION, _GROUP = "description.json", "group"
_TOLD, _LEDGER = "told.json", "ledger.jsonl"
_WEIGHT = "weight/"


class Publication(NamedTuple):
  """What a replica let others have.

  Attributes:
    replica: its number.
    step: updates that the weights contain.
    weights: float arrays by the names of the parameters.
    ledger: the bytes of its ledger at that time.
    fingerprint: digest of the weights.
    branch: of the ledger, on which they were made.
    arrays: the tree of the parameters on the replica's devices; None once they
      are read elsewhere.
  """

  replica: int
  step: int
  weights: Mapping[str, np.ndarray]
  ledger: bytes
  fingerprint: str
  branch: str
  arrays: Any = None


class Exchange(Protocol):
  """How replicas reach each other."""

  def introduce(self, description: Mapping[str, Any]) -> None:
    """Tells what this replica trains, and refuses others that do not fit.

    Args:
      description: plain data, equal for all replicas but for "run".

    Raises:
      ValueError: another replica trains something else, or another run has this
        one's number.
    """

  def group(self) -> str:
    """Names the replicas that meet here, and no others.

    Raises:
      OSError: it cannot be read.
    """

  def publish(self, publication: Publication) -> None:
    """Lets the others have it; those of earlier updates may go.

    Raises:
      OSError: it could not be written; nothing has changed.
      ValueError: somebody else publishes under this replica's number.
    """

  def newest_step(self, replica: int) -> int | None:
    """Of what a replica published last; None if it never did."""

  def read(self, replica: int, step: int) -> Publication | None:
    """What a reader after `step` updates learns from.

    Args:
      replica: who published it.
      step: of the reader.

    Returns:
      The newest publication of at most `step` updates; if all are ahead of
      that, the newest. None if there is none that is whole.
    """

  def placed(self, fingerprint: str, reader: int) -> Any:
    """What `read` returned as a tree on the reader's devices, if it is there.

    Args:
      fingerprint: of the weights.
      reader: number of the replica.

    Returns:
      The tree; None: take the weights of the publication.
    """


class SharedFolder:
  """An exchange through a folder, or a bucket, that all replicas see."""

  def __init__(
    self, path: str, replica: int, keep: int, report: Callable[[str], None]
  ):
    """Makes this replica's own folder.

    Args:
      path: of the exchange; what `etils.epath` can open.
      replica: number of this one.
      keep: of its publications that stay.
      report: told of what is damaged.

    Raises:
      ValueError: nothing can be written there.
    """
    self._root = epath.Path(path).expanduser()
    self._replica, self._keep, self._report = replica, keep, report
    self._damaged: set[str] = set()
    self._named = ""
    self._last: _File | None = None
    self._own = self._folder(replica)
    try:
      self._own.mkdir(parents=True, exist_ok=True)
      probe = self._own / f".probe_{secrets.token_hex(4)}"
      probe.write_bytes(b"can this replica publish?" * 1024)
      probe.unlink()
    except OSError as error:
      raise ValueError(
        f"Codistillation.exchange={path!r}: replica {replica} cannot write"
        f" there ({_cause(error)}): free space, grant it the right to write, or"
        " name another folder, the same for all replicas."
      ) from error

  def introduce(self, description: Mapping[str, Any]) -> None:
    """See `Exchange`."""
    own = json.loads(json.dumps(description))
    self._check_not_taken(own)
    before = self._published(self._replica)
    self._last = before[-1] if before else _NOTHING
    met = sorted(self._root.glob(f"replica_*/{_DESCRIPTION}"))
    path = self._root / _GROUP
    if not (met and path.exists()):
      # Anew where others have met before: what was said of them holds no more.
      self._write(path, secrets.token_hex(16).encode())
    for path in met:
      name = path.parent.name.removeprefix("replica_")
      if name == str(self._replica):
        continue
      try:
        found = json.loads(path.read_text())
      except (OSError, ValueError):
        continue  # being written; that replica will look at ours
      check_fits(own, found, name, str(self._root))
    self._write(self._own / _DESCRIPTION, json.dumps(own, indent=1).encode())
    self.group()  # known from now on, should the folder be away for a while

  def _check_not_taken(self, own: Mapping[str, Any]) -> None:
    path = self._own / _DESCRIPTION
    try:
      run = json.loads(path.read_text()).get("run")
    except (OSError, ValueError):
      return
    if run != own.get("run"):
      raise ValueError(
        f"Codistillation.replica={self._replica}: another run (another"
        f" MODEL_DIR) has published under that number in {self._own}. Give each"
        " replica its own number; if that run is given up, remove the folder."
      )

  def group(self) -> str:
    """See `Exchange`."""
    try:
      # Of replicas that came at the same time the last has named it.
      self._named = (self._root / _GROUP).read_text()
    except OSError:
      if not self._named:
        raise
    return self._named

  def publish(self, publication: Publication) -> None:
    """See `Exchange`."""
    before = self._published(self._replica)
    # A listing may be late; what it has beyond our last is not ours.
    newest = before[-1] if before else _NOTHING
    if (
      self._last
      and newest != self._last
      and (newest.number >= self._last.number)
    ):
      raise ValueError(
        f"Codistillation.replica={self._replica}: another process has published"
        f" under that number in {self._own} since this one began. They are"
        " copies of one MODEL_DIR, whose noise repeats: go on with one of them"
        " only."
      )
    data = _packed(publication)
    digest = hashlib.sha256(data).hexdigest()[:16]
    number = before[-1].number + 1 if before else 0
    name = f"{number:08d}-{publication.step:08d}-{digest}.npz"
    self._write(self._own / name, data)
    if self._last:
      self._last = _File(number, publication.step, digest, name)
    for old in before[: max(0, len(before) + 1 - self._keep)]:
      with contextlib.suppress(OSError):
        (self._own / old.name).unlink()

  def newest_step(self, replica: int) -> int | None:
    """See `Exchange`."""
    published = self._published(replica)
    return published[-1].step if published else None

  def read(self, replica: int, step: int) -> Publication | None:
    """See `Exchange`."""
    published = _of_this_life(self._published(replica))
    fitting = [each for each in published if each.step <= step] or published
    for each in reversed(fitting):
      path = self._folder(replica) / each.name
      if str(path) in self._damaged:
        continue
      try:
        return _unpacked(path.read_bytes(), each, replica)
      except FileNotFoundError:
        continue  # its replica has just replaced it
      except Exception as error:  # whatever a foreign file may do to NumPy
        if not isinstance(error, OSError):  # the next look may read it
          self._damaged.add(str(path))
        self._report(
          f"what replica {replica} published after update {each.step} cannot be"
          f" read ({_cause(error)}): it is left out"
        )
    return None

  def placed(self, fingerprint: str, reader: int) -> Any:
    """None: see `Exchange`."""
    del fingerprint, reader
    return None

  def _published(self, replica: int) -> list["_File"]:
    """What is there, in the order in which it was published."""
    found = []
    try:
      names = [path.name for path in self._folder(replica).glob("*.npz")]
    except OSError:
      return []
    for name in names:
      if match := _NAME.fullmatch(name):
        found.append(_File(int(match[1]), int(match[2]), match[3], name))
    return sorted(found)

  def _folder(self, replica: int) -> Any:
    return self._root / f"replica_{replica}"

  def _write(self, path: Any, data: bytes) -> None:
    draft = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
      draft.write_bytes(data)
      draft.replace(path)
    except BaseException:
      with contextlib.suppress(OSError):
        draft.unlink(missing_ok=True)
      raise


class _File(NamedTuple):
  """A publication by its name; they sort in the order of publication."""

  number: int
  step: int
  digest: str
  name: str


_NOTHING = _File(-1, -1, "", "")


def _packed(publication: Publication) -> bytes:
  told = publication._asdict()
  del told["arrays"]
  weights, ledger = told.pop("weights"), told.pop("ledger")
  arrays: Any = {f"{_WEIGHT}{name}": array for name, array in weights.items()}
  arrays[_TOLD] = np.frombuffer(json.dumps(told).encode(), np.uint8)
  arrays[_LEDGER] = np.frombuffer(ledger, np.uint8)
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def _of_this_life(published: list[_File]) -> list[_File]:
  """Without what a replica published before it went back to an earlier update.

  Args:
    published: in the order of publication.
  """
  kept: list[_File] = []
  for each in reversed(published):
    if not kept or each.step < kept[-1].step:
      kept.append(each)
  return kept[::-1]


def _unpacked(data: bytes, name: _File, replica: int) -> Publication:
  if hashlib.sha256(data).hexdigest()[:16] != name.digest:
    raise ValueError("its content does not match its name")
  with np.load(io.BytesIO(data), allow_pickle=False) as file:
    told = json.loads(file[_TOLD].tobytes())
    if told["replica"] != replica:
      raise ValueError(f"it is of replica {told['replica']}")
    if told["step"] != name.step:
      raise ValueError(f"it is of update {told['step']}")
    return Publication(
      weights={
        name.removeprefix(_WEIGHT): file[name]
        for name in file.files
        if name.startswith(_WEIGHT)
      },
      ledger=file[_LEDGER].tobytes(),
      **told,
    )


def check_fits(
  own: Mapping[str, Any], found: Mapping[str, Any], name: str, root: str
) -> None:
  """Refuses a replica that trains something else, or is a copy.

  Args:
    own: what this replica trains.
    found: what another one does.
    name: of that one.
    root: of the exchange.

  Raises:
    ValueError: names each difference.
  """
  if found.get("run") == own.get("run"):
    raise ValueError(
      f"replica {name} in Codistillation.exchange={root!r} has this run's own"
      " seed: they are copies of one MODEL_DIR, or have one fixed_seed, and"
      " their noise may repeat. Start each replica in a MODEL_DIR of its own."
    )
  differ = [
    f"{key} is {_short(found.get(key))} there and {_short(own[key])} here"
    for key in sorted(own.keys() - {"run"})
    if found.get(key) != own[key]
  ]
  if differ:
    raise ValueError(
      f"replica {name} in Codistillation.exchange={root!r} does not fit:"
      f" {'; '.join(differ)}. Start all replicas with the same settings and"
      " corpus, or use an exchange folder of their own."
    )


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


def _cause(error: BaseException) -> str:
  text = getattr(error, "strerror", None) or str(error) or type(error).__name__
  return str(text).splitlines()[0][:200]
