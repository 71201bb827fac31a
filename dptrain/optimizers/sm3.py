"""SM3: adaptive steps from second moments kept per row and per column.

AdaGrad keeps a sum of squares for every coordinate. SM3 (arXiv 1901.11150)
keeps one for every slice of an array along every axis, [n_1], ..., [n_k] for an
array [n_1, ..., n_k], and takes for a coordinate i the least of the k slices r
that contain it:

  SM3-I   mu(r) += max over r of g^2             nu(i) = min_r mu(r)
  SM3-II  nu(i) = min_r mu(r) + g(i)^2           mu(r) = max over r of nu

Both bound the sum of squares from above, nu(i) >= sum_t g_t(i)^2, and SM3-II's
bound is never looser than SM3-I's. Vectors have one slice per coordinate, so
that they get AdaGrad itself; scalars are vectors of one.

With b2 < 1 sums become averages under that decay, divided by what their weights
add up to; the bound is then one on the average of squares (an extension: the
paper has sums).

Noise. A privatised gradient is h = g + z with z ~ N(0, s^2) on each coordinate.
min and max commute with adding one number to all slices, so accumulating
h^2 - s_t^2 instead of h^2 is the same as subtracting phi = sum_t s_t^2 (or the
average) once, after the min. What is left bounds, coordinate by coordinate,
sum_t (h_t^2 - s_t^2), whose expectation is sum_t g_t^2. So: for vectors and
scalars nu - phi is unbiased, exactly; for others it is an upper bound in
expectation, E[nu(i) - phi] >= sum_t g_t(i)^2. How much above is the cover's
doing: the maximum over n coordinates of pure noise exceeds its mean, by about
2 ln(n) s^2 for one update; that part of the noise stays in.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.optimizers import layers
from dptrain.optimizers import second_moments
from dptrain.optimizers import settings
from dptrain.optimizers import weight_decay as weight_decay_lib

VARIANTS = ("I", "II")


class SM3State(NamedTuple):
  """State of `scale_by_sm3`.

  Attributes:
    steps: int32 scalar, updates so far.
    accumulators: for each parameter [n_1, ..., n_k] a tuple of arrays [n_1],
      ..., [n_k], at least float32 (one [] for a scalar); where layers are
      stacked, [layers, n_2], ..., [layers, n_k].
    momentum: averages of scaled gradients; empty if b1 is 0.
    noise_variance: float32 scalar: what the noise added to every accumulator;
      0 unless noise is corrected for.
  """

  steps: jax.Array
  accumulators: Any
  momentum: Any
  noise_variance: jax.Array


def sm3(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 1.0,
  variant: str = "II",
  weight_decay: float = 0.0,
  decay_norms_and_biases: bool = False,
  correct_noise: bool = False,
  noise_floor: float = 0.1,
  stacked: str | None = layers.STACKED,
) -> optax.GradientTransformationExtraArgs:
  """Builds SM3; each update also multiplies weights by 1 - lr * decay.

  Second moments take the sum of an array's dimensions, not their product: under
  1 % of Adam's for BERT. The momentum takes as much as the parameters; b1 = 0
  does without. Steps shrink as 1 / sqrt(t), as AdaGrad's, unless b2 < 1, so the
  learning rate is larger than Adam's, and constant after its warm-up.

  Args:
    learning_rate: a positive number, or a schedule from update number to one.
    b1: decay of the average of scaled gradients, in [0, 1); 0 keeps none.
    b2: 1 to add squares up, or the decay of their average, in [0, 1].
    variant: "II", or "I" for comparison.
    weight_decay: decay per unit of learning rate, 0 or more (see
      `dptrain.optimizers.adamw`).
    decay_norms_and_biases: decay every parameter, not only matrices.
    correct_noise: subtract what privacy noise adds to the second moments; then
      `update` takes `noise_variance`, as `second_moments.required` says.
    noise_floor: the least second moment, as a share of the noise's, above 0;
      `second_moments.scale_by_second_moment` tells how to choose it.
    stacked: the name below which arrays are stacks of layers, each with slices
      of its own; None: nothing is.

  Returns:
    An Optax transformation. Its `update` needs `params`.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings.check_learning_rate(learning_rate)
  settings.check_weight_decay(weight_decay, learning_rate)
  return optax.chain(
    scale_by_sm3(b1, b2, variant, correct_noise, noise_floor, stacked),
    optax.add_decayed_weights(
      weight_decay,
      mask=None if decay_norms_and_biases else weight_decay_lib.decayed,
    ),
    optax.scale_by_learning_rate(learning_rate),
  )


