"""SentencePiece vocabularies that begin with dptrain's special tokens.

Source: Kudo and Richardson, "SentencePiece", arXiv 1808.06226; the unigram
model, arXiv 1804.10959.

A vocabulary trained on a corpus is a function of that corpus computed without
noise: the privacy guarantee of training does not cover it. Where that matters,
learn it from noisy counts (`dptrain vocab`, `private_vocabulary`) or from
public text, and name its file in `VocabularySettings.path`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import io
import os
from pathlib import Path
import random
import re
import tempfile
from typing import Any

from dptrain.data.special_tokens import CLS_ID
from dptrain.data.special_tokens import NUM_SPECIAL
from dptrain.data.special_tokens import PAD_ID
from dptrain.data.special_tokens import SEP_ID
from dptrain.data.special_tokens import SPECIAL_PIECES
from dptrain.data.special_tokens import UNK_ID
from dptrain.data.words import normalization

_MODEL_TYPES = ("unigram", "bpe")
# SentencePiece skips lines of more than 4192 bytes; a character has at most 4.
_LINE_CHARS = 1024
# Another number of threads sums in another order and yields another model.
_THREADS = 1
_TOO_LARGE = re.compile(r"Vocabulary size too high .* value <= (\d+)")
_TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


@dataclasses.dataclass(frozen=True)
class VocabularySettings:
  """How to obtain a vocabulary.

  Attributes:
    size: number of tokens, special ones included; the result has exactly as
      many.
    model_type: "unigram" or "bpe".
    path: an existing SentencePiece model to use instead of training one, which
      then decides everything else; None to train.
    declared_public: nothing of the corpus went into the vocabulary at `path`:
      ledger and report then name it as public, with its fingerprint.
    same_units: the vocabulary at `path` was learned privately from another task
      than the run's, whose documents and users are the same.
    character_coverage: share of the corpus's characters, by count, that get a
      token of their own; the rarest others become [UNK].
    max_lines: train on at most this many lines, drawn evenly from the corpus.

  Raises:
    ValueError: if a setting is out of range.
  """

  size: int = 8192
  model_type: str = "unigram"
  path: str | None = None
  declared_public: bool = False
  same_units: bool = False
  character_coverage: float = 0.9995
  max_lines: int = 1_000_000

  def __post_init__(self) -> None:
    if self.size <= NUM_SPECIAL:
      raise ValueError(
        f"vocabulary size={self.size} must exceed the {NUM_SPECIAL} special "
        "tokens; 8192 suits a corpus of a few megabytes"
      )
    if self.declared_public and self.path is None:
      raise ValueError(
        "vocabulary declared_public=True needs a path: a vocabulary that is "
        "learned from the training text is not public"
      )
    if self.model_type not in _MODEL_TYPES:
      raise ValueError(
        f"vocabulary model_type={self.model_type!r} must be one of "
        f"{', '.join(map(repr, _MODEL_TYPES))}"
      )
    if not 0.98 <= self.character_coverage <= 1:
      raise ValueError(
        f"vocabulary character_coverage={self.character_coverage} must lie in "
        "[0.98, 1]"
      )
    if self.max_lines < 1:
      raise ValueError(
        f"vocabulary max_lines={self.max_lines} must be at least 1"
      )


class TooLargeError(ValueError):
  """The corpus does not yield so many tokens.

  Attributes:
    largest: how many it does.
  """

  def __init__(self, size: int, largest: int):
    self.largest = largest
    super().__init__(
      f"vocabulary size={size} is too large for this corpus: the largest"
      f" possible size is {largest}; lower VocabularySettings.size"
      " (--gin.VOCABULARY_SIZE) or give more text"
    )


class Vocabulary:
  """A SentencePiece model with [PAD] [UNK] [CLS] [SEP] [MASK] as ids 0 to 4."""

  def __init__(self, model: bytes, name: str = "vocabulary") -> None:
    """Opens a model.

    Args:
      model: the serialised SentencePiece model.
      name: what to call it in messages, for instance its path.

    Raises:
      ValueError: if these bytes are no SentencePiece model, or one whose
        special tokens stand elsewhere.
    """
    import sentencepiece

    try:
      processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise ValueError(f"{name} is not a SentencePiece model") from error
    self._processor: Any = processor
    self._model = model
    self._check_special_tokens(name)

  def _check_special_tokens(self, name: str) -> None:
    """Refuses a model whose first ids mean something else."""
    processor = self._processor
    size = min(NUM_SPECIAL, processor.get_piece_size())
    pieces = tuple(processor.id_to_piece(i) for i in range(size))
    # A control token never comes out of text that spells its name.
    controls = all(
      processor.is_unknown(i) if i == UNK_ID else processor.is_control(i)
      for i in range(size)
    )
    if pieces != SPECIAL_PIECES or not controls:
      raise ValueError(
        f"{name} begins with the tokens {' '.join(pieces) or '(none)'}, but "
        f"{' '.join(SPECIAL_PIECES)} must be ids 0 to {NUM_SPECIAL - 1}, as "
        "control tokens; train it with dptrain.data.vocabulary.train_vocabulary"
      )

  @property
  def size(self) -> int:
    """Number of tokens, special ones included."""
    return int(self._processor.get_piece_size())

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the model's bytes in hexadecimal."""
    return hashlib.sha256(self._model).hexdigest()

  @property
  def model(self) -> bytes:
    """The serialised SentencePiece model."""
    return self._model

  def encode(
    self, texts: list[str], num_threads: int | None = None
  ) -> list[list[int]]:
    """Splits texts into token ids, on all cores at once.

    Args:
      texts: the texts; a line's end counts as a space.
      num_threads: the most threads to use; None for as many as there are cores.

    Returns:
      One list of ids per text, without [CLS] and [SEP]. Of the special tokens
      only [UNK] can occur, whatever the text spells.
    """
    ids: list[list[int]] = self._processor.encode(
      texts, out_type=int, num_threads=num_threads or -1
    )
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Joins token ids to text.

    Args:
      ids: token ids; special tokens other than [UNK] leave no trace.

    Returns:
      The text.
    """
    return str(self._processor.decode([int(i) for i in ids]))

  def piece(self, token: int) -> str:
    """Spells one token; "▁" stands for the space before a word.

    Args:
      token: its id.

    Returns:
      The token's spelling.
    """
    return str(self._processor.id_to_piece(int(token)))

  def is_unused(self, token: int) -> bool:
    """Whether no text contains a token: it fills the vocabulary up.

    Args:
      token: its id.
    """
    return bool(self._processor.is_unused(int(token)))

  def is_byte(self, token: int) -> bool:
    """Whether a token stands for one byte of what no other piece spells.

    Args:
      token: its id.
    """
    return bool(self._processor.is_byte(int(token)))

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the model; the file appears whole or not at all.

    Args:
      path: the file; missing folders are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
      with os.fdopen(handle, "wb") as file:
        file.write(self._model)
      # mkstemp leaves the file to its owner alone; grant what the umask allows.
      umask = os.umask(0)
      os.umask(umask)
      os.chmod(partial, 0o666 & ~umask)
      os.replace(partial, target)
    except BaseException:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)
      raise


def load_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
  """Reads a vocabulary from its file.

  Args:
    path: a SentencePiece model.

  Returns:
    The vocabulary.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no SentencePiece model, or one whose special tokens
      stand elsewhere.
  """
  return Vocabulary(Path(path).read_bytes(), name=str(path))


def train_vocabulary(
  texts: Iterable[str],
  settings: VocabularySettings,
  path: str | os.PathLike[str],
) -> Vocabulary:
  """Trains a vocabulary and writes it.

  The same texts and settings give the same bytes.

  Args:
    texts: the corpus, in any division into texts.
    settings: the settings; `settings.path` plays no part here.
    path: the file to write the model to.

  Returns:
    The vocabulary, of exactly `settings.size` tokens.

  Raises:
    ValueError: if the corpus is empty, or too small or too rich in characters
      for the size; the message names the size that would do.
  """
  lines = _sample(_lines(texts), settings.max_lines)
  if not lines:
    raise ValueError("cannot train a vocabulary: the corpus holds no text")
  vocabulary = Vocabulary(_trained(lines, settings))
  vocabulary.save(path)
  return vocabulary


def train_on_word_counts(
  counts: Mapping[str, int],
  settings: VocabularySettings,
  lowercase: bool = False,
) -> Vocabulary:
  """Trains a vocabulary on words and their counts, and on nothing else.

  The same counts and settings give the same bytes. What no piece spells becomes
  bytes, so that every text is encodable. Where the words yield fewer tokens
  than `settings.size`, the rest is [unused1], [unused2] .., which no text
  contains.

  Args:
    counts: at least 1 each, by word as `words.Splitter` yields it.
    settings: size, model type and character coverage.
    lowercase: whether encoding folds case, as it was before counting.

  Returns:
    The vocabulary, of exactly `settings.size` tokens.

  Raises:
    ValueError: the words are too rich in characters for the size.
  """
  from sentencepiece import sentencepiece_model_pb2

  protos: Any = sentencepiece_model_pb2
  model = protos.ModelProto()
  lines = [f"{word}\t{count}" for word, count in sorted(counts.items())]
  # A word has its space with it, or has none: neither is to be added or dropped
  # here, and both are in the texts that the model will read.
  options: dict[str, Any] = {
    "input_format": "tsv",
    "byte_fallback": True,
    "normalization_rule_name": normalization(lowercase),
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
  }
  try:
    trained = _trained(lines, settings, **options)
  except TooLargeError as error:
    fewer = dataclasses.replace(settings, size=error.largest)
    trained = _trained(lines, fewer, **options)
  model.ParseFromString(trained)
  for number in range(1, settings.size - len(model.pieces) + 1):
    model.pieces.add(
      piece=f"[unused{number}]", type=protos.ModelProto.SentencePiece.UNUSED
    )
  model.normalizer_spec.add_dummy_prefix = True
  model.normalizer_spec.remove_extra_whitespaces = True
  return Vocabulary(model.SerializeToString())


def _trained(
  lines: Iterable[str], settings: VocabularySettings, **more: Any
) -> bytes:
  """What SentencePiece learns from the lines."""
  import sentencepiece

  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      model_type=settings.model_type,
      vocab_size=settings.size,
      character_coverage=settings.character_coverage,
      num_threads=_THREADS,
      minloglevel=3,
      control_symbols=list(SPECIAL_PIECES[SEP_ID + 1 :]),
      **_special_token_arguments(),
      **more,
    )
  except RuntimeError as error:
    raise _explained(str(error), settings) from error
  return model.getvalue()


def _special_token_arguments() -> dict[str, Any]:
  """Names the special tokens in SentencePiece's own terms."""
  names = {"pad": PAD_ID, "unk": UNK_ID, "bos": CLS_ID, "eos": SEP_ID}
  arguments: dict[str, Any] = {}
  for name, token in names.items():
    arguments[f"{name}_id"] = token
    arguments[f"{name}_piece"] = SPECIAL_PIECES[token]
  return arguments


