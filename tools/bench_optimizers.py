"""Optimizers side by side: to a target loss, in memory, and in seconds.

  OPENBLAS_NUM_THREADS=1 python tools/bench_optimizers.py [--only PART ...]
      [--seeds 3] [--updates 300] [--rates] [--json FILE]

Parts:
  convex   an ill-conditioned quadratic in one matrix (condition 1e6)
  bert     a small BERT on Python's documentation, without privacy
  noisy    the same, clipped and with noise, also with noise-aware moments
  memory   the state of each optimizer for BERT-Base
  roots    what roots cost, against a BERT-Base update of 1,024 records

All optimizers run in one process, update after update in turn, on the same
batches; the target is what AdamW reaches at three quarters of its updates. The
learning rates are those of `RATES`, found by `--rates` on a seed of its own.
"""

import argparse
from collections.abc import Callable, Iterator
import json
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizer_problems

from dptrain.clipping import rules
from dptrain.data import masking
from dptrain.models import bert
from dptrain.models import masked_lm
from dptrain.optimizers import adamw
from dptrain.optimizers import lamb
from dptrain.optimizers import preconditioner_refresh
from dptrain.optimizers import sgd
from dptrain.optimizers import shampoo
from dptrain.optimizers import shampoo_settings
from dptrain.optimizers import sm3
from dptrain.optimizers import soap
from dptrain.optimizers import soap_settings
from dptrain.training import host_memory
from dptrain.training import objective as objective_lib
from dptrain.training import step as step_lib

PARTS = ("convex", "bert", "noisy", "memory", "roots")
TUNING_SEED = 1000
INTERVAL = 10


class Entrant(NamedTuple):
  """An optimizer that takes part.

  Attributes:
    build: learning rate -> transformation.
    rates: learning rates that `--rates` tries, by part.
  """

  build: Callable[[Any], optax.GradientTransformation]
  rates: dict[str, tuple[float, ...]]


def _shampoo(rate: Any, **settings: Any) -> optax.GradientTransformation:
  refresh = preconditioner_refresh.RefreshSettings(interval=INTERVAL)
  chosen = shampoo_settings.ShampooSettings(
    beta2=B2, refresh=refresh, **settings
  )
  return shampoo.shampoo(rate, chosen, weight_decay=0.0)


