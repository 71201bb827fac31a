"""The records that a run trains on: read from its task, prepared, or given."""

import pathlib
import shutil
from typing import NamedTuple

from dptrain.data import corpus
from dptrain.data import prepared as prepared_lib
from dptrain.data import private_vocabulary
from dptrain.data import store as store_lib
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.privacy import others as others_lib
from dptrain.privacy import settings as settings_lib
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
    vocabulary_release: what learning the vocabulary released; None if that is
      unknown or nothing.
    public: public records in the same vocabulary; None without.
  """

  train: store_lib.Store
  validation: store_lib.Store | None
  vocabulary_size: int
  vocabulary_fingerprint: str
  unprotected: tuple[str, ...] = ()
  vocabulary_release: private_vocabulary.VocabularyRelease | None = None
  public: store_lib.Store | None = None

  def others(
    self, privacy: settings_lib.PrivacySettings
  ) -> tuple[others_lib.OtherRelease, ...]:
    """What is to be priced beside the updates.

    Raises:
      ValueError: the vocabulary protects a smaller unit than `privacy.unit`.
    """
    release = self.vocabulary_release
    if release is None or release.fixed_seed:
      return ()
    return (release.other(privacy.unit, privacy.relation),)


def read_records(
  run: run_lib.TrainingRun, directory: pathlib.Path, started: bool
) -> Records:
  """Reads the run's task, after training a vocabulary on it if need be.

  With `TrainingRun.prepared` it reads what was prepared instead, and compares
  all of it with its digests.

  Args:
    run: the user's settings.
    directory: MODEL_DIR, which exists.
    started: whether MODEL_DIR already trains: then its vocabulary stays.

  Returns:
    The records.

  Raises:
    ValueError: bad input; names the setting, its value and the way out.
  """
  if run.prepared is not None:
    return _prepared_records(run, run.prepared, directory, started)
  if run.vocabulary.path is None:
    # Told before minutes go into the vocabulary.
    run.model.check(run.sequence_length, run.vocabulary.size)
  vocabulary = _vocabulary(run, directory, started)
  run.model.check(run.sequence_length, vocabulary.size)
  public = _public_store(run, vocabulary)
  release = private_vocabulary.read_release(directory / VOCABULARY_FILE)
  return Records(
    train=_read_store(run, vocabulary, run.task, run.train_split),
    validation=_read_store(run, vocabulary, run.task, run.validation_split)
    if run.validation_split
    else None,
    public=public,
    vocabulary_size=vocabulary.size,
    vocabulary_fingerprint=vocabulary.fingerprint,
    unprotected=_counted_elsewhere(run, release, run.task),
    vocabulary_release=release,
  )


def check_records(run: run_lib.TrainingRun, records: Records) -> None:
  """Raises ValueError unless the records fit the run's settings."""
  run.model.check(run.sequence_length, records.vocabulary_size)
  if records.public is not None:
    if run.public_data.name is not None:
      run.public_data.check_store(records.public)
    _check_public(run, records, records.public)
  for store in (records.train, records.validation, records.public):
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


def _check_public(
  run: run_lib.TrainingRun, records: Records, public: store_lib.Store
) -> None:
  """Refuses this run's own records as public ones: they would have no noise.

  One task registered for both is a flag's slip away. Parts of a corpus, or its
  text under other names, are not found: what is public is taken on trust.
  """
  content = public.content_digest()
  for split, store in (
    (run.train_split, records.train),
    (run.validation_split, records.validation),
  ):
    if store is not None and store.content_digest() == content:
      raise ValueError(
        f"PublicData ({run.public_data.name!r}, split"
        f" {run.public_data.split!r}) holds the very records of this run's own"
        f" split {split!r}, which would enter the model without clipping and"
        " noise: name a task or folder of public text."
      )


