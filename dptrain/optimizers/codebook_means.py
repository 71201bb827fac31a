"""Running means of clusters, of privatised sums and counts.

Of an update come, for each cluster k, a noisy mean D_k of deviations from its
centre c_k and a noisy mean N_k of counts, coordinates of one Gaussian release:

  n_k <- (d w n_k + (1 - d) N_k) / w'     the mass, a mean of past counts
  c_k <- c_k + (1 - decay) scale D_k / n_k      where n_k is above its floor

with d the decay of masses and w = 1 - d^t the weights of what came so far. At
d = 0 and without noise that is decay c + (1 - decay) (sum / count), the running
mean of arXiv 2207.06366's code; there, an empty cluster's centre shrinks
towards 0, here it stays. For d > 0 masses lag behind counts, and their noise is
averaged out; where counts do not change both are the same.

The variance of the noise in n is V / w^2 with V <- d^2 V + (1 - d)^2 v and v
that of one coordinate: the same for all clusters, and public. (Under noise that
is correlated over updates it is another one, and the floor an approximation.)

Formal guarantee: post-processing. All that is read is a privatised gradient,
what earlier ones left, and public constants; restarts are drawn with a key that
is public, from released centres and masses alone.

Shapes: K clusters, S head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dptrain.optimizers import codebook_settings
from dptrain.optimizers import second_moments


class MassWeights(NamedTuple):
  """How masses are averaged at one update: scalars.

  Attributes:
    old: weight of the mass before.
    new: weight of this update's noisy count.
    floor: least mass of a cluster that is not empty.
  """

  old: jax.Array
  new: jax.Array
  floor: jax.Array


def mass_weights(
  settings: codebook_settings.CodebookSettings,
  decay: float,
  steps: jax.Array,
  noise: jax.Array,
  variance: jax.Array | float,
) -> tuple[MassWeights, jax.Array]:
  """Weights of an update, and the noise that masses then carry.

  Args:
    settings: of the floor.
    decay: d.
    steps: int32 scalar, updates before this one.
    noise: float32 scalar V before this update.
    variance: v, of the noise on each coordinate of this update's gradient.

  Returns:
    The weights, and V after it.
  """
  noise = decay**2 * noise + (1.0 - decay) ** 2 * variance
  before = second_moments.total_weight(decay, steps)
  after = second_moments.total_weight(decay, steps + 1)
  stddev = jnp.sqrt(noise) / after
  return (
    MassWeights(
      old=jnp.asarray(decay * before / after, jnp.float32),
      new=jnp.asarray((1.0 - decay) / after, jnp.float32),
      floor=jnp.maximum(settings.min_mass, settings.mass_floor * stddev),
    ),
    noise,
  )


def moved(
  codebook: jax.Array,
  gradient: jax.Array,
  weights: MassWeights,
  settings: codebook_settings.CodebookSettings,
  deviation_scale: float,
) -> tuple[jax.Array, jax.Array]:
  """One update of a codebook's centres and masses.

  Args:
    codebook: [K, S + 1], rows (centre, mass).
    gradient: [K, S + 1], rows (D, N); D in units of `deviation_scale`.
    weights: of masses.
    settings: of decay.
    deviation_scale: what the deviations were divided by.

  Returns:
    The codebook [K, S + 1] in at least float32, and [K] bool: clusters that are
    not empty.
  """
  dtype = jnp.promote_types(codebook.dtype, jnp.float32)
  codebook, gradient = codebook.astype(dtype), gradient.astype(dtype)
  centres = codebook[:, :-1]
  masses = weights.old * codebook[:, -1] + weights.new * gradient[:, -1]
  live = masses >= weights.floor
  ratio = gradient[:, :-1] / jnp.where(live, masses, 1.0)[:, None]
  step = (1.0 - settings.decay) * deviation_scale * ratio
  centres = jnp.where(live[:, None], centres + step, centres)
  return jnp.concatenate([centres, masses[:, None]], axis=-1), live


def restarted(
  codebook: jax.Array,
  live: jax.Array,
  empty_for: jax.Array,
  key: jax.Array,
  settings: codebook_settings.CodebookSettings,
) -> tuple[jax.Array, jax.Array]:
  """Clusters that were empty for long, put beside others.

  Each draws one of those that are not empty, with their masses as
  probabilities, and starts at its centre plus noise, with the share of its mass
  that would fall to it if tokens split evenly. The drawn ones stay as they are.

  Args:
    codebook: [K, S + 1], what `moved` returned.
    live: [K] bool, likewise.
    empty_for: [K] int32, updates in a row for which a cluster was empty before.
    key: public, of this update and codebook.
    settings: when, and how far beside.

  Returns:
    The codebook, and `empty_for` after this update.
  """
  empty_for = jnp.where(live, 0, empty_for + 1)
  if not settings.restart_after:
    return codebook, empty_for
  centres, masses = codebook[:, :-1], codebook[:, -1]
  weights = jnp.where(live, masses, 0.0)
  below = jnp.cumsum(weights)
  choice, draw = jax.random.split(key)
  points = jax.random.uniform(choice, masses.shape, masses.dtype) * below[-1]
  # Inverse of the distribution function: no K x K numbers.
  donors = jnp.searchsorted(below, points, side="right")
  donors = jnp.minimum(donors, masses.shape[0] - 1)
  # Where all clusters are empty there is nothing to start from.
  due = (empty_for >= settings.restart_after) & (weights[donors] > 0)
  takers = jnp.zeros_like(masses).at[donors].add(due.astype(masses.dtype))
  chosen = centres[donors]
  size = jnp.sqrt(jnp.mean(jnp.square(chosen), axis=-1, keepdims=True))
  noise = jax.random.normal(draw, centres.shape, centres.dtype)
  beside = jnp.concatenate(
    [
      chosen + settings.restart_spread * size * noise,
      (masses[donors] / (1.0 + takers[donors]))[:, None],
    ],
    axis=-1,
  )
  return (
    jnp.where(due[:, None], beside, codebook),
    jnp.where(due, 0, empty_for),
  )
