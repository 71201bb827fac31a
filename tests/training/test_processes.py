"""Several processes train as one: the same as one, also when some are killed.

Each is a program of its own on this machine; they talk through gloo.
"""

import shutil
import signal
import textwrap

import pytest
import small_run
import together

from dptrain import cli
from dptrain.training import processes

STEPS = {"steps": 8, "sizes": [20, 40], "keep": 4}
# Nothing to evaluate: one program less to compile.
QUICK = {"corpus": {"validation": False}, **STEPS}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """MODEL_DIRs of a run on one device: whole, and stopped after 2 updates."""
  whole = tmp_path_factory.mktemp("whole")
  small_run.train(whole, **STEPS)
  stopped = tmp_path_factory.mktemp("stopped") / "run"
  shutil.copytree(whole, stopped)
  small_run.cut(stopped, 2)
  return whole, stopped


@pytest.fixture
def stopped(begun, tmp_path):
  return shutil.copytree(begun[1], tmp_path / "run")


@pytest.fixture(scope="module")
def by_two(begun, tmp_path_factory):
  """MODEL_DIR of the stopped run, ended by two processes of two devices."""
  directory = tmp_path_factory.mktemp("two") / "run"
  shutil.copytree(begun[1], directory)
  programs = together.train(directory, 2, devices=2, **STEPS)
  (status, told), (other_status, other_told) = together.ended(programs)
  assert status == other_status == 0, told + other_told
  assert "mesh: data 4, fsdp 1, model 1; 2 process(es)" in told
  assert "epsilon" in told
  # Only the first of them speaks.
  assert "epsilon" not in other_told
  assert "update 8" not in other_told
  return directory


def test_two_processes_train_what_one_does(begun, by_two):
  small_run.assert_close(begun[0], by_two)


def test_four_processes_and_a_model_axis(begun, stopped):
  """Checkpoints of arrays that no process holds whole, too."""
  mesh = {"fsdp": 2, "model": 2}
  ended = together.ended(together.train(stopped, 4, mesh=mesh, **QUICK))
  assert [status for status, _ in ended] == [0] * 4, ended
  small_run.assert_close(begun[0], stopped)
  # Read back by a process that has them whole.
  small_run.train(stopped, **STEPS)
  assert len(small_run.ledger_lines(stopped, "release")) == 8


def test_killed_interrupted_and_resumed_bit_for_bit(by_two, stopped):
  """Ctrl-C at one of them, kill -9 of process 0, a damaged checkpoint."""

  def go(condition):
    programs = together.train(stopped, 2, devices=2, period=3, **QUICK)
    together.wait_for(programs, condition)
    return programs

  programs = go(lambda: together.num_releases(stopped) >= 3)
  programs[1].send_signal(signal.SIGINT)
  ended = together.ended(programs)
  assert [status for status, _ in ended] == [130, 130], ended
  saved, _ = small_run.newest_state(stopped)
  assert f"interrupted; update {saved} is saved" in ended[0][1]
  assert 2 <= saved < 8

  released = together.num_releases(stopped)
  programs = go(lambda: together.num_releases(stopped) > released)
  programs[0].kill()
  ended = together.ended(programs)
  assert ended[0][0] == -signal.SIGKILL
  assert ended[1][0] != 0, "trained on without the process that writes down"
  newest, _ = small_run.newest_state(stopped)
  assert newest < 8

  for path in (stopped / "checkpoints" / str(newest) / "state").rglob("d/*"):
    path.write_bytes(path.read_bytes()[:-50])
  ended = together.ended(together.train(stopped, 2, devices=2, **STEPS))
  assert [status for status, _ in ended] == [0, 0], ended
  assert f"checkpoint of update {newest} is damaged" in ended[0][1]
  small_run.assert_same(by_two, stopped)


