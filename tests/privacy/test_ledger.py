import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import subprocess
import sys

from ledger_sessions import PLAN
from ledger_sessions import entries
from ledger_sessions import file_of
from ledger_sessions import go_on
from ledger_sessions import record
from ledger_sessions import start
from ledger_sessions import state
from ledger_sessions import train
import pytest

from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy.accounting import Releases
from dptrain.privacy.ledger import LedgerError


@pytest.fixture
def _no_fsync(monkeypatch):
  """For tests that write much and lose no power."""
  monkeypatch.setattr(os, "fsync", lambda _: None)


# --- append-only chain ------------------------------------------------------


def test_each_line_carries_the_hash_of_the_one_before(tmp_path):
  train(tmp_path)
  previous = "0" * 64
  for line in file_of(tmp_path).read_bytes().splitlines(keepends=True):
    assert json.loads(line)["previous"] == previous
    previous = hashlib.sha256(line).hexdigest()
  kinds = [entry["kind"] for entry in entries(tmp_path)]
  assert kinds == ["plan", "unprotected", "branch", *["release"] * 8]


def test_what_is_written_stays(tmp_path):
  before = b""
  for end in (0, 3, 8):
    train(tmp_path, end)
    after = file_of(tmp_path).read_bytes()
    assert after.startswith(before)
    assert len(after) > len(before)
    before = after


def test_a_ledger_read_again_is_equal(tmp_path):
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    ledger.declare_unprotected("a")
    root = go_on(ledger)
    record(ledger, root, 0, 8)
    assert go_on(ledger, root, 8, environment="other") == root
    record(ledger, root, 8, 9)
    fork = go_on(ledger, root, 5, lineage="other")
    record(ledger, fork, 5, 7)
    ledger.declare_unprotected("b")
    # What is in memory is what is on disk, even before closing.
    assert state(ledger_lib.read(tmp_path)) == state(ledger)
  with ledger_lib.opened(tmp_path) as again:
    assert state(again) == state(ledger)
  assert again.unprotected == ("a", "b")
  assert [branch.name for branch in again.branches] == [root, fork]
  assert again.has(fork, 6)
  assert not again.has(fork, 7)
  assert (again.last_step(root), again.num_releases(root)) == (8, 9)
  assert (again.last_step(fork), again.num_releases(fork)) == (6, 2)
  assert (again.last_step("?"), again.num_releases("?")) == (-1, 0)


def test_probabilities_survive_to_the_last_bit(tmp_path):
  release = Releases(1, 1 / 3, 0.1 + 0.2)
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    ledger.record(go_on(ledger), 0, release)
  assert ledger_lib.read(tmp_path).releases() == [release]


def test_something_unprotected_is_declared_once(tmp_path):
  for _ in range(2):
    train(tmp_path)
  assert ledger_lib.read(tmp_path).unprotected == ("the vocabulary",)


@pytest.mark.usefixtures("_no_fsync")
@pytest.mark.parametrize("torn", ["plan", "unprotected", "branch", "release"])
def test_training_goes_on_after_a_kill_at_any_byte(tmp_path, torn):
  train(tmp_path, 3)
  whole = file_of(tmp_path).read_bytes()
  lines = whole.splitlines(keepends=True)
  kinds = [json.loads(line)["kind"] for line in lines]
  number = len(kinds) - 1 - kinds[::-1].index(torn)
  begin = sum(map(len, lines[:number]))
  for cut in range(begin, begin + len(lines[number])):
    file_of(tmp_path).write_bytes(whole[:cut])
    with contextlib.suppress(LedgerError):  # a first line is "nothing yet"
      reader = ledger_lib.read(tmp_path)
      assert sum(r.count for r in reader.releases()) == kinds[:number].count(
        "release"
      )
    assert file_of(tmp_path).read_bytes() == whole[:cut]  # readers do not write
    train(tmp_path, 3)
    assert file_of(tmp_path).read_bytes() == whole


