"""The one private step, shared by every loop: jax and optax only.

  accumulator = step.zeros(params)
  for batch in physical_batches:
    accumulator = step.accumulate(params, accumulator, batch, examples_key)
  params, opt_state, _ = step.finish(params, opt_state, accumulator, ...)

Shapes: B physical batch.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.clipping import methods
from dptrain.clipping import per_example
from dptrain.clipping import rules
from dptrain.privacy import noise

Params = Any
Batch = Any


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


class Accumulator(NamedTuple):
  """What an update has gathered so far. PRIVATE until `finish`.

  Attributes:
    gradients: float32 tree: the sum of clipped gradients.
    statistics: None unless the step collects them.
  """

  gradients: Any
  statistics: Statistics | None


@dataclasses.dataclass(frozen=True)
class PrivateStep:
  """From physical batches to one differentially private update.

  Formal guarantee: unit: one example, neighbouring by zero-out or add/remove
  (`ClippingRule`). `accumulate` sums clipped gradients, whose sensitivity is
  `rule.sensitivity` however the examples are dealt out to physical batches.
  `finish` is one Gaussian mechanism on that sum: noise of standard deviation
  `noise_multiplier * rule.sensitivity`, once per update. All that follows,
  division by the public constant `expected_batch_size` and the optimizer, is
  post-processing. An update without examples is pure noise. Public:
  the rule, the noise multiplier, the expected batch size, the optimizer.

  Attributes:
    loss_fn: `per_example.PerExampleLoss`.
    rule: the clipping rule.
    optimizer: any optax transformation.
    collect_statistics: also sum `Statistics`, which are not protected.
    clipping_method: how clipped sums are computed, one of `methods.METHODS`,
      or what `methods.choose` returned; changes speed and memory, not the
      result.
  """

  loss_fn: per_example.PerExampleLoss
  rule: rules.ClippingRule
  optimizer: optax.GradientTransformation
  collect_statistics: bool = False
  clipping_method: str | methods.Choice = "auto"

  def zeros(self, params: Params, batch: Batch) -> Accumulator:
    """An empty accumulator.

    Args:
      params: the parameters, or their shapes.
      batch: a physical batch, or its shapes: decides the statistics' shapes.
    """
    gradients = jax.tree.map(
      lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
      params,
    )
    if not self.collect_statistics:
      return Accumulator(gradients, None)
    key = jax.random.key(0, impl="threefry2x32")
    sums = jax.eval_shape(self._clipped_sum, params, batch, key)[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
    return Accumulator(gradients, zeros)

  def accumulate(
    self,
    params: Params,
    accumulator: Accumulator,
    batch: Batch,
    examples_key: jax.Array,
  ) -> Accumulator:
    """Adds the clipped gradients of one physical batch.

    Args:
      params: the parameters.
      accumulator: what was gathered so far.
      batch: arrays [B, ...]; "is_padding" [B] bool marks rows that are not
        examples and "example_ids" [B] int32 numbers the others.
      examples_key: key of this update; an example's own key (masking, dropout)
        is a function of it and of the example's number alone.

    Returns:
      The accumulator with this batch added.
    """
    clipped, statistics = self._clipped_sum(params, batch, examples_key)
    gradients = jax.tree.map(jnp.add, accumulator.gradients, clipped.gradients)
    if accumulator.statistics is None:
      return Accumulator(gradients, None)
    return Accumulator(
      gradients, jax.tree.map(jnp.add, accumulator.statistics, statistics)
    )

  def finish(
    self,
    params: Params,
    opt_state: optax.OptState,
    accumulator: Accumulator,
    *,
    noise_key: jax.Array,
    noise_multiplier: jax.Array | float,
    expected_batch_size: jax.Array | float,
  ) -> tuple[Params, optax.OptState, dict[str, jax.Array]]:
    """Makes the sum private and updates the parameters, once per update.

    Args:
      params: the parameters.
      opt_state: the optimizer's state.
      accumulator: the sum over all examples of this update.
      noise_key: key of this update, used for nothing else.
      noise_multiplier: noise standard deviation over sensitivity.
      expected_batch_size: the public constant to divide by.

    Returns:
      New parameters, new optimizer state, and unprotected statistics (empty
      unless collected): per-example means and the ratio of the norms of the
      clipped sum and of the noise (gradient SNR, arXiv 2108.01624).
    """
    stddev = noise_multiplier * self.rule.sensitivity
    drawn = noise.gaussian_like(noise_key, accumulator.gradients, stddev)
    gradient = jax.tree.map(
      lambda total, n, p: ((total + n) / expected_batch_size).astype(p.dtype),
      accumulator.gradients,
      drawn,
      params,
    )
    updates, opt_state = self.optimizer.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    if accumulator.statistics is None:
      return params, opt_state, {}
    signal = optax.tree.norm(accumulator.gradients) / optax.tree.norm(drawn)
    means = _means(accumulator.statistics) | {"gradient_snr": signal}
    return params, opt_state, means

  def _clipped_sum(
    self, params: Params, batch: Batch, examples_key: jax.Array
  ) -> tuple[per_example.ClippedSum, Statistics]:
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
      examples_key, batch["example_ids"]
    )
    is_padding = batch["is_padding"]
    clipped = methods.clipped_sum(
      self.loss_fn,
      params,
      batch,
      keys,
      is_padding,
      self.rule,
      self.clipping_method,
    )
    count = clipped.contributes

    def total(x: jax.Array) -> jax.Array:
      mask = count.reshape(-1, *[1] * (x.ndim - 1))
      return jnp.sum(jnp.where(mask, x, 0).astype(jnp.float32), axis=0)

    statistics = Statistics(
      examples=total(count),
      clipped=total(clipped.norms > self.rule.l2_clip_norm),
      non_finite=jnp.sum((~count & ~is_padding).astype(jnp.float32)),
      loss=total(clipped.losses),
      aux=jax.tree.map(total, clipped.aux),
    )
    return clipped, statistics


def _means(sums: Statistics) -> dict[str, jax.Array]:
  examples = jnp.maximum(sums.examples, 1.0)
  means = {
    "realised_batch_size": sums.examples,
    "clip_fraction": sums.clipped / examples,
    "non_finite_examples": sums.non_finite,
    "loss": sums.loss / examples,
  }
  if isinstance(sums.aux, dict) and {"correct", "masked"} <= set(sums.aux):
    masked = jnp.maximum(sums.aux["masked"], 1.0)
    means["accuracy"] = sums.aux["correct"] / masked
  return means
