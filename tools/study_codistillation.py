"""Codistillation: updates to a target, churn of retrains, and halves under DP.

  OPENBLAS_NUM_THREADS=1 python tools/study_codistillation.py
      [--only PART ...] [--corpus generated] [--seeds 3] [--first_seed 0]
      [--share 1.0] [--json FILE]

Parts (on one slow core, in minutes: 5, 7 and 4):
  updates  without privacy: updates to a target loss, and the best loss, of one
           model, of one at twice its batch (on one seed, at four times), and of
           two codistilled ones at its batch: on halves of the records, and on
           the same records, the paper's control (arXiv 1804.03235)
  churn    without privacy: how much of what is served changes when all is
           trained again from another seed (arXiv 1804.03235, 2102.03349)
  private  at epsilon 8: one private model of all records, or two of a half
           each, codistilled or not, and their ensemble

Codistillation can only bring what a mean of two models would. So `updates` and
`churn` have a setting that was made for it (`--corpus generated`): 400 records
of 16 tokens, most of them a function of the one before, the rest noise that a
model of 1 layer of width 64 memorises; the mean of two is 0.07 nats better.
Python's documentation (`--corpus docs`; 1 layer of width 32, records of 32
tokens, vocabulary 512, as demo.gin's, and part `private` always) showed little
at three seeds: there the mean of two is only 0.016 nats better, codistilled
halves took 227 updates to a loss of 4.75 against 230 (gap -3 +- 16), and churn
fell in |dp| of the label by 0.0016 +- 0.0010, but in first guesses by
0.039 +- 0.078. Nor did the generated corpus show fewer updates; less churn it
did not at seeds 0 to 2, but at 3 to 5 (--first_seed 3, run after the others).
Halves that teach each other reached the loss of one model of all records
there, 0.16 nats below halves alone.

This is no BERT of use. Rates, targets, burn-in and weights were chosen from a
handful of runs on seeds 100 (generated) and 1000 (docs), target and burn-in of
`updates` before any run that counts; those of churn on docs were not tuned.
Churn's trainings of seed 0 begin with seed 100: not a fresh one there. Rates
are the same for all arms. Intervals are 95 %, t-distribution over seeds: the
corpus and the halves are fixed, so they say nothing of other corpora. Held-out
records choose the "better one" and a run's best loss too. Noise is of fixed
seeds: no privacy is claimed.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from typing import Any

import codistillation_corpora as corpora
import codistillation_runs as runs
import jax
import numpy as np
from scipy import stats

from dptrain.models import distillation
from dptrain.training import host_memory

Distillation = distillation.Distillation


@dataclasses.dataclass(frozen=True)
class Updates:
  """Of part `updates`; `whole`: train on after the target, tell the best."""

  batch: int
  rate: float
  target: float
  most: int
  teaching: Distillation
  whole: bool


@dataclasses.dataclass(frozen=True)
class Churn:
  """Of part `churn`."""

  batch: int
  rate: float
  updates: int
  teaching: Distillation
  alike: Distillation


# See the module's text.
EXCHANGE, ENTROPY = 10, 0.1
_alike = Distillation(loss="symmetric_kl", burn_in=100, ramp=100)
UPDATES = {
  "generated": Updates(128, 3e-3, 1.26, 600, Distillation(burn_in=300), True),
  "docs": Updates(
    *(1024, 2e-3, 4.75, 400),
    Distillation(weight=0.5, burn_in=150, ramp=50),
    whole=False,
  ),
}
CHURN = {
  "generated": Churn(
    *(128, 3e-3, 500),
    Distillation(burn_in=250),
    dataclasses.replace(_alike, burn_in=250, ramp=0),
  ),
  "docs": Churn(*(128, 2e-3, 400), Distillation(burn_in=150, ramp=50), _alike),
}
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
  finite = np.isfinite(values)
  if not finite.all():
    return f"never in {np.sum(~finite)} of {len(values)}"
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
        gaps = np.subtract(values, first[kind])
        if np.isfinite(gaps).all():
          text += f" (gap {told(list(gaps), digits)})"
      cells.append(text)
    print(f"  {name:28} {', '.join(cells)}", flush=True)


def _first(figures: dict[str, list[float]]) -> dict[str, list[float]]:
  return {kind: values[:1] for kind, values in figures.items()}


def note(found: Figures, arm: str, **figures: float) -> None:
  """Adds a seed's figures of an arm."""
  for kind, value in figures.items():
    found.setdefault(arm, {}).setdefault(kind, []).append(value)