@pytest.mark.parametrize("mask", [0x01, 0x80, 0x20])
def test_a_changed_byte_is_refused_and_its_line_named(tmp_path, mask):
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    ledger.declare_unprotected("a")
    root = go_on(ledger)
    record(ledger, root, 0, 2)
    go_on(ledger, root, 2, environment="other")
    record(ledger, root, 2, 4)
  whole = file_of(tmp_path).read_bytes()
  lines = whole.splitlines(keepends=True)
  at = 0
  for number, line in enumerate(lines[:-1], 1):
    for position in range(at, at + len(line)):
      changed = bytearray(whole)
      changed[position] ^= mask
      file_of(tmp_path).write_bytes(changed)
      with pytest.raises(LedgerError, match=r"line \d+ is damaged") as info:
        ledger_lib.read(tmp_path)
      (named,) = re.findall(r"line (\d+) is", str(info.value))
      # A line that still reads well is told by the hash in the next one.
      assert int(named) in (number, number + 1)
      if int(named) == number + 1:
        assert "line before; one of the two" in str(info.value)
    at += len(line)


@pytest.mark.parametrize("number", range(1, 5))
def test_a_missing_or_repeated_line_is_refused(tmp_path, number):
  train(tmp_path, 3)
  lines = file_of(tmp_path).read_bytes().splitlines(keepends=True)
  for damaged in (
    lines[: number - 1] + lines[number:],
    lines[:number] + lines[number - 1 :],
    [*lines[:number], b"\n", *lines[number:]],
  ):
    file_of(tmp_path).write_bytes(b"".join(damaged))
    with (
      pytest.raises(LedgerError, match=r"line \d is damaged.*Restore"),
      ledger_lib.opened(tmp_path),
    ):
      pass
    # Not a byte of a damaged file is touched: there may be more to save.
    assert file_of(tmp_path).read_bytes() == b"".join(damaged)


def test_readers_name_what_they_miss(tmp_path):
  with pytest.raises(FileNotFoundError, match="is not a MODEL_DIR of dptrain"):
    ledger_lib.read(tmp_path)
  replica = tmp_path / "pair" / "replica_0"
  replica.mkdir(parents=True)
  file_of(replica).touch()
  with pytest.raises(FileNotFoundError, match=rf"below it: name {replica}\."):
    ledger_lib.read(tmp_path / "pair")
  file_of(tmp_path).touch()
  with pytest.raises(LedgerError, match="is empty: nothing was released yet"):
    ledger_lib.read(tmp_path)


def test_a_ledger_of_another_format_is_refused(tmp_path):
  line = {"kind": "plan", "format": 2, "plan": {}, "previous": "0" * 64}
  file_of(tmp_path).write_text(json.dumps(line) + "\n")
  with pytest.raises(LedgerError, match="line 1 is damaged: format 2 is not 1"):
    ledger_lib.read(tmp_path)


# --- releases ---------------------------------------------------------------


def test_a_replay_adds_nothing(tmp_path):
  branch = train(tmp_path)
  before = file_of(tmp_path).read_bytes()
  assert train(tmp_path) == branch
  with ledger_lib.opened(tmp_path) as ledger:
    assert go_on(ledger, branch, 5) == branch
    record(ledger, branch, 5, 8)
  assert file_of(tmp_path).read_bytes() == before


@pytest.mark.parametrize("name", ["sampling_prob", "noise_multiplier"])
def test_a_replay_with_other_numbers_is_refused(tmp_path, name):
  branch = train(tmp_path)
  other = dataclasses.replace(PLAN.release(4), **{name: 0.5})
  with ledger_lib.opened(tmp_path) as ledger:
    with pytest.raises(LedgerError, match=r"update 4 .* would now be repeated"):
      ledger.record(branch, 4, other)
    assert ledger.releases() == ledger_lib.read(tmp_path).releases()


def test_no_update_is_skipped(tmp_path):
  branch = train(tmp_path, 3)
  with ledger_lib.opened(tmp_path) as ledger:
    with pytest.raises(
      LedgerError, match=r"update 4 .* cannot be recorded before update 3"
    ):
      ledger.record(branch, 4, PLAN.release(4))
    fork = go_on(ledger, branch, 2, lineage="other")
    for step in (0, 1, 3):
      with pytest.raises(LedgerError, match="before update 2"):
        ledger.record(fork, step, PLAN.release(step))


