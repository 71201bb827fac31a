"""Losses of one prediction: a number from scores of the vocabulary and a label.

Every loss here is a function of one position's logits and label alone, so an
example's loss, their mean over its masked positions, depends on that example
alone, as clipping demands. None is negative, so that a metric which counts
losses from 0 (`private_metrics`) cuts nothing off below.

Shapes: [...] any leading dimensions, K classes (the vocabulary, or those of it
that were drawn).
"""

import dataclasses
import functools
import math
import numbers
from typing import Any, Protocol

import jax
import jax.numpy as jnp


class PositionLoss(Protocol):
  """What `MaskedLanguageModel.loss` may be."""

  @property
  def takes_samples(self) -> bool:
    """Whether it can be estimated from a sample of the classes."""

  def __call__(
    self,
    logits: jax.Array,
    labels: jax.Array,
    log_weights: jax.Array | None = None,
  ) -> jax.Array:
    """Computes the loss of each position.

    Args:
      logits: [..., K] float32.
      labels: [...] int32 in [0, K).
      log_weights: [..., K], without gradient: class k stands for
        exp(log_weights) classes of logits like its own; minus infinity counts
        it for none. None: every class for itself. Only where `takes_samples`.

    Returns:
      [...] float32.
    """


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
  """Cross-entropy of the softmax.

  Attributes:
    label_smoothing: s in [0, 1): the label gets 1 - s + s / K of the target
      distribution and every other class s / K (arXiv 1512.00567, section 7).
    z_loss: weight of log(Z)^2, with Z the sum of the exponentials: keeps logits
      from drifting (arXiv 2204.02311, section 5; 1e-4 there).
  """

  label_smoothing: float = 0.0
  z_loss: float = 0.0

  def __post_init__(self) -> None:
    _check_share("CrossEntropy.label_smoothing", self.label_smoothing)
    _check_weight("CrossEntropy.z_loss", self.z_loss)

  @property
  def takes_samples(self) -> bool:
    """A smoothed label is a sum over all classes, which no sample has."""
    return self.label_smoothing == 0.0

  def __call__(
    self,
    logits: jax.Array,
    labels: jax.Array,
    log_weights: jax.Array | None = None,
  ) -> jax.Array:
    """See `PositionLoss`."""
    log_z = jax.nn.logsumexp(_weighted(logits, log_weights), axis=-1)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = log_z - picked
    if self.label_smoothing:
      rest = log_z - jnp.mean(logits, axis=-1)
      loss = (1.0 - self.label_smoothing) * loss + self.label_smoothing * rest
    if self.z_loss:
      loss = loss + self.z_loss * jnp.square(log_z)
    return loss


@dataclasses.dataclass(frozen=True)
class BiTempered:
  """Bi-tempered logistic loss, for labels that may be wrong (1906.03361).

  With log_t(x) = (x^(1-t) - 1) / (1 - t) and exp_t its inverse, predictions are
  p = exp_t2(logits - c), c such that they add up to 1, and the loss from a
  target y is the sum over classes of
  y (log_t1 y - log_t1 p) - (y^(2-t1) - p^(2-t1)) / (2 - t1) (section 2 there).

  t1 < 1 bounds the loss, at 1 / (1 - t1): no example loses more than
  that, however wrong its label. t2 > 1 gives predictions heavy tails. Both 1 is
  cross-entropy.

  c is found by Newton's method on (sum of exp_t2)^(1 - t2), which is concave,
  increasing, and linear where all logits are equal: from the largest logit the
  iterates rise to c and never pass it. The paper's own iteration is the same
  with a slope that is never updated. The gradient is that of the exact c
  (implicit differentiation), not of the iterations.

  Attributes:
    t1: temperature of the loss, in [0, 1].
    t2: temperature of the predictions, at least 1.
    num_iters: Newton steps. 5 leave no more than rounding: log p within 1e-6 of
      its size, measured for 2 to 30,522 classes, t2 up to 4, logits of standard
      deviation up to 100.
    label_smoothing: as in `CrossEntropy`.
  """

  t1: float = 1.0
  t2: float = 1.0
  num_iters: int = 5
  label_smoothing: float = 0.0

  def __post_init__(self) -> None:
    if not 0.0 <= self.t1 <= 1.0:
      raise ValueError(
        f"BiTempered.t1={self.t1} must lie in [0, 1]; 1 is the logarithm of"
        " cross-entropy"
      )
    if not 1.0 <= self.t2 < math.inf:
      raise ValueError(
        f"BiTempered.t2={self.t2} must be finite and at least 1: below, classes"
        " far from the label would get neither probability nor gradient"
      )
    number = self.num_iters
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
      raise ValueError(
        f"BiTempered.num_iters={number!r} must be a positive int, such as 5"
      )
    _check_share("BiTempered.label_smoothing", self.label_smoothing)

  @property
  def takes_samples(self) -> bool:
    """Its predictions are normalised over all classes, not by a sum."""
    return False

  def __call__(
    self,
    logits: jax.Array,
    labels: jax.Array,
    log_weights: jax.Array | None = None,
  ) -> jax.Array:
    """See `PositionLoss`."""
    if log_weights is not None:
      raise ValueError("BiTempered cannot be estimated from sampled classes")
    return _bi_tempered(self, logits, labels)


