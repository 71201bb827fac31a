"""Learning-rate schedules: functions from update number to learning rate.

Updates are counted from 0, one per optimizer update: a logical step of private
training, however many physical batches it took.

Warm-up is linear and gives update t the rate peak * (t + 1) / (warmup_steps +
1). Starting at 0 instead would spend the first update's privacy on nothing.
"""

import optax

from dptrain.optimizers import settings


def constant(value: float) -> optax.Schedule:
  """Returns `value` at every update.

  Args:
    value: the learning rate, above 0.

  Raises:
    ValueError: if `value` is out of range.

  >>> constant(0.5)(1000)
  0.5
  """
  settings.check_positive("value", value)
  return optax.constant_schedule(value)


def warmup_linear_decay(
  peak: float, warmup_steps: int, total_steps: int, end: float = 0.0
) -> optax.Schedule:
  """Rises to `peak` over the warm-up, then falls in a straight line to `end`.

  Args:
    peak: highest learning rate, reached at update `warmup_steps`.
    warmup_steps: updates before the peak, 0 or more.
    total_steps: updates in the whole run, more than `warmup_steps`.
    end: learning rate from update `total_steps` on, in [0, peak].

  Raises:
    ValueError: names the setting that is out of range.

  >>> schedule = warmup_linear_decay(1.0, warmup_steps=3, total_steps=7)
  >>> [round(float(schedule(t)), 4) for t in range(8)]
  [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
  """
  _check_decay(peak, warmup_steps, total_steps, end)
  decay = optax.linear_schedule(peak, end, total_steps - warmup_steps)
  return _with_warmup(decay, peak, warmup_steps)


def warmup_cosine_decay(
  peak: float, warmup_steps: int, total_steps: int, end: float = 0.0
) -> optax.Schedule:
  """Rises to `peak` over the warm-up, then falls along half a cosine to `end`.

  Args:
    peak: highest learning rate, reached at update `warmup_steps`.
    warmup_steps: updates before the peak, 0 or more.
    total_steps: updates in the whole run, more than `warmup_steps`.
    end: learning rate from update `total_steps` on, in [0, peak].

  Raises:
    ValueError: names the setting that is out of range.

  >>> schedule = warmup_cosine_decay(1.0, warmup_steps=1, total_steps=5)
  >>> [round(float(schedule(t)), 4) for t in range(6)]
  [0.5, 1.0, 0.8536, 0.5, 0.1464, 0.0]
  """
  _check_decay(peak, warmup_steps, total_steps, end)
  decay = optax.cosine_decay_schedule(
    peak, total_steps - warmup_steps, alpha=end / peak
  )
  return _with_warmup(decay, peak, warmup_steps)


def warmup_exponential_decay(
  peak: float, warmup_steps: int, decay_rate: float, decay_steps: int
) -> optax.Schedule:
  """Rises to `peak` over the warm-up, then decays exponentially for ever.

  arXiv 2501.18914 warms up for 1,000 updates and decays by a factor of 10 over
  128,000: ``warmup_exponential_decay(peak, 1_000, 0.1, 128_000)``.

  Args:
    peak: highest learning rate, reached at update `warmup_steps`.
    warmup_steps: updates before the peak, 0 or more.
    decay_rate: factor lost every `decay_steps` updates, in (0, 1].
    decay_steps: updates per factor of `decay_rate`, 1 or more.

  Raises:
    ValueError: names the setting that is out of range.

  >>> schedule = warmup_exponential_decay(
  ...   1.0, warmup_steps=1, decay_rate=0.25, decay_steps=2
  ... )
  >>> [round(float(schedule(t)), 4) for t in range(6)]
  [0.5, 1.0, 0.5, 0.25, 0.125, 0.0625]
  """
  settings.check_positive("peak", peak)
  _check_warmup(warmup_steps)
  if not 0.0 < decay_rate <= 1.0:
    raise ValueError(f"decay_rate={decay_rate} must lie in (0, 1]")
  if decay_steps < 1:
    raise ValueError(f"decay_steps={decay_steps} must be 1 or more")
  decay = optax.exponential_decay(peak, decay_steps, decay_rate)
  return _with_warmup(decay, peak, warmup_steps)


def _with_warmup(
  decay: optax.Schedule, peak: float, warmup_steps: int
) -> optax.Schedule:
  """Puts a linear warm-up in front of `decay`."""
  if warmup_steps == 0:
    return decay
  first = peak / (warmup_steps + 1)
  rise = optax.linear_schedule(first, peak, warmup_steps)
  return optax.join_schedules([rise, decay], [warmup_steps])


def _check_warmup(warmup_steps: int) -> None:
  """Raises ValueError on a negative warm-up."""
  if warmup_steps < 0:
    raise ValueError(f"warmup_steps={warmup_steps} must be 0 or more")


def _check_decay(
  peak: float, warmup_steps: int, total_steps: int, end: float
) -> None:
  """Raises ValueError unless the settings describe a rise and a fall."""
  settings.check_positive("peak", peak)
  _check_warmup(warmup_steps)
  if total_steps <= warmup_steps:
    raise ValueError(
      f"total_steps={total_steps} must exceed warmup_steps={warmup_steps};"
      " shorten the warm-up or train longer"
    )
  if not 0.0 <= end <= peak:
    raise ValueError(f"end={end} must lie in [0, peak={peak}]")
