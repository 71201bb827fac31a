"""`dptrain codistill`: replicas that end, die, are interrupted, go on."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import small_replicas
import small_run
import together

from dptrain import cli
from dptrain import configuration
from dptrain import replica_processes
from dptrain import replicas
from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import layout
import gin


def codistill(folder, count=2, **options):
  """Runs `dptrain codistill` on small runs: status, stdout, stderr."""
  out, err = io.StringIO(), io.StringIO()
  with (
    pytest.MonkeyPatch.context() as patch,
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    patch.setattr(replicas, "PROGRAM", small_replicas.PROGRAM)
    patch.setattr(configuration, "training_run", small_replicas.training_run)
    patch.setenv("XLA_FLAGS", together.QUICK_TO_COMPILE)
    status = cli.main(command(folder, count, **options))
  return status, out.getvalue(), err.getvalue()


def command(folder, count=2, **options):
  return [
    "codistill",
    f"--replicas={count}",
    "--gin_file=demo.gin",
    f"--gin.MODEL_DIR={folder}",
    f"--gin.OPTIONS={options!r}",
  ]


def newest(folder):
  """Updates in a replica's newest checkpoint; 0 without one."""
  names = [path.name for path in (folder / "checkpoints").glob("*")]
  return max((int(name) for name in names if name.isdigit()), default=0)


def releases(folder):
  return len(small_run.ledger_lines(folder, "release"))


OPTIONS = {"steps": 8, "die": [1, 5]}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
  """A pair of which one was killed; its folder, and how the launcher ended."""
  folder = tmp_path_factory.mktemp("pair")
  return folder, *codistill(folder, **OPTIONS)


def test_one_that_is_killed_stops_no_other(killed):
  folder, status, out, err = killed
  assert status == 1
  assert newest(folder / "replica_0") == 8
  assert newest(folder / "replica_1") < 8
  assert "replica 0: updates" in out
  assert "replica 1: updates" not in out
  *_, last = err.splitlines()
  assert last.startswith(
    "dptrain: error: replica 1 was ended by SIGKILL (out of memory?) after"
    " update "
  )
  assert str(folder / "replica_1" / "log.txt") in last
  assert last.endswith("The same command resumes all replicas.")
  # What it had released is in the report.
  joint = json.loads((folder / "privacy_report.json").read_text())
  assert set(joint["runs"]) == {"replica 0", "replica 1"}


def test_the_same_command_resumes_and_reports_all(killed):
  folder = killed[0]
  before = json.loads((folder / "privacy_report.json").read_text())
  status, out, err = codistill(folder, **OPTIONS)
  assert status == 0, err
  assert "replica 0: all 8 updates are made" in err
  for number in range(2):
    replica = folder / f"replica_{number}"
    assert newest(replica) == releases(replica) == 8
    assert re.search(rf"^replica {number}: updates +8$", out, re.M)
    assert re.search(rf"^replica {number}: validation accuracy", out, re.M)
    assert f"replica {number}: clipping:" in err
    log = (replica / "log.txt").read_text()
    assert log.count("clipping:") == 2
    assert "8/8 [" in log
    assert small_run.ledger_lines(replica, "lesson")
  # Bars are not passed on but added up.
  assert "8/8" not in err
  assert re.search(r"16/16 \[.*replica 0: 8, replica 1: 8, epsilon [\d.]+", err)
  joint = json.loads((folder / "privacy_report.json").read_text())
  assert joint["disjoint"]
  assert joint["epsilon"] == pytest.approx(max(joint["runs"].values()))
  assert joint["runs"]["replica 1"] > before["runs"]["replica 1"]
  shown = layout.rounded_up(joint["epsilon"])
  assert f"all replicas           epsilon {shown}, delta 1e-05\n" in out
  assert f"{folder / 'privacy_report.txt'}\n" in out
  text = (folder / "privacy_report.txt").read_text()
  assert "Privacy report of several runs" in text
  assert "Written 20" in text


