"""Range checks on optimizer settings, each naming the setting it refuses."""

import math
from typing import Any

import optax


def check_positive(name: str, value: float) -> None:
  """Raises ValueError unless `value` is finite and above 0."""
  if not (math.isfinite(value) and value > 0.0):
    raise ValueError(f"{name}={value} must be a finite number above 0")


def check_not_negative(name: str, value: float) -> None:
  """Raises ValueError unless `value` is finite and 0 or more."""
  if not (math.isfinite(value) and value >= 0.0):
    raise ValueError(f"{name}={value} must be a finite number, 0 or more")


def check_limits(name: str, limits: tuple[float, float]) -> None:
  """Raises ValueError unless the limits are positive, with 1 between them."""
  least, greatest = limits
  if not (0.0 < least <= 1.0 <= greatest < math.inf):
    raise ValueError(
      f"{name}={limits} must be two finite numbers above 0 with 1 between them"
    )


def check_fraction(name: str, value: float) -> None:
  """Raises ValueError unless `value` lies in [0, 1)."""
  if not 0.0 <= value < 1.0:
    raise ValueError(f"{name}={value} must lie in [0, 1)")


def check_decay(name: str, value: float) -> None:
  """Raises ValueError unless `value` lies in [0, 1]; 1 adds up for ever."""
  if not 0.0 <= value <= 1.0:
    raise ValueError(f"{name}={value} must lie in [0, 1]")


def check_learning_rate(learning_rate: optax.ScalarOrSchedule) -> None:
  """Raises ValueError unless given a schedule or a positive number."""
  if not callable(learning_rate):
    check_positive("learning_rate", float(learning_rate))


def check_weight_decay(
  weight_decay: float, learning_rate: optax.ScalarOrSchedule | None = None
) -> None:
  """Raises ValueError on a decay that is negative or overshoots zero.

  A schedule's peak is not known here, so only a fixed learning rate is held
  against the decay; None where their product is not what shrinks the weights.
  """
  if not (math.isfinite(weight_decay) and weight_decay >= 0.0):
    raise ValueError(
      f"weight_decay={weight_decay} must be a finite number, 0 or more"
    )
  if learning_rate is None or callable(learning_rate):
    return
  if weight_decay * float(learning_rate) >= 1:
    raise ValueError(
      f"weight_decay={weight_decay} times learning_rate={learning_rate} is 1"
      " or more, which erases the weights at each update; lower either"
    )


def check_params(params: Any) -> None:
  """Raises ValueError unless `update` was given the parameters."""
  if params is None:
    raise ValueError(
      "update() was given no params, which this optimizer compares its steps"
      " with: call update(gradients, state, params)"
    )


def check_nesterov(nesterov: bool, momentum: float) -> None:
  """Raises ValueError if there is no momentum to look ahead with."""
  if nesterov and momentum == 0.0:
    raise ValueError(
      "nesterov=True needs momentum, but momentum=0.0; set momentum or"
      " nesterov=False"
    )
