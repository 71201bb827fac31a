"""The private step under t5x's training loop.

Shapes: B physical batch, S shards of the data axis.
"""

from collections.abc import Iterator, Mapping
import time
from typing import Any, NamedTuple

from clu import metrics as clu_metrics
from flax import core
from flax import serialization
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
from t5x import metrics as t5x_metrics
from t5x import trainer as t5x_trainer

from dptrain.clipping import private_metrics
from dptrain.t5x_bridge import fingerprint
from dptrain.t5x_bridge import initial_state
from dptrain.t5x_bridge import launch as launch_lib
from dptrain.t5x_bridge import optimizers
from dptrain.t5x_bridge import poisson_batches
from dptrain.training import classroom as classroom_lib
from dptrain.training import private_curves
from dptrain.training import processes
from dptrain.training import sharded_step
from dptrain.training import step as step_lib


class PrivateTrainer(t5x_trainer.BaseTrainer):
  """Trains through `ShardedStep`; t5x loops, evaluates, saves and stops.

  One of t5x's steps is one update, of any number of physical batches; all of
  its periods count updates.

  Formal guarantee: as in the thin loop, each update goes one way: Poisson
  sample, clip, sum, ledger, noise once, divide by a public constant, optimizer.
  Keys come from the secret seed, never from t5x's rng.

  Attributes:
    train_state: t5x's, set after every update.
  """

  train_state: Any

  def __init__(self, *, launch: launch_lib.Launch, **settings: Any):
    """Opens the branch that the train state goes on with.

    Args:
      launch: the run.
      **settings: what t5x gives every trainer.

    Raises:
      ValueError: mesh or train state do not fit the run.
      LedgerError: the checkpoint does not belong to the ledger.
    """
    super().__init__(**settings)
    self._launch = launch
    slot = optimizers.private_state(self.train_state)
    self._programs = _Programs(
      launch, self._partitioner, self._train_state_axes, self.train_state
    )
    step = int(_local(self.train_state.step))
    self._limit = launch.open_branch(
      step,
      _local(slot.branch),
      _local(slot.ledger_head),
      {
        "params": core.unfreeze(self.train_state.params),
        "opt_state": slot.step_state,
      },
      self._programs.mesh_in_words(),
      intact=self._programs.is_intact(self.train_state),
    )
    self._step = step
    self._released = private_curves.PrivateCurves(
      launch.prepared.step.metrics, launch.plan
    )
    launch.on_report = self._log_epsilon

  @property
  def stop_training(self) -> bool:
    """Whether t5x shall stop: asked to, or the budget allows no more."""
    return self._asked_to_stop or self._step >= getattr(
      self, "_limit", self._step + 1
    )

  @stop_training.setter
  def stop_training(self, value: bool) -> None:
    self._asked_to_stop = value

  def train(
    self, batch_iter: Any, num_steps: int, start_step: int | None = None
  ) -> Any:
    """Makes `num_steps` updates, or as many as the budget allows.

    Args:
      batch_iter: a `PoissonBatches`.
      num_steps: updates to make.
      start_step: updates made before, as t5x counts them.

    Returns:
      A future of the metrics, as t5x's trainers return.

    Raises:
      ValueError: the batches are not Poisson samples.
      PreemptionError: on SIGTERM or Ctrl-C; t5x saves and ends.
    """
    _check_batches(batch_iter)
    start = int(_local(self.train_state.step))
    if start_step is not None and start_step != start:
      # t5x counts on when a stop came early; there is nothing left to do.
      num_steps = 0
    statistics: Mapping[str, jax.Array] = {}
    self.train_metrics_manager.start_duration_timer(
      block_on=self.train_state.params
    )
    self._step = start
    end = min(start + num_steps, self._limit)
    try:
      with processes.interruptible():
        for step in range(start, end):
          if processes.stop_asked(step):
            raise KeyboardInterrupt
          with jax.profiler.StepTraceAnnotation("train", step_num=step):
            # After each update: an emergency checkpoint may be due any time.
            self.train_state, statistics = self._update(
              step, self.train_state, batch_iter
            )
          self._released.add(step, statistics)
          self._step = step + 1
      if self._step >= self._limit:
        self._launch.classroom.end(
          self._step, core.unfreeze(self.train_state.params)
        )
    except KeyboardInterrupt as error:
      raise t5x_trainer.PreemptionError(
        "interrupted; what was done is saved, the same command resumes"
      ) from error
    return self.train_metrics_manager.write_metrics_summary(
      self._metrics(statistics), self._step, max(end - start, 1)
    )

  def compile_train(self, batch: Mapping[str, jax.Array]) -> None:
    """Compiles the programs before the first update.

    Args:
      batch: a dummy batch of global arrays.

    Raises:
      ValueError: it is not of the shapes that the private step reads.
    """
    wanted = self._launch.prepared.batch
    found = {name: (x.shape, str(x.dtype)) for name, x in batch.items()}
    if found != {name: (x.shape, str(x.dtype)) for name, x in wanted.items()}:
      raise ValueError(
        f"the dataset has the features {sorted(found)}; private training reads"
        f" {sorted(wanted)} of its own: bind train.get_dataset_fn ="
        " @poisson_batches.get_dataset (dptrain.t5x_bridge)."
      )
    begin = time.monotonic()
    self._programs.compile(self.train_state)
    self.train_metrics_manager.write_scalar(
      "timing/compilation_seconds", time.monotonic() - begin, self._step
    )

  def close(self) -> None:
    """Ends the metrics' threads, writes the report, closes the ledger."""
    self._launch.close()
    super().close()

  def _update(
    self, step: int, state: Any, source: poisson_batches.PoissonBatches
  ) -> tuple[Any, Mapping[str, jax.Array]]:
    """One update: the only road from private examples to parameters."""
    launch, programs = self._launch, self._programs
    launch.classroom.offer(step, core.unfreeze(state.params))
    taught = launch.classroom.before_update(step)
    accumulate = programs.accumulate
    if taught is not classroom_lib.unchanged:
      accumulate = programs.accumulate_taught
    accumulator = programs.zeros(state)
    examples_key = launch.key("examples", step)
    for rows in source.physical_batches(step):
      batch = taught(programs.on_mesh(rows), _typed(examples_key))
      accumulator = accumulate(state, accumulator, batch, examples_key)
    branch, ledger_head = launch.record(step)
    release = launch.plan.release(step)
    state, statistics = programs.finish(
      state,
      accumulator,
      _Update(
        launch.key("noise", step),
        np.float32(release.noise_multiplier),
        np.float32(launch.plan.expected_batch_size(step)),
        branch,
        ledger_head,
      ),
    )
    return programs.marked(state), statistics

  def _metrics(
    self, statistics: Mapping[str, jax.Array]
  ) -> dict[str, clu_metrics.Metric]:
    """Public figures; unprotected ones only if the run asks for them."""
    sizes = self._launch.plan.expected_batch_size(max(self._step - 1, 0))
    told: dict[str, Any] = {"expected_batch_size": np.float32(sizes)}
    told |= self._released.window()
    _, rest = private_metrics.separated(statistics)
    told |= {f"unprotected/{name}": x for name, x in rest.items()}
    metrics: dict[str, clu_metrics.Metric] = {
      name: clu_metrics.LastValue.from_model_output(
        jnp.asarray(_local(x))[None]
      )
      for name, x in told.items()
    }
    metrics["timing/updates_per_second"] = (
      t5x_metrics.StepsPerTime.from_model_output()
    )
    return metrics

  def _log_epsilon(self, epsilon: float) -> None:
    self.train_metrics_manager.write_scalar("epsilon", epsilon, self._step)

  @property
  def _partitioned_train_step(self) -> Any:
    raise RuntimeError("an update is more than one program: see train")

  @property
  def _partitioned_eval_step(self) -> Any:
    return self._partitioner.partition(
      lambda state, batch: t5x_trainer.eval_step(self._model, state, batch),
      in_axis_resources=(
        self._train_state_axes,
        self._partitioner.data_partition_spec,
      ),
      out_axis_resources=None,
    )


