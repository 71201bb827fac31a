"""Vocabularies learned from a private histogram of words, and their papers.

Beside `FILE.model` stand `FILE.model.words.tsv`, the noisy counts, which are
all that was released of the corpus, and `FILE.model.release.json`, which says
how, and from which a training run prices it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dptrain.data import vocabulary as vocabulary_lib
from dptrain.data import words as words_lib
from dptrain.data.corpus import Document
from dptrain.privacy import keys
from dptrain.privacy import others
from dptrain.privacy import word_counts

SUFFIX = ".release.json"
WORDS_SUFFIX = ".words.tsv"
UNITS = ("document", "user")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularyRelease:
  """What was released of a corpus with a vocabulary. All of it is public.

  Attributes:
    words: SHA-256 of the noisy counts, which are what was released.
    fingerprint: SHA-256 of the SentencePiece model that was learned from them;
      empty before.
    unit: whose words were counted together: "document" or "user".
    words_per_unit: the most distinct words of one unit that counted.
    noise_multiplier: noise over sqrt(words_per_unit).
    failure_prob: delta of the choice of words.
    threshold: what a noisy count had to exceed.
    words_kept: how many did.
    lowercase: whether case was folded.
    fixed_seed: whether the seed is known to others: no privacy claim.
    task: the seqio task whose words were counted.
    split: its split.
  """

  words: str
  unit: str
  words_per_unit: int
  noise_multiplier: float
  failure_prob: float
  threshold: float
  words_kept: int
  lowercase: bool
  fixed_seed: bool
  fingerprint: str = ""
  task: str = ""
  split: str = ""

  def other(self, unit: str, relation: str) -> others.OtherRelease:
    """The release as a plan and a ledger price it.

    Args:
      unit: the plan's.
      relation: the plan's.

    Raises:
      ValueError: the vocabulary's unit is smaller than the plan's.
    """
    return others.OtherRelease(
      what=(
        "the vocabulary was learned privately (noise multiplier"
        f" {self.noise_multiplier:g}, {self.words_per_unit} words per"
        f" {self.unit})"
      ),
      name=self.words,
      noise_multiplier=word_counts.priced(
        self.noise_multiplier, self.unit, unit, relation
      ),
      failure_prob=self.failure_prob,
    )

  def as_json(self) -> str:
    """As JSON text."""
    return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"


def release_path(model: str | os.PathLike[str]) -> Path:
  """Where the release of a model's file is described."""
  return Path(f"{os.fspath(model)}{SUFFIX}")


def words_path(model: str | os.PathLike[str]) -> Path:
  """Where the noisy counts behind a model's file are."""
  return Path(f"{os.fspath(model)}{WORDS_SUFFIX}")


def read_release(model: str | os.PathLike[str]) -> VocabularyRelease | None:
  """What was released with a model; None if its file tells of nothing.

  Args:
    model: a SentencePiece model's file.

  Raises:
    ValueError: the description is damaged, or that of another model.
  """
  path = release_path(model)
  if not path.exists():
    return None
  release = _read(path)
  if release.fingerprint != vocabulary_lib.load_vocabulary(model).fingerprint:
    raise ValueError(
      f"{path} describes another vocabulary than {model}: put the two files of"
      " one `dptrain vocab` together again."
    )
  return release


def count_words(
  documents: Iterable[Document],
  *,
  unit: str,
  words_per_unit: int,
  seed: keys.SecretSeed,
  lowercase: bool = False,
) -> dict[str, int]:
  """Counts units by word, with a bounded contribution. PRIVATE.

  Args:
    documents: the corpus; documents of one unit need not be adjacent.
    unit: "document" (its key, or its source) or "user" (its feature "unit").
    words_per_unit: the most distinct words of one unit that count.
    seed: secret; chooses which.
    lowercase: fold case.

  Raises:
    ValueError: a document without a user.
  """
  split = words_lib.Splitter(lowercase)
  counts = word_counts.WordCounts(words_per_unit, seed)
  for document in documents:
    counts.add(_key(document, unit), split(document.text))
  return counts.counts()


