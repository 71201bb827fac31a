"""Shampoo as an optax transformation: its state and one update of it."""

import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.optimizers import finite_gradients
from dptrain.optimizers import inverse_roots
from dptrain.optimizers import magnitudes
from dptrain.optimizers import momentum as momentum_lib
from dptrain.optimizers import preconditioner_refresh
from dptrain.optimizers import preconditioner_statistics as statistics_lib
from dptrain.optimizers import quantized_matrices
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import shampoo_settings

_logger = logging.getLogger(__name__)


class ShampooState(NamedTuple):
  """State of `scale_by_shampoo`.

  Attributes:
    step: int32: updates made.
    factors: by size and root, [M, b, b]: the statistics, packed.
    factor_count: int32: how often they were added to.
    noise: float32: noise variance, averaged or summed as the factors are.
    roots: like factors: their inverse roots, packed.
    late: a refresh in progress; None without delay.
    momentum: like the parameters; None without.
    magnitude: state of the transformation that is grafted.
    failed_roots: int32: roots refused so far; each kept the one before.
    non_finite: int32: gradients (of a parameter) and factors that were not
      finite so far; such a gradient counts as 0, such a factor stays.
  """

  step: jax.Array
  factors: Any
  factor_count: jax.Array
  noise: jax.Array
  roots: Any
  late: preconditioner_refresh.Late | None
  momentum: Any
  magnitude: Any
  failed_roots: jax.Array
  non_finite: jax.Array


