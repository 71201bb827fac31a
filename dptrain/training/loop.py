"""The thin loop: the whole of private training in one sitting."""

from collections.abc import Callable, Generator, Iterator, Sequence
import contextlib
import functools
import itertools
import pathlib
from typing import Any

import jax

from dptrain.clipping import private_metrics
from dptrain.data import store as store_lib
from dptrain.privacy import budget
from dptrain.privacy import draws
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import plan as plan_lib
from dptrain.reports import report as report_lib
from dptrain.training import checkpoints as checkpoints_lib
from dptrain.training import classroom as classroom_lib
from dptrain.training import epsilon_meter
from dptrain.training import evaluation as evaluation_lib
from dptrain.training import exchange as exchange_lib
from dptrain.training import feeding
from dptrain.training import lineage as lineage_lib
from dptrain.training import mesh as mesh_lib
from dptrain.training import preparation as preparation_lib
from dptrain.training import private_curves
from dptrain.training import processes
from dptrain.training import programs as programs_lib
from dptrain.training import progress as progress_lib
from dptrain.training import public_data as public_data_lib
from dptrain.training import records as records_lib
from dptrain.training import run as run_lib


def train(
  run: run_lib.TrainingRun,
  records: records_lib.Records | None = None,
  exchange: exchange_lib.Exchange | None = None,
) -> run_lib.TrainingResult:
  """Trains until the plan ends or the budget is spent; resumes by itself.

  Formal guarantee: see `PrivacyPlan` and `PrivateStep`. Each update goes one
  way: Poisson sample, clip, sum, ledger, noise once, divide by a public
  constant, optimizer.

  On several processes (`processes.start`) all call this with the same settings
  and the same MODEL_DIR.

  Args:
    run: the user's settings.
    records: what to train on instead of the run's task.
    exchange: with other replicas, instead of the run's folder.

  Returns:
    How it ended.

  Raises:
    ValueError: bad input, before anything is spent.
    LedgerError: MODEL_DIR belongs to another plan, or its ledger is damaged.
    CheckpointError: no checkpoint can be read, or the last cannot be written.
    ElsewhereError: any of these, in another process.
    KeyboardInterrupt: interrupted, after saving what was done.
  """
  with contextlib.ExitStack() as stack:
    return begin(stack, run, records, exchange).run_to_the_end()


