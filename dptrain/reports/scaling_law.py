"""What one paper predicts for data, privacy and compute: arXiv 2501.18914.

The paper fitted the loss of BERT masked language models (4.5 to 335 million
parameters, 512 tokens per record, DP-Adam, delta 1e-8, its own corpus) over
model size, updates and noise-batch ratio. That fit is not printed in numbers.
Table 2 (appendix C.1) is: for 20 pairs of records and epsilon the saturating
compute, beyond which the fit gains less than 1 % (so the authors' notebook,
google-research/dp_scaling_laws), and the training that takes it. What is
predicted here are points of that table and points between them.
"""

import dataclasses
import math

import numpy as np

SOURCE = "arXiv 2501.18914, Table 2"
SEQUENCE_LENGTH = 512
DELTA = 1e-8
# Table 1: models that were trained; the fit reaches to Large.
MODELS = {
  "tiny": 4.5e6,
  "mini": 11.4e6,
  "small": 29e6,
  "medium": 41e6,
  "base": 109e6,
  "large": 335e6,
}
# Section 3.2: what was trained with.
NOISE_BATCH_RATIOS = (2.0**-23, 2.0**-6)

_LEAST_EXAMPLES, _LEAST_EPSILON = 1e5, 1.0
_EXAMPLES_STEP, _EPSILON_STEP = 10.0, 4.0
# Rows: 1e5 .. 1e9 records. In each, epsilon 1, 4, 16, 64: compute in FLOPs,
# cross-entropy, parameters, updates, batch.
_TABLE = np.array(
  [
    [
      (1.3e16, 7.28, 4.6e6, 1.8e3, 5.1e2),
      (1.1e17, 6.65, 4.6e6, 1.8e3, 4.1e3),
      (2.0e18, 5.60, 1.7e7, 2.7e3, 1.4e4),
      (7.5e18, 4.63, 2.0e7, 6.3e3, 1.9e4),
    ],
    [
      (2.8e17, 5.89, 4.6e6, 2.5e3, 8.2e3),
      (8.8e18, 4.62, 1.9e7, 6.5e3, 2.3e4),
      (3.3e19, 3.61, 1.7e7, 1.4e4, 4.6e4),
      (3.2e20, 2.82, 4.9e7, 1.2e4, 1.9e5),
    ],
    [
      (3.8e19, 3.73, 1.7e7, 9.6e3, 7.8e4),
      (3.8e20, 2.81, 4.9e7, 1.1e4, 2.2e5),
      (2.0e21, 2.15, 7.0e7, 1.2e4, 7.4e5),
      (4.4e22, 1.66, 3.3e8, 4.9e4, 8.8e5),
    ],
    [
      (5.2e21, 2.26, 1.3e8, 5.8e4, 2.2e5),
      (4.4e22, 1.66, 3.3e8, 4.9e4, 8.8e5),
      (1.0e23, 1.32, 3.3e8, 9.3e4, 1.0e6),
      (1.0e23, 1.23, 3.3e8, 1.1e5, 8.8e5),
    ],
    [
      (8.5e22, 1.36, 3.3e8, 9.4e4, 8.8e5),
      (1.0e23, 1.23, 3.3e8, 1.1e5, 8.8e5),
      (1.0e23, 1.22, 3.3e8, 1.1e5, 8.8e5),
      (1.2e23, 1.20, 3.3e8, 1.1e5, 1.1e6),
    ],
  ]
)
_LOGS = np.log(_TABLE)
_SEARCH_POINTS, _SEARCH_TOLERANCE = 33, 1e-9


@dataclasses.dataclass(frozen=True)
class Point:
  """A point of the table, or between its points.

  Attributes:
    num_examples: records in the corpus.
    epsilon: of the budget, at delta 1e-8.
    flops: saturating compute.
    loss: cross-entropy of masked tokens, on the paper's corpus.
    parameters: of the model.
    steps: updates.
    batch_size: records that an update expects.
  """

  num_examples: float
  epsilon: float
  flops: float
  loss: float
  parameters: float
  steps: float
  batch_size: float


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What the paper predicts for a budget.

  Attributes:
    saturating: where more compute gains less than 1 %.
    advised: the training to choose: `saturating`, or with less compute the
      point of a smaller budget of data and privacy that this compute saturates.
    saturates: whether the compute given suffices; None if none was given.
    loss_at_least: of `advised`, at the budget asked for.
    loss_at_most: likewise; the same where the compute saturates.
    warnings: where the prediction is weak, in words.
  """

  saturating: Point
  advised: Point
  saturates: bool | None
  loss_at_least: float
  loss_at_most: float
  warnings: list[str]


def table() -> list[Point]:
  """The paper's Table 2, row by row."""
  return [
    Point(
      _LEAST_EXAMPLES * _EXAMPLES_STEP**i,
      _LEAST_EPSILON * _EPSILON_STEP**j,
      *map(float, row),
    )
    for i, rows in enumerate(_TABLE)
    for j, row in enumerate(rows)
  ]


def flops(parameters: float, steps: float, batch_size: float) -> float:
  """6 M B S T of the paper (appendix B.3), without what clipping costs."""
  return 6.0 * parameters * batch_size * SEQUENCE_LENGTH * steps


