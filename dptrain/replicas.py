"""From flags to several replicas on this machine, and to their joint report."""

import argparse
import ast
from collections.abc import Sequence
import contextlib
import datetime
import json
import pathlib
import re
import sys
from typing import Any, NamedTuple

import jax

from dptrain import configuration
from dptrain import replica_processes
from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import layout
from dptrain.reports import report as report_lib
from dptrain.reports import several_runs
from dptrain.reports import wording

LOG_FILE = "log.txt"
# What trains one replica.
PROGRAM = (sys.executable, "-m", "dptrain.cli")
_GIN_FOLDER = "codistill"
_GIN_FILE = f"{_GIN_FOLDER}/shards.gin"
_EXCHANGE, _KEY_FOLDER = "exchange", "shard_key"
_COUNT_FILE = "replicas.json"
_OWN = ("REPLICA", "REPLICAS", "EXCHANGE", "KEY_FOLDER")
_REPLICA = re.compile(r"replica_(\d+)")
# Of a replica that was asked to end, and has: by itself, or before it could.
_ENDED_AS_ASKED = (0, 130, -15)


class _Launch(NamedTuple):
  """What is to be started.

  Attributes:
    folder: the user's MODEL_DIR, which holds one for each replica.
    files: gin files of every replica.
    run: replica 0, as its process will see it.
  """

  folder: pathlib.Path
  files: list[str]
  run: Any


def launch(arguments: argparse.Namespace) -> int:
  """Trains all replicas on this machine, to the end.

  Args:
    arguments: the flags of `dptrain codistill`: those of gin, `replicas`, and
      `one_mesh`: all in this process, on groups of its devices.

  Returns:
    0; 1 if a replica has died, or there is no joint report; 130 if interrupted.

  Raises:
    ValueError: bad input, before any process is started.
    OSError: MODEL_DIR cannot be written.
  """
  count = arguments.replicas
  launch = _checked(arguments)
  launch.folder.mkdir(parents=True, exist_ok=True)
  _write(launch.folder / _COUNT_FILE, json.dumps({"replicas": count}) + "\n")
  orders = []
  for number in range(count):
    folder = _replica_folder(launch.folder, number)
    folder.mkdir(exist_ok=True)
    if arguments.one_mesh:
      continue
    command = _command(arguments, launch, number)
    orders.append(
      replica_processes.Order(f"replica {number}", command, folder / LOG_FILE)
    )
  if arguments.one_mesh:
    return _train_here(arguments, launch)
  disjoint = launch.run.codistillation.corpora != "overlapping"
  view = replica_processes.View(
    count * launch.run.privacy.schedule.num_steps,
    "epsilon" if disjoint else "largest epsilon",
  )
  with contextlib.closing(view):
    outcomes, interrupted = replica_processes.run(orders, view)
  for outcome in outcomes:
    for line in outcome.summary:
      print(f"{outcome.name}: {line}")
  reported = _report(launch.folder, count)
  if interrupted:
    print("interrupted; the same command resumes all replicas", file=sys.stderr)
  died = [
    each
    for each in outcomes
    if each.status and not (interrupted and each.status in _ENDED_AS_ASKED)
  ]
  for outcome in died:
    print(f"dptrain: error: {_obituary(outcome)}", file=sys.stderr)
  return 130 if interrupted else int(bool(died) or not reported)


def _train_here(arguments: argparse.Namespace, launch: _Launch) -> int:
  """All replicas in this process, in step, on groups of its devices."""
  from dptrain.training import host_memory
  from dptrain.training import progress
  from dptrain.training import together

  count = arguments.replicas
  runs = [
    configuration.training_run(
      launch.files,
      [
        *arguments.gin_bindings,
        *_bindings(launch.folder, count, number, one_mesh=True),
      ],
      arguments.gin_search_paths,
    )
    for number in range(count)
  ]
  host_memory.keep_freed_memory()
  results = together.train_together(runs)
  for number, result in enumerate(results):
    folder, claim = (
      _replica_folder(launch.folder, number),
      launch.run.fixed_seed,
    )
    told = progress.summary(result, folder, claim=claim is None)
    for line in told.splitlines():
      print(f"replica {number}: {line}")
  return int(not _report(launch.folder, count))


