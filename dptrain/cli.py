"""The command line: train, prepare, vocab, plan, report, audit."""

import argparse
from collections.abc import Sequence
import pathlib
import sys
from typing import Any


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


def _prepare(arguments: argparse.Namespace) -> int:
  from dptrain import configuration
  from dptrain.training import preparing

  run = configuration.training_run(
    arguments.gin_file,
    # Nothing is written there; the flag is the user's to leave out.
    ["MODEL_DIR = 'not used'", *arguments.gin_bindings],
    arguments.gin_search_paths,
  )
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
  _add_gin_flags(train)
  train.add_argument(
    "--coordinator_address",
    metavar="HOST:PORT",
    help="where process 0 is reached, if several processes train together",
  )
  train.add_argument(
    "--process_count", type=int, metavar="N", help="how many they are"
  )
  train.add_argument(
    "--process_index", type=int, metavar="I", help="which one this is, from 0"
  )
  train.set_defaults(command=_train)
  prepare = commands.add_parser(
    "prepare",
    help="tokenise a run's corpus once, into a folder for TrainingRun.prepared;"
    " the same command again goes on after a kill",
  )
  _add_gin_flags(prepare)
  _add_prepare_flags(prepare)
  prepare.set_defaults(command=_prepare)
  plan = commands.add_parser(
    "plan", help="price a run before it is started: epsilon, noise, compute"
  )
  _add_gin_flags(plan)
  _add_plan_flags(plan)
  plan.set_defaults(command=_plan)
  report = commands.add_parser(
    "report",
    help="compute the privacy report of MODEL_DIR, or of several together, from"
    " the ledgers",
  )
  report.add_argument("model_dir", metavar="MODEL_DIR", nargs="+")
  report.add_argument(
    "--disjoint",
    action="store_true",
    help="the runs' corpora share no unit (else: they are one corpus)",
  )
  report.add_argument(
    "--format", choices=("text", "json", "html"), default="text"
  )
  report.set_defaults(command=_report)
  audit = commands.add_parser(
    "audit",
    help="train with canaries in a MODEL_DIR of its own, and see whether they"
    " betray more than is claimed (then the exit status is 1)",
  )
  _add_gin_flags(audit)
  _add_audit_flags(audit)
  audit.set_defaults(command=_audit)
  vocab = commands.add_parser(
    "vocab", help="learn a vocabulary of a run's training text, privately"
  )
  _add_gin_flags(vocab)
  _add_vocab_flags(vocab)
  vocab.set_defaults(command=_vocab)
  return parser


def _add_gin_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--gin_file",
    action="append",
    default=[],
    metavar="FILE",
    help="gin file; may be given several times, later ones win",
  )
  parser.add_argument(
    "--gin_bindings",
    action="append",
    default=[],
    metavar="'NAME = VALUE'",
    help="one binding; the same as --gin.NAME=VALUE",
  )
  parser.add_argument(
    "--gin_search_paths",
    default=".",
    metavar="DIR[,DIR]",
    help="where gin files are looked for before dptrain's own",
  )


