"""What a word is, where words are counted: what pieces never reach across.

SentencePiece's pieces cross neither spaces nor, by default, the borders
between letters, digits and signs. So these are cut apart before they are
counted: a word is then one word, whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
import re
import sys
from typing import Any
import unicodedata

# Longer ones are left out; a piece has at most 16 characters anyway.
MAX_WORD_CHARS = 64
# What SentencePiece writes for a space.
_SPACE = "\u2581"
# Written without spaces: each character counts as a word.
_UNSPACED = (
  "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


class Splitter:
  """Splits texts into words, as SentencePiece normalises them."""

  def __init__(self, lowercase: bool = False):
    """Opens SentencePiece's normaliser.

    Args:
      lowercase: fold case (nmt_nfkc_cf instead of nmt_nfkc).
    """
    import sentencepiece

    self._normalizer: Any = sentencepiece.SentencePieceNormalizer(
      rule_name=normalization(lowercase)
    )

  def __call__(self, text: str) -> Iterator[str]:
    """Yields the words of a text, in order, as often as they occur.

    Args:
      text: any text.

    Yields:
      A run of letters, a run of digits, or one other character; with a space
      before it if it begins a word of the text.
    """
    for found in _words().finditer(self._normalizer.normalize(text)):
      word = found[0].replace(_SPACE, " ")
      if len(word) <= MAX_WORD_CHARS:
        yield word


def normalization(lowercase: bool) -> str:
  """SentencePiece's name of the normalisation."""
  return "nmt_nfkc_cf" if lowercase else "nmt_nfkc"


@functools.cache
def _words() -> re.Pattern[str]:
  # \w has no combining marks, without which some scripts fall apart.
  marks = "".join(
    chr(i)
    for i in range(sys.maxunicode)
    if unicodedata.category(chr(i)).startswith("M")
  )
  letters = rf"(?:(?![{_UNSPACED}])[^\W\d_]|[{re.escape(marks)}])+"
  return re.compile(
    rf"{_SPACE}?(?:{letters}|\d+|[^\s{_SPACE}])", re.DOTALL | re.UNICODE
  )