def test_a_ledger_that_was_only_read_cannot_be_written(tmp_path):
  branch = train(tmp_path, 3)
  with pytest.raises(LedgerError, match="open for reading only"):
    ledger_lib.read(tmp_path).record(branch, 3, PLAN.release(3))


def test_the_line_is_on_disk_when_record_returns(tmp_path, monkeypatch):
  synced = []

  def fsync(descriptor):
    assert os.path.samestat(os.fstat(descriptor), file_of(tmp_path).stat())
    synced.append(file_of(tmp_path).read_bytes())  # at the time of the call

  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    branch = go_on(ledger)
    monkeypatch.setattr(os, "fsync", fsync)
    for step in range(3):
      ledger.record(branch, step, PLAN.release(step))
      assert len(synced) == step + 1
      last = json.loads(synced[-1].splitlines()[-1])
      assert (last["kind"], last["step"]) == ("release", step)
      assert synced[-1].endswith(b"\n")


def test_every_branch_is_priced(tmp_path):
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    root = go_on(ledger)
    record(ledger, root, 0, 10)
    left = go_on(ledger, root, 4, lineage="left")
    record(ledger, left, 4, 9)
    right = go_on(ledger, root, 4, lineage="right")
    record(ledger, right, 4, 7)
  assert len({root, left, right}) == 3
  read = ledger_lib.read(tmp_path)
  union = [
    PLAN.release(step)
    for steps in (range(10), range(4, 9), range(4, 7))
    for step in steps
  ]
  assert sorted(read.releases(), key=str) == sorted(
    accounting.merged(union), key=str
  )
  assert sum(release.count for release in read.releases()) == 18
  assert [read.num_releases(b.name) for b in read.branches] == [10, 5, 3]
  parents = [(b.parent, b.fork_step) for b in read.branches]
  assert parents == [("", 0), (root, 4), (root, 4)]


def test_segments_are_the_releases_in_runs(tmp_path):
  branch = train(tmp_path)
  segments = ledger_lib.read(tmp_path).segments()
  ends = [(run["first_step"], run["last_step"]) for run in segments]
  assert ends == [(0, 5), (6, 7)]
  assert [run["sampling_prob"] for run in segments] == [0.01, 0.02]
  assert {run["branch"] for run in segments} == {branch}
  assert json.loads(json.dumps(segments)) == segments


def test_a_ledger_that_was_rolled_back_is_refused(tmp_path):
  branch = train(tmp_path, 5)
  older = file_of(tmp_path).read_bytes()
  train(tmp_path, 8)
  newest = ledger_lib.read(tmp_path)
  newest.check_contains(newest.segments())
  file_of(tmp_path).write_bytes(older)
  with pytest.raises(
    LedgerError, match=rf"lacks update 5 of branch {branch[:12]}.*rolled back"
  ):
    ledger_lib.read(tmp_path).check_contains(newest.segments())
  ledger_lib.read(tmp_path).check_contains([])


def test_a_ledger_of_other_numbers_is_refused_beside_a_checkpoint(tmp_path):
  train(tmp_path)
  ledger = ledger_lib.read(tmp_path)
  segments = ledger.segments()
  segments[1]["noise_multiplier"] = 1.2
  with pytest.raises(LedgerError, match="lacks update 6"):
    ledger.check_contains(segments)


@pytest.mark.parametrize("name", ["checkpoints/4", "checkpoint_4"])
def test_checkpoints_of_either_loop_need_their_ledger(tmp_path, name):
  (tmp_path / name).mkdir(parents=True)
  with (
    ledger_lib.opened(tmp_path) as ledger,
    pytest.raises(ledger_lib.LedgerError, match="checkpoints but no ledger"),
  ):
    ledger.check_not_lost()


