"""The thin loop: the whole of private training in one sitting."""

import contextlib
import pathlib
import signal
import time
from typing import Any

import jax

from dptrain.data import batches
from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import report as report_lib
from dptrain.privacy import sampling
from dptrain.training import checkpoints as checkpoints_lib
from dptrain.training import evaluation as evaluation_lib
from dptrain.training import preparation as preparation_lib
from dptrain.training import progress as progress_lib
from dptrain.training import records as records_lib
from dptrain.training import run as run_lib


def train(
  run: run_lib.TrainingRun, records: records_lib.Records | None = None
) -> run_lib.TrainingResult:
  """Trains until the plan ends or the budget is spent; resumes by itself.

  Formal guarantee: see `PrivacyPlan` and `PrivateStep`. Each update goes one
  way: Poisson sample, clip, sum, ledger, noise once, divide by a public
  constant, optimizer.

  Args:
    run: the user's settings.
    records: what to train on instead of the run's task.

  Returns:
    How it ended.

  Raises:
    ValueError: bad input, before anything is spent.
    LedgerError: MODEL_DIR belongs to another plan, or its ledger is damaged.
    CheckpointError: no checkpoint can be read, or the last cannot be written.
    KeyboardInterrupt: interrupted, after saving what was done.
  """
  # The noise must not depend on how arrays are sharded.
  jax.config.update("jax_threefry_partitionable", True)
  directory = pathlib.Path(run.model_dir).expanduser()
  directory.mkdir(parents=True, exist_ok=True)
  with ledger_lib.opened(directory) as ledger, _sigterm_interrupts():
    if not ledger.header and any(directory.glob("checkpoints/[0-9]*")):
      raise ledger_lib.LedgerError(
        f"{directory} has checkpoints but no ledger ({ledger.path.name}): what"
        " was released is unknown. Restore the ledger, or start in a new"
        " MODEL_DIR."
      )
    prepared = preparation_lib.prepare(run, directory, ledger, records)
    loop = _Loop(run, directory, ledger, prepared)
    return loop.run_to_the_end()


