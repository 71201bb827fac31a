"""The command line: `dptrain COMMAND`, and its one-line errors."""

import argparse
from collections.abc import Sequence
import pathlib
import sys
from typing import Any

from dptrain import command_flags


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  if argv is None:
    argv = sys.argv[1:]
  arguments = _parser().parse_args(_with_bindings(argv))
  arguments.as_typed = ["dptrain", *argv]
  try:
    return int(arguments.command(arguments))
  except KeyboardInterrupt:
    return 130
  except (ValueError, OSError, RuntimeError, TypeError) as error:
    if arguments.debug:
      raise
    print(f"dptrain: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _train(arguments: argparse.Namespace) -> int:
  _join_processes(arguments)
  from dptrain import configuration
  from dptrain.training import host_memory
  from dptrain.training import loop
  from dptrain.training import processes
  from dptrain.training import progress

  run = configuration.training_run(
    arguments.gin_file, arguments.gin_bindings, arguments.gin_search_paths
  )
  host_memory.keep_freed_memory()
  result = loop.train(run)
  directory = pathlib.Path(run.model_dir).expanduser()
  if processes.is_first():
    print(progress.summary(result, directory, claim=run.fixed_seed is None))
  return 0


def _codistill(arguments: argparse.Namespace) -> int:
  from dptrain import replicas

  return replicas.launch(arguments)


def _prepare(arguments: argparse.Namespace) -> int:
  from dptrain.training import preparing

  run = _run_without_model_dir(arguments)
  manifest = preparing.prepare(
    run,
    arguments.output,
    encoding_errors=arguments.encoding_errors,
    shard_chars=arguments.shard_chars,
    processes=arguments.processes,
  )
  for name, split in manifest["splits"].items():
    print(
      f"{name:<22} {split['records']:,} records of"
      f" {manifest['sequence_length']} tokens, {_listed(split['units'])},"
      f" {len(split['shards']):,} shards"
    )
  print(f"{'prepared corpus':<22} {arguments.output} (as private as its text)")
  return 0


def _run_without_model_dir(arguments: argparse.Namespace) -> Any:
  from dptrain import configuration

  return configuration.training_run(
    arguments.gin_file,
    # Nothing is written there; the flag is the user's to leave out.
    ["MODEL_DIR = 'not used'", *arguments.gin_bindings],
    arguments.gin_search_paths,
  )


def _listed(units: dict[str, int]) -> str:
  return ", ".join(f"{number:,} {kind}" for kind, number in units.items())


def _join_processes(arguments: argparse.Namespace) -> None:
  names = ("coordinator_address", "process_count", "process_index")
  given = [name for name in names if getattr(arguments, name) is not None]
  if not given:
    return
  if len(given) < len(names):
    missing = ", ".join(f"--{name}" for name in names if name not in given)
    raise ValueError(
      f"--{given[0]} is given, but {missing} is not: several processes need all"
      " three."
    )
  from dptrain.training import processes

  processes.start(*(getattr(arguments, name) for name in names))


def _plan(arguments: argparse.Namespace) -> int:
  from dptrain import planning

  made: Any = (
    planning.advise(arguments)
    if arguments.advise
    else planning.forecast(arguments)
  )
  if arguments.format == "html":
    from dptrain.reports import advice_page
    from dptrain.reports import plan_page

    page = (
      advice_page.make_page(made)
      if arguments.advise
      else plan_page.make_page(made, command=arguments.as_typed)
    )
    print(page, end="")
    return 0
  print(
    made.as_json() if arguments.format == "json" else made.as_text(), end=""
  )
  return 0


def _report(arguments: argparse.Namespace) -> int:
  from dptrain.privacy import ledger
  from dptrain.reports import report

  found = {
    name: ledger.read(pathlib.Path(name)) for name in arguments.model_dir
  }
  if len(found) < len(arguments.model_dir):
    raise ValueError("a MODEL_DIR is given twice; name each run once.")
  if len(found) > 1:
    if arguments.format == "html":
      raise ValueError("--format=html is for one MODEL_DIR; use text or json.")
    from dptrain.reports import several_runs

    made: Any = several_runs.make_joint_report(
      found, disjoint=arguments.disjoint
    )
  elif arguments.format == "html":
    from dptrain.reports import released_metrics
    from dptrain.reports import report_page

    ((name, only),) = found.items()
    metrics = released_metrics.read(pathlib.Path(name))
    print(report_page.make_page(only, metrics), end="")
    return 0
  else:
    made = report.make_report(*found.values())
  print(
    made.as_json() if arguments.format == "json" else made.as_text(), end=""
  )
  return 0


def _audit(arguments: argparse.Namespace) -> int:
  from dptrain import configuration
  from dptrain.auditing import audit
  from dptrain.training import host_memory

  settings = audit.AuditSettings(
    canaries=arguments.canaries,
    mode=arguments.mode,
    guesses=arguments.guesses,
    confidence=arguments.confidence,
  )
  run = configuration.training_run(
    arguments.gin_file, arguments.gin_bindings, arguments.gin_search_paths
  )
  host_memory.keep_freed_memory()
  verdict = audit.audit(run, settings)
  print(
    verdict.as_json() if arguments.format == "json" else verdict.as_text(),
    end="",
  )
  return 0 if verdict.passed else 1


def _vocab(arguments: argparse.Namespace) -> int:
  from dptrain import vocabularies

  print(vocabularies.learn(arguments), end="")
  return 0


def _churn(arguments: argparse.Namespace) -> int:
  from dptrain.training import churn

  found = churn.compare(
    _run_without_model_dir(arguments),
    arguments.a,
    arguments.b,
    arguments.data,
    arguments.split,
  )
  print(
    found.as_json() if arguments.format == "json" else found.as_text(), end=""
  )
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="dptrain",
    description="Differentially private pretraining of masked language models.",
  )
  parser.add_argument(
    "--debug", action="store_true", help="show tracebacks of errors"
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  train = commands.add_parser(
    "train", help="train, or go on training, in MODEL_DIR"
  )
  command_flags.add_gin_flags(train)
  command_flags.add_train_flags(train)
  train.set_defaults(command=_train)
  codistill = commands.add_parser(
    "codistill",
    help="train several replicas on this machine, which learn from each other,"
    " in MODEL_DIR/replica_0 and so on",
  )
  command_flags.add_gin_flags(codistill)
  command_flags.add_codistill_flags(codistill)
  codistill.set_defaults(command=_codistill)
  prepare = commands.add_parser(
    "prepare",
    help="tokenise a run's corpus once, into a folder for TrainingRun.prepared;"
    " the same command again goes on after a kill",
  )
  command_flags.add_gin_flags(prepare)
  command_flags.add_prepare_flags(prepare)
  prepare.set_defaults(command=_prepare)
  plan = commands.add_parser(
    "plan", help="price a run before it is started: epsilon, noise, compute"
  )
  command_flags.add_gin_flags(plan)
  command_flags.add_plan_flags(plan)
  plan.set_defaults(command=_plan)
  report = commands.add_parser(
    "report",
    help="compute the privacy report of MODEL_DIR, or of several together, from"
    " the ledgers",
  )
  command_flags.add_report_flags(report)
  report.set_defaults(command=_report)
  audit = commands.add_parser(
    "audit",
    help="train with canaries in a MODEL_DIR of its own, and see whether they"
    " betray more than is claimed (then the exit status is 1)",
  )
  command_flags.add_gin_flags(audit)
  command_flags.add_audit_flags(audit)
  audit.set_defaults(command=_audit)
  vocab = commands.add_parser(
    "vocab", help="learn a vocabulary of a run's training text, privately"
  )
  command_flags.add_gin_flags(vocab)
  command_flags.add_vocab_flags(vocab)
  vocab.set_defaults(command=_vocab)
  churn = commands.add_parser(
    "churn", help="how far the predictions of two models differ"
  )
  command_flags.add_gin_flags(churn)
  command_flags.add_churn_flags(churn)
  churn.set_defaults(command=_churn)
  return parser


def _with_bindings(argv: Sequence[str]) -> list[str]:
  """Rewrites `--gin.NAME=VALUE` as t5x does, so that argparse can read it."""
  rewritten = []
  for argument in argv:
    if argument.startswith("--gin."):
      name, equals, value = argument.removeprefix("--gin.").partition("=")
      if not equals:
        _parser().error(f"{argument} has no value; write --gin.{name}=VALUE")
      argument = f"--gin_bindings={name} = {value}"
    rewritten.append(argument)
  return rewritten


if __name__ == "__main__":
  sys.exit(main())