def _prepared_records(
  run: run_lib.TrainingRun, name: str, directory: pathlib.Path, started: bool
) -> Records:
  folder = pathlib.Path(name).expanduser()
  manifest = prepared_lib.read_manifest(folder)
  if manifest["sequence_length"] != run.sequence_length:
    raise ValueError(
      f"TrainingRun.prepared={name!r} holds records of"
      f" {manifest['sequence_length']} tokens, but"
      f" sequence_length={run.sequence_length}: set that length, or prepare"
      " again in another folder."
    )
  vocabulary = vocabulary_lib.load_vocabulary(folder / VOCABULARY_FILE)
  if vocabulary.fingerprint != manifest["vocabulary_sha256"]:
    raise ValueError(
      f"{folder / VOCABULARY_FILE} is not the vocabulary that the records of"
      f" {folder} are written in: restore that file, or prepare again."
    )
  if run.vocabulary.declared_public and not manifest["vocabulary_given"]:
    raise ValueError(
      "VocabularySettings.declared_public=True, but the vocabulary of"
      f" TrainingRun.prepared={name!r} was learned from its training split,"
      " without noise: leave the declaration out, or prepare again with a"
      " public vocabulary."
    )
  # A given vocabulary may have had a price, which only its own path tells.
  if manifest["vocabulary_given"] and run.vocabulary.path is None:
    raise ValueError(
      f"TrainingRun.prepared={name!r} was prepared with a given vocabulary: set"
      " VocabularySettings.path to it here, too"
      f" (--gin.VocabularySettings.path={folder / VOCABULARY_FILE})."
    )
  if run.vocabulary.path is None:
    _check_size(run, vocabulary, f"TrainingRun.prepared={name!r} was prepared")
  else:
    given = vocabulary_lib.load_vocabulary(run.vocabulary.path)
    if given.fingerprint != vocabulary.fingerprint:
      raise ValueError(
        f"TrainingRun.prepared={name!r} was prepared with another vocabulary"
        f" than VocabularySettings.path={run.vocabulary.path!r}: give that one,"
        " or prepare again in another folder."
      )
  # Either may be the one that has the papers of a private vocabulary.
  places = [folder / VOCABULARY_FILE, run.vocabulary.path]
  source = next(
    (
      place
      for place in places
      if place is not None and private_vocabulary.release_path(place).exists()
    ),
    folder / VOCABULARY_FILE,
  )
  setting = f"TrainingRun.prepared={name!r}"
  _keep(vocabulary, source, directory, started, setting)
  run.model.check(run.sequence_length, vocabulary.size)
  stores = {
    split: prepared_lib.PreparedStore(folder, split)
    for split in (run.train_split, run.validation_split)
    if split is not None
  }
  for store in stores.values():
    store.check()
  release = private_vocabulary.read_release(directory / VOCABULARY_FILE)
  return Records(
    public=_public_store(run, vocabulary),
    train=stores[run.train_split],
    validation=stores[run.validation_split] if run.validation_split else None,
    vocabulary_size=vocabulary.size,
    vocabulary_fingerprint=vocabulary.fingerprint,
    unprotected=_counted_elsewhere(run, release, manifest["task"]),
    vocabulary_release=release,
  )


def _counted_elsewhere(
  run: run_lib.TrainingRun,
  release: private_vocabulary.VocabularyRelease | None,
  task: str,
) -> tuple[str, ...]:
  """What to tell where a vocabulary's units may not be those of the run.

  A task says what one document or user is. Words counted by line, say, protect
  no file, though both are called documents: one file moves many counts.

  Args:
    run: the user's settings.
    release: of the vocabulary.
    task: that the run's records come from.

  Raises:
    ValueError: they may differ, and the user has not said that they do not.
  """
  known = (task, run.train_split), ("", "")
  if release is None or (release.task, release.split) in known:
    return ()
  if not release.fixed_seed:  # a smaller unit is refused in its own words
    release.other(run.privacy.unit, run.privacy.relation)
  told = (
    f"words were counted by {release.unit} of {release.task!r} (split"
    f" {release.split!r}), but this run trains on {task!r} (split"
    f" {run.train_split!r})"
  )
  if not run.vocabulary.same_units:
    raise ValueError(
      f"VocabularySettings.path={run.vocabulary.path!r}: its {told}. Where the"
      f" two tell {release.unit}s apart in other ways, its price would be"
      " wrong: learn it with `dptrain vocab` under this run's flags, or, if one"
      f" {release.unit} is the same in both, set"
      " VocabularySettings.same_units=True."
    )
  return (
    f"The vocabulary's {told}: that one {release.unit} is the same in both was"
    " declared (VocabularySettings.same_units) and is taken on trust.",
  )