# Of all averages of squares: 0.999 would take longer than the race.
B2 = 0.99
_ADAM = (1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
ENTRANTS = {
  "SGD": Entrant(
    lambda rate: sgd.sgd(rate, momentum=0.9),
    {
      "convex": (0.3, 1.0, 1.9),
      "bert": (0.1, 0.3, 1.0),
      "noisy": (0.1, 0.3, 1.0),
    },
  ),
  "AdamW": Entrant(
    lambda rate: adamw.adamw(rate, b2=B2, weight_decay=0.0),
    {"convex": (1e-1, 3e-1, 1.0, 3.0), "bert": _ADAM, "noisy": _ADAM},
  ),
  "LAMB": Entrant(
    lambda rate: lamb.lamb(rate, b2=B2, weight_decay=0.0),
    {
      "convex": (3e-3, 1e-2, 3e-2),
      "bert": (3e-4, 1e-3, 3e-3, 1e-2),
      "noisy": (1e-3, 3e-3, 1e-2),
    },
  ),
  "SM3": Entrant(
    lambda rate: sm3.sm3(rate, weight_decay=0.0),
    {
      "convex": (1.0, 3.0, 10.0),
      "bert": (0.01, 0.03, 0.1),
      "noisy": (0.01, 0.03, 0.1),
    },
  ),
  "Shampoo": Entrant(
    _shampoo, {"convex": (1e-1, 3e-1, 1.0, 3.0), "bert": _ADAM, "noisy": _ADAM}
  ),
  "SOAP": Entrant(
    lambda rate: soap.soap(
      rate, soap_settings.SoapSettings(b2=B2), weight_decay=0.0
    ),
    {"convex": (1e-1, 3e-1, 1.0, 3.0), "bert": _ADAM, "noisy": _ADAM},
  ),
}
AWARE = {
  "AdamW, corrected": (
    "AdamW",
    lambda rate: adamw.adamw(rate, b2=B2, weight_decay=0.0, correct_noise=True),
  ),
  "SM3, corrected": (
    "SM3",
    lambda rate: sm3.sm3(rate, weight_decay=0.0, correct_noise=True),
  ),
  "Shampoo, corrected": (
    "Shampoo",
    lambda rate: _shampoo(rate, subtract_noise=True),
  ),
}
# What `--rates` found.
RATES: dict[str, dict[str, float]] = {
  "convex": {
    "SGD": 1.9,
    "AdamW": 0.3,
    "LAMB": 0.01,
    "SM3": 3.0,
    "Shampoo": 1.0,
    "SOAP": 0.3,
  },
  "bert": {
    "SGD": 0.1,
    "AdamW": 5e-4,
    "LAMB": 3e-3,
    "SM3": 0.03,
    "Shampoo": 1e-3,
    "SOAP": 2e-3,
  },
  "noisy": {
    "SGD": 0.3,
    "AdamW": 2e-3,
    "LAMB": 3e-3,
    "SM3": 0.1,
    "Shampoo": 2e-3,
    "SOAP": 2e-3,
  },
}


class Curve(NamedTuple):
  """Losses of one run at every `every`-th update, and seconds an update."""

  losses: list[float]
  seconds: float


def runs(
  problem: optimizer_problems.Problem,
  optimizers: dict[str, optax.GradientTransformation],
  seed: int,
  updates: int,
  every: int,
) -> dict[str, Curve]:
  """Trains all in turn, so that what else the machine does hits all alike."""
  made = {name: problem.update(each) for name, each in optimizers.items()}
  params = {name: problem.params(seed) for name in made}
  states = {name: optimizers[name].init(params[name]) for name in made}
  losses: dict[str, list[float]] = {name: [] for name in made}
  times: dict[str, list[float]] = {name: [] for name in made}
  for number in range(updates):
    for name, update in made.items():
      begin = time.perf_counter()
      params[name], states[name] = jax.block_until_ready(
        update(params[name], states[name], number, seed)
      )
      times[name].append(time.perf_counter() - begin)
      if (number + 1) % every == 0:
        losses[name].append(float(problem.loss(params[name], seed)))
  # The mean: an update with roots is dearer. The first ones compile.
  return {
    name: Curve(losses[name], statistics.fmean(times[name][INTERVAL + 1 :]))
    for name in made
  }


def warmed(rate: float) -> optax.Schedule:
  """Linear warm-up over 10 updates, then constant."""
  return optax.linear_schedule(rate / 10, rate, 10)


def reached(curve: Curve, target: float, every: int) -> float:
  """Updates until the loss is at most `target`; infinity if it never is."""
  for place, value in enumerate(curve.losses):
    if value <= target:
      return float((place + 1) * every)
  return float("inf")


def find_rates(
  part: str, problem: optimizer_problems.Problem, updates: int
) -> dict[str, float]:
  """The best rate of each optimizer's, on a seed that is not used again."""
  best = {}
  for name, entrant in ENTRANTS.items():
    tried = {
      f"{rate:g}": entrant.build(warmed(rate)) for rate in entrant.rates[part]
    }
    ended = runs(problem, tried, TUNING_SEED, updates, updates)
    final = {
      rate: curve.losses[-1] if np.isfinite(curve.losses[-1]) else np.inf
      for rate, curve in ended.items()
    }
    best[name] = float(min(final, key=lambda rate: final[rate]))
    told = ", ".join(f"{rate}: {value:.4g}" for rate, value in final.items())
    print(f"{part} {name}: {told}", flush=True)
  return best


def compare(
  part: str,
  problem: optimizer_problems.Problem,
  seeds: int,
  updates: int,
  every: int,
) -> dict[str, Any]:
  """Prints and returns updates and seconds to the target, by optimizer."""
  optimizers = {
    name: entrant.build(warmed(RATES[part][name]))
    for name, entrant in ENTRANTS.items()
  }
  if part == "noisy":
    for name, (base, build) in AWARE.items():
      optimizers[name] = build(warmed(RATES[part][base]))
  by_seed = [
    runs(problem, optimizers, seed, updates, every) for seed in range(seeds)
  ]
  figures: dict[str, Any] = {}
  print(f"{part}: {updates} updates, {seeds} seeds; median (lowest to highest)")
  print(
    "                     updates to target   x AdamW   s/update   last loss"
  )
  targets = [r["AdamW"].losses[3 * updates // (4 * every) - 1] for r in by_seed]
  adamw_needs = [
    reached(r["AdamW"], t, every) for r, t in zip(by_seed, targets, strict=True)
  ]
  for name in optimizers:
    curves = [r[name] for r in by_seed]
    needs = [reached(c, t, every) for c, t in zip(curves, targets, strict=True)]
    shares = [n / a for n, a in zip(needs, adamw_needs, strict=True)]
    told = {
      "updates": needs,
      "ratio": statistics.median(shares),
      "seconds": statistics.median(c.seconds for c in curves),
      "last": [c.losses[-1] for c in curves],
      "rate": RATES[part].get(name),
    }
    figures[name] = told
    print(
      f"  {name:18} {statistics.median(needs):6.0f} ({min(needs):.0f} to"
      f" {max(needs):.0f})   {told['ratio']:6.2f}   {told['seconds']:8.4f}  "
      f" {statistics.median(told['last']):.4g} ({min(told['last']):.4g} to"
      f" {max(told['last']):.4g})",
      flush=True,
    )
  return figures


def _base() -> masked_lm.MaskedLanguageModel:
  return masked_lm.MaskedLanguageModel(
    bert.Bert(
      vocab_size=30522,
      num_layers=12,
      width=768,
      num_heads=12,
      max_length=512,
    )
  )


def measure_memory() -> dict[str, float]:
  """Prints bytes of state for each parameter of BERT-Base."""
  params = jax.eval_shape(_base().init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(params))
  figures = {}
  print(
    f"memory: BERT-Base, {count:,} parameters of 4 bytes; state, in bytes each"
  )
  for name, entrant in ENTRANTS.items():
    state = jax.eval_shape(entrant.build(1e-3).init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    figures[name] = size / count
    print(f"  {name:10} {size / count:6.2f}")
  return figures


def measure_roots(interval: int, records: int) -> dict[str, float]:
  """Prints the share of Shampoo's work in a BERT-Base update."""
  model = _base()
  objective = objective_lib.Objective(model, masking.MaskingSettings())
  params = jax.jit(model.init)(jax.random.key(0))
  draw = np.random.default_rng(0)
  batch = {
    "tokens": jnp.asarray(draw.integers(5, 30522, (records, 128)), jnp.int32),
    "example_ids": jnp.arange(records),
    "is_padding": jnp.zeros(records, bool),
  }
  step = step_lib.PrivateStep(
    objective.losses, rules.ClippingRule("normalized", 1.0), optax.sgd(1.0)
  )
  zeros = jax.jit(lambda: step.zeros(params, batch))()
  key = jax.random.key(0, impl="threefry2x32")
  accumulate = jax.jit(step.accumulate)
  per_record = _seconds(accumulate, params, zeros, batch, key) / records
  gradient = jax.tree.map(lambda x: 1e-3 * jnp.ones_like(x), params)
  seconds = {}
  for name, built in (
    ("AdamW", adamw.adamw(1e-3, weight_decay=0.0)),
    ("every update", _shampoo(1e-3)),
  ):
    state = jax.jit(built.init)(params)
    update = jax.jit(built.update)
    times = _each(update, gradient, state, params, interval=INTERVAL)
    seconds[name] = min(times)
    seconds[f"{name}, dearest"] = max(times)
  extra = seconds["every update"] - seconds["AdamW"]
  roots = seconds["every update, dearest"] - seconds["every update"]
  whole = 1024 * per_record
  figures = {
    "update_of_1024": whole,
    "statistics": extra,
    "roots": roots,
    "share": (extra + roots / interval) / whole,
  }
  print(
    f"roots: a BERT-Base update of 1,024 records of 128 tokens takes"
    f" {whole:.0f} s here (from {records} records); Shampoo's factors"
    f" {extra:.2f} s an update, its roots {roots:.2f} s: at interval"
    f" {interval} {100 * figures['share']:.2f} % more"
  )
  return figures


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
  jax.block_until_ready(function(*arguments))
  begin = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  return time.perf_counter() - begin


def _each(
  update: Callable[..., Any],
  gradient: Any,
  state: Any,
  params: Any,
  interval: int,
) -> Iterator[float]:
  """Seconds of successive updates, of which one has roots; compiled before."""
  _, state = jax.block_until_ready(update(gradient, state, params))
  times = []
  for _ in range(interval):
    begin = time.perf_counter()
    _, state = jax.block_until_ready(update(gradient, state, params))
    times.append(time.perf_counter() - begin)
  return times


def main() -> None:
  """Runs the parts that are asked for, and prints them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--updates", type=int, default=300)
  parser.add_argument("--layers", type=int, default=2)
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--interval", type=int, default=50, help="of the roots")
  parser.add_argument("--records", type=int, default=8, help="timed for roots")
  parser.add_argument("--rates", action="store_true", help="only find rates")
  parser.add_argument("--json", metavar="FILE", help="also write data here")
  arguments = parser.parse_args()
  host_memory.keep_freed_memory()
  figures: dict[str, Any] = {}
  for part in arguments.only:
    if part == "memory":
      figures[part] = measure_memory()
      continue
    if part == "roots":
      figures[part] = measure_roots(arguments.interval, arguments.records)
      continue
    problem = (
      optimizer_problems.convex()
      if part == "convex"
      else optimizer_problems.language_model(
        part == "noisy", arguments.layers, arguments.width
      )
    )
    if arguments.rates:
      figures[part] = find_rates(part, problem, arguments.updates)
      print(part, figures[part], flush=True)
      continue
    figures[part] = compare(
      part, problem, arguments.seeds, arguments.updates, every=5
    )
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
  main()
