"""Bounds that hold as often as they say, and what a verdict tells."""

import dataclasses
import json
import math

from jax_privacy import auditing
import numpy as np
import pytest
from scipy import stats

from dptrain.auditing import verdict

DELTA = 1e-5


def guess(scores, included, made=100, significance=0.025, delta=DELTA):
  return verdict.guess(scores, included, made, significance, delta)


def gaussian_scores(seed, mu, count=1000):
  """Log ratios of a mechanism that is mu-GDP, at its worst."""
  draw = np.random.default_rng(seed)
  included = draw.integers(0, 2, count).astype(bool)
  x = mu * included + draw.normal(size=count)
  return mu * x - mu**2 / 2, included


@pytest.mark.parametrize("right", [0, 50, 80, 100])
def test_bounds_are_those_of_jax_privacy_for_the_counts(right):
  # 100 sure guesses of which `right` are right; 900 that are passed over.
  included = np.tile([True, False], 500)
  scores = np.where(included, 1e-3, -1e-3)
  scores[:100] *= 1000.0
  scores[: 100 - right] *= -1
  found = guess(scores, included)
  assert (found.canaries, found.made, found.correct) == (1000, 100, right)
  wanted = [
    f(0, 1000, 100, right, 0.025, DELTA)
    for f in (auditing._epsilon_one_run, auditing._epsilon_one_run_fdp)
  ]
  ours = [found.epsilon_one_run, found.epsilon_one_run_fdp]
  # If all are right, the auditor is given a canary more.
  np.testing.assert_allclose(ours, wanted, rtol=3e-4, atol=1e-4)
  assert (min(ours) > 0) is (right >= 80)


def test_a_sure_guess_of_out_counts_as_one_of_in():
  scores, included = gaussian_scores(0, 1.0)
  one, other = guess(scores, included), guess(-scores, ~included)
  assert one == other


@pytest.mark.parametrize("always", [True, False])
def test_all_right_and_all_wrong(always):
  included = np.tile([True, False], 100)
  scores = np.where(included == always, 1.0, -1.0) * np.arange(1, 201)
  found = guess(scores, included, made=20)
  assert found.made == 20
  assert found.correct == (20 if always else 0)
  assert (found.epsilon_one_run > 1) is always


def test_scores_that_say_nothing_give_no_bound():
  found = guess(np.zeros(1000), np.tile([True, False], 500))
  assert found.made == 1000
  assert found.epsilon_one_run == found.epsilon_one_run_fdp == 0


def test_the_bound_for_pure_dp_is_wrong_as_seldom_as_it_says():
  # Randomised response is (1, 0)-DP, and no mechanism is easier to guess.
  draw = np.random.default_rng(1)
  wrong = 0
  for _ in range(100):
    included = draw.integers(0, 2, 200).astype(bool)
    told = included ^ (draw.random(200) > 1 / (1 + math.exp(-1.0)))
    scores = np.where(told, 1.0, -1.0) * (1 + draw.random(200))
    found = guess(scores, included, made=100, significance=0.1, delta=1e-9)
    wrong += found.epsilon_one_run > 1.0
  assert 0 < wrong < stats.binom.ppf(0.9999, 100, 0.1)


def test_the_bound_for_gaussians_is_below_the_truth_and_not_far():
  mu, claim = 1.0, 4.378  # that of 4 updates at noise multiplier 2
  bounds = [
    guess(*gaussian_scores(seed, mu)).epsilon_one_run_fdp for seed in range(12)
  ]
  assert max(bounds) < claim
  assert np.median(bounds) > claim / 3


# --- what is measured ---------------------------------------------------------


def readings(noise, sensitivity, probs, count=1000, seed=0):
  draw = np.random.default_rng(seed)
  included = draw.integers(0, 2, count).astype(bool)
  sampled = draw.random((len(probs), count)) < np.asarray(probs)[:, None]
  x = sensitivity * (included & sampled) + noise * draw.normal(
    size=(len(probs), count)
  )
  return x.sum(0), (x**2).sum(0), included


PROBS = [0.2, 0.2, 0.5, 1.0]


def test_what_is_true_is_within_what_is_measured():
  for seed in range(20):
    found = verdict.measure(*readings(1.5, 1.0, PROBS, seed=seed), PROBS, 1.5)
    assert found.noise_multiplier_at_most > 1.5
    assert found.sensitivity_at_least < 1.0
    assert found.noise_multiplier == pytest.approx(1.5, rel=0.1)
    assert found.sensitivity == pytest.approx(1.0, rel=0.3)


@pytest.mark.parametrize(
  ("noise", "sensitivity"), [(1.5 / 2**0.5, 1.0), (1.5, 2.0), (0.0, 1.0)]
)
def test_less_noise_and_more_sensitivity_are_seen(noise, sensitivity):
  made = readings(noise, sensitivity, PROBS)
  found = verdict.measure(*made, PROBS, 1.5)
  assert (found.noise_multiplier_at_most < 1.5) is (noise < 1.5)
  assert (found.sensitivity_at_least > 1.0) is (sensitivity > 1.0)


# --- the verdict --------------------------------------------------------------


def make_verdict(**changes):
  fields = {
    "mode": "white_box",
    "claim": True,
    "epsilon": 4.0,
    "delta": DELTA,
    "gaussian_epsilon": 4.5,
    "confidence": 0.95,
    "updates": 10,
    "noise_multiplier": 2.0,
    "guesses": verdict.Guesses(
      canaries=1000,
      made=100,
      correct=90,
      epsilon_one_run=1.5,
      epsilon_one_run_fdp=2.5,
    ),
    "measured": verdict.Measured(
      noise_multiplier=2.0,
      noise_multiplier_at_most=2.1,
      sensitivity=1.0,
      sensitivity_at_least=0.8,
    ),
  }
  return verdict.Verdict(**fields | changes)


def changed(part, **changes):
  return {part: dataclasses.replace(getattr(make_verdict(), part), **changes)}


def test_a_verdict_that_passes_says_that_it_proves_nothing():
  made = make_verdict()
  assert made.passed
  assert made.lower_bound == 2.5
  text = made.as_text()
  assert "proves nothing" in " ".join(text.split())
  assert "90 of 100 right" in text
  assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    (changed("guesses", epsilon_one_run=4.01), "for (epsilon, delta)-DP, 4.01"),
    (changed("guesses", epsilon_one_run_fdp=4.6), "for f-DP, 4.6, exceeds"),
    (changed("measured", noise_multiplier_at_most=1.9), "is at most 1.9"),
    (changed("measured", sensitivity_at_least=1.1), "at least 1.1 times"),
  ],
)
def test_each_finding_refutes(changes, told):
  made = make_verdict(**changes)
  assert not made.passed
  assert len(made.refutations) == 1
  assert told in made.statement()
  assert "THE CLAIM IS REFUTED" in made.as_text()


def test_the_gaussian_form_is_held_against_the_gaussian_that_covers():
  assert make_verdict(**changed("guesses", epsilon_one_run_fdp=4.2)).passed


def test_as_json():
  told = json.loads(make_verdict(epsilon=math.inf, measured=None).as_json())
  assert told["epsilon"] == "inf"
  assert told["passed"] is True
  assert told["measured"] is None
  assert told["lower_bound"] == 2.5
  assert told["guesses"]["correct"] == 90


def test_a_fixed_seed_is_told():
  assert "NO PRIVACY CLAIM" in make_verdict(claim=False).as_text()
