"""What replicas leave for each other in a shared folder."""

import errno
import hashlib
import io
import json
import pathlib

from etils import epath
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from dptrain.training import checkpoints
from dptrain.training import exchange
from dptrain.training import kept_weights
from dptrain.training import shared_mesh

DESCRIPTION = {
  "replicas": 2,
  "topology": "all_to_all",
  "corpora": "shards",
  "sequence_length": 16,
  "vocabulary": "v",
  "parameters": "3 arrays, abc",
  "unit": "one record",
  "relation": "zero_out",
  "claim": True,
  "run": "run 0",
  "shards": {"count": 2, "corpus": "c", "key": "k"},
}


def weights_of(value):
  return {
    "layer/kernel": np.full((3, 2), value, np.float32),
    "layer/bias": np.arange(2, dtype=np.float32) + value,
  }


def publication(step, value=None, replica=0):
  weights = weights_of(step if value is None else value)
  fingerprint = checkpoints.state_digest(weights)
  ledger = f"ledger after {step}\n".encode()
  return exchange.Publication(
    replica, step, weights, ledger, fingerprint, "branch"
  )


def folder_of(path, replica=0, keep=9):
  told = []
  made = exchange.SharedFolder(str(path), replica, keep, told.append)
  return made, told


def files(path, replica=0):
  return sorted(each.name for each in (path / f"replica_{replica}").iterdir())


@pytest.fixture
def both(tmp_path):
  """Replica 0, which publishes; replica 1, which reads; what that one said."""
  publisher, _ = folder_of(tmp_path)
  reader, told = folder_of(tmp_path, 1)
  return publisher, reader, told


def test_what_is_published_is_read(both, tmp_path):
  publisher, reader, told = both
  assert reader.read(0, 5) is None
  assert reader.newest_step(0) is None
  wanted = publication(5)
  publisher.publish(wanted)
  found = reader.read(0, 5)
  assert found._replace(weights=None) == wanted._replace(weights=None)
  assert found.arrays is None
  assert found.weights.keys() == wanted.weights.keys()
  for name, array in wanted.weights.items():
    np.testing.assert_array_equal(found.weights[name], array)
    assert found.weights[name].dtype == array.dtype
  assert reader.newest_step(0) == 5
  assert reader.placed(found.fingerprint, 1) is None
  (name,) = files(tmp_path)  # no draft, no probe
  assert name.startswith("00000000-00000005-")
  assert not told


def test_a_reader_learns_from_the_newest_that_is_not_ahead(both):
  publisher, reader, _ = both
  for step in (10, 20, 30):
    publisher.publish(publication(step))
  read = {at: reader.read(0, at).step for at in (5, 10, 19, 20, 31, 99)}
  # Where all are ahead of it, the newest.
  assert read == {5: 30, 10: 10, 19: 10, 20: 20, 31: 30, 99: 30}


def test_nothing_of_a_life_that_was_given_up_is_read(both, tmp_path):
  publisher, reader, _ = both
  for step in (10, 20, 30):
    publisher.publish(publication(step, value=-step))
  for step in (20, 25):  # went back to update 12, say
    publisher.publish(publication(step))
  assert reader.newest_step(0) == 25
  found = {at: reader.read(0, at) for at in (15, 20, 24, 25, 40)}
  steps = {at: each.step for at, each in found.items()}
  assert steps == {15: 10, 20: 20, 24: 20, 25: 25, 40: 25}
  for at in (20, 24, 25, 40):
    assert found[at].fingerprint == publication(steps[at]).fingerprint
  # Not even where the one that took its place is damaged.
  newer = [name for name in files(tmp_path) if name.startswith("00000003")]
  (tmp_path / "replica_0" / newer[0]).write_bytes(b"damaged")
  again, _ = folder_of(tmp_path, 2)
  assert again.read(0, 24).step == 10