def test_what_processes_tell_each_other(tmp_path):
  """One launch of two for all the small functions."""
  program = tmp_path / "program.py"
  program.write_text(
    textwrap.dedent(
      """
      import os, pathlib, sys, time, traceback
      import jax
      from dptrain.training import processes

      def leave(*error):
        traceback.print_exception(*error)
        sys.stderr.flush()
        os._exit(1)  # else it would wait for the other

      sys.excepthook = leave
      address, count, index = [flag.partition("=")[2] for flag in sys.argv[2:]]
      processes.start(address, int(count), int(index))
      index = int(index)
      folder = pathlib.Path(sys.argv[1])

      def refused(error, words, make):
        try:
          make()
        except error as found:
          assert type(found) is error, found
          assert all(word in str(found) for word in words), found
        else:
          raise AssertionError(words)

      assert processes.is_first() == (index == 0)
      assert processes.gathered({"a": index}) == [{"a": 0}, {"a": 1}]
      assert processes.gathered("x" * 5000 * index) == ["", "x" * 5000]

      def write():
        assert index == 0
        time.sleep(0.5)
        (folder / "written").touch()
        return 7

      assert processes.first(write) == 7
      assert (folder / "written").exists()

      def fail():
        raise OSError("the disk is full")

      elsewhere = processes.ElsewhereError
      kind = elsewhere if index else OSError
      refused(kind, ["the disk is full"], lambda: processes.first(fail))
      kind = OSError if index else elsewhere
      refused(
        kind, ["disk"], lambda: processes.everywhere(index and fail or int)
      )

      def turn():
        time.sleep(0.3 * (1 - index))
        (folder / str(index)).touch()
        return [(folder / str(i)).exists() for i in (0, 1)]

      assert processes.in_turn(turn) == [True, bool(index)]
      processes.check_equal("settings", {"a": 1})
      refused(
        ValueError,
        ["process 1 has other settings", "rows is 2 there and 1 in process 0"],
        lambda: processes.check_equal("settings", {"a": 1, "rows": 1 + index}),
      )
      processes.check_shared(folder)
      processes._SHARED_FILE_SECONDS = 0.5
      own = folder / f"own{index}"
      own.mkdir()
      kind = ValueError if index else elsewhere
      words = ["is not the folder that process 0 sees", "must share it"]
      refused(kind, words, lambda: processes.check_shared(own))
      if index == 0:  # which takes its mark away
        assert not any(folder.rglob(".shared*"))
      print("all told")
      """
    )
  )
  commands = [[program, tmp_path, *flags] for flags in together.flags(2)]
  for status, told in together.ended(together.start(commands)):
    assert status == 0, told
    assert "all told" in told


def test_processes_read_weights_of_another_run_in_turn(begun, tmp_path):
  program = tmp_path / "program.py"
  program.write_text(
    textwrap.dedent(
      """
      import sys
      import jax
      from dptrain.training import initial_weights
      from dptrain.training import processes

      address, count, index = [flag.partition("=")[2] for flag in sys.argv[2:]]
      processes.start(address, int(count), int(index))
      given = initial_weights.InitialWeights(path=sys.argv[1])
      like = {
        "mix": jax.ShapeDtypeStruct((16, 16), "float32"),
        "positions": jax.ShapeDtypeStruct((16, 16), "float32"),
        "tokens": jax.ShapeDtypeStruct((50, 16), "float32"),
      }
      print("read", sorted(processes.in_turn(lambda: given.load(like))))
      """
    )
  )
  commands = [[program, begun[0], *flags] for flags in together.flags(2)]
  for status, told in together.ended(together.start(commands)):
    assert status == 0, told
    assert "read ['mix', 'positions', 'tokens']" in told


def test_other_settings_are_refused_before_anything_is_written(tmp_path):
  each = [{}, {"physical_batch_size": 8, "period": 5}]
  directory = tmp_path / "new"
  for status, told in together.ended(together.train(directory, 2, each=each)):
    assert status == 2, told
    (error,) = [line for line in told.splitlines() if "dptrain: error" in line]
    assert "process 1 has other settings than process 0" in error
    assert "physical_batch_size is 8 there and 16 in process 0" in error
    assert "checkpoints is" in error
    assert "Traceback" not in told
  assert not directory.exists()


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (["--process_count=2"], "--coordinator_address, --process_index"),
    (
      ["--coordinator_address=a:1", "--process_count=2", "--process_index=2"],
      "--process_index=2 must lie in [0, 2)",
    ),
    (
      ["--coordinator_address=host", "--process_count=2", "--process_index=0"],
      "--coordinator_address=host has no port",
    ),
  ],
)
def test_refuses_flags_that_do_not_fit(capsys, given, message):
  assert cli.main(["train", *given]) == 2
  assert message in capsys.readouterr().err


def test_alone_all_is_a_plain_call(tmp_path):
  assert processes.gathered(3) == [3]
  assert processes.first(lambda: 4) == 4
  assert processes.in_turn(lambda: 5) == 5
  assert not processes.stop_asked(0)
  processes.check_equal("settings", {"a": object})
  processes.check_shared(tmp_path)