def scale_by_sm3(
  b1: float = 0.9,
  b2: float = 1.0,
  variant: str = "II",
  correct_noise: bool = False,
  noise_floor: float = 0.1,
  stacked: str | None = layers.STACKED,
) -> optax.GradientTransformationExtraArgs:
  """Divides gradients by the root of SM3's second moments, then averages them.

  As in the paper, nothing is added to the root, and 0 / 0 is 0; and the average
  is not divided by what its weights add up to, so that the first step has
  length 1 - b1 per coordinate. (An epsilon inside the root, as in `optax.sm3`,
  outweighs the squares of all gradients below its root, 1e-4 there: privatised
  gradients over a large batch are.)

  Args:
    b1: see `sm3`.
    b2: see `sm3`.
    variant: see `sm3`.
    correct_noise: see `sm3`.
    noise_floor: see `sm3`.
    stacked: see `sm3`.

  Returns:
    An Optax transformation that takes `noise_variance` as an extra argument.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings.check_fraction("b1", b1)
  settings.check_decay("b2", b2)
  settings.check_positive("noise_floor", noise_floor)
  if variant not in VARIANTS:
    raise ValueError(f"variant={variant!r} is unknown; use one of {VARIANTS}")

  def init(params: Any) -> SM3State:
    accumulators = layers.map_with_depth(_zeros, params, stacked=stacked)
    momentum = jax.tree.map(lambda p: jnp.zeros(p.shape, _wide(p)), params)
    return SM3State(
      jnp.zeros((), jnp.int32),
      accumulators,
      momentum if b1 else optax.EmptyState(),
      jnp.zeros((), jnp.float32),
    )

  def update(
    gradients: Any,
    state: SM3State,
    params: Any = None,
    *,
    noise_variance: Any = None,
    **extra: Any,
  ) -> tuple[Any, SM3State]:
    del params, extra
    count = optax.safe_increment(state.steps)
    weight = second_moments.total_weight(b2, count)
    noise = state.noise_variance
    if correct_noise:
      variance = second_moments.required(noise_variance)
      noise = second_moments.accumulated(noise, variance, b2)

    def scaled(deep: int, g: jax.Array, mu: tuple[jax.Array, ...]) -> _Leaf:
      wide = g.astype(_wide(g))
      nu, mu = _advanced(jnp.square(wide), mu, deep, b2, variant)
      if correct_noise:
        nu = second_moments.corrected(nu, noise, noise_floor)
      root = jnp.sqrt(nu / weight)
      return _Leaf(jnp.where(root > 0, wide / root, 0.0), mu)

    both = layers.map_with_depth(
      scaled, gradients, state.accumulators, stacked=stacked
    )
    updates, accumulators = (
      jax.tree.map(lambda b, n=n: b[n], both, is_leaf=_is_leaf) for n in (0, 1)
    )
    momentum = state.momentum
    if b1:
      momentum = jax.tree.map(
        lambda u, m: second_moments.accumulated(m, u, b1), updates, momentum
      )
      updates = momentum
    updates = jax.tree.map(lambda u, g: u.astype(g.dtype), updates, gradients)
    return updates, SM3State(count, accumulators, momentum, noise)

  return optax.GradientTransformationExtraArgs(init, update)


class _Leaf(NamedTuple):
  """What one parameter's update is made of."""

  update: jax.Array
  accumulators: tuple[jax.Array, ...]


def _is_leaf(x: Any) -> bool:
  return isinstance(x, _Leaf)


def _wide(x: Any) -> Any:
  return jnp.promote_types(x.dtype, jnp.float32)


def _zeros(deep: int, p: Any) -> tuple[jax.Array, ...]:
  """Empty accumulators of one parameter."""
  lead, axes = tuple(p.shape[:deep]), p.shape[deep:]
  shapes = [(*lead, size) for size in axes] or [lead]
  return tuple(jnp.zeros(shape, _wide(p)) for shape in shapes)


def _advanced(
  squares: jax.Array,
  accumulators: tuple[jax.Array, ...],
  deep: int,
  decay: float,
  variant: str,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Second moments nu, of the shape of `squares`, and new accumulators."""
  axes = range(deep, squares.ndim)

  def over_slices(x: jax.Array) -> tuple[jax.Array, ...]:
    """The greatest entry of every slice along every axis."""
    if not axes:
      return (x,)
    return tuple(
      jnp.max(x, axis=tuple(other for other in axes if other != axis))
      for axis in axes
    )

  def least(accumulators: tuple[jax.Array, ...]) -> jax.Array:
    """For every coordinate, the least of the slices that contain it."""
    if not axes:
      return accumulators[0]
    spread = [
      jnp.expand_dims(x, tuple(other for other in axes if other != axis))
      for axis, x in zip(axes, accumulators, strict=True)
    ]
    return functools.reduce(jnp.minimum, spread)

  if variant == "I":
    accumulators = tuple(
      second_moments.accumulated(old, new, decay)
      for old, new in zip(accumulators, over_slices(squares), strict=True)
    )
    return least(accumulators), accumulators
  nu = second_moments.accumulated(least(accumulators), squares, decay)
  return nu, over_slices(nu)