@pytest.mark.long
def test_sigterm_to_the_launcher_lets_all_save(tmp_path):
  folder = tmp_path / "pair"
  # No checkpoint but that of an interrupted run.
  options = {"steps": 800, "pause": 0.05, "period": 1000}
  (program,) = together.start(
    [[small_replicas.PROGRAM[1], *command(folder, **options)]]
  )
  each = [folder / f"replica_{i}" for i in range(2)]
  together.wait_for(
    [program], lambda: min(map(together.num_releases, each)) >= 3
  )
  program.terminate()
  assert program.wait(together.TIMEOUT) == 130
  told = program.told()
  assert told.endswith("interrupted; the same command resumes all replicas\n")
  assert "dptrain: error" not in told
  assert "all replicas           epsilon" in told
  for replica in each:
    assert "is saved" in (replica / "log.txt").read_text()
    assert 3 <= newest(replica) == releases(replica) < 800
    with ledger_lib.opened(replica):  # nobody else has it open
      pass


# --- programs of a line ------------------------------------------------------


def toys(tmp_path, *sources):
  return [
    replica_processes.Order(
      f"replica {number}",
      [sys.executable, "-I", "-S", "-c", source],
      tmp_path / f"{number}.txt",
    )
    for number, source in enumerate(sources)
  ]


def run_toys(tmp_path, *sources, total=20):
  view = replica_processes.View(total, "epsilon")
  try:
    return replica_processes.run(toys(tmp_path, *sources), view)
  finally:
    view.close()


def test_bars_are_read_and_everything_else_is_said(tmp_path, capsys):
  bar = (
    "'\\r 30%|###       | 3/10 [00:10<00:23, 1.2update/s, epsilon=0.4 at 2]'"
  )
  other = "'\\rprepare:  50%|#####  | 5/10 [00:01<00:01, 5document/s]'"
  source = (
    "import sys; say = sys.stderr.write; say('first\\n');"
    f" say({bar}); say('\\r' + 70 * ' ' + '\\r'); say({other});"
    " say('\\rstr\\u00e4nge\\n'); say('no end'); print('done')"
  )
  (outcome,), interrupted = run_toys(tmp_path, source)
  assert not interrupted
  assert (outcome.status, outcome.step, outcome.epsilon) == (0, 3, 0.4)
  assert outcome.last_words == "no end"
  assert outcome.summary == ["done"]
  err = capsys.readouterr().err
  for line in ("first", "str\u00e4nge", "no end"):
    assert f"replica 0: {line}\n" in err
  assert "3/10" not in err
  assert "5/10" not in err
  assert "3/20 [" in err
  assert "replica 0: 3, epsilon 0.400" in err
  said = outcome.log.read_text().splitlines()
  assert {"first", "str\u00e4nge", "no end", "done"} < set(said)
  assert sum("3/10 [" in line for line in said) == 1


def test_a_log_goes_on_where_it_was(tmp_path):
  for word in ("one", "two"):
    run_toys(tmp_path, f"print({word!r})")
  assert (tmp_path / "0.txt").read_text() == "one\ntwo\n"


def test_who_dies_is_named_at_once_and_stops_nobody(tmp_path, capsys):
  dying = "import sys; sys.exit('dptrain: error: no such corpus.')"
  (one, other), _ = run_toys(
    tmp_path, dying, "import time; time.sleep(0.7); print('alive')"
  )
  assert (one.status, other.status) == (1, 0)
  assert other.summary == ["alive"]
  assert "replica 0 ended with status 1; the others go on" in (
    capsys.readouterr().err
  )
  assert replicas._obituary(one) == (
    "replica 0 ended with status 1; its last words: no such corpus; its log:"
    f" {one.log}. The same command resumes all replicas."
  )


def test_a_bar_of_a_resumed_replica_begins_where_it_was(capsys):
  view = replica_processes.View(20, "epsilon")
  for step in (6, 8):
    view.show([replica_processes.Outcome("replica 0", None, step=step)])
  assert view._bar.n == 8
  assert view._bar.initial == 6
  view.close()


