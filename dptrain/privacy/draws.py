"""The records of one update, whatever the sampling that the plan asks for.

A draw is a function of secret keys and of the number of the update: nothing to
save, and processes agree without a word.

Formal guarantee: each draw is the sampling that `PrivacyPlan.releases` prices,
given that `key_of` gives independent keys that nobody else knows. Units are
records. Public: the plan.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Protocol

import jax
import numpy as np
import numpy.typing as npt

from dptrain.privacy import plan as plan_lib
from dptrain.privacy import rounds
from dptrain.privacy import sampling

Indices = npt.NDArray[np.int64]


class Drawn(Protocol):
  """The sample of one update, of which each host may ask its part."""

  @property
  def size(self) -> int:
    """How many records are in it. PRIVATE."""

  def part(self, begin: int, end: int) -> Indices:
    """Its members at places `begin` to before `end`, sorted, int64."""


@dataclasses.dataclass(frozen=True)
class Whole:
  """A sample that is all there.

  Attributes:
    members: sorted distinct indices.
  """

  members: Indices

  @property
  def size(self) -> int:
    """As `Drawn.size`."""
    return len(self.members)

  def part(self, begin: int, end: int) -> Indices:
    """As `Drawn.part`."""
    return self.members[begin:end]


def draw(
  plan: plan_lib.PrivacyPlan,
  key_of: Callable[[str, int], jax.Array],
  num_examples: int,
  step: int,
  start: int = 0,
) -> Indices:
  """The records that take part in update `step`: all of `drawn`.

  Returns:
    Sorted distinct indices, int64.
  """
  sample = drawn(plan, key_of, num_examples, step, start)
  return sample.part(0, sample.size)


def drawn(
  plan: plan_lib.PrivacyPlan,
  key_of: Callable[[str, int], jax.Array],
  num_examples: int,
  step: int,
  start: int = 0,
) -> Drawn:
  """The sample of update `step`, to be made part by part.

  Args:
    plan: of the run.
    key_of: key by purpose and number, on the branch that goes on.
    num_examples: records there are; the plan's own number unless that is
      private.
    step: the update.
    start: first update of the branch.

  Returns:
    The sample; of the samplings that hold a permutation, all of it.
  """
  size, kind = plan.expected_batch_size(step), plan.sampling
  key = key_of("sampling", step)
  if kind == "poisson" or (kind == "cyclic_poisson" and plan.bands == 1):
    return sampling.poisson(key, num_examples, plan.sampling_prob(step))
  if kind == "truncated_poisson":
    cap = plan.truncated_batch_size(step)
    return sampling.poisson(key, num_examples, plan.sampling_prob(step), cap)
  if kind == "without_replacement":
    return sampling.fixed_size(key, num_examples, size)
  if kind == "cyclic_poisson":
    order = _permutation(key_of("partition", start), num_examples)
    length = num_examples // plan.bands
    group = (step - start) % plan.bands
    members = order[group * length : (group + 1) * length]
    found = sampling.poisson_sample(key, length, plan.sampling_prob(step))
    return Whole(np.sort(members[found]))
  if kind == "balls_in_bins":
    bins = rounds.num_bins(size, plan.num_examples)
    thrown = _bins(key_of("partition", start), num_examples, bins)
    return Whole(np.flatnonzero(thrown == (step - start) % bins))
  if kind == "shuffled":
    epochs, offsets = rounds.shuffled_places(plan.sizes(start), num_examples)
    epoch, offset = int(epochs[step - start]), int(offsets[step - start])
    order = _permutation(key_of("partition", start + epoch), num_examples)
    return Whole(np.sort(order[offset : offset + size]))
  raise ValueError(f"sampling={kind!r} cannot be drawn.")


def _permutation(key: jax.Array, num_examples: int) -> Indices:
  return _kept_permutation(sampling.words(key), num_examples)


def _bins(key: jax.Array, num_examples: int, bins: int) -> Indices:
  return _kept_bins(sampling.words(key), num_examples, bins)


# The next updates ask for the same one.
@functools.lru_cache(maxsize=1)
def _kept_permutation(words: tuple[int, int], num_examples: int) -> Indices:
  return sampling.generator(words).permutation(num_examples)


@functools.lru_cache(maxsize=1)
def _kept_bins(words: tuple[int, int], num_examples: int, bins: int) -> Indices:
  return sampling.generator(words).integers(bins, size=num_examples)