# --- the header -------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"plan": dataclasses.replace(PLAN, delta=1e-7)}, ["delta was 1e-06 and"]),
    (
      {"plan": dataclasses.replace(PLAN, l2_clip_norm=2.0, noise_multiplier=9)},
      [
        "l2_clip_norm was 1.0 and is now 2.0",
        "noise_multiplier was 1.1 and is",
      ],
    ),
    ({"plan": dataclasses.replace(PLAN, num_examples=999)}, ["num_examples"]),
    ({"corpus": "other"}, ["the content of the training records is not"]),
    ({"seed": "other", "corpus": "other"}, ["the secret seed is another one"]),
    (
      {"seed": "other", "plan": dataclasses.replace(PLAN, delta=1e-7)},
      ["the secret seed", "delta was"],
    ),
  ],
)
def test_another_plan_corpus_or_seed_is_refused_by_name(
  tmp_path, changes, told
):
  train(tmp_path)
  before = file_of(tmp_path).read_bytes()
  with ledger_lib.opened(tmp_path) as ledger:
    with pytest.raises(
      LedgerError, match="or start in a new MODEL_DIR"
    ) as info:
      start(ledger, **changes)
    for text in told:
      assert text in str(info.value)
    start(ledger)
  assert file_of(tmp_path).read_bytes() == before


@pytest.mark.parametrize("fixed", [True, False])
def test_a_fixed_seed_is_remembered(tmp_path, fixed):
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger, fixed_seed=fixed)
  assert ledger_lib.read(tmp_path).fixed_seed is fixed


# --- one writer, and a full disk --------------------------------------------


def test_a_second_process_is_locked_out(tmp_path):
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    code = (
      "import pathlib; from dptrain.privacy import ledger\n"
      f"with ledger.opened(pathlib.Path({str(tmp_path)!r})): print('in')"
    )
    done = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "another process is training in" in done.stderr
    assert done.returncode
    assert "in" not in done.stdout.split()
    assert ledger_lib.read(tmp_path).header  # reports need no lock


def test_the_lock_ends_with_the_session(tmp_path):
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    with pytest.raises(LedgerError, match="another process is training"):
      train(tmp_path)
    record(ledger, go_on(ledger), 0, 2)
  train(tmp_path)
  with (
    pytest.raises(ZeroDivisionError),
    ledger_lib.opened(tmp_path),
  ):
    raise ZeroDivisionError
  train(tmp_path)


class FullDisk:
  """A file that takes some bytes of a line and then no more."""

  def __init__(self, file, takes, *, silent=False):
    self.file, self.takes, self.silent = file, takes, silent

  def write(self, data):
    self.file.write(data[: self.takes])
    if self.silent:
      return self.takes
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def fileno(self):
    return self.file.fileno()


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("takes", [0, 1, 60])
@pytest.mark.parametrize("mends", [True, False])
def test_a_full_disk_stops_the_update_and_keeps_the_ledger(
  tmp_path, monkeypatch, silent, takes, mends
):
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    branch = go_on(ledger)
    record(ledger, branch, 0, 3)
    before = file_of(tmp_path).read_bytes()
    with monkeypatch.context() as patch:
      patch.setattr(
        ledger._lines,
        "_file",
        FullDisk(ledger._lines._file, takes, silent=silent),
      )
      if not mends:

        def broken(*_):
          raise OSError(errno.EIO, "broken")

        patch.setattr(os, "ftruncate", broken)
      with pytest.raises(
        OSError, match=r"privacy ledger \(No space left .*start again; nothing"
      ) as info:
        ledger.record(branch, 3, PLAN.release(3))
    assert info.value.errno == errno.ENOSPC
    assert info.value.filename == str(file_of(tmp_path))
    assert not ledger.has(branch, 3)
    after = file_of(tmp_path).read_bytes()
    assert after == before if mends else after[: len(before)] == before
  assert ledger_lib.read(tmp_path).last_step(branch) == 2
  with ledger_lib.opened(tmp_path) as ledger:
    record(ledger, branch, 3, 5)
  assert ledger_lib.read(tmp_path).last_step(branch) == 4


def test_a_line_that_did_not_reach_the_disk_is_taken_back(
  tmp_path, monkeypatch
):
  def broken(_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    branch = go_on(ledger)
    before = file_of(tmp_path).read_bytes()
    with monkeypatch.context() as patch:
      patch.setattr(os, "fsync", broken)
      with pytest.raises(
        OSError, match=r"Input/output error.*could not record"
      ):
        ledger.record(branch, 0, PLAN.release(0))
    assert file_of(tmp_path).read_bytes() == before
    record(ledger, branch, 0, 1)
  assert ledger_lib.read(tmp_path).last_step(branch) == 0