def scale_by_shampoo(
  settings: shampoo_settings.ShampooSettings | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Builds Shampoo without learning rate and weight decay.

  `init` logs what is preconditioned and what is not.

  Args:
    settings: None for the defaults.

  Returns:
    A transformation whose `update(updates, state, params, *, noise_variance)`
    takes the variance of the noise on each coordinate of `updates`, a scalar;
    None is allowed unless `subtract_noise` is set. Further extra arguments go
    to the grafted transformation.

  Raises:
    ValueError: by `init` and `update`, where a parameter does not fit the
      settings.
  """
  return _Shampoo(
    settings or shampoo_settings.ShampooSettings()
  ).transformation()


class _Layout(NamedTuple):
  """What is where, for parameters of given shapes."""

  plans: list[shampoo_blocks.ParameterPlan]
  stacks: statistics_lib.Stacks
  dtype: Any


@dataclasses.dataclass(frozen=True)
class _Shampoo:
  settings: shampoo_settings.ShampooSettings

  def transformation(self) -> optax.GradientTransformationExtraArgs:
    told: set[tuple[str, ...]] = set()

    def init(params: Any) -> ShampooState:
      lines = tuple(shampoo_blocks.describe(params, self.settings.blocking))
      if lines not in told:
        told.add(lines)
        _logger.info("Shampoo: %s", "\n  ".join(lines))
        if not self._layout(params).stacks.lengths:
          _logger.warning("Shampoo preconditions nothing: see describe()")
      return self._init(params)

    return optax.GradientTransformationExtraArgs(init, self._update)

  def _layout(self, tree: Any) -> _Layout:
    plans = shampoo_blocks.plan(tree, self.settings.blocking)
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in leaves))
    return _Layout(plans, statistics_lib.stacks(plans), dtype)

  def _init(self, params: Any) -> ShampooState:
    settings = self.settings
    layout = self._layout(params)
    factors = layout.stacks.full(0.0, layout.dtype)
    roots = layout.stacks.full(1.0, layout.dtype)
    late = None
    if settings.refresh.delay:
      subtract = {}
      if settings.subtract_noise:
        subtract = {
          key: jnp.zeros(length, layout.dtype)
          for key, length in layout.stacks.lengths.items()
        }
      late = preconditioner_refresh.Late(dict(factors), subtract)

    def number() -> jax.Array:
      return jnp.zeros((), jnp.int32)

    return ShampooState(
      step=number(),
      factors=_packed(factors, settings.statistics_bits),
      factor_count=number(),
      noise=jnp.zeros((), jnp.float32),
      roots=_packed(roots, settings.root_bits),
      late=late,
      momentum=momentum_lib.zeros(params) if settings.momentum else None,
      magnitude=settings.magnitude().init(params),
      failed_roots=number(),
      non_finite=number(),
    )

  def _update(
    self,
    updates: Any,
    state: ShampooState,
    params: Any = None,
    *,
    noise_variance: Any = None,
    **extra: Any,
  ) -> tuple[Any, ShampooState]:
    settings = self.settings
    if settings.subtract_noise and noise_variance is None:
      raise ValueError(
        "subtract_noise=True needs update(..., noise_variance=...): the"
        " variance of the noise on each coordinate; a loop that does not pass"
        " it cannot use this setting"
      )
    layout = self._layout(updates)
    leaves, treedef = jax.tree.flatten(updates)
    leaves, non_finite = finite_gradients.replaced(leaves)
    count = state.step + 1
    magnitude, magnitude_state = self._magnitude(
      layout,
      leaves,
      (treedef, state.magnitude, params),
      {"noise_variance": noise_variance, **extra},
    )
    blocks = [
      plan.blocked(x).astype(layout.dtype) if plan.factors else None
      for plan, x in zip(layout.plans, leaves, strict=True)
    ]
    state = self._with_factors(layout, blocks, count, state, noise_variance)
    refreshed = preconditioner_refresh.Refresh(
      settings.refresh,
      functools.partial(self._rooted, layout),
      settings.root_bits,
      settings.mesh,
    )(count, state.roots, state.late, lambda: self._to_root(layout, state))
    found = jax.lax.cond(
      settings.refresh.in_use(count),
      lambda: self._grafted(layout, blocks, magnitude, refreshed.roots),
      lambda: magnitude,
    )
    momentum = state.momentum
    if momentum is not None:
      found, moved = momentum_lib.applied(
        found,
        jax.tree.leaves(momentum),
        count,
        settings.momentum,
        settings.moving_average,
        settings.nesterov,
      )
      momentum = jax.tree.unflatten(treedef, moved)
    result = [x.astype(g.dtype) for x, g in zip(found, leaves, strict=True)]
    state = state._replace(
      step=count,
      roots=refreshed.roots,
      late=refreshed.late,
      momentum=momentum,
      magnitude=magnitude_state,
      failed_roots=state.failed_roots + refreshed.failed,
      non_finite=state.non_finite + non_finite,
    )
    return jax.tree.unflatten(treedef, result), state

  def _magnitude(
    self,
    layout: _Layout,
    leaves: list[jax.Array],
    tree: tuple[Any, Any, Any],
    extra: dict[str, Any],
  ) -> tuple[list[jax.Array], Any]:
    """The grafted transformation's updates and its new state.

    Args:
      layout: of the parameters.
      leaves: the gradient's.
      tree: its structure, the transformation's state, and the parameters.
      extra: arguments for the transformation.
    """
    treedef, state, params = tree
    if magnitudes.is_normalized(self.settings.graft):
      leaves = [
        magnitudes.normalized(x, plan.stacked)
        for x, plan in zip(leaves, layout.plans, strict=True)
      ]
    updates, state = self.settings.magnitude().update(
      jax.tree.unflatten(treedef, leaves), state, params, **extra
    )
    return jax.tree.leaves(updates), state

  def _with_factors(
    self,
    layout: _Layout,
    blocks: list[Any],
    count: jax.Array,
    state: ShampooState,
    noise_variance: Any,
  ) -> ShampooState:
    """Adds this update's products to the factors, if it is its turn."""
    beta2 = self.settings.beta2
    weight = 1.0 - beta2 if beta2 < 1.0 else 1.0
    variance = 0.0 if noise_variance is None else noise_variance

    def add() -> ShampooState:
      old = _unpacked(state.factors)
      new = statistics_lib.products(layout.stacks, blocks, layout.dtype)
      factors, refused = statistics_lib.accumulated(old, new, beta2)
      return state._replace(
        factors=_packed(factors, self.settings.statistics_bits),
        factor_count=state.factor_count + 1,
        noise=beta2 * state.noise + weight * jnp.asarray(variance, jnp.float32),
        non_finite=state.non_finite + refused,
      )

    interval = self.settings.refresh.statistics_interval
    if interval == 1:
      return add()
    return jax.lax.cond(count % interval == 0, add, lambda: state)

  def _to_root(
    self, layout: _Layout, state: ShampooState
  ) -> preconditioner_refresh.Late:
    """What roots are taken of: factors, debiased."""
    beta2 = self.settings.beta2
    bias: Any = 1.0
    if beta2 < 1.0:
      bias = 1.0 - jnp.asarray(beta2, layout.dtype) ** state.factor_count
    sizes = statistics_lib.true_sizes(layout.stacks, layout.plans)
    matrices = {
      key: statistics_lib.filled_padding(x / bias, sizes[key])
      for key, x in _unpacked(state.factors).items()
    }
    subtract: dict[str, jax.Array] = {}
    if self.settings.subtract_noise:
      multiples = statistics_lib.noise_multiples(layout.stacks, layout.plans)
      subtract = {
        key: (x * state.noise / bias).astype(layout.dtype)
        for key, x in multiples.items()
      }
    return preconditioner_refresh.Late(matrices, subtract)

  def _rooted(
    self, layout: _Layout, key: str, factors: Any, subtract: Any, old: Any
  ) -> tuple[jax.Array, jax.Array]:
    """Roots [n, b, b], and whether each failed [n]; see `Refresh.compute`."""
    settings = self.settings.roots
    # What rounding may have made negative, the ridge must lift again.
    lost = quantized_matrices.spread(
      factors.shape[-1], self.settings.statistics_bits
    )
    settings = dataclasses.replace(settings, ridge=max(settings.ridge, lost))
    found = inverse_roots.inverse_roots(
      factors, layout.stacks.orders[key], settings, subtract
    )
    good = found.errors <= settings.max_error
    # A factor of zeros has seen no gradient: it has no root, and needs none.
    seen = jnp.trace(factors, axis1=-2, axis2=-1) != 0.0
    return jnp.where(good[:, None, None], found.roots, old), seen & ~good

  def _grafted(
    self,
    layout: _Layout,
    blocks: list[Any],
    magnitude: list[jax.Array],
    roots: Any,
  ) -> list[jax.Array]:
    """Preconditioned updates at the magnitude's length, layer by layer."""
    matrices = _unpacked(roots, definite=True)
    result = []
    for plan, slots, block, other in zip(
      layout.plans, layout.stacks.slots, blocks, magnitude, strict=True
    ):
      if not slots:
        result.append(other)
        continue
      own = plan.unblocked(statistics_lib.multiplied(slots, block, matrices))
      if self.settings.graft is not None:
        own = magnitudes.with_length(other, own, plan.stacked)
      result.append(own.astype(other.dtype))
    return result


def _packed(matrices: Any, bits: int) -> Any:
  return {
    key: quantized_matrices.packed(x, bits) for key, x in matrices.items()
  }


def _unpacked(matrices: Any, definite: bool = False) -> Any:
  return {
    key: quantized_matrices.unpacked(x, definite) for key, x in matrices.items()
  }
