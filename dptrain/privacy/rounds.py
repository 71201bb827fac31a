"""Rounds: stretches of updates in which a unit takes part at most once.

What the updates of a round release is one release of a unit's data: neighbours
differ in one of them at most, and in which one does not depend on the data
(parallel composition within the round, sequential over rounds). Under Poisson
sampling every update is a round of its own.

Shapes: S updates.
"""

import functools

import numpy as np
import numpy.typing as npt

# Every record takes part in each round: nothing is gained by sampling.
UNAMPLIFIED = ("shuffled", "balls_in_bins")

Whole = npt.NDArray[np.int64]


def several_updates(sampling: str) -> bool:
  """Whether a round may have more than one update."""
  return sampling in (*UNAMPLIFIED, "cyclic_poisson")


def numbers(
  sampling: str, sizes: Whole, num_examples: int, bands: int
) -> Whole:
  """The round that each of the updates of one branch belongs to.

  Args:
    sampling: a key of `mechanisms.PRICED`.
    sizes: int [S], expected batch sizes from the branch's first update on.
    num_examples: records in the corpus.
    bands: of the noise; groups of cyclic Poisson sampling.

  Returns:
    int [S], rising from 0 without gaps.
  """
  if sampling == "shuffled":
    return shuffled_places(tuple(sizes.tolist()), num_examples)[0]
  length = 1
  if sampling == "balls_in_bins" and len(sizes):
    length = num_bins(int(sizes[0]), num_examples)
  elif sampling == "cyclic_poisson":
    length = bands
  return np.arange(len(sizes), dtype=np.int64) // length


def num_bins(size: int, num_examples: int) -> int:
  """Bins into which records are thrown for batches of about `size`."""
  return max(1, num_examples // size)


@functools.lru_cache(maxsize=4)
def shuffled_places(
  sizes: tuple[int, ...], num_examples: int
) -> tuple[Whole, Whole]:
  """Where each batch lies in the permutations of the corpus.

  A batch that an epoch has no room for begins the next one: across the border
  a record could be in it twice. Left-over records are skipped in that epoch.

  Returns:
    int [S] and int [S]: the epoch of each update, and where in that epoch's
    permutation its batch begins.
  """
  epochs = np.zeros(len(sizes), np.int64)
  offsets = np.zeros(len(sizes), np.int64)
  epoch = offset = 0
  for update, size in enumerate(sizes):
    if offset + size > num_examples:
      epoch, offset = epoch + 1, 0
    epochs[update], offsets[update] = epoch, offset
    offset += size
  return epochs, offsets
