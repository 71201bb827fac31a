"""Noise in proportion to the gradients it hides: scale-then-privatise.

arXiv 2507.01129: before clipping, divide every example's gradient, coordinate
by coordinate, by the root of a second moment of past privatised gradients; clip
and add noise there; multiply the noisy mean back. Noise then has the shape of
the gradients instead of being the same everywhere, and rare coordinates are not
drowned. The second moments are not unbiased, and need not be.

With d the divisors, noise on coordinate j of the unscaled mean has standard
deviation d_j s, where s is what it is without scaling. Here d is divided by its
root mean square, so that the noise's total is that of plain clipping at the
same clip norm, only shared out otherwise; and a gradient that is as the
divisors say, |g_j| ~ d_j, keeps its norm. So the clip norm keeps its meaning
(the paper's d is as long as it comes out, and the clip norm tuned for that).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.optimizers import layers
from dptrain.optimizers import second_moments
from dptrain.optimizers import settings

# As in `dptrain.models.scaled`, which this wing must not import.
MODEL, DIVISORS = "model", "divisors"


class ScaleState(NamedTuple):
  """State of `scale_then_privatise`.

  Attributes:
    inner: of the optimizer within.
    steps: int32 scalar, updates so far.
    nu: averages of squared unscaled gradients, at least float32.
  """

  inner: Any
  steps: jax.Array
  nu: Any


def scale_then_privatise(
  inner: optax.GradientTransformation, b2: float = 0.999, eps: float = 0.1
) -> optax.GradientTransformationExtraArgs:
  """Unscales what a scaled model's private step hands over, and sets the scale.

  For parameters {"model": .., "divisors": ..}, as `dptrain.models.scaled`
  keeps them. The gradient by "divisors", which is noise alone, is not read.

  Args:
    inner: any Optax transformation; it sees the model's part of gradients and
      parameters. It is given no `noise_variance`: the noise it sees is another
      on each coordinate.
    b2: decay of the average of squares, in [0, 1).
    eps: added to the divisors at a root mean square of 1, before they are made
      so again, above 0. Small: quiet coordinates get next to no noise, but
      where they stir after all they use up the clip norm. Large: all are scaled
      alike.

  Returns:
    An Optax transformation. Its `update` needs `params`.

  Raises:
    ValueError: names the setting that is out of range.
  """
  settings.check_fraction("b2", b2)
  settings.check_positive("eps", eps)
  optimizer = optax.with_extra_args_support(inner)

  def init(params: Any) -> ScaleState:
    model = _parts(params)[0]
    zeros = jax.tree.map(
      lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
      model,
    )
    return ScaleState(optimizer.init(model), jnp.zeros((), jnp.int32), zeros)

  def update(
    gradients: Any, state: ScaleState, params: Any = None, **extra: Any
  ) -> tuple[Any, ScaleState]:
    settings.check_params(params)
    extra.pop("noise_variance", None)
    model, divisors = _parts(params)
    unscaled = jax.tree.map(
      lambda g, d: (g * d).astype(g.dtype), _parts(gradients)[0], divisors
    )
    updates, kept = optimizer.update(unscaled, state.inner, model, **extra)
    nu = jax.tree.map(
      lambda v, g: second_moments.accumulated(
        v, jnp.square(g.astype(v.dtype)), b2
      ),
      state.nu,
      unscaled,
    )
    moved = jax.tree.map(
      lambda new, old: new - old, _divisors(nu, eps), divisors
    )
    steps = optax.safe_increment(state.steps)
    # FrozenDict or dict, as the parameters are.
    both = type(params)({MODEL: updates, DIVISORS: moved})
    return both, ScaleState(kept, steps, nu)

  return optax.GradientTransformationExtraArgs(init, update)


def _parts(tree: Any) -> tuple[Any, Any]:
  """The model's part and the divisors'.

  Raises:
    ValueError: the tree is not that of a scaled model.
  """
  try:
    return tree[MODEL], tree[DIVISORS]
  except (KeyError, TypeError, IndexError) as error:
    raise ValueError(
      "scale_then_privatise needs the parameters of a scaled model,"
      f" {{'{MODEL}': .., '{DIVISORS}': ..}}: train"
      " dptrain.models.scaled.ScaledModel with it"
    ) from error


def _divisors(nu: Any, eps: float) -> Any:
  """Roots of second moments plus `eps`, of root mean square 1."""
  roots = jax.tree.map(jnp.sqrt, nu)
  return _of_rms_one(jax.tree.map(lambda root: root + eps, _of_rms_one(roots)))


def _of_rms_one(tree: Any) -> Any:
  """A tree over the root mean square of all its entries; 0 stays 0."""
  size = layers.memory(tree)
  rms = layers.global_norm(tree) / jnp.sqrt(size)
  return jax.tree.map(
    lambda x: (x / jnp.where(rms > 0, rms, 1.0)).astype(jnp.float32), tree
  )
