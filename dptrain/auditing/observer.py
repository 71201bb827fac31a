"""White-box attack: gradient canaries, and an observer of what is released.

Canary j has a coordinate of the gradient to itself in each of `NUM_LEAVES`
parameters that the model does not use. Its own loss moves these alone, with a
gradient far longer than the clip norm, so that clipping, sum, noise and divisor
are all exercised on it. The observer is the run's optimizer: it sees the noisy
mean that `PrivateStep.finish` hands to any optimizer, and nothing else. All
that it computes is post-processing.

Shapes: m canaries, B batch.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.clipping import rules
from dptrain.models import masked_lm
from dptrain.privacy import plan as plan_lib

# A canary's gradient is spread over this many parameters, with signs that add
# up to 0: clipping each parameter by itself would let twice as much through,
# and one noise for all parameters would cancel.
NUM_LEAVES = 4
_SIGNS = (1.0, -1.0, 1.0, -1.0)
_SHARE = 1.0 / math.sqrt(NUM_LEAVES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CanaryModel(masked_lm.MaskedLanguageModel):
  """A model beside whose parameters stand those of the canaries.

  Parameters: {"model": those of `base`, "canaries": {"leaf_0": [m], ..}}. The
  first m examples are canaries, known by their "example_ids"; all others have
  the loss of `base`, untouched.

  Attributes:
    bert: that of `base`.
    base: the model that is audited.
    num_canaries: m.
    gradient_norm: length of an included canary's gradient before clipping.
  """

  base: masked_lm.MaskedLanguageModel
  num_canaries: int
  gradient_norm: float

  def init(self, key: jax.Array) -> masked_lm.Params:
    """Draws the parameters of `base`; the canaries' are all 1."""
    ones = jnp.ones(self.num_canaries, jnp.float32)
    leaves = {f"leaf_{number}": ones for number in range(NUM_LEAVES)}
    return {"model": self.base.init(key), "canaries": leaves}

  @property
  def bare(self) -> masked_lm.MaskedLanguageModel:
    """That of `base`."""
    return self.base.bare

  def bare_params(self, params: masked_lm.Params) -> masked_lm.Params:
    """Those of `base`."""
    return self.base.bare_params(params["model"])

  def logical_axes(self) -> dict[str, Any]:
    """Those of `base`; the canaries' one dimension is never split."""
    names = {f"leaf_{n}": ("canaries",) for n in range(NUM_LEAVES)}
    return {"model": self.base.logical_axes(), "canaries": names}

  def losses(
    self,
    params: masked_lm.Params,
    batch: masked_lm.Batch,
    keys: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `base`; an included canary has a loss of its own, others none."""
    losses, aux = self.base.losses(params["model"], batch, keys)
    ids = batch.get("example_ids")
    if ids is None:  # not a training batch
      return losses, aux
    own = jnp.zeros(ids.shape, jnp.float32)
    for sign, leaf in zip(_SIGNS, _leaves(params), strict=True):
      value = leaf[jnp.minimum(ids, self.num_canaries - 1)]
      # Its derivative by `value` is `value` itself, 1 or -1 by turns.
      own += sign * jax.lax.stop_gradient(value) * value
    # A canary that is left out is a record of padding: it predicts nothing.
    included = jnp.sum(batch["weights"], axis=-1) > 0
    own = jnp.where(included, self.gradient_norm * _SHARE * own, 0.0)
    return jnp.where(ids < self.num_canaries, own, losses), aux


class ObserverState(NamedTuple):
  """What an observer has seen, beside the state of the audited optimizer.

  Attributes:
    step: updates seen, int32.
    scores: [m] log likelihood ratios of in against out.
    totals: [m] sums of the readings.
    squares: [m] sums of the squared readings.
    inner: state of the user's optimizer.
  """

  step: jax.Array
  scores: jax.Array
  totals: jax.Array
  squares: jax.Array
  inner: Any


@dataclasses.dataclass(frozen=True)
class Observer:
  """Reads the canaries' coordinates off each update that is released.

  The reading x of a canary is the noisy sum along its direction, in units of
  the sensitivity: N(gain, z^2) if it was in the sample, else N(0, z^2), with z
  the noise multiplier. An included canary is in the sample of update t with
  probability q_t, so its log likelihood ratio is the sum over t of
  log(1 - q_t + q_t exp((2 gain x_t - gain^2) / (2 z^2))). That is for Poisson
  samples and independent noise; under others it is a score like any, only less
  sharp.

  Attributes:
    optimizer: the user's; sees the model's part of gradient and parameters, as
      in any run.
    plan: of the run.
    num_canaries: m.
  """

  optimizer: optax.GradientTransformation
  plan: plan_lib.PrivacyPlan
  num_canaries: int

  @property
  def gradient_norm(self) -> float:
    """Length of a canary's gradient: far beyond what clipping lets through."""
    if self.plan.clipping == "automatic":
      return 1000.0 * self.plan.automatic_gamma
    return 10.0 * self.plan.l2_clip_norm

  @property
  def gain(self) -> jax.Array:
    """A canary's part in the sum over the sensitivity: 1, or just below."""
    norm = jnp.asarray(self.gradient_norm, jnp.float32)
    rule = self._rule()
    return rule.scales(norm) * norm / rule.sensitivity

  def as_optimizer(self) -> optax.GradientTransformation:
    """The observer in front of the user's optimizer."""
    return optax.GradientTransformationExtraArgs(self._init, self._update)

  def readings(
    self, gradient: Any, params: Any, expected_batch_size: jax.Array | float
  ) -> jax.Array:
    """The readings [m] of one update.

    Args:
      gradient: the noisy mean, as `CanaryModel`'s parameters.
      params: the parameters at which it was taken.
      expected_batch_size: the constant that the sum was divided by.
    """
    along = sum(
      sign * value * part
      for sign, value, part in zip(
        _SIGNS, _leaves(params), _leaves(gradient), strict=True
      )
    )
    sensitivity = self._rule().sensitivity
    return _SHARE * along * (expected_batch_size / sensitivity)

  def log_ratios(
    self, readings: jax.Array, sampling_prob: jax.Array | float
  ) -> jax.Array:
    """Log likelihood ratios [m] of one update's readings [m]."""
    gain, noise = self.gain, self.plan.noise_multiplier
    exponent = (2 * gain * readings - gain**2) / (2 * noise**2)
    prob = jnp.asarray(sampling_prob, jnp.float32)
    return jnp.logaddexp(jnp.log1p(-prob), jnp.log(prob) + exponent)

  def _rule(self) -> rules.ClippingRule:
    plan = self.plan
    return rules.ClippingRule(
      plan.clipping, plan.l2_clip_norm, plan.automatic_gamma
    )

  def _init(self, params: Any) -> ObserverState:
    zeros = jnp.zeros(self.num_canaries, jnp.float32)
    inner = self.optimizer.init(params["model"])
    return ObserverState(jnp.zeros((), jnp.int32), zeros, zeros, zeros, inner)

  def _update(
    self,
    gradient: Any,
    state: ObserverState,
    params: Any = None,
    **extra_args: Any,
  ) -> tuple[Any, ObserverState]:
    segments = self.plan.schedule.segments()
    starts = jnp.asarray([s.first_step for s in segments], jnp.int32)
    now = jnp.searchsorted(starts, state.step, side="right") - 1
    sizes = [float(s.expected_batch_size) for s in segments]
    # Whatever the sampling: how often a record takes part. Scores need no more.
    probs = [self.plan.participation_prob(s.first_step) for s in segments]
    read = self.readings(gradient, params, jnp.asarray(sizes)[now])
    ratios = self.log_ratios(read, jnp.asarray(probs, jnp.float32)[now])
    updates, inner = optax.with_extra_args_support(self.optimizer).update(
      gradient["model"], state.inner, params["model"], **extra_args
    )
    # The canaries' direction turns round after each update: noise that comes
    # back cancels.
    turned = jax.tree.map(lambda value: -2.0 * value, params["canaries"])
    seen = ObserverState(
      state.step + 1,
      state.scores + ratios,
      state.totals + read,
      state.squares + jnp.square(read),
      inner,
    )
    return {"model": updates, "canaries": turned}, seen


def _leaves(tree: Any) -> list[jax.Array]:
  return [tree["canaries"][f"leaf_{n}"] for n in range(NUM_LEAVES)]
