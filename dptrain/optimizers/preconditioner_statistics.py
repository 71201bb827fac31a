"""Second moments of gradients along each dimension, stacked by size.

For a block G of a gradient and one of its dimensions, of size b, the factor is
the [b, b] matrix that sums G_(i) G_(i)^T over updates, where G_(i) has that
dimension first and all others flattened into the second (arXiv 2002.09018).
Factors of one size and root, of all parameters, stand in one stack [M, b, b]:
what is done to them is done to all at once, and is easily shared out.

What noise adds: let Z be independent noise of variance v on each coordinate of
a block of true sizes s_1, .., s_k. Row r of Z_(i) has prod_{j != i} s_j
coordinates, so the factor's diagonal gains v prod_{j != i} s_j in expectation;
two different rows are independent with mean 0, so nothing is gained off it.
The noise is also independent of the clean gradient, of mean 0, so cross terms
vanish:

    E[(G + Z)_(i) (G + Z)_(i)^T] = G_(i) G_(i)^T + v (prod_{j != i} s_j) I.

Merging dimensions relabels coordinates and cutting into blocks selects some, so
the sizes that count are those of the merged block. Padding has no noise and is
outside the identity. A factor that decays gains the same average of v. (For an
[m, n] matrix in one block: n v on the left factor, m v on the right one.)
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dptrain.optimizers import shampoo_blocks

Matrices = dict[str, Any]


class Slot(NamedTuple):
  """Where the factors of one dimension of a parameter's blocks are.

  Attributes:
    dim: which of the block's dimensions.
    key: of the stack.
    start: of the first block's factor in it; the others follow.
    number: N, of blocks.
  """

  dim: int
  key: str
  start: int
  number: int


@dataclasses.dataclass(frozen=True)
class Stacks:
  """Which factor is where.

  Attributes:
    slots: for each parameter, in the order of its plan; () if skipped.
    lengths: M by key.
    sizes: b by key.
    orders: p by key; 0 where factors are not for roots.
  """

  slots: tuple[tuple[Slot, ...], ...]
  lengths: dict[str, int]
  sizes: dict[str, int]
  orders: dict[str, int]

  def full(self, diagonal: float, dtype: Any) -> Matrices:
    """Every factor as `diagonal` times the identity."""
    return {
      key: jnp.tile(
        diagonal * jnp.eye(self.sizes[key], dtype=dtype), (length, 1, 1)
      )
      for key, length in self.lengths.items()
    }


def stacks(plans: Sequence[shampoo_blocks.ParameterPlan]) -> Stacks:
  """Lays the factors of all parameters out in stacks.

  Args:
    plans: of the parameters.
  """
  lengths: dict[str, int] = {}
  sizes: dict[str, int] = {}
  orders: dict[str, int] = {}
  slots = []
  for plan in plans:
    own = []
    for factor in plan.factors:
      key = f"size_{factor.size}"
      if factor.order:
        key += f"_root_{factor.order}"
      start = lengths.setdefault(key, 0)
      sizes[key], orders[key] = factor.size, factor.order
      lengths[key] += plan.num_blocks
      own.append(Slot(factor.dim, key, start, plan.num_blocks))
    slots.append(tuple(own))
  return Stacks(tuple(slots), lengths, sizes, orders)


def products(
  layout: Stacks, blocks: Sequence[jax.Array | None], dtype: Any
) -> Matrices:
  """G_(i) G_(i)^T for every factor.

  Args:
    layout: where each belongs.
    blocks: for each parameter its gradient's blocks [N, b_1, .., b_k]; not
      read where there are no slots.
    dtype: of the result.

  Returns:
    [M, b, b] by key.
  """
  parts: dict[str, list[jax.Array]] = {key: [] for key in layout.lengths}
  for slots, block in zip(layout.slots, blocks, strict=True):
    for slot in slots:
      if block is None:
        raise ValueError("a parameter with factors has no blocks")
      rows = jnp.moveaxis(block, slot.dim + 1, 1)
      rows = rows.reshape(*rows.shape[:2], -1).astype(dtype)
      gram = jnp.einsum(
        "nik,njk->nij", rows, rows, precision=jax.lax.Precision.HIGHEST
      )
      parts[slot.key].append(gram)
  return {key: jnp.concatenate(found) for key, found in parts.items()}


def accumulated(
  old: Matrices, new: Matrices, beta2: float
) -> tuple[Matrices, jax.Array]:
  """Adds the products of one update.

  Args:
    old: factors so far.
    new: `products` of this update.
    beta2: decay of an average; 1 sums up instead.

  Returns:
    The factors, and how many would have become non-finite: those keep what they
    were.
  """
  weight = 1.0 - beta2 if beta2 < 1.0 else 1.0
  refused = jnp.zeros((), jnp.int32)
  result = {}
  for key, factor in old.items():
    moved = beta2 * factor + weight * new[key]
    # A sum is finite only if all terms are (or overflows, which is refused).
    good = jnp.isfinite(jnp.sum(jnp.abs(moved), axis=(-2, -1)))
    refused += jnp.sum(~good, dtype=jnp.int32)
    result[key] = jnp.where(good[:, None, None], moved, factor)
  return result, refused


def noise_multiples(
  layout: Stacks, plans: Sequence[shampoo_blocks.ParameterPlan]
) -> dict[str, np.ndarray]:
  """How often noise of variance 1 adds the identity to each factor.

  Args:
    layout: where each factor is.
    plans: of the parameters.

  Returns:
    float32 [M] by key: the product of the other dimensions' true sizes.
  """
  return _per_factor(
    layout, plans, lambda sizes, dim: np.prod(np.delete(sizes, dim, 1), axis=1)
  )


def true_sizes(
  layout: Stacks, plans: Sequence[shampoo_blocks.ParameterPlan]
) -> dict[str, np.ndarray]:
  """Sizes of the factors without padding: float32 [M] by key."""
  return _per_factor(layout, plans, lambda sizes, dim: sizes[:, dim])


def filled_padding(matrices: jax.Array, sizes: np.ndarray) -> jax.Array:
  """Puts the largest diagonal entry on the diagonal where padding is.

  Zeros there would be the smallest eigenvalues of the factor; gradients are 0
  there, so that nothing else depends on it.

  Args:
    matrices: [M, b, b].
    sizes: [M] true sizes.
  """
  b = matrices.shape[-1]
  padding = jnp.arange(b) >= jnp.asarray(sizes)[:, None]
  diagonal = jnp.diagonal(matrices, axis1=-2, axis2=-1)
  fill = jnp.where(padding, jnp.max(diagonal, axis=-1, keepdims=True), 0.0)
  return matrices + fill[:, :, None] * jnp.eye(b, dtype=matrices.dtype)


def multiplied(
  plan_slots: Sequence[Slot], block: jax.Array, matrices: Matrices
) -> jax.Array:
  """Multiplies blocks by a matrix along each dimension that has a factor.

  Args:
    plan_slots: of the parameter.
    block: [N, b_1, .., b_k].
    matrices: by key; entry [n, i, j] takes coordinate j to i.

  Returns:
    [N, b_1, .., b_k].
  """
  for slot in plan_slots:
    own = matrices[slot.key][slot.start : slot.start + slot.number]
    rows = jnp.moveaxis(block, slot.dim + 1, 1)
    flat = rows.reshape(*rows.shape[:2], -1)
    flat = jnp.matmul(own, flat, precision=jax.lax.Precision.HIGHEST)
    block = jnp.moveaxis(flat.reshape(rows.shape), 1, slot.dim + 1)
  return block


def _per_factor(layout: Stacks, plans: Any, of_sizes: Any) -> Any:
  parts: dict[str, list[np.ndarray]] = {key: [] for key in layout.lengths}
  for plan, slots in zip(plans, layout.slots, strict=True):
    if slots:
      sizes = plan.true_sizes().astype(np.float64)
      for slot in slots:
        parts[slot.key].append(of_sizes(sizes, slot.dim))
  return {
    key: np.concatenate(found).astype(np.float32)
    for key, found in parts.items()
  }