def release_words(
  counts: Mapping[str, int],
  settings: word_counts.WordRelease,
  *,
  unit: str,
  seed: keys.SecretSeed,
  lowercase: bool = False,
  task: str = "",
  split: str = "",
) -> tuple[dict[str, int], VocabularyRelease]:
  """Makes counts private; whatever is learned from the result is free.

  Formal guarantee: that of `word_counts.WordRelease`.

  Args:
    counts: of `count_words`. PRIVATE.
    settings: noise and threshold.
    unit: that of `counts`.
    seed: secret; used for this release only, and not kept.
    lowercase: that of `counts`.
    task: told in the release.
    split: told in the release.

  Returns:
    Noisy counts by word, and what they are.

  Raises:
    ValueError: no word passes the threshold.
  """
  noisy = word_counts.noisy_counts(counts, settings, seed)
  if not noisy:
    raise ValueError(
      "no word is held by enough units for a private vocabulary: a noisy count"
      f" must exceed {settings.threshold:.0f}. Give more text, a larger"
      " --epsilon, a larger --delta or fewer --words_per_unit; and count the"
      " cost of this attempt, which has told that there is none."
    )
  return noisy, VocabularyRelease(
    words=_fingerprint(noisy),
    unit=unit,
    words_per_unit=settings.words_per_unit,
    noise_multiplier=settings.noise_multiplier,
    failure_prob=settings.failure_prob,
    threshold=settings.threshold,
    words_kept=len(noisy),
    lowercase=lowercase,
    fixed_seed=seed.fixed,
    task=task,
    split=split,
  )


def write_words(
  noisy: Mapping[str, int],
  release: VocabularyRelease,
  path: str | os.PathLike[str],
) -> None:
  """Writes noisy counts, and what they are, before anything is made of them.

  Args:
    noisy: of `release_words`.
    release: likewise.
    path: of the model that is to be learned; missing folders are made.
  """
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  words_path(path).write_text(_table(noisy), encoding="utf-8")
  release_path(path).write_text(release.as_json(), encoding="utf-8")


def read_words(
  path: str | os.PathLike[str],
) -> tuple[dict[str, int], VocabularyRelease]:
  """Noisy counts that `write_words` wrote, and what they are.

  Args:
    path: the file that ends in `.words.tsv`.

  Raises:
    FileNotFoundError: there is none, or nothing that says what it is.
    ValueError: damaged.
  """
  path = Path(path)
  beside = release_path(os.fspath(path).removesuffix(WORDS_SUFFIX))
  release = _read(beside)
  try:
    lines = path.read_text("utf-8").removesuffix("\n").split("\n")
    noisy = {
      word: int(count) for word, count in (line.split("\t") for line in lines)
    }
  except ValueError as error:
    raise ValueError(f"{path} is no table of words and counts.") from error
  if _fingerprint(noisy) != release.words:
    raise ValueError(f"{beside} describes other counts than those of {path}.")
  return noisy, release


def save(
  vocabulary: vocabulary_lib.Vocabulary,
  release: VocabularyRelease,
  path: str | os.PathLike[str],
) -> None:
  """Writes a model, and before it what was released with it.

  Args:
    vocabulary: learned from the words of `release` alone.
    release: of these.
    path: the model's file; missing folders are made.
  """
  beside = release_path(path)
  beside.parent.mkdir(parents=True, exist_ok=True)
  release = dataclasses.replace(release, fingerprint=vocabulary.fingerprint)
  beside.write_text(release.as_json(), encoding="utf-8")
  vocabulary.save(path)


def _read(path: Path) -> VocabularyRelease:
  try:
    release = VocabularyRelease(**json.loads(path.read_text("utf-8")))
    # Checks them.
    word_counts.WordRelease(
      words_per_unit=release.words_per_unit,
      noise_multiplier=release.noise_multiplier,
      failure_prob=release.failure_prob,
    )
    if release.unit not in UNITS:
      raise ValueError(f"unit {release.unit!r} is not known")
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{path} is damaged: {error}. Restore it, or learn the vocabulary again."
    ) from error
  return release


def _table(noisy: Mapping[str, int]) -> str:
  return "".join(f"{word}\t{count}\n" for word, count in sorted(noisy.items()))


def _fingerprint(noisy: Mapping[str, int]) -> str:
  return hashlib.sha256(_table(noisy).encode()).hexdigest()


def _key(document: Any, unit: str) -> str:
  if unit not in UNITS:
    raise ValueError(f"unit={unit!r} must be 'document' or 'user'.")
  if unit == "document":
    return getattr(document, "document", "") or str(document.source)
  key = getattr(document, "unit", "")
  if not key:
    raise ValueError(
      f"document {document.source!r} has no user: --unit=user needs the feature"
      " 'unit' in every example of the task; or use --unit=document."
    )
  return str(key)
