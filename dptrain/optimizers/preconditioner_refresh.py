"""When roots are made anew: at once, or a share of them at each update.

Updates are counted from 1 here. A refresh is due at update `start` and every
`interval` updates after that. Without delay all roots are computed in that
update, which takes longer than the others. With a delay of d, that update only
copies the factors; each of the d updates after it computes one d-th of the
roots, and the last of these puts all of them to use at once. No update then
waits for more than its share, and which root is used when depends on the
update's number alone, so that a resumed run repeats itself.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dptrain.optimizers import preconditioner_statistics
from dptrain.optimizers import quantized_matrices
from dptrain.optimizers import root_sharing

Matrices = preconditioner_statistics.Matrices
Compute = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class RefreshSettings:
  """When factors and roots are made anew.

  Attributes:
    start: the first update (from 1) at which roots are computed. Before any
      are in use, updates are those of the optimizer that gives the magnitude.
    interval: updates between two computations of the roots.
    delay: updates over which a computation is spread, and so by which roots
      are late; at most `interval`. 0 computes all roots in one update.
    statistics_interval: updates between two additions to the factors.
  """

  start: int = 10
  interval: int = 20
  delay: int = 0
  statistics_interval: int = 1

  def __post_init__(self) -> None:
    for name in ("start", "interval", "statistics_interval", "delay"):
      value = getattr(self, name)
      least = 0 if name == "delay" else 1
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
          f"RefreshSettings.{name}={value!r} must be a whole number, {least} or"
          " more"
        )
    if self.delay > self.interval:
      raise ValueError(
        f"RefreshSettings.delay={self.delay} exceeds interval={self.interval}:"
        " roots would never be ready; lower the delay"
      )
    if self.start < self.statistics_interval:
      raise ValueError(
        f"RefreshSettings.start={self.start} comes before the first factor, at"
        f" update statistics_interval={self.statistics_interval}; start later"
      )

  def in_use(self, update: jax.Array) -> jax.Array:
    """Whether update number `update`, from 1, uses computed roots."""
    return update >= self.start + self.delay

  def due(self, update: jax.Array) -> jax.Array:
    """Whether a refresh begins at this update."""
    since = update - self.start
    return (since >= 0) & (since % self.interval == 0)

  def share(self, update: jax.Array) -> jax.Array:
    """Which share, 1 to `delay`, this update computes; 0 for none."""
    since = update - self.start
    phase = (since - 1) % self.interval + 1
    return jnp.where((since > 0) & (phase <= self.delay), phase, 0)


class Late(NamedTuple):
  """A refresh in progress.

  Attributes:
    matrices: by key [M, b, b]: roots as far as they are computed, factors
      beyond.
    subtract: by key [M]: as in `inverse_roots.inverse_roots`; {} without.
  """

  matrices: Matrices
  subtract: dict[str, jax.Array]


class Refreshed(NamedTuple):
  """What a refresh leaves.

  Attributes:
    roots: by key, packed.
    late: None without delay.
    failed: int32: roots that failed in this update and stay as they were.
  """

  roots: Matrices
  late: Late | None
  failed: jax.Array


@dataclasses.dataclass(frozen=True)
class Refresh:
  """Carries refreshes out.

  Attributes:
    settings: when.
    compute: (key, factors [n, b, b], subtract [n] or None, old roots
      [n, b, b]) -> roots [n, b, b] and whether each failed [n].
    bits: of a stored root's entries.
    mesh: whose devices share the work; see `root_sharing.shared`.
  """

  settings: RefreshSettings
  compute: Compute
  bits: int = 32
  mesh: Mesh | None = None

  def __call__(
    self,
    update: jax.Array,
    roots: Matrices,
    late: Late | None,
    factors: Callable[[], Late],
  ) -> Refreshed:
    """Does what is due at one update.

    Args:
      update: its number, from 1.
      roots: by key, packed.
      late: of the last update; None without delay.
      factors: what to compute roots of, called where a refresh is due.
    """
    due = self.settings.due(update)
    none = jnp.zeros((), jnp.int32)
    if late is None:
      roots, failed = jax.lax.cond(
        due, lambda: self._all(roots, factors()), lambda: (roots, none)
      )
      return Refreshed(roots, None, failed)
    started = late
    share = self.settings.share(update)
    matrices, failed = jax.lax.cond(
      share > 0,
      lambda: self._share(share, roots, started),
      lambda: (started.matrices, none),
    )
    roots = jax.lax.cond(
      share == self.settings.delay,
      lambda: {
        key: quantized_matrices.packed(x, self.bits)
        for key, x in matrices.items()
      },
      lambda: roots,
    )
    late = jax.lax.cond(
      due, factors, lambda: started._replace(matrices=matrices)
    )
    return Refreshed(roots, late, failed)

  def _all(self, roots: Matrices, factors: Late) -> tuple[Matrices, jax.Array]:
    failed = jnp.zeros((), jnp.int32)
    result = {}
    for key, matrices in factors.matrices.items():
      old = quantized_matrices.unpacked(roots[key])
      subtract = factors.subtract.get(key)
      new, bad = self._computed(key, matrices, subtract, old)
      result[key] = quantized_matrices.packed(new, self.bits)
      failed += jnp.sum(bad, dtype=jnp.int32)
    return result, failed

  def _share(
    self, share: jax.Array, roots: Matrices, late: Late
  ) -> tuple[Matrices, jax.Array]:
    """Replaces one share of the factors by their roots."""
    failed = jnp.zeros((), jnp.int32)
    result = {}
    for key in late.matrices:
      result[key], bad = self._share_of_stack(key, share, roots, late)
      failed += bad
    return result, failed

  def _share_of_stack(
    self, key: str, share: jax.Array, roots: Matrices, late: Late
  ) -> tuple[jax.Array, jax.Array]:
    matrices, subtract = late.matrices[key], late.subtract.get(key)
    total = matrices.shape[0]
    size = -(-total // self.settings.delay)
    first = (share - 1) * size
    # The last share may be cut short: rows before `first` are done already.
    start = jnp.minimum(first, total - size)

    def part(x: Any) -> Any:
      return jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), x
      )

    def compute() -> tuple[jax.Array, jax.Array]:
      old = quantized_matrices.unpacked(part(roots[key]))
      own = part(matrices)
      new, bad = self._computed(key, own, part(subtract), old)
      fresh = jnp.arange(size) + start >= first
      new = jnp.where(fresh[:, None, None], new, own)
      whole = jax.lax.dynamic_update_slice_in_dim(matrices, new, start, 0)
      return whole, jnp.sum(bad & fresh, dtype=jnp.int32)

    found: tuple[jax.Array, jax.Array] = jax.lax.cond(
      first < total, compute, lambda: (matrices, jnp.zeros((), jnp.int32))
    )
    return found

  def _computed(
    self, key: str, matrices: Any, subtract: Any, old: Any
  ) -> tuple[jax.Array, jax.Array]:
    stacks = [matrices, old] + ([] if subtract is None else [subtract])

    def function(m: Any, old: Any, s: Any = None) -> tuple[Any, Any]:
      return self.compute(key, m, s, old)

    found: tuple[jax.Array, jax.Array] = root_sharing.shared(
      function, self.mesh, *stacks
    )
    return found