# --- before -----------------------------------------------------------------


def _checked(arguments: argparse.Namespace) -> _Launch:
  if not arguments.one_mesh:
    # What the replicas are for: this process must not take their memory.
    jax.config.update("jax_platforms", "cpu")
  count = arguments.replicas
  if count < 1:
    raise ValueError(
      f"--replicas={count} must be a whole number >= 1: how many train here."
    )
  folder = _folder(arguments.gin_bindings)
  _check_folder(folder, count)
  files = list(arguments.gin_file)
  read = configuration.files_read(files, arguments.gin_search_paths)
  there = any(pathlib.PurePath(f).parent.name == _GIN_FOLDER for f in read)
  if files and not there:
    files.append(_GIN_FILE)
  run = configuration.training_run(
    files,
    [
      *arguments.gin_bindings,
      *_bindings(folder, count, 0, one_mesh=arguments.one_mesh),
    ],
    arguments.gin_search_paths,
  )
  exchange = None if arguments.one_mesh else str(folder / _EXCHANGE)
  _check_run(run, exchange, count)
  return _Launch(folder, files, run)


def _folder(bindings: Sequence[str]) -> pathlib.Path:
  """MODEL_DIR of the bindings; refuses what the launcher binds itself."""
  found = None
  for binding in bindings:
    name, _, value = (part.strip() for part in binding.partition("="))
    if name in _OWN:
      raise ValueError(
        f"--gin.{name}={value} is given, but `dptrain codistill` binds"
        f" {', '.join(_OWN)} itself, for each replica: leave it out, or start"
        " the replicas one by one with `dptrain train`."
      )
    if name == "MODEL_DIR":
      found = value
  if found is None:
    raise ValueError(
      "MODEL_DIR is missing: give --gin.MODEL_DIR=FOLDER on the command line;"
      " each replica gets a folder in it."
    )
  try:
    value = ast.literal_eval(found)
  except (SyntaxError, ValueError):
    value = found
  if not isinstance(value, str) or not value or value[0] in "@%":
    raise ValueError(
      f"MODEL_DIR={found} is no path: give --gin.MODEL_DIR=FOLDER; each replica"
      " gets a folder in it."
    )
  return pathlib.Path(value).expanduser()


def _check_folder(folder: pathlib.Path, count: int) -> None:
  """Raises ValueError if it holds something else than so many replicas."""
  if (folder / ledger_lib.LEDGER_FILE).exists():
    raise ValueError(
      f"MODEL_DIR={folder} holds a run of its own"
      f" ({ledger_lib.LEDGER_FILE}): choose another folder for the replicas."
    )
  begun = [
    int(found[1])
    for path in folder.glob("replica_*")
    if (found := _REPLICA.fullmatch(path.name)) and _has_begun(path)
  ]
  if not begun:
    return
  before = max(max(begun) + 1, _count_before(folder, count))
  if before != count:
    raise ValueError(
      f"--replicas={count}, but MODEL_DIR={folder} holds {before} replicas,"
      f" each on one of {before} shards: say --replicas={before}, or choose"
      " another folder."
    )


def _has_begun(folder: pathlib.Path) -> bool:
  """Whether a replica has left more in it than a log."""
  return any(file.name != LOG_FILE for file in folder.glob("*"))


def _count_before(folder: pathlib.Path, count: int) -> int:
  """How many the last call has started; `count` if it is not known."""
  try:
    told = json.loads((folder / _COUNT_FILE).read_text(encoding="utf-8"))
    return int(told["replicas"])
  except FileNotFoundError:
    return count
  except (ValueError, KeyError, TypeError):
    raise ValueError(
      f"{folder / _COUNT_FILE} is damaged: remove it, and give --replicas as"
      " before."
    ) from None


