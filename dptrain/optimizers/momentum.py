"""Momentum of finished updates, as a sum or as a debiased average."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def zeros(params: Any) -> Any:
  """Momentum before the first update: like the parameters, float32 at least."""
  return jax.tree.map(
    lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
    params,
  )


def applied(
  updates: Sequence[jax.Array],
  momentum: Sequence[jax.Array],
  count: jax.Array,
  decay: float,
  moving_average: bool,
  nesterov: bool,
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Updates with momentum, and the momentum after them.

  Args:
    updates: arrays.
    momentum: arrays of the same shapes.
    count: number of this update, from 1.
    decay: of the momentum, in [0, 1).
    moving_average: average and debias (as Adam does), rather than sum.
    nesterov: look one step ahead; of an average as in NAdam, whose look-ahead
      is debiased for the update that it looks at.
  """
  weight = 1.0 - decay if moving_average else 1.0
  moved = [
    decay * m + weight * u for m, u in zip(momentum, updates, strict=True)
  ]
  if not moving_average:
    if not nesterov:
      return moved, moved
    ahead = [decay * m + u for m, u in zip(moved, updates, strict=True)]
    return ahead, moved
  now = 1.0 - jnp.asarray(decay, jnp.float32) ** count
  if not nesterov:
    return [(m / now).astype(m.dtype) for m in moved], moved
  then = 1.0 - jnp.asarray(decay, jnp.float32) ** (count + 1)
  ahead = [
    (decay * m / then + weight * u / now).astype(m.dtype)
    for m, u in zip(moved, updates, strict=True)
  ]
  return ahead, moved
