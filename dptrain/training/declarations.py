"""What ledger and report shall say of a run beside its updates."""

from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import others as others_lib
from dptrain.training import frozen_teacher
from dptrain.training import ngram_learning
from dptrain.training import records as records_lib
from dptrain.training import run as run_lib


def declare(
  run: run_lib.TrainingRun,
  ledger: ledger_lib.Ledger,
  records: records_lib.Records,
  initial_weights: str | None = None,
  teacher: frozen_teacher.LoadedTeacher | None = None,
) -> None:
  """Writes down what is unprotected, and what is declared public.

  Args:
    run: the user's settings.
    ledger: open for writing; with its header.
    records: of the run.
    initial_weights: fingerprint of given ones; None for fresh ones.
    teacher: a finished one; None without.
  """
  _declare_vocabulary(run, ledger, records)
  _declare_weights(run, ledger, initial_weights)
  if teacher is not None and teacher.ledger is None:
    _declare_teacher(run, ledger, teacher)
  if run.learns and run.codistillation.exchange is not None:
    ledger.declare_unprotected(
      "Which weights of another replica were there when this one looked, and so"
      " which ones it learned from, follows from how long updates took."
    )
  if records.public is not None:
    public = run.public_data
    ledger.declare_public(
      others_lib.DeclaredPublic(
        f"{records.public.num_examples:,} records of {public.name!r} (split"
        f" {public.split!r}), {public.batch_size} of them in each update, with"
        f" weight {public.weight:g}, neither clipped nor noised",
        records.public.content_digest().hex(),
      )
    )
  if records.validation is not None:
    ledger.declare_unprotected(
      "The validation records: accuracy and loss on them are published exactly."
    )
  if run.unprotected_training_metrics:
    ledger.declare_unprotected(
      "Training metrics (loss, accuracy, realised batch size, clip fraction,"
      " gradient SNR) are logged without noise, because"
      " unprotected_training_metrics is on."
    )
  if told := ngram_learning.unprotected(run.model):
    ledger.declare_unprotected(told)
  for what in records.unprotected:
    ledger.declare_unprotected(what)


def _declare_weights(
  run: run_lib.TrainingRun, ledger: ledger_lib.Ledger, fingerprint: str | None
) -> None:
  weights = run.initial_weights
  if fingerprint is None:
    return
  if weights.declared_public:
    ledger.declare_public(
      others_lib.DeclaredPublic("the initial weights", fingerprint)
    )
  else:
    ledger.declare_unprotected(weights.unprotected())


def _declare_teacher(
  run: run_lib.TrainingRun,
  ledger: ledger_lib.Ledger,
  teacher: frozen_teacher.LoadedTeacher,
) -> None:
  if run.teacher.declared_public:
    fingerprint = teacher.teacher.fingerprint
    ledger.declare_public(
      others_lib.DeclaredPublic("the frozen teacher's weights", fingerprint)
    )
  else:
    ledger.declare_unprotected(
      "The frozen teacher's weights came without a ledger: if they were learned"
      " from a private corpus, this run may reveal it."
    )


def _declare_vocabulary(
  run: run_lib.TrainingRun,
  ledger: ledger_lib.Ledger,
  records: records_lib.Records,
) -> None:
  release = records.vocabulary_release
  if release is not None and release.fixed_seed:
    ledger.declare_unprotected(
      "The vocabulary was learned under a seed that is known to others: its"
      " pieces may reveal words of the corpus."
    )
  elif release is not None:
    if run.privacy.unit == "record":
      ledger.declare_unprotected(
        "Where records begin and end follows from the vocabulary; the guarantee"
        " for one record takes its place in its document as given."
      )
  elif run.vocabulary.declared_public:
    ledger.declare_public(
      others_lib.DeclaredPublic(
        "the vocabulary", records.vocabulary_fingerprint
      )
    )
  elif run.vocabulary.path is None:
    ledger.declare_unprotected(
      "The vocabulary was learned from the training text without noise: its"
      " pieces may reveal words of the corpus."
    )
  else:
    ledger.declare_unprotected(
      "The vocabulary was given; if it was learned from this corpus, its pieces"
      " may reveal words of it."
    )
