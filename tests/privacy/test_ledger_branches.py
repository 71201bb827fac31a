"""Which branch a continuation goes on with, and when it needs fresh keys."""

import hashlib
import os
import pathlib
import re
import tempfile

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from ledger_sessions import PLAN
from ledger_sessions import entries
from ledger_sessions import file_of
from ledger_sessions import go_on
from ledger_sessions import record
from ledger_sessions import start
import pytest

from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy.ledger import Ledger
from dptrain.privacy.ledger import LedgerError


@pytest.fixture
def sessions(tmp_path):
  """Trains updates [step, end) in a session of its own; the branch."""
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)

  def session(branch, step, end, environment, lineage="l"):
    with ledger_lib.opened(tmp_path) as ledger:
      name = go_on(
        ledger, branch, step, lineage=lineage, environment=environment
      )
      record(ledger, name, step, end)
    return name

  return session


def test_another_environment_goes_on_where_nothing_is_repeated(sessions):
  root = sessions("", 0, 10, "a")
  assert sessions(root, 10, 13, "b") == root
  assert sessions(root, 13, 15, "a") == root
  assert sessions(root, 15, 18, "c") == root


def test_another_environment_forks_where_it_would_repeat(sessions, tmp_path):
  root = sessions("", 0, 10, "a")
  forks = {sessions(root, 9, 12, "b"), sessions(root, 5, 12, "b")}
  assert len(forks | {root}) == 3
  assert sessions(root, 9, 12, "b") in forks  # the same again: a replay
  counts = [r.count for r in ledger_lib.read(tmp_path).releases()]
  assert sum(counts) == 10 + 3 + 7


def test_changed_arrays_fork_where_they_would_repeat(sessions, tmp_path):
  root = sessions("", 0, 10, "a")

  def branch(step, state, intact):
    with ledger_lib.opened(tmp_path) as ledger:
      return ledger.open_branch(
        checkpoint_branch=root,
        checkpoint_step=step,
        lineage="l",
        environment="a",
        state=state,
        intact=intact,
      ).name

  assert branch(8, "saved", True) == root
  assert branch(10, "cast", False) == root  # nothing is repeated
  fork = branch(8, "cast", False)
  assert fork != root
  assert branch(8, "cast", False) == fork
  assert branch(8, "cast otherwise", False) not in (root, fork)


def test_an_environment_repeats_only_what_it_made(sessions):
  root = sessions("", 0, 10, "a")
  sessions(root, 10, 13, "b")
  assert sessions(root, 11, 13, "b") == root
  assert sessions(root, 10, 15, "b") == root  # b's own, then on
  assert sessions(root, 10, 11, "a") != root
  assert sessions(root, 5, 6, "a") != root  # it would come to b's updates
  assert sessions(root, 5, 6, "b") != root
  assert sessions(root, 15, 16, "a") == root  # all behind it


def test_an_environment_that_made_nothing_forces_no_fork(sessions, tmp_path):
  root = sessions("", 0, 10, "a")
  assert sessions(root, 10, 10, "b") == root  # killed before its first update
  assert sessions(root, 5, 12, "a") == root
  assert sessions(root, 5, 12, "a") == root
  assert sessions(root, 10, 11, "b") != root
  history = [entry for entry in entries(tmp_path) if "environment" in entry]
  of_root = [e for e in history if root in (e.get("name"), e.get("branch"))]
  told = [(e.get("step", 0), e["environment"]) for e in of_root]
  assert told == [(0, "a"), (10, "b"), (10, "a")]


def test_a_fork_that_went_on_elsewhere_is_not_repeated_here(sessions):
  # Its keys have served other gradients: the second fork needs fresh ones.
  root = sessions("", 0, 10, "a")
  fork = sessions(root, 5, 8, "a", lineage="new")
  assert sessions(fork, 8, 11, "b", lineage="new") == fork
  again = sessions(root, 5, 11, "a", lineage="new")
  assert again not in (root, fork)
  assert sessions(root, 5, 11, "a", lineage="new") == again


def test_a_run_that_went_on_elsewhere_is_not_begun_again_here(sessions):
  root = sessions("", 0, 5, "a")
  sessions(root, 5, 8, "b")
  assert sessions("", 0, 8, "a") != root


def test_a_branch_is_named_by_all_that_decides_it(tmp_path):
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    root = go_on(ledger)
    record(ledger, root, 0, 5)
    names = {
      root,
      go_on(ledger, lineage="other"),
      go_on(ledger, environment="other"),
      go_on(ledger, root, 2, lineage="other"),
      go_on(ledger, root, 3, lineage="other"),
      go_on(ledger, root, 2, lineage="third"),
      go_on(ledger, root, 2, environment="other"),
    }
  assert len(names) == 7
  assert all(re.fullmatch("[0-9a-f]{64}", name) for name in names)


def test_an_unknown_branch_is_refused(tmp_path):
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    with pytest.raises(LedgerError, match="does not know branch abcdefabcdef "):
      go_on(ledger, "abcdef" * 6, 3)


session_lists = st.lists(
  st.tuples(
    st.integers(0, 3),  # which checkpoint
    st.sampled_from("lllllm"),  # lineage
    st.sampled_from("ab"),  # environment
    st.integers(0, 2),  # updates
  ),
  min_size=6,
  max_size=10,
)


@given(session_lists)
@settings(deadline=None, max_examples=400)
def test_no_key_ever_serves_two_different_updates(sessions_to_make):
  # Whatever somebody goes back to and continues, a branch and a step, which
  # decide the key, make one and the same update, or noise could be subtracted.
  made: dict[tuple[str, int], str] = {}
  with (
    tempfile.TemporaryDirectory() as folder,
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setattr(os, "fsync", lambda _: None)
    directory = pathlib.Path(folder)
    checkpoints = {("", 0): "initial parameters"}
    for which, lineage, environment, updates in sessions_to_make:
      branch, step = list(checkpoints)[which % len(checkpoints)]
      model = checkpoints[branch, step]
      with ledger_lib.opened(directory) as ledger:
        start(ledger)
        branch = go_on(
          ledger, branch, step, lineage=lineage, environment=environment
        )
        for at in range(step, step + updates):
          ledger.record(branch, at, PLAN.release(at))
          # The model after an update, were its rounding told exactly.
          parts = model, lineage, environment, branch, at
          model = hashlib.sha256(repr(parts).encode()).hexdigest()
          assert made.setdefault((branch, at), model) == model
          checkpoints[branch, at + 1] = model
    read = Ledger(file_of(directory))
    assert sum(release.count for release in read.releases()) == len(made)


@given(
  st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 4)), max_size=9)
)
@settings(deadline=None, max_examples=50)
def test_crashes_alone_never_fork(crashes):
  with (
    tempfile.TemporaryDirectory() as folder,
    pytest.MonkeyPatch.context() as m,
  ):
    m.setattr(os, "fsync", lambda _: None)
    directory = pathlib.Path(folder)
    reached = [("", 0)]
    for which, updates in crashes:
      branch, step = reached[which % len(reached)]
      with ledger_lib.opened(directory) as ledger:
        start(ledger)
        branch = go_on(ledger, branch, step)
        record(ledger, branch, step, step + updates)
        reached.append((branch, step + updates))
    ledger = Ledger(file_of(directory))
    assert len(ledger.branches) <= 1
    most = max(step for _, step in reached)
    assert sum(release.count for release in ledger.releases()) == most