def _check_run(run: Any, exchange: str | None, count: int) -> None:
  """Raises ValueError if it would not be replica 0 of so many."""
  told = run.codistillation
  expected = {
    "replicas": count,
    "replica": 0,
    "exchange": exchange,
  }
  for name, value in expected.items():
    if getattr(told, name) != value:
      raise ValueError(
        f"Codistillation.{name} is bound to {getattr(told, name)!r}, where"
        f" `dptrain codistill` needs {value!r}: remove that binding, or bind it"
        f" as {_GIN_FILE} does."
      )
  told.check_shard(run.shard.index, run.shard.count)
  if run.fixed_seed is not None and count > 1:
    raise ValueError(
      f"TrainingRun.fixed_seed={run.fixed_seed} would be the seed of all"
      f" {count} replicas, whose noise must differ: leave it out, or start the"
      " replicas one by one with `dptrain train` and a seed each."
    )


# --- start ------------------------------------------------------------------


def _command(
  arguments: argparse.Namespace, launch: _Launch, number: int
) -> list[str]:
  """What trains one replica."""
  bindings = _bindings(launch.folder, arguments.replicas, number)
  return [
    *PROGRAM,
    *(["--debug"] if arguments.debug else []),
    "train",
    *(f"--gin_file={file}" for file in launch.files),
    f"--gin_search_paths={arguments.gin_search_paths}",
    # The last one wins.
    *(f"--gin_bindings={b}" for b in [*arguments.gin_bindings, *bindings]),
  ]


def _bindings(
  folder: pathlib.Path, count: int, number: int, *, one_mesh: bool = False
) -> list[str]:
  exchange = None if one_mesh else str(folder / _EXCHANGE)
  return [
    f"MODEL_DIR = {str(_replica_folder(folder, number))!r}",
    f"REPLICA = {number}",
    f"REPLICAS = {count}",
    f"EXCHANGE = {exchange!r}",
    f"KEY_FOLDER = {str(folder / _KEY_FOLDER)!r}",
  ]


def _replica_folder(folder: pathlib.Path, number: int) -> pathlib.Path:
  return folder / f"replica_{number}"


# --- after ------------------------------------------------------------------


def _obituary(outcome: replica_processes.Outcome) -> str:
  after = "" if outcome.step is None else f" after update {outcome.step}"
  words = outcome.last_words.removeprefix("dptrain: error: ")
  said = f"; its last words: {words.rstrip('.')}" if words else ""
  return (
    f"{outcome.name} {outcome.ended()}{after}{said}; its log: {outcome.log}."
    " The same command resumes all replicas."
  )


def _report(folder: pathlib.Path, count: int) -> bool:
  """Writes and tells what the replicas have released together; if it could."""
  try:
    ledgers = {}
    for number in range(count):
      path = _replica_folder(folder, number) / ledger_lib.LEDGER_FILE
      ledger = ledger_lib.Ledger(path) if path.exists() else None
      if ledger is not None and ledger.header:  # else nothing was released
        ledger.check_checkpoints()
        ledgers[f"replica {number}"] = ledger
    if not ledgers:
      return False
    made = several_runs.make_joint_report(ledgers)
    _write_report(made, folder)
  except (ValueError, OSError, RuntimeError) as error:
    print(
      "dptrain: error: the joint report could not be made"
      f" ({' '.join(str(error).split())}); `dptrain report` of the replicas'"
      " folders can make it from their ledgers",
      file=sys.stderr,
    )
    return False
  exact = any(wording.EXACT_CODEBOOKS in told for told in made.unprotected)
  claimed = "" if made.claim and not exact else "   NO PRIVACY CLAIM"
  print(
    f"all replicas           epsilon {layout.rounded_up(made.epsilon)}, delta"
    f" {made.delta:g}{claimed}\n"
    f"joint privacy report   {folder / report_lib.TEXT_FILE}"
  )
  return True


def _write_report(made: several_runs.JointReport, folder: pathlib.Path) -> None:
  """Writes the report, as text and as JSON."""
  stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
  _write(folder / report_lib.TEXT_FILE, f"{made.as_text()}Written {stamp}\n")
  _write(folder / report_lib.JSON_FILE, made.as_json())


def _write(path: pathlib.Path, text: str) -> None:
  draft = path.with_name(f".{path.name}.draft")
  draft.write_text(text, encoding="utf-8")
  draft.replace(path)
