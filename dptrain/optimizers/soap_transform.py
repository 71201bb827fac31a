"""SOAP as an optax transformation: its state and one update of it."""

from collections.abc import Sequence
import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.optimizers import eigenbases
from dptrain.optimizers import finite_gradients
from dptrain.optimizers import preconditioner_statistics as statistics_lib
from dptrain.optimizers import root_sharing
from dptrain.optimizers import second_moments
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import soap_settings

_logger = logging.getLogger(__name__)


class SoapState(NamedTuple):
  """State of `scale_by_soap`.

  Attributes:
    step: int32: updates made.
    mu: like the parameters, at least float32: averages of gradients.
    nu: for each parameter the average of squares in its eigenbasis: blocks
      [N, b_1, .., b_k], or its own shape if it has none.
    noise_variance: float32: the noise's under the same weights as `nu`.
    factors: Shampoo's, by size, [M, b, b].
    bases: likewise, their eigenvectors as columns.
    failed_bases: int32: bases refused so far; each kept the one before.
    non_finite: int32: gradients (of a parameter) and factors that were not
      finite so far; such a gradient counts as 0, such a factor stays.
  """

  step: jax.Array
  mu: Any
  nu: Any
  noise_variance: jax.Array
  factors: statistics_lib.Matrices
  bases: statistics_lib.Matrices
  failed_bases: jax.Array
  non_finite: jax.Array


