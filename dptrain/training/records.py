"""The records that a run trains on: read from its task, or given."""

import pathlib
import shutil
from typing import NamedTuple

from dptrain.data import corpus
from dptrain.data import store as store_lib
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.training import run as run_lib

VOCABULARY_FILE = "vocabulary.model"


class Records(NamedTuple):
  """Tokenised records and the vocabulary that they are written in.

  Attributes:
    train: the training records. PRIVATE.
    validation: the validation records; None without a validation split.
    vocabulary_size: number of tokens, special ones included.
    vocabulary_fingerprint: names the vocabulary.
    unprotected: what the ledger shall tell of these records, as outside the
      guarantee.
  """

  train: store_lib.Store
  validation: store_lib.Store | None
  vocabulary_size: int
  vocabulary_fingerprint: str
  unprotected: tuple[str, ...] = ()


def read_records(
  run: run_lib.TrainingRun, directory: pathlib.Path, started: bool
) -> Records:
  """Reads the run's task, after training a vocabulary on it if need be.

  Args:
    run: the user's settings.
    directory: MODEL_DIR, which exists.
    started: whether MODEL_DIR already trains: then its vocabulary stays.

  Returns:
    The records.

  Raises:
    ValueError: bad input; names the setting, its value and the way out.
  """
  if run.vocabulary.path is None:
    # Told before minutes go into the vocabulary.
    run.model.check(run.sequence_length, run.vocabulary.size)
  vocabulary = _vocabulary(run, directory, started)
  run.model.check(run.sequence_length, vocabulary.size)
  return Records(
    train=_read_store(run, vocabulary, run.train_split),
    validation=_read_store(run, vocabulary, run.validation_split)
    if run.validation_split
    else None,
    vocabulary_size=vocabulary.size,
    vocabulary_fingerprint=vocabulary.fingerprint,
  )


def check_records(run: run_lib.TrainingRun, records: Records) -> None:
  """Raises ValueError unless the records fit the run's settings."""
  run.model.check(run.sequence_length, records.vocabulary_size)
  for store in (records.train, records.validation):
    if store is None:
      continue
    if store.sequence_length != run.sequence_length:
      raise ValueError(
        f"the records have length {store.sequence_length}, but"
        f" sequence_length={run.sequence_length}."
      )
    lowest, largest = store.token_range()
    if lowest < 0 or largest >= records.vocabulary_size:
      wrong = lowest if lowest < 0 else largest
      raise ValueError(
        f"the records hold token {wrong}, but their vocabulary has"
        f" {records.vocabulary_size} tokens."
      )


def _vocabulary(
  run: run_lib.TrainingRun, directory: pathlib.Path, started: bool
) -> vocabulary_lib.Vocabulary:
  """The run's vocabulary: MODEL_DIR's own, a given one, or a new one."""
  kept = directory / VOCABULARY_FILE
  # A start that was refused may have left one made under other settings.
  keep = started and kept.exists()
  given = run.vocabulary.path
  if given is not None:
    vocabulary = vocabulary_lib.load_vocabulary(given)
    if not keep:
      shutil.copyfile(given, kept)
    elif (
      vocabulary_lib.load_vocabulary(kept).fingerprint != vocabulary.fingerprint
    ):
      raise ValueError(
        f"VocabularySettings.path={given!r} is not the vocabulary that"
        f" {directory} was started with ({kept}): use that one, or start in a"
        " new MODEL_DIR."
      )
    return vocabulary
  if keep:
    vocabulary = vocabulary_lib.load_vocabulary(kept)
    if vocabulary.size != run.vocabulary.size:
      raise ValueError(
        f"VocabularySettings.size={run.vocabulary.size}, but {directory} was"
        f" started with a vocabulary of {vocabulary.size} tokens: restore that"
        " size, or start in a new MODEL_DIR."
      )
    return vocabulary
  documents = corpus.read_documents(run.task, run.train_split)
  return vocabulary_lib.train_vocabulary(
    (document.text for document in documents), run.vocabulary, kept
  )


def _read_store(
  run: run_lib.TrainingRun, vocabulary: vocabulary_lib.Vocabulary, split: str
) -> store_lib.RecordStore:
  documents = corpus.read_documents(run.task, split)
  return store_lib.build_store(documents, vocabulary, run.sequence_length)
