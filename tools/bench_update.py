"""Times whole updates of the demo, private against plain, in one run.

  python tools/bench_update.py [--rounds 9] [--json FILE] [MACRO=VALUE ...]

A private update draws a Poisson sample, clips, sums, writes its line to the
ledger (with fsync), adds noise and steps the optimizer. A plain update takes as
many records, sums their gradients in the same physical batches and steps the
same optimizer. Both are run in turn. The records are random tokens: what they
say does not change the time.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
import optax

from dptrain import configuration
from dptrain.clipping import rules
from dptrain.data import batches
from dptrain.data import store as store_lib
from dptrain.privacy import accounting
from dptrain.privacy import keys
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import sampling
from dptrain.training import host_memory
from dptrain.training import objective as objective_lib
from dptrain.training import run as run_lib
from dptrain.training import step as step_lib

RECORDS = 30_000
STEP = 399  # of the demo's schedule: its full batch


def main() -> None:
  """Runs the comparison and prints it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--json", metavar="FILE", help="also write data here")
  parser.add_argument("bindings", nargs="*", metavar="NAME=VALUE")
  arguments = parser.parse_args()
  host_memory.keep_freed_memory()  # as `dptrain train` does
  with tempfile.TemporaryDirectory() as folder:
    run = configuration.training_run(
      ["demo.gin"],
      [f"MODEL_DIR = {folder}", "TASK = 'not read'", *arguments.bindings],
    )
    figures = _measure(run, pathlib.Path(folder), arguments.rounds)
  print(
    f"demo, {figures['records']} records an update, median of"
    f" {arguments.rounds} rounds:\n"
    f"  plain update    {figures['plain']:.3f} s\n"
    f"  private update  {figures['private']:.3f} s,"
    f" {figures['ratio']:.2f} x plain (middle half"
    f" {figures['ratio_low']:.2f} to {figures['ratio_high']:.2f})"
  )
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2))


def _measure(
  run: run_lib.TrainingRun, folder: pathlib.Path, rounds: int
) -> dict[str, float]:
  draw = np.random.default_rng(0)
  size = (RECORDS, run.sequence_length)
  store = store_lib.RecordStore(
    draw.integers(5, run.model.bert.vocab_size, size, np.int32)
  )
  plan = plan_lib.make_plan(run.privacy, RECORDS, calibrated_noise=1.0)
  number = plan.expected_batch_size(STEP)
  objective = objective_lib.Objective(run.model, run.masking)
  params = jax.jit(run.model.init)(jax.random.key(0))
  opt_state = run.optimizer.init(params)
  with ledger_lib.opened(folder) as ledger:
    private = _private_update(run, objective, plan, store, ledger)
    plain = _plain_update(run, objective, store, number)
    seconds: dict[str, list[float]] = {"plain": [], "private": []}
    for turn in range(rounds + 1):
      for name, update in (("plain", plain), ("private", private)):
        start = time.perf_counter()
        jax.block_until_ready(update(params, opt_state, turn))
        if turn:  # the first compiles
          seconds[name].append(time.perf_counter() - start)
  ratios = [
    b / a for a, b in zip(seconds["plain"], seconds["private"], strict=True)
  ]
  low, ratio, high = statistics.quantiles(ratios, n=4)
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  return {
    "records": number,
    **medians,
    "ratio": ratio,
    "ratio_low": low,
    "ratio_high": high,
  }


def _private_update(
  run: run_lib.TrainingRun,
  objective: objective_lib.Objective,
  plan: plan_lib.PrivacyPlan,
  store: store_lib.RecordStore,
  ledger: ledger_lib.Ledger,
) -> Any:
  """What the thin loop does for one update."""
  step = step_lib.PrivateStep(
    objective.losses,
    rules.ClippingRule(plan.clipping, plan.l2_clip_norm),
    run.optimizer,
    clipping_method=run.clipping_method,
  )
  accumulate = jax.jit(step.accumulate, donate_argnums=1)
  finish = jax.jit(step.finish)
  zeros = jax.jit(lambda params: step.zeros(params, {}))
  seed = keys.fixed_seed(0)
  ledger.start(plan, corpus="none", seed="none", fixed_seed=True)
  branch = ledger.open_branch(
    checkpoint_branch="", checkpoint_step=0, lineage="none", environment="none"
  )
  release = accounting.Releases(
    1, plan.sampling_prob(STEP), plan.noise_multiplier
  )

  def update(params: Any, opt_state: Any, turn: int) -> Any:
    indices = sampling.poisson_sample(
      seed.key("sampling", branch.name, turn),
      plan.num_examples,
      release.sampling_prob,
    )
    accumulator = zeros(params)
    examples_key = seed.key("examples", branch.name, turn)
    for batch in batches.physical_batches(
      store, indices, run.physical_batch_size
    ):
      accumulator = accumulate(params, accumulator, batch, examples_key)
    ledger.record(branch.name, turn, release)
    return finish(
      params,
      opt_state,
      accumulator,
      noise_key=seed.key("noise", branch.name, turn),
      noise_multiplier=release.noise_multiplier,
      expected_batch_size=float(plan.expected_batch_size(STEP)),
    )

  return update


def _plain_update(
  run: run_lib.TrainingRun,
  objective: objective_lib.Objective,
  store: store_lib.RecordStore,
  number: int,
) -> Any:
  """The same update without privacy."""

  @jax.jit
  def add(params: Any, total: Any, batch: Any, key: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
      each = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["example_ids"])
      return objective.losses(params, batch, each)[0].sum()

    return jax.tree.map(lambda a, b: a + b, total, jax.grad(loss)(params))

  @jax.jit
  def apply(params: Any, opt_state: Any, total: Any) -> Any:
    mean = jax.tree.map(lambda g: g / number, total)
    updates, opt_state = run.optimizer.update(mean, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  zeros = jax.jit(lambda params: jax.tree.map(lambda p: 0 * p, params))

  def update(params: Any, opt_state: Any, turn: int) -> Any:
    indices = np.random.default_rng(turn).choice(
      store.num_examples, number, replace=False
    )
    total = zeros(params)
    for batch in batches.physical_batches(
      store, np.sort(indices), run.physical_batch_size
    ):
      total = add(params, total, batch, jax.random.key(turn))
    return apply(params, opt_state, total)

  return update


if __name__ == "__main__":
  main()