class _Loop:
  """State and phases of one call of `train`."""

  def __init__(
    self,
    run: run_lib.TrainingRun,
    directory: pathlib.Path,
    ledger: ledger_lib.Ledger,
    prepared: preparation_lib.Preparation,
  ):
    self.run, self.directory, self.ledger = run, directory, ledger
    self.prepared, self.plan = prepared, prepared.plan
    step = prepared.step
    self.zeros = jax.jit(
      lambda params, opt_state: step.zeros(params, prepared.batch, opt_state)
    )
    self.accumulate = jax.jit(step.accumulate, donate_argnums=1)
    # Parameters are not donated: a checkpoint may still be reading them.
    self.finish = jax.jit(step.finish, donate_argnums=())
    self.epsilon = _EpsilonMeter(self.plan.delta, self.plan.relation)
    self.evaluation: evaluation_lib.Evaluation | None = None

  def run_to_the_end(self) -> run_lib.TrainingResult:
    """Restores, trains, saves; the result."""
    with (
      contextlib.ExitStack() as stack,
      checkpoints_lib.Checkpoints(
        self.directory, self.run.checkpoints, progress_lib.say
      ) as checkpoints,
    ):
      step, state = self._restore(checkpoints)
      limit = self._last_affordable(step)
      progress = progress_lib.Progress(
        self.directory if self.run.tensorboard else None,
        self.plan.num_steps,
        step,
      )
      stack.callback(progress.close)
      if limit < self.plan.num_steps:
        progress_lib.say(
          f"the budget, epsilon {self.plan.target_epsilon:g}, allows {limit} of"
          f" {self.plan.num_steps} updates"
        )
      chosen = self.prepared.clipping
      progress_lib.say(f"clipping: {chosen.method} ({chosen.reason})")
      if step >= limit:
        progress_lib.say(f"all {step} updates are made: nothing left to do")
      try:
        while step < limit:
          # Bound together: an interrupt must not save a state under another
          # update's number.
          step, state, statistics = self._update(step, state)
          self._after_update(step, limit, state, statistics, progress)
          if self._due(step, self.run.checkpoints.period) and step < limit:
            self._save(checkpoints, step, state)
      except KeyboardInterrupt:
        self._save(checkpoints, step, state)
        checkpoints.finish(step)
        progress_lib.say(
          f"interrupted; update {step} is saved, the same command resumes"
        )
        raise
      self._save(checkpoints, step, state)
      checkpoints.finish(step)
      return self._result(step, state)

  def _restore(
    self, checkpoints: checkpoints_lib.Checkpoints
  ) -> tuple[int, Any]:
    """State to go on from, and the branch on which to go on."""
    like = jax.eval_shape(self.prepared.initial_state)
    restored = checkpoints.restore(like)
    if restored is not None:
      self.ledger.check_contains(restored.metadata["ledger"])
      step, state = restored.step, restored.state
    else:
      step, state = 0, self.prepared.initial_state()
    self.branch = self.ledger.open_branch(
      checkpoint_branch=restored.metadata["branch"] if restored else "",
      checkpoint_step=restored.step if restored else 0,
      lineage=self.prepared.lineage,
      environment=self.prepared.environment,
      state=checkpoints_lib.state_digest(jax.device_get(state)),
    )
    return step, state

  def _last_affordable(self, step: int) -> int:
    """Updates that may be made before the budget is spent."""
    written = max(step, self.ledger.last_step(self.branch.name) + 1)
    if self.plan.target_epsilon is None:
      return self.plan.num_steps
    return written + accounting.affordable_steps(
      self.ledger.releases(),
      list(self.plan.releases(written)),
      self.plan.target_epsilon,
      self.plan.delta,
      self.plan.relation,
    )

  def _update(self, step: int, state: Any) -> tuple[int, Any, Any]:
    """One update: the only road from private examples to parameters."""
    release = self.plan.release(step)
    indices = sampling.poisson_sample(
      self._key("sampling", step),
      self.plan.num_examples,
      release.sampling_prob,
    )
    accumulator = self.zeros(state["params"], state["opt_state"])
    examples_key = self._key("examples", step)
    for batch in batches.physical_batches(
      self.prepared.store, indices, self.run.physical_batch_size
    ):
      accumulator = self.accumulate(
        state["params"], accumulator, batch, examples_key
      )
    self.ledger.record(self.branch.name, step, release)
    params, opt_state, statistics = self.finish(
      state["params"],
      state["opt_state"],
      accumulator,
      noise_key=self._key("noise", step),
      noise_multiplier=release.noise_multiplier,
      expected_batch_size=float(self.plan.expected_batch_size(step)),
    )
    return step + 1, {"params": params, "opt_state": opt_state}, statistics

  def _key(self, purpose: str, step: int) -> jax.Array:
    return self.prepared.seed.key(purpose, self.branch.name, step)

  def _after_update(
    self,
    step: int,
    limit: int,
    state: Any,
    statistics: dict[str, jax.Array],
    progress: progress_lib.Progress,
  ) -> None:
    progress.advance(self.plan.expected_batch_size(step - 1))
    curves: dict[str, float] = {}
    if self._due(step, self.run.log_period) or step == limit:
      curves |= {f"unprotected/{k}": float(v) for k, v in statistics.items()}
      epsilon = self.epsilon(self.ledger, now=step == limit)
      if epsilon is not None:
        progress.show(epsilon=f"{epsilon:.3f} at {step}")
        curves |= {"epsilon": epsilon}
    if self.prepared.evaluator and (
      self._due(step, self.run.evaluation.period) or step == limit
    ):
      self.evaluation = self.prepared.evaluator.evaluate(state["params"])
      progress_lib.say(
        f"update {step}: validation accuracy"
        f" {100 * self.evaluation.accuracy:.2f} % (constant guess"
        f" {100 * self.evaluation.baseline_accuracy:.2f} %), loss"
        f" {self.evaluation.loss:.3f}"
      )
      curves |= {
        "validation/accuracy": self.evaluation.accuracy,
        "validation/loss": self.evaluation.loss,
      }
    if curves:
      progress.curves(step, curves)

  def _save(
    self, checkpoints: checkpoints_lib.Checkpoints, step: int, state: Any
  ) -> None:
    checkpoints.save(
      step,
      state,
      {"branch": self.branch.name, "ledger": self.ledger.segments()},
    )
    try:
      report_lib.write_report(self.ledger, self.directory)
    except OSError as error:
      progress_lib.say(
        f"the privacy report could not be written ({error}); training goes on,"
        f" and `dptrain report {self.directory}` can make it from the ledger"
      )

  def _result(self, step: int, state: Any) -> run_lib.TrainingResult:
    if self.evaluation is None and self.prepared.evaluator:
      self.evaluation = self.prepared.evaluator.evaluate(state["params"])
    report = report_lib.make_report(self.ledger)
    stopped = ""
    if step < self.plan.num_steps:
      stopped = f"one more would exceed epsilon {self.plan.target_epsilon:g}"
    sizes = [self.plan.expected_batch_size(s) for s in range(step)]
    return run_lib.TrainingResult(
      step=step,
      stopped=stopped,
      epsilon=report.epsilon.value,
      delta=report.delta,
      accuracy=self.evaluation.accuracy if self.evaluation else None,
      baseline_accuracy=self.evaluation.baseline_accuracy
      if self.evaluation
      else None,
      expected_examples=sum(sizes),
    )

  @staticmethod
  def _due(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


class _EpsilonMeter:
  """Epsilon spent, computed in no more than a twentieth of the time."""

  def __init__(self, delta: float, relation: str):
    self._delta, self._relation = delta, relation
    self._cost, self._at = 0.0, -float("inf")

  def __call__(self, ledger: ledger_lib.Ledger, now: bool) -> float | None:
    """What `ledger` costs; None if it is too early to ask, unless `now`."""
    begin = time.monotonic()
    if not now and begin - self._at < 20 * self._cost:
      return None
    value = accounting.epsilon(
      ledger.releases(), self._delta, self._relation, quick=True
    ).value
    self._at = time.monotonic()
    self._cost = self._at - begin
    return value


@contextlib.contextmanager
def _sigterm_interrupts() -> Any:
  """Lets a cluster's SIGTERM end a run as Ctrl-C does: after saving."""

  def interrupt(*_: object) -> None:
    raise KeyboardInterrupt

  try:
    before = signal.signal(signal.SIGTERM, interrupt)
  except ValueError:  # not the main thread: leave signals alone
    yield
    return
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
