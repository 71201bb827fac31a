"""The flags of each command, as `cli` reads them."""

import argparse


def add_gin_flags(parser: argparse.ArgumentParser) -> None:
  """Adds those that name gin files and bindings."""
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


def add_train_flags(parser: argparse.ArgumentParser) -> None:
  """Adds those of `dptrain train`."""
  parser.add_argument(
    "--coordinator_address",
    metavar="HOST:PORT",
    help="where process 0 is reached, if several processes train together",
  )
  parser.add_argument(
    "--process_count", type=int, metavar="N", help="how many they are"
  )
  parser.add_argument(
    "--process_index", type=int, metavar="I", help="which one this is, from 0"
  )


def add_codistill_flags(parser: argparse.ArgumentParser) -> None:
  """Adds those of `dptrain codistill`."""
  parser.add_argument(
    "--replicas", type=int, required=True, metavar="N", help="how many they are"
  )
  parser.add_argument(
    "--one_mesh",
    action="store_true",
    help="all in one process, each on a group of its devices, exchanging"
    " weights by collectives",
  )


def add_prepare_flags(parser: argparse.ArgumentParser) -> None:
  """Adds those of `dptrain prepare`."""
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


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
  """Adds those of `dptrain plan`."""
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


def add_report_flags(parser: argparse.ArgumentParser) -> None:
  """Adds those of `dptrain report`."""
  parser.add_argument("model_dir", metavar="MODEL_DIR", nargs="+")
  parser.add_argument(
    "--disjoint",
    action="store_true",
    help="the runs' corpora share no unit (else: they are one corpus)",
  )
  parser.add_argument(
    "--format", choices=("text", "json", "html"), default="text"
  )


def add_audit_flags(parser: argparse.ArgumentParser) -> None:
  """Adds those of `dptrain audit`."""
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


def add_vocab_flags(parser: argparse.ArgumentParser) -> None:
  """Adds those of `dptrain vocab`."""
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


def add_churn_flags(parser: argparse.ArgumentParser) -> None:
  """Adds those of `dptrain churn`."""
  for name in ("a", "b"):
    parser.add_argument(
      name,
      metavar=name.upper(),
      help="a MODEL_DIR (its newest checkpoint) or an .npz file of weights",
    )
  parser.add_argument(
    "--data",
    metavar="DIR",
    help="compare on what `dptrain prepare` has written there; left out: on the"
    " run's task",
  )
  parser.add_argument(
    "--split", metavar="NAME", help="left out: the run's validation split"
  )
  parser.add_argument("--format", choices=("text", "json"), default="text")
