"""From a run's settings to a prepared store of its corpus."""

import dataclasses
import pathlib
from typing import Any

from dptrain.data import corpus
from dptrain.data import prepare as prepare_lib
from dptrain.data import prepared as prepared_lib
from dptrain.data import private_vocabulary
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.training import records as records_lib
from dptrain.training import run as run_lib


def prepare(
  run: run_lib.TrainingRun,
  folder: str,
  encoding_errors: str = "strict",
  **options: Any,
) -> dict[str, Any]:
  """Tokenises the run's task into a folder, for `TrainingRun.prepared`.

  Called again after an interruption or a kill, goes on and ends with the same
  bytes.

  Args:
    run: the user's settings; its model_dir is not touched.
    folder: where the store goes.
    encoding_errors: as in `corpus.read_documents`.
    **options: of `prepare.PrepareSettings`.

  Returns:
    The store's manifest.

  Raises:
    ValueError: bad input; names the setting, its value and the way out.
  """
  place = pathlib.Path(folder).expanduser()
  settings = prepare_lib.PrepareSettings(
    sequence_length=run.sequence_length, **options
  )
  wanted = (run.train_split, run.validation_split)
  splits = list(dict.fromkeys(split for split in wanted if split is not None))

  def documents(split: str) -> Any:
    return corpus.read_documents(run.task, split, encoding_errors)

  vocabulary = _prepared_vocabulary(run, place, documents)
  manifest = prepare_lib.prepare_store(
    place,
    documents,
    splits,
    vocabulary,
    settings,
    {
      "task": run.task,
      "encoding_errors": encoding_errors,
      "vocabulary_given": run.vocabulary.path is not None,
      "vocabulary_settings": _learning(run.vocabulary),
    },
  )
  if run.vocabulary.path is not None:
    # Its price goes where it goes.
    records_lib.copy_release(
      run.vocabulary.path, place / prepared_lib.VOCABULARY
    )
  return manifest


def _learning(settings: vocabulary_lib.VocabularySettings) -> Any:
  """What decides a vocabulary that is learned; None for a given one."""
  return None if settings.path is not None else dataclasses.asdict(settings)


def _prepared_vocabulary(
  run: run_lib.TrainingRun, folder: pathlib.Path, documents: Any
) -> vocabulary_lib.Vocabulary:
  if run.vocabulary.path is not None:
    return vocabulary_lib.load_vocabulary(run.vocabulary.path)
  kept = folder / prepared_lib.VOCABULARY
  if kept.exists() and prepare_lib.is_begun(folder):
    return vocabulary_lib.load_vocabulary(kept)
  private_vocabulary.release_path(kept).unlink(missing_ok=True)
  texts = (document.text for document in documents(run.train_split))
  return vocabulary_lib.train_vocabulary(texts, run.vocabulary, kept)
