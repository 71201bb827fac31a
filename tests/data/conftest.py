"""A small corpus and a vocabulary trained on it."""

import random

import pytest

from dptrain.data.corpus import Document
from dptrain.data.vocabulary import Vocabulary
from dptrain.data.vocabulary import VocabularySettings
from dptrain.data.vocabulary import train_vocabulary


@pytest.fixture(scope="session")
def documents() -> list[Document]:
  """40 documents of different lengths over a few hundred made-up words."""
  draws = random.Random(7)
  syllables = ["ba", "ke", "li", "mo", "nu", "ra", "si", "to", "vu", "ze"]
  words = ["".join(draws.choices(syllables, k=3)) for _ in range(300)]
  return [
    Document(f"doc{i}", " ".join(draws.choices(words, k=5 + 7 * i)))
    for i in range(40)
  ]


@pytest.fixture(scope="session")
def vocabulary(
  documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Vocabulary:
  """120 tokens, special ones included."""
  path = tmp_path_factory.mktemp("vocabulary") / "small.model"
  texts = [each.text for each in documents]
  return train_vocabulary(texts, VocabularySettings(size=120), path)
