"""Figures of the private examples as they are: outside the guarantee.

Shapes: B physical batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dptrain.clipping import per_example


class Statistics(NamedTuple):
  """Sums over the examples of one update. PRIVATE: outside the guarantee.

  Attributes:
    examples: examples that took part.
    clipped: how many of them were longer than the clip norm.
    non_finite: how many were dropped for NaN or infinity.
    loss: sum of per-example losses.
    aux: sums of what the loss function returned beside them.
  """

  examples: jax.Array
  clipped: jax.Array
  non_finite: jax.Array
  loss: jax.Array
  aux: Any


def sums(
  clipped: per_example.ClippedSum, is_padding: jax.Array, l2_clip_norm: Any
) -> Statistics:
  """Sums over the examples of one batch. PRIVATE.

  Args:
    clipped: what was seen while clipping them.
    is_padding: [B] bool.
    l2_clip_norm: what they were clipped to, a scalar.
  """
  count = clipped.contributes

  def total(x: jax.Array) -> jax.Array:
    mask = count.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.sum(jnp.where(mask, x, 0).astype(jnp.float32), axis=0)

  return Statistics(
    examples=total(count),
    clipped=total(clipped.norms > l2_clip_norm),
    non_finite=jnp.sum((~count & ~is_padding).astype(jnp.float32)),
    loss=total(clipped.losses),
    aux=jax.tree.map(total, clipped.aux),
  )


def means(sums: Statistics) -> dict[str, jax.Array]:
  """Per-example means and counts, by their names. PRIVATE."""
  examples = jnp.maximum(sums.examples, 1.0)
  found = {
    "realised_batch_size": sums.examples,
    "clip_fraction": sums.clipped / examples,
    "non_finite_examples": sums.non_finite,
    "loss": sums.loss / examples,
  }
  if isinstance(sums.aux, dict) and {"correct", "masked"} <= set(sums.aux):
    masked = jnp.maximum(sums.aux["masked"], 1.0)
    found["accuracy"] = sums.aux["correct"] / masked
  return found
