"""Gradients that are not finite, kept from an optimizer's state."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def replaced(
  leaves: Sequence[jax.Array],
) -> tuple[list[jax.Array], jax.Array]:
  """Puts 0 in place of each array that is not finite throughout.

  A state that has seen one NaN is NaN for good. The whole array goes: the rest
  of it is no more to be trusted.

  Args:
    leaves: gradients.

  Returns:
    The arrays, and how many were replaced (int32).
  """
  good = [jnp.all(jnp.isfinite(x)) for x in leaves]
  count = sum((1 - g.astype(jnp.int32) for g in good), jnp.zeros((), jnp.int32))
  return [
    jnp.where(g, x, jnp.zeros_like(x))
    for g, x in zip(good, leaves, strict=True)
  ], count
