"""Private metrics on their way from the updates to people."""

from collections.abc import Mapping
import pathlib
from typing import Any

from dptrain.clipping import private_metrics
from dptrain.privacy import plan as plan_lib
from dptrain.reports import released_metrics
from dptrain.training import processes
from dptrain.training import progress

# TensorBoard's folder of the noise's standard deviations.
NOISE_PREFIX = "private_noise/"


class PrivateCurves:
  """Collects what updates release; tells means of it, and keeps each in a file.

  Formal guarantee: post-processing of released values.
  """

  def __init__(
    self,
    metrics: private_metrics.PrivateMetrics | None,
    plan: plan_lib.PrivacyPlan,
  ):
    """Collects in memory; `keep_in` adds the file.

    Args:
      metrics: what the run releases; None: nothing, and all that follows does
        nothing.
      plan: of the run.
    """
    self._metrics, self._plan = metrics, plan
    banded = plan_lib.banded_noise(plan) if metrics else None
    # Of correlated noise: the largest, and sums of it are smaller.
    self._spread = banded.largest_stddev(plan.num_steps) if banded else 1.0
    self._directory: pathlib.Path | None = None
    self._branch = ""
    # Values may still be being computed: nobody waits for them here.
    self._pending: list[tuple[int, dict[str, Any]]] = []
    self._window: list[released_metrics.Release] = []

  def keep_in(self, directory: pathlib.Path, branch: str, step: int) -> None:
    """Also writes what follows into the file of MODEL_DIR, in one process.

    Args:
      directory: MODEL_DIR.
      branch: the open branch.
      step: the first update that will be made on it.
    """
    self._branch = branch
    if self._metrics is None or not processes.is_first():
      return
    self._directory = directory
    try:
      released_metrics.resume(directory, branch, step)
    except OSError as error:
      self._give_up(error)

  def add(self, step: int, figures: Mapping[str, Any]) -> None:
    """Takes what `PrivateStep.finish` told of update `step`, the first is 0."""
    if self._metrics is not None:
      self._pending.append((step, private_metrics.separated(figures)[0]))

  def flush(self) -> None:
    """Waits for what was added, and writes it down."""
    metrics = self._metrics
    if metrics is None:
      return
    made = [
      self._release(metrics, step, values) for step, values in self._pending
    ]
    self._pending = []
    self._window += made
    if self._directory is None or not made:
      return
    try:
      released_metrics.append(self._directory, made)
    except OSError as error:
      self._give_up(error)

  def window(self) -> dict[str, float]:
    """Means over all updates since it was last asked, and their noise.

    Returns:
      "private/..." and "private_noise/..." by name, for curves; empty if there
      were no updates. Means are cut to the metrics' ranges, which noise may
      leave.
    """
    self.flush()
    if self._metrics is None or not self._window:
      return {}
    mean = released_metrics.mean(self._window)
    self._window = []
    ranges = self._metrics.ranges
    return {
      private_metrics.PREFIX + name: min(max(value, 0.0), ranges[name])
      for name, value in mean.values.items()
    } | {NOISE_PREFIX + name: value for name, value in mean.noise.items()}

  def _release(
    self,
    metrics: private_metrics.PrivateMetrics,
    step: int,
    values: Mapping[str, Any],
  ) -> released_metrics.Release:
    size = self._plan.expected_batch_size(step)
    return released_metrics.Release(
      self._branch,
      step,
      size,
      {name: float(values[name]) for name in metrics.names},
      metrics.noise_of_means(self._spread * self._plan.noise_multiplier, size),
    )

  def _give_up(self, error: OSError) -> None:
    """A full disk is told and ends nothing: nobody depends on the file."""
    self._directory = None
    progress.say(
      f"private metrics could not be written ({error}); training goes on"
      " without their file"
    )


def in_words(curves: Mapping[str, float]) -> dict[str, str]:
  """Loss and accuracy with their noise, to be shown beside a progress bar.

  Args:
    curves: what `PrivateCurves.window` returned.
  """
  told = {}
  for name, scale, form in (("loss", 1, ".2f"), ("accuracy", 100, ".1f")):
    value = curves.get(private_metrics.PREFIX + name)
    if value is not None:
      noise = curves[NOISE_PREFIX + name]
      told[name] = f"{scale * value:{form}}±{scale * noise:{form}}"
  if "accuracy" in told:
    told["accuracy"] += "%"
  return told
