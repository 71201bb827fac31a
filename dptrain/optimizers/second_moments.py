"""Second moments of gradients that carry noise of a known variance.

A privatised gradient is h = g + z with z ~ N(0, s^2) on each coordinate, where
s = noise multiplier * sensitivity / expected batch size is public. Given all
that came before, E[h^2] = g^2 + s^2: what adaptive optimizers take the root of
is mostly noise once s^2 outgrows g^2, the same on every coordinate, and then
they no longer adapt. Any weighted sum v = sum_t w_t h_t^2 exceeds the one of
g_t^2, in expectation, by exactly phi = sum_t w_t s_t^2: one scalar, kept beside
v under the same weights, so that s may change from update to update (batch
schedules, clip norms that adapt). v - phi is unbiased; it is held above a floor
(arXiv 2312.14334, DP-AdamBC, for Adam under a constant s).

Unbiased is not the same as better: arXiv 2507.01129 finds that it is the wrong
aim. Under noise that is correlated over updates (BandMF), phi is still the
noise's own second moment, but g_t depends on noise that z_t shares, so v - phi
is unbiased no more.

Formal guarantee: post-processing. s is public, and v is made of privatised
gradients alone.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.optimizers import settings


def accumulated(old: Any, new: Any, decay: float) -> Any:
  """One more term of a moment: an average under `decay`, a sum if that is 1."""
  return old + new if decay == 1.0 else decay * old + (1.0 - decay) * new


def total_weight(decay: float, count: jax.Array) -> jax.Array | float:
  """What the weights of an average of `count` terms add up to; 1 for sums.

  1 - decay ** count, without the digits that float32 loses near 1.
  """
  if decay in (0.0, 1.0):
    return 1.0
  return -jnp.expm1(count * math.log(decay))


def required(noise_variance: Any) -> jax.Array:
  """The variance of the privacy noise as a float32 scalar.

  Args:
    noise_variance: of the noise on each coordinate of the gradient that comes
      with it: (noise multiplier * sensitivity / expected batch size) ** 2, a
      number or a traced scalar.

  Raises:
    ValueError: it was not given, or is not one number.
  """
  if noise_variance is None:
    raise ValueError(
      "correct_noise=True, but update() was given no noise_variance: pass the"
      " variance of the privacy noise on each coordinate, as update(gradients,"
      " state, params, noise_variance=...), or set correct_noise=False"
    )
  variance = jnp.asarray(noise_variance, jnp.float32)
  if variance.ndim:
    raise ValueError(
      f"noise_variance of shape {variance.shape} must be one number: the"
      " privacy noise is the same on every coordinate"
    )
  return variance


def corrected(moment: jax.Array, noise: jax.Array, floor: float) -> jax.Array:
  """A second moment less the noise's, at least `floor` times the noise's.

  Args:
    moment: [...] of noisy gradients.
    noise: scalar, the noise's own under the same weights.
    floor: the least result as a share of `noise`.
  """
  return jnp.maximum(moment - noise, floor * noise)


class SecondMomentState(NamedTuple):
  """State of `scale_by_second_moment`.

  Attributes:
    steps: int32 scalar, updates so far.
    mu: averages of gradients, at least float32; empty if b1 is 0.
    nu: averages, or sums, of squared gradients, at least float32.
    noise_variance: float32 scalar: that of the noise's squares under the same
      weights; 0 unless noise is corrected for.
  """

  steps: jax.Array
  mu: Any
  nu: Any
  noise_variance: jax.Array


def scale_by_second_moment(
  b1: float = 0.0,
  b2: float = 0.999,
  eps: float = 1e-8,
  debias: bool = True,
  correct_noise: bool = False,
  noise_floor: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
  """Divides gradients, or their average, by the root of the second moment.

  Adam is b1 and b2 under 1 with `debias`; RMSProp is b1 = 0 without; AdaGrad is
  b1 = 0 and b2 = 1. Where nothing but zeros was seen the result is 0.

  With `correct_noise`, `update` takes `noise_variance` (see `required`) and the
  divisor is sqrt(max(v - phi, noise_floor * phi)) + eps, as in the module's
  docstring. v is accurate to its own spread only: from noise alone, v / phi
  spreads by sqrt(2 (1 - b2) / (1 + b2)) about 1 (0.03 at b2 = 0.999, 0.1 at
  0.99, 0.5 at 0.75), or sqrt(2 / t) for a sum of t. A floor well under that
  divides pure noise by accidents close to 0. A floor f lengthens the step on
  coordinates without visible signal by up to 1 / sqrt(f), 3.2 at 0.1: lower the
  learning rate with it.

  Args:
    b1: decay of the average of gradients, in [0, 1); 0 keeps none.
    b2: decay of the average of squares, in [0, 1]; 1 adds squares up.
    eps: added to the root, above 0. It must lie well under the noise per
      coordinate, or the result is plain momentum.
    debias: divide averages by what their weights add up to.
    correct_noise: subtract the noise's share of the second moment.
    noise_floor: the least second moment, as a share of the noise's, above 0:
      DP-AdamBC's gamma' divided by its phi.

  Returns:
    An Optax transformation that takes `noise_variance` as an extra argument.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings.check_fraction("b1", b1)
  settings.check_decay("b2", b2)
  settings.check_positive("eps", eps)
  settings.check_positive("noise_floor", noise_floor)

  def init(params: Any) -> SecondMomentState:
    zeros = jax.tree.map(
      lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
      params,
    )
    return SecondMomentState(
      jnp.zeros((), jnp.int32),
      zeros if b1 else optax.EmptyState(),
      zeros,
      jnp.zeros((), jnp.float32),
    )

  def update(
    gradients: Any,
    state: SecondMomentState,
    params: Any = None,
    *,
    noise_variance: Any = None,
    **extra: Any,
  ) -> tuple[Any, SecondMomentState]:
    del params, extra
    count = optax.safe_increment(state.steps)
    wide = jax.tree.map(lambda g, v: g.astype(v.dtype), gradients, state.nu)
    nu = jax.tree.map(
      lambda g, v: accumulated(v, jnp.square(g), b2), wide, state.nu
    )
    mu, mean = state.mu, wide
    if b1:
      mu = jax.tree.map(lambda g, m: accumulated(m, g, b1), wide, state.mu)
      weight = total_weight(b1, count) if debias else 1.0
      mean = jax.tree.map(lambda m: m / weight, mu)
    noise = state.noise_variance
    if correct_noise:
      noise = accumulated(noise, required(noise_variance), b2)
    weight = total_weight(b2, count) if debias else 1.0

    def scaled(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
      if correct_noise:
        v = corrected(v, noise, noise_floor)
      return (m / (jnp.sqrt(v / weight) + eps)).astype(g.dtype)

    updates = jax.tree.map(scaled, gradients, mean, nu)
    return updates, SecondMomentState(count, mu, nu, noise)

  return optax.GradientTransformationExtraArgs(init, update)