@given(
  lives=st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=4
  ),
  at=st.integers(0, 20),
  keep=st.integers(2, 6),
)
@settings(
  deadline=None,
  max_examples=25,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_who_reads_what(tmp_path_factory, lives, at, keep):
  # A replica that publishes after each update, and goes back now and then.
  root = tmp_path_factory.mktemp("exchange")
  publisher, _ = folder_of(root, keep=keep)
  alive, published = [], []
  for life, (back, updates) in enumerate(lives):
    begin = min(back, alive[-1][0] + 1) if alive else 0
    alive = [each for each in alive if each[0] < begin]
    for step in range(begin, begin + updates):
      publisher.publish(publication(step, value=life * 100 + step))
      alive.append((step, life))
      published.append((step, life))
  reader, told = folder_of(root, 1)
  found = reader.read(0, at)
  assert not told
  there = [each for each in published[-keep:] if each in alive]
  fitting = [each for each in there if each[0] <= at] or there
  step, life = fitting[-1]
  assert found.fingerprint == publication(step, life * 100 + step).fingerprint
  assert reader.newest_step(0) == published[-1][0]


def test_so_many_are_kept(tmp_path):
  publisher, _ = folder_of(tmp_path, keep=2)
  for step in range(1, 6):
    publisher.publish(publication(step))
  names = files(tmp_path)
  assert [name[:17] for name in names] == [
    "00000003-00000004",
    "00000004-00000005",
  ]
  # Numbers go on after a restart.
  again, _ = folder_of(tmp_path, keep=2)
  again.publish(publication(6))
  assert files(tmp_path)[-1].startswith("00000005-00000006-")


def foreign(data, number=9, step=9):
  """A name that fits its content."""
  digest = hashlib.sha256(data).hexdigest()[:16]
  return f"{number:08d}-{step:08d}-{digest}.npz"


def npz(**arrays):
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def text(value):
  return np.frombuffer(json.dumps(value).encode(), np.uint8)


def truncated(path):
  path.write_bytes(path.read_bytes()[:-7])


def renamed(path):
  """To a later publication, of an earlier update."""
  digest = path.stem.rpartition("-")[2]
  path.rename(path.with_name(f"00000009-00000004-{digest}.npz"))


def moved(path):
  """From another replica, with its true name."""
  other, _ = folder_of(path.parent.parent, 7)
  other.publish(publication(20, replica=7))
  (name,) = files(path.parent.parent, 7)
  data = (path.parent.parent / "replica_7" / name).read_bytes()
  path.with_name(name.replace("00000000-", "00000009-")).write_bytes(data)
  path.unlink()


def written(data):
  def damage(path):
    path.unlink()
    path.with_name(foreign(data)).write_bytes(data)

  return damage


def told_of(**more):
  known = {"replica": 0, "step": 9, "fingerprint": "f", "branch": "b"}
  return text({**known, **more})


DAMAGES = {
  "truncated": truncated,
  "renamed": renamed,
  "of another replica": moved,
  "empty": written(b""),
  "garbage": written(b"garbage"),
  "an array": written(b"\x93NUMPY" + b"\x00" * 40),
  "other arrays": written(npz(a=np.zeros(3))),
  "no ledger": written(npz(**{"told.json": told_of()})),
  "a list": written(npz(**{"told.json": text([1]), "ledger.jsonl": text(1)})),
  "another format": written(
    npz(**{"told.json": told_of(more=1), "ledger.jsonl": text(1)})
  ),
  "pickled": written(
    npz(
      **{
        "told.json": told_of(),
        "ledger.jsonl": text(1),
        "weight/a": np.array([{}], object),
      }
    )
  ),
  "a zip that lies": written(
    npz(**{"told.json": told_of()}).replace(b"NUMPY", b"NUMBY")
  ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_bad_file_is_left_out_and_said_once(both, tmp_path, damage):
  publisher, reader, told = both
  publisher.publish(publication(3))
  publisher.publish(publication(5))
  damage(tmp_path / "replica_0" / files(tmp_path)[-1])
  for _ in range(3):
    assert reader.read(0, 99).step == 3
  assert len(told) == 1
  assert told[0].startswith("what replica 0 published after update")
  assert "\n" not in told[0]


def test_nothing_else_in_the_folder_matters(both, tmp_path):
  publisher, reader, told = both
  publisher.publish(publication(3))
  own = tmp_path / "replica_0"
  for name in (".00000009-00000009-0000000000000000.npz.ab", "x.npz", "y"):
    (own / name).write_bytes(b"half written")
  (tmp_path / "replica_x").mkdir()
  assert reader.read(0, 9).step == 3
  assert not told


def test_a_file_that_is_replaced_while_it_is_read(both, tmp_path, monkeypatch):
  publisher, reader, told = both
  publisher.publish(publication(3))
  publisher.publish(publication(5))
  last = files(tmp_path)[-1]
  read_bytes = epath.Path(tmp_path).__class__.read_bytes

  def vanishing(path):
    if path.name == last:
      raise FileNotFoundError(errno.ENOENT, "gone", str(path))
    return read_bytes(path)

  monkeypatch.setattr(epath.Path(tmp_path).__class__, "read_bytes", vanishing)
  assert reader.read(0, 9).step == 3
  monkeypatch.undo()
  assert reader.read(0, 9).step == 5  # it was no damage
  assert not told


def full_disk(monkeypatch, root):
  """Writes half of what it is given."""
  kind = epath.Path(root).__class__
  whole = kind.write_bytes

  def write_bytes(path, data):
    whole(path, data[: len(data) // 2])
    raise OSError(errno.ENOSPC, "No space left on device", str(path))

  monkeypatch.setattr(kind, "write_bytes", write_bytes)


def test_a_full_disk_leaves_nothing_half_written(both, tmp_path, monkeypatch):
  publisher, reader, told = both
  publisher.publish(publication(3))
  before = files(tmp_path)
  full_disk(monkeypatch, tmp_path)
  with pytest.raises(OSError, match="No space left"):
    publisher.publish(publication(5))
  assert files(tmp_path) == before
  monkeypatch.undo()
  assert reader.read(0, 9).step == 3
  publisher.publish(publication(7))
  assert reader.read(0, 9).step == 7
  assert not told


@pytest.mark.parametrize("how", ["full", "read-only", "below a file"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, how):
  path = tmp_path / "exchange"
  if how == "full":
    full_disk(monkeypatch, tmp_path)
    told = "No space left"
  elif how == "below a file":
    path.touch()
    path /= "pair"
    told = "Not a directory.*name another folder"
  else:

    def mkdir(*_, **__):
      raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(epath.Path(tmp_path).__class__, "mkdir", mkdir)
    told = "Permission denied"
  with pytest.raises(
    ValueError, match=rf"Codistillation\.exchange=.*replica 0 .*{told}"
  ):
    folder_of(path)


# --- who may meet ------------------------------------------------------------


def introduced(path, replica, **changes):
  made, _ = folder_of(path, replica)
  made.introduce({**DESCRIPTION, "run": f"run {replica}", **changes})
  return made


def test_replicas_that_fit_are_known_to_each_other(tmp_path):
  introduced(tmp_path, 0)
  introduced(tmp_path, 1)
  introduced(tmp_path, 0)  # starts again
  told = json.loads((tmp_path / "replica_1" / "description.json").read_text())
  assert told == {**DESCRIPTION, "run": "run 1"}


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("vocabulary", "w"),
    ("sequence_length", 32),
    ("parameters", "3 arrays, def"),
    ("shards", {"count": 2, "corpus": "d", "key": "k"}),
    ("unit", "one user"),
    ("relation", "replace_one"),
    ("claim", False),
    ("replicas", 3),
    ("topology", "ring"),
    ("corpora", "overlapping"),
  ],
)
def test_what_does_not_fit_is_named(tmp_path, name, value):
  introduced(tmp_path, 0)
  with pytest.raises(
    ValueError, match=rf"replica 0 in .* does not fit: {name} is "
  ):
    introduced(tmp_path, 1, **{name: value})
  # It has left no description that would keep the others from starting again.
  introduced(tmp_path, 0)
  introduced(tmp_path, 1)


def test_copies_of_a_model_dir_are_refused(tmp_path):
  introduced(tmp_path, 0)
  with pytest.raises(ValueError, match="copies of one MODEL_DIR"):
    introduced(tmp_path, 1, run="run 0")


def test_a_number_that_is_taken_is_refused(tmp_path):
  introduced(tmp_path, 0)
  with pytest.raises(ValueError, match="replica=0: another run"):
    introduced(tmp_path, 0, run="run 5")


def test_two_processes_under_one_number_are_found(tmp_path):
  """Copies of one MODEL_DIR: their run is the same."""
  one, _ = folder_of(tmp_path)
  one.introduce(DESCRIPTION)
  one.publish(publication(1))
  one.publish(publication(2))
  two, _ = folder_of(tmp_path)
  two.introduce(DESCRIPTION)
  two.publish(publication(3))
  with pytest.raises(ValueError, match="another process has published"):
    one.publish(publication(4))
  two.publish(publication(5))
  # One that is started again takes over.
  one, _ = folder_of(tmp_path)
  one.introduce(DESCRIPTION)
  one.publish(publication(6))
  with pytest.raises(ValueError, match="another process has published"):
    two.publish(publication(6))


@pytest.mark.parametrize("content", ["", "{", "[1]x"])
def test_a_description_that_is_being_written_is_passed_over(tmp_path, content):
  introduced(tmp_path, 0)
  (tmp_path / "replica_0" / "description.json").write_text(content)
  introduced(tmp_path, 1)
  introduced(tmp_path, 0)


# --- the name of those who meet ----------------------------------------------


def test_replicas_agree_on_the_name_of_their_group(tmp_path):
  first = introduced(tmp_path / "one", 0)
  second = introduced(tmp_path / "one", 1)
  other = introduced(tmp_path / "two", 0)
  assert first.group() == second.group() != other.group()
  again = introduced(tmp_path / "one", 0)
  assert again.group() == first.group()
  # While the folder is away, it is what it was.
  (tmp_path / "one" / "group").unlink()
  assert first.group() == again.group()


def test_of_two_that_come_at_once_the_last_has_named_it(tmp_path):
  first = introduced(tmp_path, 0)
  (tmp_path / "group").write_text("by another that came at the same time")
  assert first.group().startswith("by another")


def test_another_group_in_an_old_folder_has_another_name(tmp_path):
  before = introduced(tmp_path, 0).group()
  (tmp_path / "replica_0" / "description.json").unlink()
  assert introduced(tmp_path, 0).group() != before


def test_a_shared_mesh_is_named_by_its_runs():
  def mesh(*runs):
    made = shared_mesh.SharedMesh(2)
    for run in runs:
      made.introduce({**DESCRIPTION, "run": run})
    return made

  assert mesh("a", "b").group() == mesh("a", "b").group()
  assert mesh("a", "b").group() != mesh("a", "c").group()
  with pytest.raises(ValueError, match="copies of one MODEL_DIR"):
    mesh("a", "a")


# --- weights that are kept for replays ---------------------------------------


def like():
  return {"layer": {"bias": np.empty(2), "kernel": np.empty((3, 2))}}


@pytest.fixture
def kept(tmp_path):
  return kept_weights.KeptWeights(tmp_path)


def test_kept_weights_are_loaded(kept, tmp_path):
  fingerprint = publication(4).fingerprint
  assert not kept.has(fingerprint)
  kept.keep(weights_of(4), fingerprint)
  kept.keep(weights_of(4), fingerprint)
  assert kept.has(fingerprint)
  found = kept.load(fingerprint, like())
  np.testing.assert_array_equal(found["layer"]["kernel"], np.full((3, 2), 4))
  np.testing.assert_array_equal(found["layer"]["bias"], [4, 5])
  assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
  "damage",
  [
    truncated,
    pathlib.Path.unlink,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(npz(**weights_of(5))),  # whole, but others
    lambda path: path.write_bytes(npz(a=np.array([{}], object))),
  ],
)
def test_damage_to_kept_weights_is_found(kept, tmp_path, damage):
  fingerprint = publication(4).fingerprint
  kept.keep(weights_of(4), fingerprint)
  damage(tmp_path / f"{fingerprint}.npz")
  with pytest.raises(ValueError, match=r"is damaged: remove it and start"):
    kept.load(fingerprint, like())


def test_only_what_is_needed_stays(kept, tmp_path):
  for value in range(3):
    kept.keep(weights_of(value), str(value))
  (tmp_path / "replica_1.ledger.jsonl").write_text("stays")
  kept.forget({"1"})
  assert [kept.has(str(value)) for value in range(3)] == [False, True, False]
  assert (tmp_path / "replica_1.ledger.jsonl").exists()


def test_weights_that_cannot_be_kept_leave_nothing(kept, tmp_path, monkeypatch):
  def fsync(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(kept_weights.os, "fsync", fsync)
  with pytest.raises(OSError, match="No space left"):
    kept.keep(weights_of(1), "1")
  assert not list(tmp_path.iterdir())
