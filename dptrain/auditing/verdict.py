"""From guesses to lower bounds on epsilon, beside the claim.

Shapes: m canaries.
"""

from collections.abc import Sequence
import dataclasses
import json
import math
from typing import Any

from jax_privacy import auditing
import numpy as np
from scipy import stats

from dptrain.reports import layout

# Of the two direct measurements: no audit should fail by chance for them.
MEASUREMENT_SIGNIFICANCE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guesses:
  """How well the coins were guessed.

  Attributes:
    canaries: m.
    made: how many were guessed; the others were passed over.
    correct: how many of these guesses were right.
    epsilon_one_run: lower bound for (epsilon, delta)-DP.
    epsilon_one_run_fdp: lower bound among Gaussian trade-offs.
  """

  canaries: int
  made: int
  correct: int
  epsilon_one_run: float
  epsilon_one_run_fdp: float


def guess(
  scores: np.ndarray,
  included: np.ndarray,
  num_guesses: int,
  significance: float,
  delta: float,
) -> Guesses:
  """Guesses the coins of the canaries with the most extreme scores.

  Guessed is "in" above 0 and "out" below, for the `num_guesses` scores that are
  farthest from 0. Which canaries are guessed, and how, depends on the scores
  alone, and the number is chosen beforehand: no threshold is fitted to the
  coins, so nothing has to be corrected for.

  The bounds are jax-privacy's. Its auditor counts members above a threshold, so
  it is told "right" and "wrong" for "in" and "out", and the distance from 0 for
  the score: under the null, one is as likely as the other.

  What each bound rejects, for every epsilon below it:

  - `epsilon_one_run` (arXiv 2305.08846): that the run is (epsilon,
    delta)-DP.
  - `epsilon_one_run_fdp` (arXiv 2410.22235): that the run is f-DP
    with f the trade-off function of the one Gaussian mechanism that is
    (epsilon, delta)-DP. That is more than (epsilon, delta)-DP says, so the
    bound is higher, and to be compared with a Gaussian that covers the claim
    (`curves.covering_gaussian`).

  Args:
    scores: [m] functions of what the run released, and of nothing else.
    included: [m] bool, the coins: fair, independent of each other.
    num_guesses: how many are guessed (more if scores are tied).
    significance: allowed probability that a bound is wrong; of each of the two.
    delta: of the claim.
  """
  sure = np.abs(scores)
  right = (scores > 0) == included
  threshold = float(np.sort(sure)[-num_guesses])
  # Beyond those of the run, canaries that nobody guesses, which the auditor's
  # constructor wants if all are right or all are wrong.
  auditor = auditing.CanaryScoreAuditor(
    *(
      sure[part] if part.any() else np.array([-1.0]) for part in (right, ~right)
    )
  )
  how: dict[str, Any] = {
    "significance": significance,
    "delta": delta,
    "threshold_strategy": auditing.Explicit(threshold),
  }
  return Guesses(
    canaries=len(scores),
    made=int((sure >= threshold).sum()),
    correct=int(right[sure >= threshold].sum()),
    epsilon_one_run=float(auditor.epsilon_one_run(**how)),
    epsilon_one_run_fdp=float(auditor.epsilon_one_run_fdp(**how)),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
  """Noise and sensitivity as an observer of the releases reads them.

  This is no attack but a direct look: the readings of excluded canaries are
  noise, the mean of those of included ones is the sensitivity times the
  probability to be in a sample.

  Attributes:
    noise_multiplier: standard deviation of the noise over the sensitivity.
    noise_multiplier_at_most: upper bound of it.
    sensitivity: what an included canary adds over what it may, at the plan's
      sampling probabilities.
    sensitivity_at_least: lower bound of it.
  """

  noise_multiplier: float
  noise_multiplier_at_most: float
  sensitivity: float
  sensitivity_at_least: float


def measure(
  totals: np.ndarray,
  squares: np.ndarray,
  included: np.ndarray,
  sampling_probs: Sequence[float],
  noise_multiplier: float,
) -> Measured:
  """Measures, with bounds that each hold but for `MEASUREMENT_SIGNIFICANCE`.

  Args:
    totals: [m] sums over the updates of the readings (`observer.Observer`).
    squares: [m] sums of their squares.
    included: [m] bool, the coins.
    sampling_probs: of each update.
    noise_multiplier: the plan's; the lower bound of the sensitivity takes it
      for granted.
  """
  probs = np.asarray(sampling_probs, np.float64)
  noise = float(squares[~included].sum())
  count = int((~included).sum()) * len(probs)
  least = stats.chi2.ppf(MEASUREMENT_SIGNIFICANCE, count)
  expected = int(included.sum()) * probs.sum()
  spread = math.sqrt(
    included.sum()
    * (len(probs) * noise_multiplier**2 + (probs * (1 - probs)).sum())
  )
  found = float(totals[included].sum()) / expected
  margin = stats.norm.isf(MEASUREMENT_SIGNIFICANCE) * spread / expected
  return Measured(
    noise_multiplier=math.sqrt(noise / count),
    noise_multiplier_at_most=math.sqrt(noise / least),
    sensitivity=float(found),
    sensitivity_at_least=float(found - margin),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """What an audit found.

  Attributes:
    mode: "white_box" or "black_box".
    claim: whether the run makes a claim at all (not under a fixed seed).
    epsilon: what is claimed for the audited run, by its ledger.
    delta: of claim and bounds.
    gaussian_epsilon: epsilon, at delta, of a Gaussian mechanism that covers the
      claim; the bound of the f-DP form must not exceed it.
    confidence: with which both bounds hold together.
    updates: that were made.
    noise_multiplier: of the plan.
    guesses: what was guessed, and the bounds.
    measured: noise and sensitivity; None in black-box mode.
  """

  mode: str
  claim: bool
  epsilon: float
  delta: float
  gaussian_epsilon: float
  confidence: float
  updates: int
  noise_multiplier: float
  guesses: Guesses
  measured: Measured | None

  @property
  def lower_bound(self) -> float:
    """The larger of the two bounds."""
    return max(self.guesses.epsilon_one_run, self.guesses.epsilon_one_run_fdp)

  @property
  def refutations(self) -> tuple[str, ...]:
    """Why the claim is false, in sentences; empty if nothing shows it."""
    found, guesses, measured = [], self.guesses, self.measured
    for name, bound, limit in (
      ("(epsilon, delta)-DP", guesses.epsilon_one_run, self.epsilon),
      ("f-DP", guesses.epsilon_one_run_fdp, self.gaussian_epsilon),
    ):
      if bound > limit:
        found.append(
          f"The lower bound for {name}, {bound:.4g}, exceeds the"
          f" {layout.rounded_up(limit)} that is claimed."
        )
    if measured is not None:
      if measured.noise_multiplier_at_most < self.noise_multiplier:
        found.append(
          "The noise multiplier is at most"
          f" {measured.noise_multiplier_at_most:.4g}; the plan prices"
          f" {self.noise_multiplier:.4g}."
        )
      if measured.sensitivity_at_least > 1.0:
        found.append(
          "A canary adds at least"
          f" {measured.sensitivity_at_least:.4g} times what one record may."
        )
    return tuple(found)

  @property
  def passed(self) -> bool:
    """Whether nothing was found. It proves nothing: see `statement`."""
    return not self.refutations

  def statement(self) -> str:
    """The verdict in a few sentences."""
    if not self.passed:
      return "THE CLAIM IS REFUTED. " + " ".join(self.refutations)
    return (
      "The claim is not refuted. That proves nothing: an audit bounds epsilon"
      " from below, for these canaries and this attack, and another attack may"
      " find more."
    )

  def as_json(self) -> str:
    """The verdict as JSON text."""
    data = dataclasses.asdict(self) | {
      "passed": self.passed,
      "lower_bound": self.lower_bound,
      "refutations": self.refutations,
      "statement": self.statement(),
    }
    for name in ("epsilon", "gaussian_epsilon"):
      if data[name] == math.inf:
        data[name] = "inf"  # JSON has no infinity
    return json.dumps(data, indent=2, sort_keys=True) + "\n"

  def as_text(self) -> str:
    """The verdict as text for people, lines of at most 80 columns."""
    lines = ["Privacy audit", "=============", ""]
    lines += [*layout.paragraph(self.statement()), ""]
    lines += [*layout.table(self._facts()), ""]
    return "\n".join(lines)

  def _facts(self) -> list[tuple[str, str]]:
    guesses, measured = self.guesses, self.measured
    claimed = "" if self.claim else "; FIXED SEED: NO PRIVACY CLAIM"
    facts = [
      (
        "claim",
        f"epsilon {layout.rounded_up(self.epsilon)} at delta {self.delta:g},"
        f" by the ledger of this run{claimed}",
      ),
      (
        "lower bound, f-DP",
        f"{guesses.epsilon_one_run_fdp:.4g} (arXiv 2410.22235; against the"
        " Gaussian mechanism that covers the claim, epsilon"
        f" {layout.rounded_up(self.gaussian_epsilon)})",
      ),
      (
        "lower bound, DP",
        f"{guesses.epsilon_one_run:.4g} (arXiv 2305.08846; assumes nothing)",
      ),
      ("confidence", f"{self.confidence:g} that both bounds hold"),
      ("mode", self.mode),
      (
        "guesses",
        f"{guesses.correct} of {guesses.made} right;"
        f" {guesses.canaries} canaries in {self.updates} updates",
      ),
    ]
    if measured is not None:
      facts += [
        (
          "noise multiplier",
          f"{measured.noise_multiplier:.4g} measured, at most"
          f" {measured.noise_multiplier_at_most:.4g}; the plan's:"
          f" {self.noise_multiplier:.4g}",
        ),
        (
          "sensitivity",
          f"{measured.sensitivity:.4g} measured, at least"
          f" {max(measured.sensitivity_at_least, 0.0):.4g}; at most 1 is"
          " allowed",
        ),
      ]
    return facts
