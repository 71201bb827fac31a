"""Codistillation: updates to a target, churn of retrains, and halves under DP.

  OPENBLAS_NUM_THREADS=1 python tools/study_codistillation.py
      [--only PART ...] [--seeds 3] [--first_seed 0] [--share 1.0] [--json FILE]

Parts (25 minutes on one slow core: 16, 5 and 4):
  updates  without privacy: updates to a target loss of two codistilled models
           and of one model at their batch and at twice that (arXiv 1804.03235);
           first, on one seed, how far growing the batch still helps
  churn    without privacy: how much of what is served changes when all is
           trained again from another seed (arXiv 1804.03235, 2102.03349)
  private  at epsilon 8: one private model of all records, or two of a half
           each, codistilled or not, and their ensemble

This is no BERT of use: 1 layer of width 32, records of 32 tokens of Python's
documentation, vocabulary 512, as demo.gin's. Rates, the target loss and the
settings of `TAUGHT` and `PRIVATE_TAUGHT` were chosen on seed 1000, which is not
used again, from a handful of runs; those of churn were not tuned. Rates are the
same for all arms. Intervals are 95 %, t-distribution over seeds. Held-out
records choose the "better one" too. Noise is of fixed seeds: no privacy is
claimed.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from typing import Any

import codistillation_runs as runs
import jax
import numpy as np
from scipy import stats

from dptrain.models import distillation
from dptrain.training import host_memory

Distillation = distillation.Distillation

# See the module's text.
BATCH, TARGET, MOST_UPDATES, EXCHANGE = 1024, 4.75, 400, 10
RATES = {1: 2e-3, 2: 2e-3, 4: 2e-3}  # by multiples of BATCH
TAUGHT = Distillation(weight=0.5, burn_in=150, ramp=50)
CHURN_BATCH, CHURN_UPDATES, CHURN_RATE = 128, 400, 2e-3
CHURN_TAUGHT = Distillation(burn_in=150, ramp=50)
ALIKE = Distillation(loss="symmetric_kl", burn_in=100, ramp=100)
ENTROPY = 0.1
PRIVATE_BATCH, PRIVATE_UPDATES, PRIVATE_RATE = 512, 200, 1e-2
PRIVATE_TAUGHT = Distillation(burn_in=100, ramp=50)


def reached(curve: list[float], target: float) -> float:
  """Updates until the loss is `target`, between measurements by a line."""
  before = float("inf")
  for place, value in enumerate(curve):
    if value <= target:
      share = (before - target) / (before - value) if place else 1.0
      return runs.EVERY * (place + share)
    before = value
  return float("inf")


def told(values: list[float], digits: int) -> str:
  """Mean, and half of its 95 % interval over seeds."""
  half = 0.0
  if len(values) > 1:
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
  return f"{np.mean(values):.{digits}f} +- {half:.{digits}f}"


Figures = dict[str, dict[str, list[float]]]


def show(found: Figures, digits: int) -> None:
  """Prints each arm's figures, and their gaps to the first arm, by seed."""
  first = next(iter(found.values()))
  for name, figures in found.items():
    cells = []
    for kind, values in figures.items():
      text = f"{kind} {told(values, digits)}"
      if figures is not first and kind in first:
        gaps = [a - b for a, b in zip(values, first[kind], strict=True)]
        text += f" (gap {told(gaps, digits)})"
      cells.append(text)
    print(f"  {name:28} {', '.join(cells)}", flush=True)


def note(found: Figures, arm: str, **figures: float) -> None:
  """Adds a seed's figures of an arm."""
  for kind, value in figures.items():
    found.setdefault(arm, {}).setdefault(kind, []).append(value)


def study_updates(texts: runs.Data, seeds: range, share: float) -> Figures:
  """Updates to `TARGET`: see the module."""
  most = round(share * MOST_UPDATES)

  def needed(arm: runs.Arm, seed: int) -> float:
    run = runs.train(arm, texts, seed, most, TARGET)
    return reached(run.curves[0], TARGET)

  single = runs.Arm(BATCH, RATES[1])
  print(f"updates to a held-out loss of {TARGET}, {len(seeds)} seeds")
  found: Figures = {}
  for factor, rate in RATES.items():
    arm = runs.Arm(factor * BATCH, rate)
    few = seeds[:1] if factor > 2 else seeds
    for seed in few:
      note(found, f"one model, batch {arm.batch}", updates=needed(arm, seed))
  growth = {name: figures["updates"][0] for name, figures in found.items()}
  for name, value in growth.items():
    print(f"  {name}, seed {seeds[0]}: {value:.0f}", flush=True)
  found.pop(f"one model, batch {4 * BATCH}")
  pair = dataclasses.replace(single, models=2, exchange=EXCHANGE)
  halves = dataclasses.replace(pair, halves=True)
  for name, arm in (
    ("two, halves, codistilled", dataclasses.replace(halves, teaching=TAUGHT)),
    (
      "two, same data, codistilled",
      dataclasses.replace(pair, teaching=TAUGHT),
    ),
  ):
    for seed in seeds:
      note(found, name, updates=needed(arm, seed))
  show(found, 0)
  return found | {"growth": {k: [v] for k, v in growth.items()}}


