"""The pieces of a SentencePiece model as a BERT `vocab.txt`."""

from __future__ import annotations

from collections.abc import Iterator

from dptrain.data.special_tokens import NUM_SPECIAL
from dptrain.data.special_tokens import SPECIAL_PIECES
from dptrain.data.vocabulary import Vocabulary

_SPACE = "\u2581"


def vocab_txt(vocabulary: Vocabulary) -> str:
  """Converts a vocabulary for tools that cut words as BERT did.

  A conversion, not a training: a piece that begins a word becomes that word,
  any other becomes `##piece`, and every character of any piece stands alone and
  as `##character`. BERT's greedy longest match then cuts many words as
  SentencePiece does, but not all; ids differ; there is no byte fallback, so
  that a word with a character that no piece has is [UNK].

  Args:
    vocabulary: any; one that was learned with case folded is for uncased tools.

  Returns:
    One token per line; [PAD] [UNK] [CLS] [SEP] [MASK] are the first five.
  """
  tokens = dict.fromkeys(SPECIAL_PIECES)
  tokens.update(dict.fromkeys(_tokens(vocabulary)))
  return "".join(f"{token}\n" for token in tokens)


def _tokens(vocabulary: Vocabulary) -> Iterator[str]:
  pieces = [
    vocabulary.piece(i)
    for i in range(NUM_SPECIAL, vocabulary.size)
    if not vocabulary.is_byte(i) and not vocabulary.is_unused(i)
  ]
  for piece in pieces:
    if text := piece.lstrip(_SPACE):
      yield text if piece.startswith(_SPACE) else f"##{text}"
  for character in dict.fromkeys("".join(pieces)):
    if character != _SPACE:
      yield character
      yield f"##{character}"