def begin(
  stack: contextlib.ExitStack,
  run: run_lib.TrainingRun,
  records: records_lib.Records | None = None,
  exchange: exchange_lib.Exchange | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> "_Loop":
  """All of `train` that comes before the first update.

  Args:
    stack: keeps the ledger open.
    run: as in `train`.
    records: as there.
    exchange: as there.
    devices: those of this run; None: all of them.
  """
  # The noise must not depend on how arrays are sharded.
  jax.config.update("jax_threefry_partitionable", True)
  told = processes.comparable(run)
  told.pop("model_dir", None)  # may have another name on another machine
  processes.check_equal("settings", told)
  layout = processes.everywhere(lambda: _checked_layout(run, devices))
  directory = pathlib.Path(run.model_dir).expanduser()
  processes.first(lambda: directory.mkdir(parents=True, exist_ok=True))
  processes.check_shared(directory)
  stack.enter_context(processes.interruptible())
  stack.enter_context(progress_lib.logs_said())

  def prepare() -> tuple[ledger_lib.Ledger, preparation_lib.Preparation]:
    if processes.is_first():
      ledger = stack.enter_context(ledger_lib.opened(directory))
      ledger.check_not_lost()
    else:
      ledger = ledger_lib.read(directory)
    prepared = preparation_lib.prepare(run, directory, ledger, records, layout)
    return ledger, prepared

  ledger, prepared = processes.in_turn(prepare)
  processes.check_equal(
    "vocabulary, model, optimizer, initial weights or code",
    {"lineage": prepared.lineage, "weights": prepared.weights_digest()},
  )
  environments = processes.gathered(prepared.environment)
  prepared = prepared._replace(
    environment=lineage_lib.joint_environment(environments)
  )
  return _Loop(run, directory, ledger, prepared, exchange)


def _checked_layout(
  run: run_lib.TrainingRun, devices: Sequence[jax.Device] | None
) -> mesh_lib.Layout | None:
  layout = mesh_lib.make_layout(run.mesh, run.model, devices)
  if layout is not None:
    layout.check_batch(
      "TrainingRun.physical_batch_size",
      run.physical_batch_size,
      run.microbatch_size,
    )
  return layout


class _Loop:
  """State and phases of one call of `train`."""

  def __init__(
    self,
    run: run_lib.TrainingRun,
    directory: pathlib.Path,
    ledger: ledger_lib.Ledger,
    prepared: preparation_lib.Preparation,
    exchange: exchange_lib.Exchange | None,
  ):
    self.run, self.directory, self.ledger = run, directory, ledger
    self.prepared, self.plan = prepared, prepared.plan
    programs = programs_lib.make_programs(
      prepared.step,
      prepared.params,
      prepared.batch,
      prepared.layout,
      plan_lib.banded_noise(prepared.plan),
    )
    self.gathered, self.zeros = programs.gathered, programs.zeros
    self.accumulate, self.finish = programs.accumulate, programs.finish
    self.begin_noise, self.next_noise = (
      programs.begin_noise,
      programs.next_noise,
    )
    self.noise_history: Any = None
    banded = plan_lib.banded_noise(prepared.plan)
    self.noise_stddevs = banded.stddevs(self.plan.num_steps) if banded else None
    self.public_zeros, self.public_accumulate = (None, None)
    if prepared.public is not None:
      self.public_zeros, self.public_accumulate = programs_lib.make_public(
        prepared.public.term, prepared.layout
      )
    self.classroom = classroom_lib.make_classroom(
      run, directory, ledger, prepared, exchange
    )
    self.batches_built = itertools.count()
    self.epsilon = epsilon_meter.EpsilonMeter(
      self.plan.delta, self.plan.relation
    )
    self.evaluation: evaluation_lib.Evaluation | None = None
    self.released = private_curves.PrivateCurves(
      prepared.step.metrics, self.plan
    )

  def run_to_the_end(self) -> run_lib.TrainingResult:
    """Restores, trains, saves; the result."""
    rounds = self.rounds()
    while True:
      try:
        next(rounds)
      except StopIteration as end:
        result: run_lib.TrainingResult = end.value
        return result

  def rounds(self) -> Generator[int, None, run_lib.TrainingResult]:
    """As `run_to_the_end`, in parts: yields how many updates are made.

    What replicas exchange before the next update is published when it yields.
    """
    with (
      contextlib.ExitStack() as stack,
      checkpoints_lib.Checkpoints(
        self.directory, self.run.checkpoints, progress_lib.say
      ) as checkpoints,
    ):
      step, state = self._restore(checkpoints)
      limit = processes.first(
        lambda: budget.last_affordable(
          self.plan, self.ledger, self.branch.name, step
        )
      )
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
      if self.prepared.layout is not None:
        self._say_layout(self.prepared.layout)
      chosen = self.prepared.clipping
      progress_lib.say(f"clipping: {chosen.method} ({chosen.reason})")
      self.feed = self._feed(
        self._drawn, self.prepared.store, range(step, limit)
      )
      stack.callback(self.feed.close)
      if public := self.prepared.public:
        self.public_feed = self._feed(
          functools.partial(self._drawn_public, public),
          public.store,
          range(step, limit),
        )
        stack.callback(self.public_feed.close)
      if step >= limit:
        progress_lib.say(f"all {step} updates are made: nothing left to do")
      try:
        self.classroom.offer(step, state["params"])
        yield step
        while step < limit:
          # Bound together: an interrupt must not save a state under another
          # update's number.
          step, state, statistics = self._update(step, state)
          self._after_update(step, limit, state, statistics, progress)
          if self._due(step, self.run.checkpoints.period) and step < limit:
            self._save(checkpoints, step, state)
          if step < limit:
            self.classroom.offer(step, state["params"])
          yield step
      except KeyboardInterrupt:
        self._save(checkpoints, step, state)
        checkpoints.finish(step)
        progress_lib.say(
          f"interrupted; update {step} is saved, the same command resumes"
        )
        raise
      self._save(checkpoints, step, state)
      checkpoints.finish(step)
      self.classroom.end(step, state["params"])
      return self._result(step, state)

  def _restore(
    self, checkpoints: checkpoints_lib.Checkpoints
  ) -> tuple[int, Any]:
    """State to go on from, and the branch on which to go on."""
    restored = checkpoints.restore(self.prepared.state_like())
    if restored is not None:
      step, state = restored.step, restored.state
    else:
      step, state = 0, self.prepared.initial_state()
    digest = checkpoints_lib.state_digest(state)

    def open_branch() -> dict[str, Any]:
      if restored is not None:
        self.ledger.check_contains(restored.metadata["ledger"])
      branch = self.ledger.open_branch(
        checkpoint_branch=restored.metadata["branch"] if restored else "",
        checkpoint_step=step,
        lineage=self.prepared.lineage,
        environment=self.prepared.environment,
        state=digest,
        repeatable=self.classroom.repeatable(step),
      )
      return branch._asdict()

    self.branch = ledger_lib.Branch(**processes.first(open_branch))
    self.classroom.begin(self.branch.name)
    self._replay_noise(step)
    self.released.keep_in(self.directory, self.branch.name, step)
    return step, state

  def _replay_noise(self, step: int) -> None:
    """Brings correlated noise to where it was before update `step`.

    It is made again and not restored: whoever had it could subtract it.
    """
    if self.begin_noise is None:
      return
    self.noise_history = self.begin_noise()
    for past in range(self.branch.fork_step, step):
      self._correlated(past)

  def _correlated(self, step: int) -> Any:
    """The noise of update `step`, after that of all before; None if fresh."""
    if self.next_noise is None:
      return None
    key = self._noise_key(step)
    unit, self.noise_history = self.next_noise(key, self.noise_history)
    return unit

  def _update(self, step: int, state: Any) -> tuple[int, Any, Any]:
    """One update: the only road from private examples to parameters."""
    release = self.plan.release(step)
    params = self.gathered(state["params"])
    taught = self.classroom.before_update(step)
    accumulator = self.zeros(params, state["opt_state"])
    examples_key = self._key("examples", step)
    # Nothing here waits for a device: the next batches are built meanwhile.
    for batch in self._batches(self.feed, step):
      batch = taught(batch, examples_key)
      accumulator = self.accumulate(params, accumulator, batch, examples_key)
    public_gradient = self._public_gradient(params, step)
    self._stop_if_asked()
    # On every process the update is dispatched after this returned, and this
    # returns after the line is on disk: whoever is killed when, no parameters
    # exist that the ledger does not know.
    number = self.plan.round_number(step, self.branch.fork_step)
    processes.first(
      lambda: self.ledger.record(self.branch.name, step, release, number)
    )
    params, opt_state, statistics = self.finish(
      state["params"],
      state["opt_state"],
      accumulator,
      noise_key=self._noise_key(step),
      noise_multiplier=release.noise_multiplier,
      expected_batch_size=float(self.plan.expected_batch_size(step)),
      unit_noise=self._correlated(step),
      unit_noise_stddev=self._noise_stddev(step),
      public_gradient=public_gradient,
    )
    return step + 1, {"params": params, "opt_state": opt_state}, statistics

  def _public_gradient(self, params: Any, step: int) -> Any:
    """The term of public records; None without them."""
    if self.public_zeros is None or self.public_accumulate is None:
      return None
    total, key = self.public_zeros(params), self._key("public examples", step)
    for batch in self._batches(self.public_feed, step):
      total = self.public_accumulate(params, total, batch, key)
    return total

  def _noise_stddev(self, step: int) -> float:
    """Of one coordinate of what `_correlated` returns."""
    if self.noise_stddevs is None:
      return 1.0
    return float(self.noise_stddevs[step - self.branch.fork_step])

  def _drawn(self, step: int) -> draws.Drawn:
    """The sample of update `step`."""
    with _on_host():
      return draws.drawn(
        self.plan,
        self._key,
        self.prepared.store.num_examples,
        step,
        self.branch.fork_step,
      )

  def _drawn_public(
    self, public: public_data_lib.PublicExamples, step: int
  ) -> draws.Drawn:
    """The public records of update `step`."""
    with _on_host():
      return public.draw(self._key("public sample", step))

  def _feed(
    self,
    drawn: Callable[[int], draws.Drawn],
    store: store_lib.Examples,
    steps: range,
  ) -> feeding.Feed:
    """Batches of these updates; this process builds its own rows."""
    size, layout = self.run.physical_batch_size, self.prepared.layout
    shards = feeding.Shards()
    if layout is not None:
      own = dict.fromkeys(layout.own_rows(size) % layout.num_shards)
      shards = feeding.Shards(tuple(map(int, own)), layout.num_shards)
    return feeding.Feed(drawn, store, size, shards, steps)

  def _batches(self, feed: feeding.Feed, step: int) -> Iterator[Any]:
    """Physical batches of an update, on their devices."""
    size, layout = self.run.physical_batch_size, self.prepared.layout
    for batch in feed.update(step):
      self._stop_if_asked()
      yield layout.place(batch, size) if layout else batch

  def _stop_if_asked(self) -> None:
    if processes.stop_asked(next(self.batches_built)):
      raise KeyboardInterrupt

  def _key(self, purpose: str, step: int) -> jax.Array:
    return self.prepared.seed.key(purpose, self.branch.name, step)

  def _noise_key(self, step: int) -> jax.Array:
    branch = self.classroom.noise_branch(self.branch.name, step)
    return self.prepared.seed.key("noise", branch, step)

  def _after_update(
    self,
    step: int,
    limit: int,
    state: Any,
    statistics: dict[str, jax.Array],
    progress: progress_lib.Progress,
  ) -> None:
    progress.advance(self.plan.expected_batch_size(step - 1))
    if self.classroom.names:
      progress.show(taught_by=", ".join(self.classroom.names))
    self.released.add(step - 1, statistics)
    curves: dict[str, float] = {}
    if self._due(step, self.run.log_period) or step == limit:
      curves |= self.released.window()
      progress.show(**private_curves.in_words(curves))
      _, rest = private_metrics.separated(statistics)
      curves |= {f"unprotected/{k}": float(v) for k, v in rest.items()}
      epsilon = None
      if processes.is_first():
        epsilon = self.epsilon(self.ledger, now=step == limit)
      if epsilon is not None:
        progress.show(epsilon=f"{epsilon:.3f} at {step}")
        curves |= {"epsilon": epsilon}
    if self.prepared.evaluator and (
      self._due(step, self.run.evaluation.period) or step == limit
    ):
      self.evaluation = self._evaluated(self.prepared.evaluator, state)
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

  def _evaluated(
    self, evaluator: evaluation_lib.Evaluator, state: Any
  ) -> evaluation_lib.Evaluation:
    return evaluator.evaluate(self.gathered(state["params"]))

  def _say_layout(self, layout: mesh_lib.Layout) -> None:
    sizes = ", ".join(f"{k} {v}" for k, v in layout.mesh.shape.items())
    progress_lib.say(
      f"mesh: {sizes}; {jax.process_count()} process(es), each shard gets"
      f" {self.run.physical_batch_size // layout.num_shards} rows of a physical"
      " batch"
    )
    if layout.whole:
      progress_lib.say(
        "not split, since the mesh does not divide it:"
        f" {', '.join(layout.whole)}"
      )

  def _save(
    self, checkpoints: checkpoints_lib.Checkpoints, step: int, state: Any
  ) -> None:
    # Later updates are repeated after a crash, earlier ones never are.
    self.released.flush()
    checkpoints.save(
      step,
      state,
      {"branch": self.branch.name, "ledger": self.ledger.segments()},
    )
    self.classroom.forget(checkpoints.oldest())
    if not processes.is_first():
      return
    progress_lib.write_report(self.ledger, self.directory)

  def _result(self, step: int, state: Any) -> run_lib.TrainingResult:
    if self.evaluation is None and self.prepared.evaluator:
      self.evaluation = self._evaluated(self.prepared.evaluator, state)

    def guarantee() -> tuple[float, float]:
      report = report_lib.make_report(self.ledger)
      return report.epsilon.value, report.delta

    epsilon, delta = processes.first(guarantee)
    stopped = ""
    if step < self.plan.num_steps:
      stopped = f"one more would exceed epsilon {self.plan.target_epsilon:g}"
    sizes = [self.plan.expected_batch_size(s) for s in range(step)]
    return run_lib.TrainingResult(
      step=step,
      stopped=stopped,
      epsilon=epsilon,
      delta=delta,
      accuracy=self.evaluation.accuracy if self.evaluation else None,
      baseline_accuracy=self.evaluation.baseline_accuracy
      if self.evaluation
      else None,
      expected_examples=sum(sizes),
    )

  @staticmethod
  def _due(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def _on_host() -> contextlib.AbstractContextManager[Any]:
  """Computes beside the accelerator, whose queue of batches may be long."""
  if jax.default_backend() == "cpu":
    return contextlib.nullcontext()
  try:
    host = jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves the host out
    return contextlib.nullcontext()
  return jax.default_device(host)