def _lines(texts: Iterable[str]) -> Iterator[str]:
  """Yields the texts' lines in lengths that SentencePiece does not skip."""
  for text in texts:
    for line in text.splitlines():
      if line.strip():
        for start in range(0, len(line), _LINE_CHARS):
          yield line[start : start + _LINE_CHARS]


def _sample(lines: Iterable[str], limit: int) -> list[str]:
  """Draws at most `limit` lines evenly, the same ones each time."""
  # SentencePiece's own sampling draws anew in each process.
  draws = random.Random(0)  # noqa: S311 (nothing here is secret)
  kept: list[str] = []
  for position, line in enumerate(lines):
    if position < limit:
      kept.append(line)
    elif (slot := draws.randrange(position + 1)) < limit:
      kept[slot] = line
  return kept


def _explained(message: str, settings: VocabularySettings) -> ValueError:
  """Words SentencePiece's complaint in terms of the settings."""
  if found := _TOO_LARGE.search(message):
    return TooLargeError(settings.size, int(found[1]))
  if found := _TOO_SMALL.search(message):
    return ValueError(
      f"vocabulary size={settings.size} is too small for this corpus: its "
      f"characters and the special tokens alone need {found[1]}; raise "
      "VocabularySettings.size or lower VocabularySettings.character_coverage="
      f"{settings.character_coverage}"
    )
  return ValueError(f"cannot train a vocabulary with {settings}: {message}")
