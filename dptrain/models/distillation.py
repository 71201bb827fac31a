"""Learning from other models' predictions at masked positions.

An example's loss gets a second term, the distance of its predictions to those
of teachers on the very same masked input. It is a term of that example alone,
so that clipping covers both together. Codistillation is arXiv 1804.03235
(algorithm 1), the symmetric distance arXiv 2102.03349 (section 4), a frozen
teacher that sees the student's input arXiv 2106.05237.

Shapes: B batch, M masked, V vocabulary, K teachers.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dptrain.models import losses

LOSSES = ("cross_entropy", "logit_mse", "symmetric_kl")
AVERAGES = ("probabilities", "logits")


@dataclasses.dataclass(frozen=True)
class Distillation:
  """How predictions are drawn to those of teachers.

  With p and q the predictions of student and teachers, both of the softmax of
  logits / temperature, the term of one position is, times the weight,

    cross_entropy  -temperature^2 sum q log p
    symmetric_kl   temperature^2 (KL(q || p) + KL(p || q)) / 2
    logit_mse      mean over V of (logit - teacher's logit)^2 / 2, both with
                   their mean over V taken off, which no prediction shows

  The gradient of `symmetric_kl`, in two models that teach each other without
  delay on the same examples, is that of the two-model loss of arXiv
  2102.03349; its minimum entropy is `losses.MinimumEntropy`.

  Attributes:
    loss: "cross_entropy", "logit_mse" or "symmetric_kl".
    weight: of the term, beside the loss of the labels; 0 learns from no one.
    temperature: above 0; larger ones show more of the unlikely classes. Not
      read by "logit_mse".
    average: of several teachers: of their "probabilities" at that temperature,
      or of their "logits".
    burn_in: updates without the term.
    ramp: updates after them over which its weight grows linearly.
  """

  loss: str = "cross_entropy"
  weight: float = 1.0
  temperature: float = 1.0
  average: str = "probabilities"
  burn_in: int = 0
  ramp: int = 0

  def __post_init__(self) -> None:
    for name, known in (("loss", LOSSES), ("average", AVERAGES)):
      value = getattr(self, name)
      if value not in known:
        raise ValueError(
          f"Distillation.{name}={value!r} is unknown; use one of"
          f" {', '.join(map(repr, known))}."
        )
    if not losses.is_number(self.weight) or not 0.0 <= self.weight < math.inf:
      raise ValueError(
        f"Distillation.weight={self.weight!r} must be a number, finite and not"
        " negative; use 0 to learn from no teacher."
      )
    temperature = self.temperature
    if not losses.is_number(temperature) or not 0.0 < temperature < math.inf:
      raise ValueError(
        f"Distillation.temperature={temperature!r} must be a number, finite and"
        " positive, such as 1."
      )
    for name in ("burn_in", "ramp"):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
          f"Distillation.{name}={value!r} must be a number of updates, 0 or"
          " more."
        )

  def weight_at(self, step: int) -> float:
    """The term's weight in update `step`: public, a function of its number."""
    past = step - self.burn_in
    if past < 0:
      return 0.0
    return self.weight * min(1.0, (past + 1) / (self.ramp + 1))

  def averaged(self, logits: Sequence[jax.Array]) -> jax.Array:
    """Joins teachers' predictions into one.

    Args:
      logits: K arrays [..., V] float32, at least one.

    Returns:
      [..., V] logits of the average, without gradient.
    """
    stacked = jax.lax.stop_gradient(jnp.stack(logits))
    if self.average == "logits" or len(logits) == 1:
      return jnp.mean(stacked, axis=0)
    log_probs = jax.nn.log_softmax(stacked / self.temperature, axis=-1)
    mean = jax.nn.logsumexp(log_probs, axis=0) - math.log(len(logits))
    return self.temperature * mean

  def positions(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The term of each position, before its weight.

    Args:
      logits: [..., V] of the student.
      targets: [..., V] of the teachers; no gradient goes there.

    Returns:
      [...] float32; "logit_mse" and "symmetric_kl" are 0 where both agree.
    """
    logits = logits.astype(jnp.float32)
    targets = jax.lax.stop_gradient(targets.astype(jnp.float32))
    if self.loss == "logit_mse":
      gap = _centred(logits) - _centred(targets)
      return jnp.mean(jnp.square(gap), axis=-1) / 2
    log_p = jax.nn.log_softmax(logits / self.temperature, axis=-1)
    log_q = jax.nn.log_softmax(targets / self.temperature, axis=-1)
    scale = self.temperature**2
    if self.loss == "cross_entropy":
      return -scale * jnp.sum(jnp.exp(log_q) * log_p, axis=-1)
    gap = (jnp.exp(log_q) - jnp.exp(log_p)) * (log_q - log_p)
    return scale * jnp.sum(gap, axis=-1) / 2


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["logits", "weight"],
  meta_fields=["settings"],
)
@dataclasses.dataclass(frozen=True)
class Targets:
  """What teachers predict for a batch: an entry "targets" of it.

  Attributes:
    logits: float32 [B, M, V], of the teachers' average.
    weight: float32 [B], of the term; the same for all rows of an update.
    settings: the distance.
  """

  logits: Any
  weight: Any
  settings: Distillation

  def sums(self, logits: jax.Array, weights: jax.Array) -> jax.Array:
    """The term of each example, summed over its masked tokens.

    Args:
      logits: [B, M, V] of the student.
      weights: [B, M], 1.0 at real predictions and 0.0 at unused slots.

    Returns:
      [B] float32.
    """
    terms = self.settings.positions(logits, self.logits)
    return self.weight * jnp.sum(weights * terms, axis=-1)


def _centred(logits: jax.Array) -> jax.Array:
  return logits - jnp.mean(logits, axis=-1, keepdims=True)