def scale_by_soap(
  settings: soap_settings.SoapSettings | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Builds SOAP without learning rate and weight decay.

  `init` logs what gets an eigenbasis and what does not.

  Args:
    settings: None for the defaults.

  Returns:
    A transformation whose `update(updates, state, params, *, noise_variance)`
    reads `noise_variance` if `correct_noise` is set.

  Raises:
    ValueError: by `init` and `update`, where a parameter does not fit the
      settings.
  """
  return _Soap(settings or soap_settings.SoapSettings()).transformation()


class _Layout(NamedTuple):
  """What is where, for parameters of given shapes."""

  plans: list[shampoo_blocks.ParameterPlan]
  stacks: statistics_lib.Stacks
  dtype: Any


@dataclasses.dataclass(frozen=True)
class _Soap:
  settings: soap_settings.SoapSettings

  def transformation(self) -> optax.GradientTransformationExtraArgs:
    told: set[tuple[str, ...]] = set()

    def init(params: Any) -> SoapState:
      lines = shampoo_blocks.describe_plans(self._layout(params).plans)
      if tuple(lines) not in told:
        told.add(tuple(lines))
        _logger.info("SOAP: %s", "\n  ".join(lines))
        if not self._layout(params).stacks.lengths:
          _logger.warning("SOAP preconditions nothing: see describe()")
      return self._init(params)

    return optax.GradientTransformationExtraArgs(init, self._update)

  def _layout(self, tree: Any) -> _Layout:
    plans = shampoo_blocks.plan(tree, self.settings.blocking, with_roots=False)
    leaves = jax.tree.leaves(tree)
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in leaves))
    return _Layout(plans, statistics_lib.stacks(plans), dtype)

  def _init(self, params: Any) -> SoapState:
    layout = self._layout(params)
    leaves, treedef = jax.tree.flatten(params)
    zeros = [jnp.zeros(x.shape, layout.dtype) for x in leaves]
    squares = [
      jnp.zeros((plan.num_blocks, *plan.block), layout.dtype) if slots else x
      for plan, slots, x in zip(
        layout.plans, layout.stacks.slots, zeros, strict=True
      )
    ]
    return SoapState(
      step=jnp.zeros((), jnp.int32),
      mu=jax.tree.unflatten(treedef, zeros),
      nu=jax.tree.unflatten(treedef, squares),
      noise_variance=jnp.zeros((), jnp.float32),
      factors=layout.stacks.full(0.0, layout.dtype),
      bases=layout.stacks.full(1.0, layout.dtype),
      failed_bases=jnp.zeros((), jnp.int32),
      non_finite=jnp.zeros((), jnp.int32),
    )

  def _update(
    self,
    updates: Any,
    state: SoapState,
    params: Any = None,
    *,
    noise_variance: Any = None,
    **extra: Any,
  ) -> tuple[Any, SoapState]:
    del params, extra
    settings = self.settings
    layout = self._layout(updates)
    leaves, treedef = jax.tree.flatten(updates)
    leaves, non_finite = finite_gradients.replaced(leaves)
    step = state.step + 1
    mu = [
      second_moments.accumulated(m, x.astype(m.dtype), settings.b1)
      for m, x in zip(jax.tree.leaves(state.mu), leaves, strict=True)
    ]
    noise = state.noise_variance
    if settings.correct_noise:
      variance = second_moments.required(noise_variance)
      noise = second_moments.accumulated(noise, variance, settings.b2)
    blocks = _blocked(layout, leaves)
    nu = [
      second_moments.accumulated(v, jnp.square(x), settings.b2)
      for v, x in zip(
        jax.tree.leaves(state.nu),
        _turned(layout, blocks, _transposed(state.bases)),
        strict=True,
      )
    ]
    found = self._divided(layout, mu, nu, noise, state.bases, step)
    factors, refused = self._factors(layout, blocks, state.factors)
    # What comes next uses the new basis: this gradient has no part in its own.
    bases, nu, failed = self._bases(layout, factors, state.bases, nu, step)
    result = [x.astype(g.dtype) for x, g in zip(found, leaves, strict=True)]
    return jax.tree.unflatten(treedef, result), SoapState(
      step=step,
      mu=jax.tree.unflatten(treedef, mu),
      nu=jax.tree.unflatten(treedef, nu),
      noise_variance=noise,
      factors=factors,
      bases=bases,
      failed_bases=state.failed_bases + failed,
      non_finite=state.non_finite + non_finite + refused,
    )

  def _divided(
    self,
    layout: _Layout,
    mu: Sequence[jax.Array],
    nu: Sequence[jax.Array],
    noise: jax.Array,
    bases: statistics_lib.Matrices,
    step: jax.Array,
  ) -> list[jax.Array]:
    """Adam's step in the eigenbases, turned back."""
    settings = self.settings
    first = second_moments.total_weight(settings.b1, step)
    second = second_moments.total_weight(settings.b2, step)
    means = _turned(layout, _blocked(layout, mu), _transposed(bases))
    steps = []
    for m, v in zip(means, nu, strict=True):
      if settings.correct_noise:
        v = second_moments.corrected(v, noise, settings.noise_floor)
      divided = (m / first) / (jnp.sqrt(v / second) + settings.eps)
      steps.append(divided.astype(m.dtype))
    return [
      plan.unblocked(x) if slots else x
      for plan, slots, x in zip(
        layout.plans,
        layout.stacks.slots,
        _turned(layout, steps, bases),
        strict=True,
      )
    ]

  def _factors(
    self,
    layout: _Layout,
    blocks: list[jax.Array],
    factors: statistics_lib.Matrices,
  ) -> tuple[statistics_lib.Matrices, jax.Array]:
    decay = self.settings.factor_decay or self.settings.b2
    new = statistics_lib.products(layout.stacks, blocks, layout.dtype)
    return statistics_lib.accumulated(factors, new, decay)

  def _bases(
    self,
    layout: _Layout,
    factors: statistics_lib.Matrices,
    bases: statistics_lib.Matrices,
    nu: list[jax.Array],
    step: jax.Array,
  ) -> tuple[statistics_lib.Matrices, list[jax.Array], jax.Array]:
    """Bases for the next update, `nu` in them, and how many failed."""
    since = step - self.settings.start

    def refreshed() -> Any:
      found = {
        key: jax.lax.cond(
          since == 0,
          functools.partial(self._shared, eigenbases.decomposed),
          functools.partial(self._shared, eigenbases.followed),
          factors[key],
          bases[key],
        )
        for key in bases
      }
      turns = {
        key: eigenbases.overlaps(x.vectors, bases[key])
        for key, x in found.items()
      }
      failed = sum(
        (jnp.sum(x.failed, dtype=jnp.int32) for x in found.values()),
        jnp.zeros((), jnp.int32),
      )
      vectors = {key: x.vectors for key, x in found.items()}
      return vectors, _turned(layout, nu, turns), failed

    result: tuple[Any, Any, Any] = jax.lax.cond(
      (since >= 0) & (since % self.settings.interval == 0),
      refreshed,
      lambda: (bases, nu, jnp.zeros((), jnp.int32)),
    )
    return result

  def _shared(self, function: Any, factors: Any, old: Any) -> eigenbases.Bases:
    found: eigenbases.Bases = root_sharing.shared(
      function, self.settings.mesh, factors, old
    )
    return found


def _blocked(layout: _Layout, leaves: Sequence[jax.Array]) -> list[jax.Array]:
  """Blocks of what has an eigenbasis; the rest as it is; at least float32."""
  return [
    (plan.blocked(x) if slots else x).astype(layout.dtype)
    for plan, slots, x in zip(
      layout.plans, layout.stacks.slots, leaves, strict=True
    )
  ]


def _turned(
  layout: _Layout,
  blocks: Sequence[jax.Array],
  matrices: statistics_lib.Matrices,
) -> list[jax.Array]:
  """Blocks multiplied by a matrix along each dimension that has a basis."""
  return [
    statistics_lib.multiplied(slots, x, matrices)
    for slots, x in zip(layout.stacks.slots, blocks, strict=True)
  ]


def _transposed(
  matrices: statistics_lib.Matrices,
) -> statistics_lib.Matrices:
  """To the eigenbasis: `multiplied` takes rows to columns."""
  return {key: jnp.swapaxes(x, -1, -2) for key, x in matrices.items()}