@dataclasses.dataclass(frozen=True)
class MinimumEntropy:
  """Another loss plus the entropy of the prediction (arXiv 2102.03349).

  Confident predictions vary less from one training to the next. The entropy is
  that of the softmax of the logits, which is what evaluation reads, whatever
  the other loss.

  Attributes:
    loss: the other loss.
    weight: of the entropy, in nats.
  """

  loss: Any = dataclasses.field(default_factory=CrossEntropy)
  weight: float = 0.0

  def __post_init__(self) -> None:
    _check_weight("MinimumEntropy.weight", self.weight)
    if not callable(self.loss):
      raise ValueError(
        f"MinimumEntropy.loss={self.loss!r} must be a loss, such as"
        " losses.CrossEntropy(); in gin, @losses.CrossEntropy()"
      )

  @property
  def takes_samples(self) -> bool:
    """As the other loss: the entropy can be estimated."""
    return bool(self.loss.takes_samples)

  def __call__(
    self,
    logits: jax.Array,
    labels: jax.Array,
    log_weights: jax.Array | None = None,
  ) -> jax.Array:
    """See `PositionLoss`."""
    weighted = _weighted(logits, log_weights)
    log_z = jax.nn.logsumexp(weighted, axis=-1, keepdims=True)
    probs = jnp.exp(weighted - log_z)
    # With all classes, this is -sum p log p.
    entropy = jnp.sum(probs * (log_z - logits), axis=-1)
    return self.loss(logits, labels, log_weights) + self.weight * entropy


def _weighted(logits: jax.Array, log_weights: jax.Array | None) -> jax.Array:
  return logits if log_weights is None else logits + log_weights


def _targets(
  classes: int, labels: jax.Array, label_smoothing: float
) -> jax.Array:
  """Target distributions [..., K]."""
  rest = label_smoothing / classes
  hit = labels[..., None] == jnp.arange(classes)
  return jnp.where(hit, 1.0 - label_smoothing + rest, rest)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _bi_tempered(
  setting: BiTempered, logits: jax.Array, labels: jax.Array
) -> jax.Array:
  """The loss [...] of logits [..., K]."""
  log_probs = _tempered_log_probs(setting.t2, setting.num_iters, logits)
  targets = _targets(logits.shape[-1], labels, setting.label_smoothing)
  return _divergence(setting.t1, log_probs, targets)


@_bi_tempered.defjvp
def _bi_tempered_jvp(
  setting: BiTempered, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
  logits, labels = primals
  t1, t2 = setting.t1, setting.t2
  log_probs = _tempered_log_probs(t2, setting.num_iters, logits)
  targets = _targets(logits.shape[-1], labels, setting.label_smoothing)
  # dp_i / dlogit_j = p_i^t2 (1[i = j] - e_j), with e the escort distribution.
  pull = jnp.exp((t2 - t1) * log_probs) * (jnp.exp(log_probs) - targets)
  escorts = jax.nn.softmax(t2 * log_probs, axis=-1)
  slope = pull - escorts * jnp.sum(pull, axis=-1, keepdims=True)
  loss = _divergence(t1, log_probs, targets)
  return loss, jnp.sum(slope * tangents[0], axis=-1)


def _divergence(
  t1: float, log_probs: jax.Array, targets: jax.Array
) -> jax.Array:
  """The Bregman divergence [...] between targets and predictions [..., K]."""
  gain = jnp.where(
    targets > 0,
    _tempered_log(t1, jnp.log(jnp.where(targets > 0, targets, 1.0)))
    - _tempered_log(t1, log_probs),
    0.0,
  )
  mass = (targets ** (2.0 - t1) - jnp.exp((2.0 - t1) * log_probs)) / (2.0 - t1)
  return jnp.sum(targets * gain - mass, axis=-1)


def _tempered_log(t: float, log_x: jax.Array) -> jax.Array:
  """log_t(x), from log(x)."""
  return log_x if t == 1.0 else jnp.expm1((1.0 - t) * log_x) / (1.0 - t)


def _tempered_log_probs(
  t: float, num_iters: int, logits: jax.Array
) -> jax.Array:
  """Log of exp_t(logits - c), which add up to 1: [..., K]."""
  if t == 1.0:
    return jax.nn.log_softmax(logits, axis=-1)
  excess = t - 1.0
  below = logits - jnp.max(logits, axis=-1, keepdims=True)

  def log_exp(c: jax.Array) -> jax.Array:
    return -jnp.log1p(excess * (c - below)) / excess

  def step(_: int, c: jax.Array) -> jax.Array:
    logs = log_exp(c)
    total = jax.nn.logsumexp(logs, axis=-1, keepdims=True)
    slope = jax.nn.logsumexp(t * logs, axis=-1, keepdims=True)
    return c + jnp.expm1(excess * total) / excess * jnp.exp(total - slope)

  start = jnp.zeros_like(below[..., :1])
  return log_exp(jax.lax.fori_loop(0, num_iters, step, start))


def is_number(value: Any) -> bool:
  """Whether a setting is a number: a binding may be a word, or a switch."""
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_share(name: str, value: float) -> None:
  if not is_number(value) or not 0.0 <= value < 1.0:
    raise ValueError(
      f"{name}={value!r} must be a number in [0, 1); use 0 to switch it off"
    )


def _check_weight(name: str, value: float) -> None:
  if not is_number(value) or not 0.0 <= value < math.inf:
    raise ValueError(
      f"{name}={value!r} must be a number, finite and not negative; use 0 to"
      " switch it off"
    )
