"""Canaries: units that an auditor puts in, or leaves out, by a fair coin.

Shapes: m canaries, k records of one, N records in all, T sequence length.
"""

import hashlib
import pathlib
import secrets
from typing import NamedTuple

import numpy as np

from dptrain.data import special_tokens
from dptrain.data import store as store_lib
from dptrain.training import records as records_lib

SEED_FILE = "audit_seed"

_SECRET_BYTES = 32


class Canaries(NamedTuple):
  """The canaries of one audit.

  Attributes:
    tokens: int32 [m, T], what each canary reads where it is in: public.
    included: bool [m], the coins. Nothing that guesses may read them.
  """

  tokens: np.ndarray
  included: np.ndarray

  def rows(self) -> np.ndarray:
    """int32 [m, T]: the canaries' rows of the corpus.

    One that is left out is a row of padding: it has nothing to predict, so its
    loss and its gradient are exactly 0. It contributes nothing, which is what
    `zero_out` replaces a record by.
    """
    return np.where(
      self.included[:, None], self.tokens, special_tokens.PAD_ID
    ).astype(np.int32)


def load_or_create_seed(
  directory: pathlib.Path, fixed_seed: int | None
) -> bytes:
  """The seed of coins and canaries; kept, so that an audit can be resumed.

  It has nothing to do with the run's own seed, which draws sample and noise:
  the coins must be independent of both.

  Args:
    directory: MODEL_DIR of the audit, which exists.
    fixed_seed: of the run; with one, everything about the audit repeats.

  Returns:
    32 bytes.

  Raises:
    ValueError: the file is damaged.
  """
  path = directory / SEED_FILE
  if not path.exists():
    seed = secrets.token_bytes(_SECRET_BYTES)
    if fixed_seed is not None:
      seed = hashlib.sha256(f"dptrain audit {fixed_seed}".encode()).digest()
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(f"{seed.hex()}\n", encoding="ascii")
    draft.replace(path)
  try:
    seed = bytes.fromhex(path.read_text(encoding="ascii"))
  except ValueError:
    seed = b""
  if len(seed) != _SECRET_BYTES:
    raise ValueError(
      f"{path} is damaged: it must hold {2 * _SECRET_BYTES} hexadecimal digits."
      " Audit again in a new MODEL_DIR."
    )
  return seed


def make_canaries(
  seed: bytes, count: int, sequence_length: int, vocabulary_size: int
) -> Canaries:
  """Draws canaries of random ordinary tokens, and a fair coin for each.

  Args:
    seed: of `load_or_create_seed`.
    count: m.
    sequence_length: T.
    vocabulary_size: number of tokens, special ones included.
  """
  words = np.frombuffer(seed, "<u4").tolist()
  content, coins = (
    np.random.Generator(np.random.Philox(np.random.SeedSequence(child)))
    for child in ([*words, 0], [*words, 1])
  )
  tokens = content.integers(
    special_tokens.NUM_SPECIAL,
    vocabulary_size,
    (count, sequence_length),
    np.int32,
  )
  tokens[:, 0] = special_tokens.CLS_ID
  tokens[:, -1] = special_tokens.SEP_ID
  return Canaries(tokens, coins.integers(0, 2, count).astype(bool))


def with_canaries(
  records: records_lib.Records,
  canaries: Canaries,
  unit: str = "record",
  records_per_unit: int = 1,
) -> records_lib.Records:
  """The user's records behind the canaries, which are units 0 to m - 1.

  Their places are fixed and public: only the coins differ between neighbours.
  A canary that is a document or a user has as many records as a unit may have,
  all alike: what bounds a unit as a whole is exercised on it. There is no
  validation split, which an audit would only publish.

  Args:
    records: the user's.
    canaries: the canaries.
    unit: that of the plan.
    records_per_unit: k.
  """
  count = len(canaries.included)
  train = records.train
  rows = np.concatenate(
    [np.repeat(canaries.rows(), records_per_unit, axis=0), train.tokens]
  )
  own = store_lib.hashed_keys(
    [(f"canary {n} of an audit", records_per_unit) for n in range(count)]
  )
  documents, users = (
    None if unit == "record" or keys is None else np.concatenate([own, keys])
    for keys in (train.documents, train.users)
  )
  return records._replace(
    train=store_lib.RecordStore(rows, documents, users),
    validation=None,
    unprotected=(
      *records.unprotected,
      f"THIS IS AN AUDIT, NOT A MODEL TO PUBLISH: {count} of the"
      f" {unit}s are canaries, random tokens that an attacker knows, and the"
      " checkpoints may hold what the attacker saw of them.",
    ),
  )