def study_churn(texts: runs.Data, seeds: range, share: float) -> Figures:
  """What changes when all is trained again: see the module."""
  updates = round(share * CHURN_UPDATES)
  single = runs.Arm(CHURN_BATCH, CHURN_RATE, updates=updates)
  pair = dataclasses.replace(
    single, models=2, exchange=EXCHANGE, teaching=CHURN_TAUGHT
  )
  alike = dataclasses.replace(
    pair, exchange=1, same_batches=True, teaching=ALIKE, entropy=ENTROPY
  )
  found: Figures = {}

  def compare(name: str, one: jax.Array, other: jax.Array) -> None:
    scores = [runs.score(each, texts.held_out) for each in (one, other)]
    loss, accuracy = np.mean(scores, axis=0)
    differ = runs.churn(one, other, texts.held_out)
    note(found, name, **differ, loss=loss, accuracy=accuracy)

  def served(arm: runs.Arm, seed: int) -> jax.Array:
    run = runs.train(arm, texts, seed, updates)
    return runs.predict(run.models[0], texts.held_out)

  for seed in seeds:
    # Trainings that share nothing but the records.
    fresh = [100 * (seed + 1) + number for number in range(4)]
    singles = [served(single, each) for each in fresh]
    compare("one model", *singles[:2])
    pairs = singles[0] + singles[2], singles[1] + singles[3]
    compare("mean of two models", pairs[0] / 2, pairs[1] / 2)
    confident = dataclasses.replace(single, entropy=ENTROPY)
    for name, arm in (
      ("minimum entropy", confident),
      ("one of two codistilled", pair),
      ("symmetric, minimum entropy", alike),
    ):
      compare(name, served(arm, fresh[0]), served(arm, fresh[1]))
  print(f"churn of a retrain after {updates} updates, {len(seeds)} seeds")
  show(found, 4)
  return found


def study_private(texts: runs.Data, seeds: range, share: float) -> Figures:
  """At one epsilon: see the module."""
  updates = round(share * PRIVATE_UPDATES)
  single = runs.Arm(PRIVATE_BATCH, PRIVATE_RATE, updates=updates)
  halves = dataclasses.replace(
    single, batch=PRIVATE_BATCH // 2, models=2, halves=True, exchange=EXCHANGE
  )
  taught = dataclasses.replace(halves, teaching=PRIVATE_TAUGHT)
  found: Figures = {}

  def measure(name: str, *probs: jax.Array) -> None:
    scores = [runs.score(each, texts.held_out) for each in probs]
    loss, accuracy = np.mean(scores, axis=0)
    note(found, name, loss=loss, accuracy=accuracy)

  for seed in seeds:
    for name, arm in (
      ("one model of all", single),
      ("halves, alone", halves),
      ("halves, codistilled", taught),
    ):
      run = runs.train_privately(arm, texts, seed)
      probs = [runs.predict(each, texts.held_out) for each in run.models]
      measure(name, *probs)
      print(f"  seed {seed}: {name} took {run.seconds:.0f} s", flush=True)
      if arm.models > 1:
        best = min(probs, key=lambda each: runs.score(each, texts.held_out))
        measure(f"{name}, better one", best)
        measure(f"{name}, mean of both", sum(probs) / len(probs))
  noise = runs.private_plan(PRIVATE_BATCH, len(texts.train), updates)
  print(
    f"private: epsilon 8, noise {noise.noise_multiplier:.3f}, {updates}"
    f" updates of {PRIVATE_BATCH} records in all, {len(seeds)} seeds"
  )
  show(found, 4)
  return found


STUDIES = {
  "updates": study_updates,
  "churn": study_churn,
  "private": study_private,
}


def main() -> None:
  """Runs the parts that are asked for, and prints them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--only", nargs="*", choices=tuple(STUDIES), default=tuple(STUDIES)
  )
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--first_seed", type=int, default=0, help="1000 to tune")
  parser.add_argument("--share", type=float, default=1.0, help="of the updates")
  parser.add_argument("--json", metavar="FILE", help="also write data here")
  arguments = parser.parse_args()
  host_memory.keep_freed_memory()
  texts = runs.data()
  figures: dict[str, Any] = {}
  seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
  for part in arguments.only:
    begin = time.perf_counter()
    figures[part] = STUDIES[part](texts, seeds, arguments.share)
    print(f"  ({time.perf_counter() - begin:.0f} s)", flush=True)
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
  main()
