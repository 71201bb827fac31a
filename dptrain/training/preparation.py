"""From settings to everything that a loop needs; every refusal happens here.

Nothing in this file trains: bad input is told before compute, privacy budget or
a change to MODEL_DIR is spent on it.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dptrain.clipping import adaptation as adaptation_lib
from dptrain.clipping import methods
from dptrain.clipping import private_metrics
from dptrain.clipping import rules
from dptrain.data import batches
from dptrain.data import store as store_lib
from dptrain.privacy import keys as keys_lib
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import plan as plan_lib
from dptrain.training import checkpoints as checkpoints_lib
from dptrain.training import declarations
from dptrain.training import evaluation as evaluation_lib
from dptrain.training import examples as examples_lib
from dptrain.training import frozen_teacher
from dptrain.training import lineage as lineage_lib
from dptrain.training import mesh as mesh_lib
from dptrain.training import ngram_learning
from dptrain.training import numerics
from dptrain.training import objective as objective_lib
from dptrain.training import programs as programs_lib
from dptrain.training import public_data as public_data_lib
from dptrain.training import records as records_lib
from dptrain.training import run as run_lib
from dptrain.training import step as step_lib


class Preparation(NamedTuple):
  """What a loop needs.

  Attributes:
    plan: the privacy plan; sampler, noise and accountant read it.
    seed: where all keys come from.
    store: what is sampled: training records, or units of them. PRIVATE.
    evaluator: the validation split under fixed masks; None without one.
    objective: masking and model.
    step: the private step.
    clipping: how it clips, and why so.
    batch: shapes of a physical batch.
    params: shapes of the parameters.
    weights: to start from; None: fresh ones.
    public: public records that take part; None without.
    teacher: a finished one; None without.
    vocabulary: fingerprint of the vocabulary.
    shard: which shard of which corpus is trained on; None for a whole one.
    layout: where arrays are on a mesh; None on one device.
    lineage: digest of what decides the gradients.
    environment: digest of what may change their rounding.
  """

  plan: plan_lib.PrivacyPlan
  seed: keys_lib.SecretSeed
  store: store_lib.Examples
  evaluator: evaluation_lib.Evaluator | None
  objective: objective_lib.Objective
  step: step_lib.PrivateStep
  clipping: methods.Choice
  batch: dict[str, jax.ShapeDtypeStruct]
  params: Any
  weights: Any
  public: public_data_lib.PublicExamples | None
  teacher: frozen_teacher.LoadedTeacher | None
  vocabulary: str
  shard: dict[str, Any] | None
  layout: mesh_lib.Layout | None
  lineage: str
  environment: str

  def initial_state(self) -> dict[str, Any]:
    """Fresh parameters and optimizer state; the same at every start."""
    key = self.seed.key("initial parameters", branch="")
    # The key is an argument: a compiled program may be kept on disk.
    if self.layout is None:
      if self.weights is not None:
        params = jax.tree.map(jnp.asarray, self.weights)
      else:
        params = jax.jit(self.objective.model.init)(key)
      return {"params": params, "opt_state": self.step.init(params)}
    places = self._places(self.layout)
    if self.weights is not None:
      params = self._placed_weights(places["params"])
    else:
      init = jax.jit(self.objective.model.init, out_shardings=places["params"])
      params = init(key)
    begin = jax.jit(self.step.init, out_shardings=places["opt_state"])
    return {"params": params, "opt_state": begin(params)}

  def _placed_weights(self, places: Any) -> Any:
    # Each process gives what its own devices hold: all have read the file.
    return jax.tree.map(
      lambda x, place: jax.make_array_from_callback(
        x.shape, place, lambda index: x[index]
      ),
      self.weights,
      places,
    )

  def weights_digest(self) -> str:
    """Names the weights to start from; empty for fresh ones.

    Processes must have the same: which of them clips an example follows from
    the whole sample, and so other parameters on one of them would let one
    example move what others contribute.
    """
    if self.weights is None:
      return ""
    return checkpoints_lib.state_digest(self.weights)

  def state_like(self) -> dict[str, Any]:
    """Shapes of the state, with the places of its arrays."""
    shapes = self._shapes()
    if self.layout is None:
      here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      places = jax.tree.map(lambda _: here, shapes)
    else:
      places = self._places(self.layout)
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      shapes,
      places,
    )

  def _shapes(self) -> dict[str, Any]:
    opt_state = jax.eval_shape(self.step.init, self.params)
    return {"params": self.params, "opt_state": opt_state}

  def _places(self, layout: mesh_lib.Layout) -> dict[str, Any]:
    shapes = self._shapes()
    return {
      "params": layout.params,
      "opt_state": layout.opt_state(self.params, shapes["opt_state"]),
    }


def prepare(
  run: run_lib.TrainingRun,
  directory: pathlib.Path,
  ledger: ledger_lib.Ledger,
  records: records_lib.Records | None = None,
  layout: mesh_lib.Layout | None = None,
) -> Preparation:
  """Reads the corpus, makes the plan and checks everything.

  Of several processes the first must be done with this before the others call
  it: they read what it has written.

  Args:
    run: the user's settings.
    directory: MODEL_DIR, which exists.
    ledger: its ledger, open for writing; for the other processes, read.
    records: what to train on instead of the run's task.
    layout: of the mesh; None on one device.

  Returns:
    What the loop needs; the ledger has its header.

  Raises:
    ValueError: bad input; names the setting, its value and the way out.
  """
  numerics.check_sums()
  seed = (
    keys_lib.load_or_create(directory)
    if run.fixed_seed is None
    else keys_lib.fixed_seed(run.fixed_seed)
  )
  if records is None:
    records = records_lib.read_records(
      run, directory, started=bool(ledger.header)
    )
  records_lib.check_records(run, records)
  records_store, validation = records.train, records.validation
  store = examples_lib.of_run(run, records_store, validation, seed)
  # Where their number is private, no error may depend on it.
  if run.privacy.relation != "add_or_remove_one":
    batches.check_physical_batch(store.num_examples, run.physical_batch_size)
  recorded = ledger.header.get("plan", {})
  others = records.others(run.privacy)
  plan = plan_lib.make_plan(
    run.privacy,
    store.num_examples,
    calibrated_noise=recorded.get("noise_multiplier"),
    noise_coefficients=recorded.get("noise_coefficients"),
    others=others,
  )
  objective = objective_lib.Objective(run.model, run.masking)
  params = jax.eval_shape(objective.model.init, seed.key("shapes", branch=""))
  weights = run.initial_weights.load(params)
  teacher = None
  if run.learns:
    teacher = run.teacher.load(
      run.model, run.sequence_length, records.vocabulary_fingerprint, seed
    )
  corpus_fingerprint = seed.fingerprint(store.content_digest())
  shard = examples_lib.shard(run, records_store)
  ledger.start(
    plan,
    corpus=corpus_fingerprint,
    seed=seed.digest("identity").hex(),
    fixed_seed=seed.fixed,
    shard=shard,
  )
  if teacher is not None:
    teacher.check(ledger, claim=not seed.fixed)
  for other in others:
    ledger.record_other(other)
  declarations.declare(
    run,
    ledger,
    records,
    None if weights is None else checkpoints_lib.state_digest(weights),
    teacher,
  )
  batch = _batch_shapes(run, store.record_shape)
  clipping = methods.choose(
    objective.losses,
    params,
    batch,
    jax.eval_shape(lambda: jax.random.split(seed.key("shapes", branch=""))),
    run.clipping_method,
  )
  step = step_lib.PrivateStep(
    loss_fn=objective.losses,
    rule=rules.ClippingRule(
      plan.clipping, plan.l2_clip_norm, plan.automatic_gamma
    ),
    optimizer=ngram_learning.optimizer_for(
      run.model, run.optimizer, run.codebooks
    ),
    collect_statistics=run.unprotected_training_metrics,
    clipping_method=clipping,
    microbatch_size=run.microbatch_size,
    adaptation=_adaptation(plan),
    metrics=_metrics(plan),
    unprotected_codebooks=ngram_learning.unprotected_codebooks(run.model),
  )
  public = public_data_lib.examples(run.public_data, records.public, objective)
  return Preparation(
    plan=plan,
    seed=seed,
    store=store,
    evaluator=evaluation_lib.Evaluator(
      objective, validation, run.evaluation, layout
    )
    if validation is not None
    else None,
    objective=objective,
    step=step,
    clipping=clipping,
    batch=batch,
    params=params,
    weights=weights,
    public=public,
    teacher=teacher,
    vocabulary=records.vocabulary_fingerprint,
    shard=shard,
    layout=layout,
    lineage=lineage_lib.lineage(
      plan=plan.as_dict(),
      corpus=corpus_fingerprint,
      vocabulary=records.vocabulary_fingerprint,
      programs=lineage_lib.program_digest(
        step, params, jax.eval_shape(step.init, params), batch
      ),
      public=_described(run, public, params),
      taught=_taught(run, objective, step, params, batch, teacher),
    ),
    environment=lineage_lib.environment(
      run.physical_batch_size,
      run.microbatch_size,
      layout.described() if layout else "",
    ),
  )


def _described(
  run: run_lib.TrainingRun,
  public: public_data_lib.PublicExamples | None,
  params: Any,
) -> dict[str, Any] | None:
  """What decides the term of public records; None without."""
  if public is None:
    return None
  batch = _batch_shapes(run, public.store.record_shape)
  program = lineage_lib.public_program_digest(public.term, params, batch)
  return {**public.described(), "program": program}


def _taught(
  run: run_lib.TrainingRun,
  objective: objective_lib.Objective,
  step: step_lib.PrivateStep,
  params: Any,
  batch: Any,
  teacher: frozen_teacher.LoadedTeacher | None,
) -> str:
  """Digest of how teachers are matched; empty where nobody teaches."""
  if not run.learns:
    return ""
  models, teachers, told = [], [], ""
  if teacher is not None:
    models.append(teacher.model)
    teachers.append(_shapes_of(teacher.params))
    told = teacher.teacher.fingerprint
  if run.codistillation.teachers:
    models.append(objective.model.bare)
    teachers.append(jax.eval_shape(objective.model.bare_params, params))
  opt_state = jax.eval_shape(step.init, params)
  digest = lineage_lib.taught_program_digest(
    step,
    params,
    opt_state,
    batch,
    functools.partial(
      programs_lib.targets, objective, run.distillation, tuple(models)
    ),
    tuple(teachers),
  )
  return f"{run.distillation} {told} {digest}"


def _shapes_of(arrays: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)


def _batch_shapes(
  run: run_lib.TrainingRun, record_shape: tuple[int, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
  size = run.physical_batch_size
  return {
    "tokens": jax.ShapeDtypeStruct((size, *record_shape), "int32"),
    "example_ids": jax.ShapeDtypeStruct((size,), "int32"),
    "is_padding": jax.ShapeDtypeStruct((size,), "bool"),
  }


def _adaptation(
  plan: plan_lib.PrivacyPlan,
) -> adaptation_lib.NormAdaptation | None:
  if plan.adaptive_quantile is None:
    return None
  return adaptation_lib.NormAdaptation(
    target_quantile=plan.adaptive_quantile,
    learning_rate=plan.adaptive_learning_rate,
    budget_share=plan.adaptive_budget_share,
  )


def _metrics(
  plan: plan_lib.PrivacyPlan,
) -> private_metrics.PrivateMetrics | None:
  ranges = plan_lib.metric_ranges(plan.as_dict())
  if plan.private_metrics_share is None:
    return None
  return private_metrics.PrivateMetrics(
    budget_share=plan.private_metrics_share,
    names=tuple(ranges),
    max_loss=ranges["loss"],
    max_norm=ranges["gradient_norm"],
  )
