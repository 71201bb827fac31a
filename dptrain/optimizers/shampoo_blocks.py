"""How parameters are cut into blocks for a preconditioner, and which are not.

A parameter [*stacked, *rest] is seen as a stack of tensors of shape `rest`:
small neighbouring dimensions are merged, and each dimension that gets a factor
is cut into blocks. Every block of every tensor in the stack is preconditioned
on its own (arXiv 2002.09018).

Shapes: N blocks of shape [b_1, .., b_k].
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dptrain.optimizers import inverse_roots

BatchDims = Callable[[str, tuple[int, ...]], int]


def stacked_layers(path: str, shape: tuple[int, ...]) -> int:
  """Leading dimensions that number layers: 1 below a module named "layers".

  So are parameters of flax's `nn.scan` stacked in `dptrain.models`.

  Args:
    path: of the parameter, such as "layers/mlp_in/kernel".
    shape: of the parameter.

  >>> stacked_layers("layers/mlp_in/kernel", (12, 768, 3072))
  1
  """
  return int("layers" in path.split("/")[:-1] and len(shape) > 0)


@dataclasses.dataclass(frozen=True)
class Blocking:
  """Which parameters are preconditioned, along which dimensions, in blocks.

  Attributes:
    block_size: largest size of a factor. Longer dimensions are cut into equal
      blocks, the last one padded.
    merge_up_to: neighbouring dimensions are merged as long as their product
      does not exceed this; 1 merges nothing. Of all ways to do so the one with
      the fewest dimensions is taken, but never fewer than two, and of those
      the one with the smallest factors: [768, 12, 64] becomes [768, 768].
      Dimensions of 1 are dropped.
    max_dim: a dimension longer than this gets no factor.
    long_dims: what becomes of a parameter that has such a dimension:
      "one_sided" preconditions its other dimensions, "skip" none.
    sides: "all" dimensions get a factor; or, one-sided, all but the last one
      ("input"), or the shortest alone ("smallest").
    min_rank: parameters of fewer dimensions (after merging, without stacked
      ones and those of 1) are skipped: 2 skips vectors.
    skip_names: parameters with one of these in their path are skipped. Biases
      and scales stay vectors in meaning where heads or layers are stacked.
    exponents: p of the roots A^(-1/p): None for twice the number of factors;
      a number; or a mapping from the number of factors to p. SOAP has none.
    batch_dims: from a parameter's path and shape to how many of its leading
      dimensions number separate tensors, such as the layers of a scan.
  """

  block_size: int = 1024
  merge_up_to: int = 4096
  max_dim: int = 4096
  long_dims: Literal["one_sided", "skip"] = "one_sided"
  sides: Literal["all", "input", "smallest"] = "all"
  min_rank: int = 2
  skip_names: Sequence[str] = ("bias", "scale")
  exponents: int | Mapping[int, int] | None = None
  batch_dims: BatchDims = stacked_layers

  def __post_init__(self) -> None:
    for name in ("block_size", "merge_up_to", "max_dim", "min_rank"):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Blocking.{name}={value!r} must be 1 or more")
    if self.long_dims not in ("one_sided", "skip"):
      raise ValueError(
        f"Blocking.long_dims={self.long_dims!r} must be 'one_sided' or 'skip'"
      )
    if self.sides not in ("all", "input", "smallest"):
      raise ValueError(
        f"Blocking.sides={self.sides!r} must be 'all', 'input' or 'smallest'"
      )
    if isinstance(self.skip_names, str):
      raise ValueError(
        f"Blocking.skip_names={self.skip_names!r} must be a list of strings"
      )
    if isinstance(self.exponents, Mapping):
      for p in self.exponents.values():
        inverse_roots.check_order("Blocking.exponents", p)
    elif self.exponents is not None:
      inverse_roots.check_order("Blocking.exponents", self.exponents)


class Factor(NamedTuple):
  """One factor of each block of a parameter.

  Attributes:
    dim: which of the merged dimensions it is for.
    size: b, of the block along it.
    order: p of the root A^(-1/p); 0 if it is not for a root.
  """

  dim: int
  size: int
  order: int

  def described(self) -> str:
    """Its size and root."""
    if not self.order:
      return f"{self.size}"
    return f"{self.size}^(-1/{self.order})"


@dataclasses.dataclass(frozen=True)
class ParameterPlan:
  """What becomes of one parameter.

  Attributes:
    path: its name.
    shape: of the parameter.
    stacked: leading dimensions that number separate tensors.
    merged: the other dimensions, merged.
    grid: number of blocks along each of these.
    block: size of a block along each of these.
    factors: one for each dimension that is preconditioned; () if skipped.
    reason: why it is skipped, or why a dimension is; "" if neither.
  """

  path: str
  shape: tuple[int, ...]
  stacked: int = 0
  merged: tuple[int, ...] = ()
  grid: tuple[int, ...] = ()
  block: tuple[int, ...] = ()
  factors: tuple[Factor, ...] = ()
  reason: str = ""

  @property
  def num_blocks(self) -> int:
    """N, over all stacked tensors."""
    return math.prod(self.shape[: self.stacked]) * math.prod(self.grid)

  def blocked(self, x: jax.Array) -> jax.Array:
    """The blocks [N, b_1, .., b_k] of an array of the parameter's shape."""
    lead = math.prod(self.shape[: self.stacked])
    x = x.reshape(lead, *self.merged)
    padding = [
      (0, g * b - d)
      for d, g, b in zip(self.merged, self.grid, self.block, strict=True)
    ]
    x = jnp.pad(x, [(0, 0), *padding])
    pairs = itertools.chain.from_iterable(
      zip(self.grid, self.block, strict=True)
    )
    x = x.reshape(lead, *pairs)
    k = len(self.merged)
    x = x.transpose(0, *range(1, 2 * k, 2), *range(2, 2 * k + 1, 2))
    return x.reshape(self.num_blocks, *self.block)

  def unblocked(self, blocks: jax.Array) -> jax.Array:
    """The inverse of `blocked`: an array of the parameter's shape."""
    lead = math.prod(self.shape[: self.stacked])
    k = len(self.merged)
    x = blocks.reshape(lead, *self.grid, *self.block)
    back = itertools.chain.from_iterable((1 + i, 1 + k + i) for i in range(k))
    x = x.transpose(0, *back)
    x = x.reshape(
      lead, *(g * b for g, b in zip(self.grid, self.block, strict=True))
    )
    x = x[(slice(None), *(slice(0, d) for d in self.merged))]
    return x.reshape(self.shape)

  def true_sizes(self) -> np.ndarray:
    """Sizes [N, k] of the blocks without their padding."""
    along = [
      np.clip(d - b * np.arange(g), 0, b)
      for d, g, b in zip(self.merged, self.grid, self.block, strict=True)
    ]
    sizes = np.stack(np.meshgrid(*along, indexing="ij"), -1)
    sizes = sizes.reshape(-1, len(self.merged))
    lead = math.prod(self.shape[: self.stacked])
    return np.tile(sizes, (lead, 1))

  def described(self) -> str:
    """One line on what is preconditioned, and what is not and why."""
    head = f"{self.path or 'the parameter'} {list(self.shape)}"
    if not self.factors:
      return f"{head}: not preconditioned: {self.reason}"
    blocks = " x ".join(str(b) for b in self.block)
    count = self.num_blocks
    factors = ", ".join(f.described() for f in self.factors)
    told = f"{head}: {count} block{'s' * (count > 1)} of {blocks}; {factors}"
    return f"{told}; {self.reason}" if self.reason else told