STUBBORN = """
import os, signal, sys, time
def asked(*_):
  with open("asked", "a") as file:
    file.write(".")
signal.signal(signal.SIGTERM, asked)
print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True)
with open("pid.draft", "w") as file:
  file.write(str(os.getpid()))
os.rename("pid.draft", "pid")
while True:
  time.sleep(0.1)
"""
LAUNCHER = """
import pathlib, signal, sys
# Started in the background, tests may have been told to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from dptrain import replica_processes as lib
command = [sys.executable, "-I", "-S", "-c", sys.argv[1]]
order = lib.Order("replica 0", command, pathlib.Path("log.txt"))
(outcome,), interrupted = lib.run([order], lib.View(1, "epsilon"))
print(interrupted, outcome.status, outcome.summary)
"""


@pytest.fixture
def launched(tmp_path):
  """A launcher of one program that does not end when asked to."""
  program = subprocess.Popen(
    [sys.executable, "-c", LAUNCHER, STUBBORN],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=tmp_path,
    start_new_session=True,
  )
  together.wait_for([program], (tmp_path / "pid").exists)
  yield program
  with contextlib.suppress(ProcessLookupError):
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
  program.kill()
  program.communicate()


def test_ctrl_c_is_one_sigterm_and_a_second_kills(launched, tmp_path):
  # The terminal's signal reaches the whole group, replicas included.
  os.killpg(launched.pid, signal.SIGINT)
  together.wait_for([launched], (tmp_path / "asked").exists)
  os.killpg(launched.pid, signal.SIGINT)  # passed on by a wrapper, say
  time.sleep(1.2)
  assert launched.poll() is None
  os.killpg(launched.pid, signal.SIGINT)
  out, _ = launched.communicate(timeout=30)
  assert out == "True -9 ['True']\n"
  assert (tmp_path / "asked").read_text() == "."


@pytest.mark.skipif(
  sys.platform != "linux",
  reason="only Linux tells a process that its parent has died",
)
def test_a_launcher_that_is_killed_leaves_nobody_unasked(launched, tmp_path):
  launched.kill()
  launched.wait()
  end = time.monotonic() + 30
  while not (tmp_path / "asked").exists() and time.monotonic() < end:
    time.sleep(0.01)
  assert (tmp_path / "asked").exists()


# --- bad input: no process is started ----------------------------------------


@pytest.fixture
def nothing_starts(monkeypatch):
  def refuse(*_):
    raise AssertionError("a process was started")

  monkeypatch.setattr(replica_processes, "run", refuse)
  yield
  gin.clear_config()


def begun(folder, *numbers):
  for number in numbers:
    (folder / f"replica_{number}").mkdir(parents=True)
    (folder / f"replica_{number}" / "privacy_ledger.jsonl").touch()


def count_as(folder, count):
  (folder / "replicas.json").write_text(json.dumps({"replicas": count}))


