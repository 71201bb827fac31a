"""From the flags of `dptrain vocab` to a private vocabulary and its papers."""

import argparse
import dataclasses
import pathlib
import secrets
from typing import Any

from dptrain.data import corpus
from dptrain.data import private_vocabulary
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.data import wordpiece
from dptrain.privacy import accounting
from dptrain.privacy import calibration
from dptrain.privacy import keys
from dptrain.privacy import word_counts
from dptrain.reports import layout

VOCAB_TXT = ".vocab.txt"
# Of delta: the rest is for the noise.
_SHARE_OF_SELECTION = 0.5
_FEW = 100  # words, of which no useful vocabulary is made


def learn(arguments: argparse.Namespace) -> str:
  """Learns the vocabulary that the flags ask for, and writes it.

  Formal guarantee: that of `word_counts.WordRelease`. The seed is drawn from
  the operating system and kept nowhere: each call is another release, but one
  with `words`, which reads an earlier release and not the corpus.

  Args:
    arguments: the flags; gin files give the task, its training split and the
      neighbouring relation, and what is left out.

  Returns:
    What was made, for people.

  Raises:
    ValueError: a flag is missing or wrong, or the text is too little.
    FileExistsError: there is such a vocabulary: what it has cost is not to be
      forgotten.
  """
  path = pathlib.Path(arguments.output).expanduser()
  _check(arguments, path)
  run = _run(arguments)
  if arguments.unit is None:
    # Words are not counted by record: where one begins is not known yet.
    unit = "document" if run.privacy.unit == "record" else run.privacy.unit
    arguments = argparse.Namespace(**(vars(arguments) | {"unit": unit}))
  settings = _settings(arguments, run)
  if arguments.words is None:
    noisy, told = _count(arguments, run)
    private_vocabulary.write_words(noisy, told, path)
    words = private_vocabulary.words_path(path)
  else:
    words = pathlib.Path(arguments.words).expanduser()
    noisy, told = private_vocabulary.read_words(words)
  try:
    vocabulary = vocabulary_lib.train_on_word_counts(
      noisy, settings, told.lowercase
    )
  except ValueError as error:
    raise ValueError(
      f"{error}. The noisy counts are released, and kept in {words}: give"
      " --words with that file, another --size and another --output, which"
      " costs no more privacy"
    ) from error
  private_vocabulary.save(vocabulary, told, path)
  if arguments.vocab_txt:
    pathlib.Path(f"{path}{VOCAB_TXT}").write_text(
      wordpiece.vocab_txt(vocabulary), encoding="utf-8"
    )
  unused = sum(map(vocabulary.is_unused, range(vocabulary.size)))
  few = f", {unused} of them unused for want of words" if unused else ""
  if told.words_kept < _FEW:
    few += f"; THAT IS LITTLE: bring more {told.unit}s, or a larger --epsilon"
  return (
    f"vocabulary    {path}: {vocabulary.size} tokens from"
    f" {told.words_kept:,} words{few}\n"
    f"words kept    whose noisy count of {told.unit}s exceeds"
    f" {told.threshold:.1f}; of one {told.unit}, {told.words_per_unit} count\n"
    f"privacy       {_price(arguments, told, run.privacy.relation)}\n"
    f"use it by     --gin.VocabularySettings.path={path}"
    f" --gin.VOCABULARY_SIZE={vocabulary.size}\n"
  )


def _check(arguments: argparse.Namespace, path: pathlib.Path) -> None:
  for taken in (
    path,
    private_vocabulary.release_path(path),
    private_vocabulary.words_path(path),
  ):
    if taken.exists():
      raise FileExistsError(
        f"{taken} exists: each vocabulary costs privacy of its own, so none is"
        " overwritten. Give another --output, or remove it if it was never"
        " shown."
      )
  if arguments.unit not in (None, *private_vocabulary.UNITS):
    raise ValueError(f"--unit={arguments.unit} must be document or user.")
  if arguments.words is None:
    return
  for name in ("epsilon", "delta", "noise_multiplier", "lowercase"):
    if getattr(arguments, name):
      raise ValueError(
        f"--{name} and --words are both given, but these counts are released"
        " already: leave one of the two out."
      )


def _count(
  arguments: argparse.Namespace, run: Any
) -> tuple[dict[str, int], private_vocabulary.VocabularyRelease]:
  """Reads the corpus, and makes its counts private."""
  settings = _release(arguments, run.privacy.relation)
  seed = keys.SecretSeed(secrets.token_bytes(32))
  told = {"unit": arguments.unit, "lowercase": arguments.lowercase}
  counts = private_vocabulary.count_words(
    corpus.read_documents(run.task, run.train_split),
    words_per_unit=settings.words_per_unit,
    seed=seed,
    **told,
  )
  return private_vocabulary.release_words(
    counts,
    settings,
    seed=seed,
    task=run.task,
    split=run.train_split,
    **told,
  )


def _run(arguments: argparse.Namespace) -> Any:
  from dptrain import configuration

  # A file may leave MODEL_DIR to the command line; this needs none.
  return configuration.training_run(
    arguments.gin_file,
    arguments.gin_bindings,
    arguments.gin_search_paths,
    defaults=["MODEL_DIR = 'no MODEL_DIR'"],
  )


def _settings(
  arguments: argparse.Namespace, run: Any
) -> vocabulary_lib.VocabularySettings:
  given = {
    name: getattr(arguments, name)
    for name in ("size", "model_type")
    if getattr(arguments, name) is not None
  }
  # Which characters there are is told by the words that were kept.
  return dataclasses.replace(
    run.vocabulary, path=None, character_coverage=1.0, **given
  )


def _release(
  arguments: argparse.Namespace, relation: str
) -> word_counts.WordRelease:
  """Noise and threshold that the flags ask for."""
  if arguments.delta is None:
    raise ValueError(
      "--delta is missing: give the vocabulary its own, for instance a tenth of"
      " the training's."
    )
  accounting.check_delta(arguments.delta)
  if (arguments.epsilon is None) == (arguments.noise_multiplier is None):
    raise ValueError(
      "give one of --epsilon and --noise_multiplier: what the vocabulary may"
      " cost, or how much noise its counts get."
    )
  failure_prob = _SHARE_OF_SELECTION * arguments.delta
  noise = arguments.noise_multiplier
  if noise is None:
    noise = calibration.noise_multiplier(
      lambda z: _priced(z, arguments.unit, relation),
      arguments.epsilon,
      arguments.delta - failure_prob,
      relation,
    )
  return word_counts.WordRelease(
    words_per_unit=arguments.words_per_unit,
    noise_multiplier=noise,
    failure_prob=failure_prob,
  )


def _priced(
  noise_multiplier: float, unit: str, relation: str
) -> list[accounting.Releases]:
  """The release, as its own unit is protected."""
  z = word_counts.priced(noise_multiplier, unit, unit, relation)
  return [accounting.Releases(1, 1.0, z)]


def _price(
  arguments: argparse.Namespace,
  told: private_vocabulary.VocabularyRelease,
  relation: str,
) -> str:
  if arguments.words is not None:
    return "that of the counts, paid once"
  epsilon = accounting.epsilon(
    _priced(told.noise_multiplier, told.unit, relation),
    arguments.delta - told.failure_prob,
    relation,
  ).value
  return (
    f"epsilon {layout.rounded_up(epsilon)}, delta {arguments.delta:g} for one"
    f" {told.unit} (noise multiplier {told.noise_multiplier:g})"
  )