def _add_prepare_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--output", required=True, metavar="DIR", help="where the store goes"
  )
  parser.add_argument(
    "--processes", type=int, metavar="N", help="that tokenise (one per core)"
  )
  parser.add_argument(
    "--shard_chars",
    type=int,
    default=16_000_000,
    metavar="N",
    help="characters of text in a shard (16,000,000)",
  )
  parser.add_argument(
    "--encoding_errors",
    default="strict",
    metavar="HOW",
    help="of documents that are not UTF-8: strict (default) refuses them,"
    " replace reads U+FFFD",
  )


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--num_examples",
    type=float,
    metavar="N",
    help="records in the corpus; left out: that of MODEL_DIR's ledger",
  )
  for name, told in (
    ("delta", "of the guarantee"),
    ("epsilon", "budget"),
    ("noise_multiplier", "noise over sensitivity; left out: calibrated"),
    ("num_parameters", "of the model, for its compute"),
    ("sequence_length", "tokens of a record, for its compute"),
  ):
    parser.add_argument(f"--{name}", type=float, metavar="X", help=told)
  parser.add_argument(
    "--phase",
    action="append",
    default=[],
    metavar="SIZE:UNTIL",
    help="a phase of the schedule, or START:END:UNTIL for a ramp; several",
  )
  parser.add_argument(
    "--sampling",
    metavar="NAME",
    help="how records are drawn: poisson (default), truncated_poisson,"
    " without_replacement, shuffled, balls_in_bins, cyclic_poisson",
  )
  parser.add_argument(
    "--relation",
    metavar="NAME",
    help="which corpora are neighbours: zero_out (default), replace_one,"
    " add_or_remove_one (N is then a public estimate)",
  )
  parser.add_argument(
    "--bands",
    type=int,
    metavar="B",
    help="of correlated noise, for cyclic_poisson (1: independent)",
  )
  parser.add_argument(
    "--compare",
    default="",
    metavar="SIZE[,SIZE]",
    help="constant batch sizes to price at the same epsilon",
  )
  parser.add_argument(
    "--advise",
    action="store_true",
    help="what arXiv 2501.18914 predicts for --num_examples and --epsilon, and"
    " perhaps --flops: model, updates, batch, loss",
  )
  parser.add_argument(
    "--flops", type=float, metavar="X", help="compute to spend, for --advise"
  )
  parser.add_argument(
    "--format", choices=("text", "json", "html"), default="text"
  )


def _add_audit_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--canaries",
    type=int,
    default=1000,
    metavar="M",
    help="units put in or left out by a fair coin (1000)",
  )
  parser.add_argument(
    "--guesses",
    type=int,
    metavar="K",
    help="coins that are guessed; left out: a tenth of the canaries",
  )
  parser.add_argument(
    "--mode",
    default="white_box",
    metavar="MODE",
    help="white_box (default): gradient canaries, all updates are seen;"
    " black_box: text canaries, the final model is seen",
  )
  parser.add_argument(
    "--confidence",
    type=float,
    default=0.95,
    metavar="X",
    help="that the lower bounds hold (0.95)",
  )
  parser.add_argument("--format", choices=("text", "json"), default="text")


def _add_vocab_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--output",
    required=True,
    metavar="FILE",
    help="the SentencePiece model; for VocabularySettings.path",
  )
  parser.add_argument(
    "--words",
    metavar="FILE",
    help="learn from the noisy counts of an earlier call (FILE.words.tsv),"
    " instead of from the corpus: at no further cost",
  )
  parser.add_argument(
    "--size",
    type=int,
    metavar="V",
    help="tokens, 5 special ones and 256 bytes included; left out: the run's",
  )
  parser.add_argument(
    "--model_type",
    metavar="NAME",
    help="unigram or bpe; left out: the run's",
  )
  parser.add_argument(
    "--unit",
    metavar="UNIT",
    help="whose words are counted together: document or user; left out: the"
    " run's unit, or document if that is the record",
  )
  parser.add_argument(
    "--words_per_unit",
    type=int,
    default=64,
    metavar="K",
    help="distinct words of one unit that count at most (64)",
  )
  for name, told in (
    ("epsilon", "what the vocabulary may cost; or give --noise_multiplier"),
    ("delta", "of the vocabulary alone, at most half of it for the noise"),
    ("noise_multiplier", "noise on the counts over the square root of K"),
  ):
    parser.add_argument(f"--{name}", type=float, metavar="X", help=told)
  parser.add_argument(
    "--lowercase", action="store_true", help="fold case before counting"
  )
  parser.add_argument(
    "--vocab_txt",
    action="store_true",
    help="also write FILE.vocab.txt, for tools that read BERT's vocabularies",
  )


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