@pytest.mark.parametrize(
  ("count", "flags", "message"),
  [
    (0, [], "--replicas=0 must be a whole number >= 1"),
    (2, ["--gin.REPLICA=1"], "--gin.REPLICA=1 is given, but"),
    (2, ["--gin_bindings=EXCHANGE='x'"], "--gin.EXCHANGE='x' is given, but"),
    (2, ["--gin.MODEL_DIR=%FOLDER"], "MODEL_DIR=%FOLDER is no path"),
    (2, ["--gin.MODEL_DIR=3"], "MODEL_DIR=3 is no path"),
    (2, ["--gin.OPTIONS={'fixed_seed': 3}"], "fixed_seed=3 would be the seed"),
    (2, ["--gin_file=no.gin"], "--gin_file=no.gin is in none of"),
  ],
)
def test_bad_flags(
  monkeypatch, nothing_starts, tmp_path, capsys, count, flags, message
):
  monkeypatch.setattr(
    configuration, "training_run", small_replicas.training_run
  )
  folder = tmp_path / "pair"
  assert cli.main([*command(folder, count), *flags]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("dptrain: error: ")
  assert message in line
  assert not folder.exists()


@pytest.mark.parametrize(
  ("prepare", "message"),
  [
    (
      lambda folder: (folder / "privacy_ledger.jsonl").touch(),
      "holds a run of its own (privacy_ledger.jsonl): choose another folder",
    ),
    (lambda folder: begun(folder, 0, 1, 2), "say --replicas=3, or choose"),
    (
      lambda folder: (begun(folder, 0), count_as(folder, 3)),
      "say --replicas=3, or choose another folder",
    ),
    (
      lambda folder: (begun(folder, 0), count_as(folder, 1)),
      "--replicas=2, but MODEL_DIR={} holds 1 replicas",
    ),
    (
      lambda folder: (
        begun(folder, 0),
        (folder / "replicas.json").write_text("{"),
      ),
      "replicas.json is damaged",
    ),
  ],
)
def test_folders_of_something_else(
  monkeypatch, nothing_starts, tmp_path, capsys, prepare, message
):
  prepare(tmp_path)
  assert cli.main(command(tmp_path)) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message.format(tmp_path) in line


def test_a_replica_that_never_began_is_forgotten(tmp_path):
  (tmp_path / "replica_2").mkdir()
  (tmp_path / "replica_2" / "log.txt").touch()
  count_as(tmp_path, 3)
  replicas._check_folder(tmp_path, 2)


def test_without_model_dir(nothing_starts, capsys):
  argv = ["codistill", "--replicas=2", "--gin_file=demo.gin"]
  assert cli.main(argv) == 2
  assert (
    "MODEL_DIR is missing: give --gin.MODEL_DIR=" in capsys.readouterr().err
  )


# --- what the shipped gin files make of it -----------------------------------


@pytest.fixture
def orders(monkeypatch):
  """Of each call; nothing is started."""
  seen = []

  def run(orders, view):
    seen.append(orders)
    return [replica_processes.Outcome(o.name, o.log, 0) for o in orders], False

  monkeypatch.setattr(replica_processes, "run", run)
  yield seen
  gin.clear_config()


OWN = (
  "include 'demo.gin'\ninclude 'codistill/shards.gin'\nEXCHANGE_PERIOD = 7\n"
)


@pytest.mark.parametrize(
  ("files", "period", "loss"),
  [
    (["demo.gin"], 10, "cross_entropy"),
    (["demo.gin", "codistill/low_churn.gin"], 10, "symmetric_kl"),
    (["own.gin"], 7, "cross_entropy"),
  ],
)
def test_each_replica_gets_its_bindings(
  orders, monkeypatch, tmp_path, files, period, loss
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "own.gin").write_text(OWN)
  flags = [f"--gin_file={file}" for file in files]
  argv = ["codistill", "--replicas=2", *flags, "--gin.BURN_IN=3"]
  # Nothing was trained, so nothing is reported.
  assert cli.main([*argv, "--gin_bindings=MODEL_DIR = 'runs/a pair'"]) == 1
  ((*pair,),) = orders
  for number, order in enumerate(pair):
    assert order.command[:3] == [sys.executable, "-m", "dptrain.cli"]
    # argparse reads them as the replica's own process will.
    flags = cli._parser().parse_args(order.command[3:])
    run = configuration.training_run(
      flags.gin_file, flags.gin_bindings, flags.gin_search_paths
    )
    assert run.model_dir == f"runs/a pair/replica_{number}"
    assert str(order.log) == f"runs/a pair/replica_{number}/log.txt"
    told = run.codistillation
    assert (told.replica, told.replicas, told.period) == (number, 2, period)
    assert told.exchange == "runs/a pair/exchange"
    assert (run.shard.index, run.shard.count) == (number, 2)
    assert run.shard.key_folder == "runs/a pair/shard_key"
    assert run.distillation.burn_in == 3
    assert run.distillation.loss == loss
  assert len(pair) == 2