def plan(
  params: Any, blocking: Blocking, with_roots: bool = True
) -> list[ParameterPlan]:
  """Decides what becomes of each parameter, in the order of their leaves.

  Args:
    params: a pytree of arrays, or of their shapes.
    blocking: the rules.
    with_roots: False if factors are not for roots, which then have no p.

  Raises:
    ValueError: `Blocking.exponents` does not say which root a parameter gets,
      or `Blocking.batch_dims` exceeds its dimensions.
  """
  flat = jax.tree_util.tree_leaves_with_path(params)
  return [
    _parameter(
      jax.tree_util.keystr(path, simple=True, separator="/"),
      tuple(leaf.shape),
      blocking,
      with_roots,
    )
    for path, leaf in flat
  ]


def describe(params: Any, blocking: Blocking | None = None) -> list[str]:
  """Says what is preconditioned, in which blocks, and what is not and why.

  Args:
    params: a pytree of arrays, or of their shapes.
    blocking: the rules; None for the defaults.

  Returns:
    One line for each parameter, and one for all.

  >>> import jax.numpy as jnp
  >>> params = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
  >>> for line in describe(params, Blocking(block_size=4)):
  ...   print(line)
  bias [4]: not preconditioned: 'bias' is among skip_names
  kernel [6, 4]: 2 blocks of 3 x 4; 3^(-1/4), 4^(-1/4)
  preconditioned: 1 of 2 parameters, 24 of 28 numbers (86 %), by 4 matrices
  """
  return describe_plans(plan(params, blocking or Blocking()))