def study_updates(
  texts: corpora.Data, seeds: range, share: float, corpus: str
) -> Figures:
  """Updates to a target loss: see the module."""
  setting = UPDATES[corpus]
  most, target = round(share * setting.most), setting.target
  found: Figures = {}

  def measure(name: str, arm: runs.Arm, seed: int) -> None:
    stop = 0.0 if setting.whole else target
    curve = runs.train(arm, texts, seed, most, stop).curves[0]
    best = {"best": min(curve)} if setting.whole else {}
    note(found, name, updates=reached(curve, target), **best)

  print(f"updates to a held-out loss of {target}, {len(seeds)} seeds")
  single = runs.Arm(texts.size, setting.batch, setting.rate)
  for factor in (1, 2, 4):
    arm = dataclasses.replace(single, batch=factor * setting.batch)
    name = f"one model, batch {arm.batch}"
    for seed in seeds[:1] if factor > 2 else seeds:
      measure(name, arm, seed)
    show({f"{name}, seed {seeds[0]}": _first(found[name])}, 3)
  growth = {"of one seed": found.pop(name)}
  pair = dataclasses.replace(
    single, models=2, exchange=EXCHANGE, teaching=setting.teaching
  )
  halves = dataclasses.replace(pair, halves=True)
  for name, arm in (
    ("two, halves, codistilled", halves),
    ("two, same data, codistilled", pair),
    ("two, halves, alone", dataclasses.replace(halves, teaching=None)),
  ):
    for seed in seeds:
      measure(name, arm, seed)
  show(found, 3)
  return found | growth


def study_churn(
  texts: corpora.Data, seeds: range, share: float, corpus: str
) -> Figures:
  """What changes when all is trained again: see the module."""
  setting = CHURN[corpus]
  updates = round(share * setting.updates)
  single = runs.Arm(texts.size, setting.batch, setting.rate, updates=updates)
  pair = dataclasses.replace(
    single, models=2, exchange=EXCHANGE, teaching=setting.teaching
  )
  alike = dataclasses.replace(
    pair,
    exchange=1,
    same_batches=True,
    teaching=setting.alike,
    entropy=ENTROPY,
  )
  found: Figures = {}

  def compare(name: str, one: jax.Array, other: jax.Array) -> None:
    scores = [runs.score(each, texts.held_out) for each in (one, other)]
    loss, accuracy = np.mean(scores, axis=0)
    differ = runs.churn(one, other, texts.held_out)
    note(found, name, **differ, loss=loss, accuracy=accuracy)

  def served(arm: runs.Arm, seed: int) -> jax.Array:
    run = runs.train(arm, texts, seed, updates)
    return runs.predict(run.models[0], texts)

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


def study_private(
  texts: corpora.Data, seeds: range, share: float, corpus: str
) -> Figures:
  """At one epsilon, of the documentation: see the module."""
  updates = round(share * PRIVATE_UPDATES)
  single = runs.Arm(texts.size, PRIVATE_BATCH, PRIVATE_RATE, updates=updates)
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
      probs = [runs.predict(each, texts) for each in run.models]
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
  parser.add_argument("--corpus", choices=tuple(UPDATES), default="generated")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument(
    "--first_seed", type=int, default=0, help="100 or 1000 to tune"
  )
  parser.add_argument("--share", type=float, default=1.0, help="of the updates")
  parser.add_argument("--json", metavar="FILE", help="also write data here")
  arguments = parser.parse_args()
  host_memory.keep_freed_memory()
  figures: dict[str, Any] = {}
  seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
  for part in arguments.only:
    begin = time.perf_counter()
    corpus = "docs" if part == "private" else arguments.corpus
    texts = getattr(corpora, corpus)()
    figures[part] = STUDIES[part](texts, seeds, arguments.share, corpus)
    print(f"  ({time.perf_counter() - begin:.0f} s)", flush=True)
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
  main()