class _Update(NamedTuple):
  """What `finish` reads of one update, as plain arrays."""

  noise_words: Any
  noise_multiplier: Any
  expected_batch_size: Any
  branch: Any
  ledger_head: Any


class _Programs:
  """The three jitted parts of an update on t5x's mesh."""

  def __init__(
    self, launch: launch_lib.Launch, partitioner: Any, axes: Any, state: Any
  ):
    along = partitioner.data_partition_spec[0]
    run, self._launch = launch.run, launch
    self._step = sharded_step.ShardedStep(
      launch.prepared.step,
      partitioner.mesh,
      (along,) if isinstance(along, str) else tuple(along),
    )
    shard, left = divmod(run.physical_batch_size, self._step.num_shards)
    if left:
      raise ValueError(
        f"TrainingRun.physical_batch_size={run.physical_batch_size} is not a"
        f" multiple of the mesh's {self._step.num_shards} data shards; choose a"
        " multiple, or another mesh."
      )
    if run.microbatch_size and shard % run.microbatch_size:
      raise ValueError(
        f"TrainingRun.microbatch_size={run.microbatch_size} does not divide the"
        f" {shard} rows of each of the mesh's {self._step.num_shards} data"
        " shards; choose a divisor."
      )
    everywhere = NamedSharding(partitioner.mesh, PartitionSpec())
    self._states = initial_state.shardings(partitioner, axes, state)
    self._sums = self._accumulator_shardings(axes.params, state)
    self.zeros = jax.jit(self._zeros, out_shardings=self._sums)
    self.accumulate = jax.jit(
      self._accumulate, donate_argnums=1, out_shardings=self._sums
    )
    # With teachers' predictions in the batch; compiled when there are any.
    self.accumulate_taught = self.accumulate
    launch.classroom.places = classroom_lib.Places(
      self._step.batch_sharding(), everywhere
    )
    # The state is not donated: a checkpoint may still be reading it.
    self.finish = jax.jit(
      self._finish, out_shardings=(self._states, everywhere)
    )
    # A program of its own: within another, a compiler may compute an array
    # twice, and not to the same bit.
    self.fingerprint = jax.jit(_fingerprint, out_shardings=everywhere)

  def mesh_in_words(self) -> str:
    """What may change an update's rounding; empty for one device."""
    mesh = self._step.mesh
    if mesh.size == 1:
      return ""
    specs = [
      f"{jax.tree_util.keystr(path)}{sharding.spec}"
      for path, sharding in jax.tree_util.tree_leaves_with_path(
        self._states.params
      )
    ]
    return f"{dict(mesh.shape)} {' '.join(specs)}"

  def marked(self, state: Any) -> Any:
    """The state with the fingerprint of its arrays in it."""
    slot = optimizers.private_state(state)
    slot = slot._replace(fingerprint=self.fingerprint(state))
    optimizer = state._optimizer
    return state.replace(
      _optimizer=optimizer.replace(
        state=optimizer.state.replace(param_states=slot)
      )
    )

  def is_intact(self, state: Any) -> bool:
    """Whether the arrays are those of which the fingerprint was taken."""
    told = _local(optimizers.private_state(state).fingerprint)
    return bool(np.array_equal(told, _local(self.fingerprint(state))))

  def on_mesh(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A global batch [B, ...] from the rows of this process."""
    size = self._launch.run.physical_batch_size
    sharding = self._step.batch_sharding()
    return {
      name: jax.make_array_from_process_local_data(
        sharding, x, (size, *x.shape[1:])
      )
      for name, x in rows.items()
    }

  def compile(self, state: Any) -> None:
    """Compiles all three for a state of this kind."""
    batch = {
      name: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=self._step.batch_sharding()
      )
      for name, x in self._launch.prepared.batch.items()
    }
    words = np.zeros(2, np.uint32)
    sums = self.zeros.eval_shape(state)
    sums = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      sums,
      self._sums,
    )
    digest = launch_lib.NO_DIGEST
    one = np.float32(1)
    update = _Update(words, one, one, digest, digest)
    self.zeros = _compiled(self.zeros, state)
    self.accumulate = _compiled(self.accumulate, state, sums, batch, words)
    self.finish = _compiled(self.finish, state, sums, update)

  def _zeros(self, state: Any) -> step_lib.Accumulator:
    params = core.unfreeze(state.params)
    return self._step.zeros(
      params, self._launch.prepared.batch, self._step_state(params, state)
    )

  def _step_state(self, params: Any, state: Any) -> Any:
    """What the private step keeps, as it was returned."""
    like = jax.eval_shape(self._step.init, params)
    return optimizers.with_none(state.param_states.step_state, like)

  def _accumulate(
    self, state: Any, accumulator: Any, batch: Any, words: Any
  ) -> step_lib.Accumulator:
    return self._step.accumulate(
      core.unfreeze(state.params), accumulator, batch, _typed(words)
    )

  def _finish(
    self, state: Any, accumulator: step_lib.Accumulator, update: _Update
  ) -> tuple[Any, dict[str, jax.Array]]:
    params = core.unfreeze(state.params)
    params, step_state, statistics = self._step.finish(
      params,
      self._step_state(params, state),
      accumulator,
      noise_key=_typed(update.noise_words),
      noise_multiplier=update.noise_multiplier,
      expected_batch_size=update.expected_batch_size,
    )
    slot = state.param_states._replace(
      step_state=optimizers.without_none(step_state),
      branch=update.branch,
      ledger_head=update.ledger_head,
    )
    state = state.restore_state(
      {
        "target": params,
        "state": {
          "step": state.step + 1,
          "param_states": serialization.to_state_dict(slot),
        },
      }
    )
    return state, statistics

  def _accumulator_shardings(self, params_axes: Any, state: Any) -> Any:
    """Sums lie along the data axis, and each part as its parameter does."""
    mesh, data = self._step.mesh, self._step.shard_axes

    def along(spec: PartitionSpec | None) -> NamedSharding:
      rest = () if spec is None else tuple(spec)
      return NamedSharding(mesh, PartitionSpec(data, *rest))

    shapes = jax.eval_shape(self._zeros, state)
    return jax.tree.map(lambda _: along(None), shapes)._replace(
      gradients=jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: along(spec), part),
        core.unfreeze(params_axes),
        shapes.gradients,
        is_leaf=lambda x: x is None or isinstance(x, PartitionSpec),
      )
    )


class ReportOnSave:
  """Rewrites the privacy report whenever t5x saves a checkpoint.

  To be bound to `SaveCheckpointConfig.state_transformation_fns`, t5x's own hook
  for saves; the state passes unchanged.
  """

  def __init__(self, launch: launch_lib.Launch):
    """Takes the run."""
    self._launch = launch

  def __call__(self, state: Any, infos: Any) -> tuple[Any, Any]:
    """Called by t5x with what it is about to save."""
    self._launch.write_report()
    return state, infos


def _check_batches(batch_iter: Iterator[Any]) -> None:
  if not isinstance(batch_iter, poisson_batches.PoissonBatches):
    raise ValueError(
      f"PrivateTrainer was given batches of {type(batch_iter).__name__}, which"
      " are no Poisson samples: the reported epsilon would be wrong. Bind"
      " train.get_dataset_fn = @poisson_batches.get_dataset"
      " (dptrain.t5x_bridge)."
    )


def _fingerprint(state: Any) -> jax.Array:
  slot = state.param_states
  return fingerprint.fingerprint((state.params, slot.step_state))


def _typed(words: Any) -> jax.Array:
  return jax.random.wrap_key_data(words, impl="threefry2x32")


def _local(x: Any) -> np.ndarray:
  """A replicated array on this host."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = x.addressable_data(0)
  return np.asarray(jax.device_get(x))


def _compiled(program: Any, *arguments: Any) -> Any:
  return program.lower(*arguments).compile()