def point(num_examples: float, epsilon: float) -> Point:
  """Linear between the table's four nearest points, in logarithms of all.

  Args:
    num_examples: records; at most half a step (a factor of 3.2) off the table.
    epsilon: of the budget; at most half a step (a factor of 2) off.

  Raises:
    ValueError: further off.
  """
  x = _step("num_examples", num_examples, _LEAST_EXAMPLES, _EXAMPLES_STEP, 5)
  y = _step("epsilon", epsilon, _LEAST_EPSILON, _EPSILON_STEP, 4)
  i, j = min(max(int(x), 0), 3), min(max(int(y), 0), 2)
  along = np.array([1 - (x - i), x - i])
  across = np.array([1 - (y - j), y - j])
  logs = np.einsum("i,j,ijk->k", along, across, _LOGS[i : i + 2, j : j + 2])
  compute, loss, parameters, steps, batch = np.exp(logs).tolist()
  tried = min(MODELS.values()), max(MODELS.values())
  return Point(
    num_examples,
    epsilon,
    compute,
    loss,
    min(max(parameters, tried[0]), tried[1]),
    steps,
    min(batch, num_examples),
  )


def predict(
  num_examples: float, epsilon: float, compute: float | None = None
) -> Prediction:
  """The training that the paper's table advises for a budget.

  Where compute is short of saturating, the table has no row. What it has are
  rows of less data or less privacy budget that this compute saturates: the same
  training with more data and budget has less noise, so its loss is no higher
  than that row's, and no lower than with unlimited compute. (Section 4.1: at
  small compute the best allocation depends little on epsilon.) Among such rows
  the one of lowest loss is taken.

  Args:
    num_examples: records in the corpus.
    epsilon: of the budget.
    compute: FLOPs; None: as much as saturates.

  Raises:
    ValueError: too far off the table, or less compute than any of its rows.
  """
  saturating = point(num_examples, epsilon)
  warnings = _edges(num_examples, epsilon)
  if compute is None or compute >= saturating.flops:
    return Prediction(
      saturating,
      saturating,
      None if compute is None else True,
      saturating.loss,
      saturating.loss,
      warnings + _limits(saturating),
    )
  advised = _saturated_by(compute, num_examples, epsilon)
  return Prediction(
    saturating,
    advised,
    False,
    min(saturating.loss, advised.loss),
    advised.loss,
    [
      *warnings,
      "The table has no row for compute short of saturating. Advised is what"
      f" this compute saturates with {advised.num_examples:.2g} records at"
      f" epsilon {advised.epsilon:.2g}; with your records and epsilon the noise"
      " is lower, so the loss lies between the two figures.",
      *_limits(advised),
    ],
  )


def _saturated_by(compute: float, num_examples: float, epsilon: float) -> Point:
  """The point of lowest loss, within the budget, that `compute` saturates."""
  fewest = min(num_examples, _LEAST_EXAMPLES)
  least = min(epsilon, _LEAST_EPSILON)
  sizes = np.geomspace(fewest, num_examples, _SEARCH_POINTS).tolist()
  budgets = np.geomspace(least, epsilon, _SEARCH_POINTS).tolist()
  paths = [((size, least), (size, epsilon)) for size in sizes]
  paths += [((fewest, some), (num_examples, some)) for some in budgets]
  found = [_on_path(compute, *path) for path in paths]
  points = [point for point in found if point is not None]
  if not points:
    raise ValueError(
      f"--flops={compute:g} is less than any row of {SOURCE}, whose smallest"
      f" takes {_TABLE[..., 0].min():.2g}: too little to predict anything."
    )
  return min(points, key=lambda p: p.loss)


def _on_path(
  compute: float, start: tuple[float, float], end: tuple[float, float]
) -> Point | None:
  """Where on a path of rising budgets `compute` saturates; None: nowhere."""

  def at(share: float) -> Point:
    size, epsilon = (
      a * (b / a) ** share for a, b in zip(start, end, strict=True)
    )
    return point(size, epsilon)

  low, high = 0.0, 1.0
  if not at(low).flops <= compute <= at(high).flops:
    return None
  while high - low > _SEARCH_TOLERANCE:
    middle = (low + high) / 2
    if at(middle).flops <= compute:
      low = middle
    else:
      high = middle
  return at(low)


def _step(
  name: str, value: float, least: float, factor: float, count: int
) -> float:
  """Where a value lies among the table's, from 0; half a step off at most."""
  most = least * factor ** (count - 1)
  reach = math.sqrt(factor)
  # A little slack, for values that were computed.
  if not 0.999 * least / reach <= value <= 1.001 * most * reach:
    raise ValueError(
      f"--{name}={value:g} is too far off {SOURCE}, which reaches from"
      f" {least:g} to {most:g}: nothing is predicted beyond a factor of"
      f" {reach:.2g}."
    )
  return math.log(value / least, factor)


def _edges(num_examples: float, epsilon: float) -> list[str]:
  """Where a budget lies off the table."""
  off = []
  for told, value, least, most in (
    ("records", num_examples, _LEAST_EXAMPLES, 1e9),
    ("epsilon", epsilon, _LEAST_EPSILON, 64.0),
  ):
    if not 0.999 * least <= value <= 1.001 * most:
      off.append(
        f"EXTRAPOLATED: the table has {told} from {least:g} to {most:g}, and"
        f" {value:g} was asked for."
      )
  return off


def _limits(advised: Point) -> list[str]:
  """Where the paper's own fit ends."""
  if advised.parameters > 0.95 * MODELS["large"]:
    return [
      "The model is the largest that the paper's fit reaches (BERT large): a"
      " larger one may be better, and the saturating compute higher."
    ]
  if advised.parameters < 1.05 * MODELS["tiny"]:
    return [
      "The model is the smallest that the paper trained (BERT tiny): a smaller"
      " one may do as well."
    ]
  return []