def describe_plans(plans: Sequence[ParameterPlan]) -> list[str]:
  """As `describe`, of plans that were made."""
  chosen = [p for p in plans if p.factors]
  numbers = [math.prod(p.shape) for p in plans]
  done = sum(math.prod(p.shape) for p in chosen)
  share = round(100 * done / max(sum(numbers), 1))
  matrices = sum(p.num_blocks * len(p.factors) for p in chosen)
  return [p.described() for p in plans] + [
    f"preconditioned: {len(chosen)} of {len(plans)} parameters, {done:,} of"
    f" {sum(numbers):,} numbers ({share} %), by {matrices:,} matrices"
  ]


def merged_dims(shape: Sequence[int], up_to: int) -> tuple[int, ...]:
  """Merges small neighbouring dimensions; see `Blocking.merge_up_to`.

  >>> merged_dims((768, 12, 64), 4096)
  (768, 768)
  >>> merged_dims((3, 3, 64, 128), 4096)
  (576, 128)
  >>> merged_dims((8, 8), 4096)
  (8, 8)
  """
  dims = [d for d in shape if d != 1]
  best: tuple[int, ...] = tuple(dims)

  def cost(dims: tuple[int, ...]) -> tuple[int, int]:
    return max(len(dims), 2), sum(d * d for d in dims)

  gaps = range(1, len(dims))
  for count in range(1, len(dims) - 1):
    for cuts in itertools.combinations(gaps, count):
      ends = [0, *cuts, len(dims)]
      groups = [dims[a:b] for a, b in itertools.pairwise(ends)]
      if all(len(g) == 1 or math.prod(g) <= up_to for g in groups):
        candidate = tuple(math.prod(g) for g in groups)
        if cost(candidate) < cost(best):
          best = candidate
  return best


def _parameter(
  path: str, shape: tuple[int, ...], blocking: Blocking, with_roots: bool
) -> ParameterPlan:
  stacked = blocking.batch_dims(path, shape)
  if not 0 <= stacked <= len(shape):
    raise ValueError(
      f"Blocking.batch_dims gives {stacked} for {path} of shape {list(shape)};"
      f" it must lie between 0 and {len(shape)}"
    )
  merged = merged_dims(shape[stacked:], blocking.merge_up_to)
  skipped = ParameterPlan(path, shape, stacked)
  reason = _reason_to_skip(path, shape, merged, blocking)
  if reason:
    return dataclasses.replace(skipped, reason=reason)
  dims = [i for i, d in enumerate(merged) if d <= blocking.max_dim]
  reason = ""
  if len(dims) < len(merged):
    reason = f"none along what exceeds max_dim={blocking.max_dim}"
  if blocking.sides == "input":
    dims = [i for i in dims if i < len(merged) - 1]
  elif blocking.sides == "smallest":
    dims = sorted(dims, key=lambda i: merged[i])[:1]
  if not dims:
    return dataclasses.replace(
      skipped, reason=f"no dimension is left by sides={blocking.sides!r}"
    )
  if len(dims) < len(merged) and not reason:
    reason = f"one-sided (sides={blocking.sides!r})"
  order = _order(path, len(dims), blocking) if with_roots else 0
  grid = tuple(
    -(-d // blocking.block_size) if i in dims else 1
    for i, d in enumerate(merged)
  )
  block = tuple(-(-d // g) for d, g in zip(merged, grid, strict=True))
  factors = tuple(Factor(i, block[i], order) for i in sorted(dims))
  return ParameterPlan(
    path, shape, stacked, merged, grid, block, factors, reason
  )


def _reason_to_skip(
  path: str, shape: tuple[int, ...], merged: Sequence[int], blocking: Blocking
) -> str:
  """Why a parameter is not preconditioned; "" if it is."""
  if not math.prod(shape):
    return "empty"
  for name in blocking.skip_names:
    if name in path.split("/"):
      return f"{name!r} is among skip_names"
  if len(merged) < blocking.min_rank:
    count = f"{len(merged)} dimension{'s' * (len(merged) != 1)}"
    return f"{count}, fewer than min_rank={blocking.min_rank}"
  long = [d for d in merged if d > blocking.max_dim]
  if long and (blocking.long_dims == "skip" or len(long) == len(merged)):
    return f"{long[0]} exceeds max_dim={blocking.max_dim}"
  return "" if merged else "a single number"


def _order(path: str, count: int, blocking: Blocking) -> int:
  """The p for a parameter of `count` factors."""
  if blocking.exponents is None:
    order = 2 * count
    if order > 16:
      raise ValueError(
        f"{path} has {count} dimensions to precondition, more than 8: merge"
        " more of them (Blocking.merge_up_to) or set Blocking.exponents"
      )
    return order
  if isinstance(blocking.exponents, Mapping):
    if count not in blocking.exponents:
      raise ValueError(
        f"Blocking.exponents={dict(blocking.exponents)} has no entry for"
        f" {count}, the number of factors of {path}; add one"
      )
    return blocking.exponents[count]
  return blocking.exponents