def _public_store(
  run: run_lib.TrainingRun, vocabulary: vocabulary_lib.Vocabulary
) -> store_lib.Store | None:
  """The public records, in the run's own vocabulary."""
  public = run.public_data
  if public.task is not None:
    return _read_store(run, vocabulary, public.task, public.split)
  if public.prepared is None:
    return None
  folder = pathlib.Path(public.prepared).expanduser()
  manifest = prepared_lib.read_manifest(folder)
  if manifest["vocabulary_sha256"] != vocabulary.fingerprint:
    raise ValueError(
      f"PublicData.prepared={public.prepared!r} was prepared with another"
      " vocabulary than this run's: prepare it again with"
      " VocabularySettings.path set to this run's vocabulary."
    )
  store = prepared_lib.PreparedStore(folder, public.split)
  store.check()
  return store


def _keep(
  vocabulary: vocabulary_lib.Vocabulary,
  source: str | pathlib.Path,
  directory: pathlib.Path,
  started: bool,
  setting: str,
) -> None:
  """Copies the vocabulary and its papers to MODEL_DIR, or finds it there."""
  kept = directory / VOCABULARY_FILE
  # A start that was refused may have left one made under other settings.
  if not (started and kept.exists()):
    vocabulary.save(kept)
    copy_release(source, kept)
  elif vocabulary_lib.load_vocabulary(kept).fingerprint != (
    vocabulary.fingerprint
  ):
    raise ValueError(
      f"{setting} is not the vocabulary that {directory} was started with"
      f" ({kept}): use that one, or start in a new MODEL_DIR."
    )


def _check_size(
  run: run_lib.TrainingRun,
  vocabulary: vocabulary_lib.Vocabulary,
  started: str,
) -> None:
  if vocabulary.size != run.vocabulary.size:
    raise ValueError(
      f"VocabularySettings.size={run.vocabulary.size}, but {started} with a"
      f" vocabulary of {vocabulary.size} tokens: restore that size, or start in"
      " a new folder."
    )


def _vocabulary(
  run: run_lib.TrainingRun, directory: pathlib.Path, started: bool
) -> vocabulary_lib.Vocabulary:
  """The run's vocabulary: MODEL_DIR's own, a given one, or a new one."""
  kept = directory / VOCABULARY_FILE
  given = run.vocabulary.path
  if given is not None:
    vocabulary = vocabulary_lib.load_vocabulary(given)
    setting = f"VocabularySettings.path={given!r}"
    _keep(vocabulary, given, directory, started, setting)
    return vocabulary
  # A start that was refused may have left one made under other settings.
  if started and kept.exists():
    vocabulary = vocabulary_lib.load_vocabulary(kept)
    _check_size(run, vocabulary, f"{directory} was started")
    return vocabulary
  documents = corpus.read_documents(run.task, run.train_split)
  private_vocabulary.release_path(kept).unlink(missing_ok=True)
  return vocabulary_lib.train_vocabulary(
    (document.text for document in documents), run.vocabulary, kept
  )


def copy_release(given: str | pathlib.Path, kept: pathlib.Path) -> None:
  """Keeps what was released with a vocabulary beside its copy.

  Args:
    given: the vocabulary's file.
    kept: its copy.
  """
  told = private_vocabulary.release_path(given)
  beside = private_vocabulary.release_path(kept)
  if told.exists():
    shutil.copyfile(told, beside)
  else:
    beside.unlink(missing_ok=True)


def _read_store(
  run: run_lib.TrainingRun,
  vocabulary: vocabulary_lib.Vocabulary,
  task: str,
  split: str,
) -> store_lib.RecordStore:
  documents = corpus.read_documents(task, split)
  return store_lib.build_store(documents, vocabulary, run.sequence_length)
