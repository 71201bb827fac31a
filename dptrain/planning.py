"""From flags or a gin file to a forecast of what a run would cost."""

import argparse
import pathlib
from typing import Any

from dptrain.privacy import others as others_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule as schedule_lib
from dptrain.reports import advice as advice_lib
from dptrain.reports import forecast as forecast_lib

_GIN_FLAGS = (
  "delta",
  "epsilon",
  "noise_multiplier",
  "phase",
  "sampling",
  "relation",
  "bands",
)
_NOT_FOR_ADVICE = (
  "gin_file",
  "phase",
  "noise_multiplier",
  "compare",
  "num_parameters",
  "sequence_length",
)


def forecast(arguments: argparse.Namespace) -> forecast_lib.Forecast:
  """The forecast that the flags of `dptrain plan` ask for.

  Args:
    arguments: the flags. With gin files, these give the schedule, the budget
      and the model; without, `delta`, `phase` and one of `epsilon` and
      `noise_multiplier` must be given.

  Returns:
    The forecast.

  Raises:
    ValueError: a flag is missing, or contradicts the gin file.
  """
  if arguments.flops is not None:
    raise ValueError(
      f"--flops={arguments.flops:g} is read with --advise only: add that, or"
      " leave it out."
    )
  run = _run(arguments) if arguments.gin_file else None
  settings = _settings(arguments) if run is None else run.privacy
  others = _others(run)
  plan = plan_lib.make_plan(
    settings, _num_examples(arguments, run), others=others
  )
  return forecast_lib.forecast(
    plan,
    model=_model_cost(run) if run else _stated_cost(arguments),
    constant_batches=[
      _whole("compare", float(size))
      for size in arguments.compare.split(",")
      if size
    ],
    others=others,
  )


def advise(arguments: argparse.Namespace) -> advice_lib.Advice:
  """The advice that the flags of `dptrain plan --advise` ask for.

  Args:
    arguments: the flags: `num_examples` and `epsilon`, perhaps `delta` and
      `flops`.

  Returns:
    The advice.

  Raises:
    ValueError: a flag is missing, or is one that advice would decide.
  """
  for name in _NOT_FOR_ADVICE:
    if getattr(arguments, name):
      raise ValueError(
        f"--{name} and --advise are both given; advice chooses model and"
        " schedule: leave one of the two out."
      )
  for name in ("num_examples", "epsilon"):
    if getattr(arguments, name) is None:
      raise ValueError(f"--{name} is missing: --advise needs it.")
  return advice_lib.advise(
    _whole("num_examples", arguments.num_examples),
    arguments.epsilon,
    delta=arguments.delta,
    flops=arguments.flops,
  )


def _run(arguments: argparse.Namespace) -> Any:
  given = [name for name in _GIN_FLAGS if getattr(arguments, name)]
  if given:
    raise ValueError(
      f"--{given[0]} and --gin_file are both given; bind it instead, for"
      " example --gin.TARGET_EPSILON=4, or leave the gin file out."
    )
  from dptrain import configuration

  # A file may leave MODEL_DIR to the command line; planning needs none.
  return configuration.training_run(
    arguments.gin_file,
    arguments.gin_bindings,
    arguments.gin_search_paths,
    defaults=["MODEL_DIR = 'no MODEL_DIR'"],
  )


def _others(run: Any) -> tuple[others_lib.OtherRelease, ...]:
  """What a run's vocabulary released."""
  if run is None or run.vocabulary.path is None:
    return ()
  from dptrain.data import private_vocabulary

  release = private_vocabulary.read_release(run.vocabulary.path)
  if release is None or release.fixed_seed:
    return ()
  return (release.other(run.privacy.unit, run.privacy.relation),)


def _settings(arguments: argparse.Namespace) -> plan_lib.PrivacySettings:
  for name in ("delta", "phase"):
    if not getattr(arguments, name):
      raise ValueError(
        f"--{name} is missing: give it, or a gin file by --gin_file."
      )
  relation = arguments.relation or "zero_out"
  phases = [forecast_lib.parse_phase(text) for text in arguments.phase]
  return plan_lib.PrivacySettings(
    schedule=schedule_lib.BatchSchedule(phases),
    delta=arguments.delta,
    target_epsilon=arguments.epsilon,
    noise_multiplier=arguments.noise_multiplier,
    sampling=arguments.sampling or "poisson",
    relation=relation,
    bands=1 if arguments.bands is None else arguments.bands,
    public_num_examples=_num_examples(arguments, None)
    if relation == "add_or_remove_one"
    else None,
  )


def _num_examples(arguments: argparse.Namespace, run: Any) -> int:
  if arguments.num_examples is not None:
    return _whole("num_examples", arguments.num_examples)
  if run is not None:
    if run.privacy.public_num_examples is not None:
      return int(run.privacy.public_num_examples)
    from dptrain.privacy import ledger

    path = pathlib.Path(run.model_dir).expanduser() / ledger.LEDGER_FILE
    if path.exists():
      header = ledger.read(path.parent).header
      return int(header["plan"]["num_examples"])
  raise ValueError(
    "--num_examples is missing: epsilon depends on the number of records in the"
    " corpus (a MODEL_DIR that trains already has it in its ledger)."
  )


def _stated_cost(
  arguments: argparse.Namespace,
) -> forecast_lib.ModelCost | None:
  number, length = arguments.num_parameters, arguments.sequence_length
  if number is None or length is None:
    return None
  return forecast_lib.ModelCost(
    num_parameters=_whole("num_parameters", number),
    sequence_length=_whole("sequence_length", length),
  )


def _model_cost(run: Any) -> forecast_lib.ModelCost:
  """From shapes alone."""
  import jax

  from dptrain.models import masked_lm
  from dptrain.training import ngram_learning

  optimizer = ngram_learning.optimizer_for(
    run.model, run.optimizer, run.codebooks
  )
  key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
  params = jax.eval_shape(run.model.init, key)
  number = masked_lm.num_parameters(params)
  return forecast_lib.ModelCost(
    num_parameters=number,
    sequence_length=run.sequence_length,
    memory={
      "parameters": _bytes(params),
      "optimizer": _bytes(jax.eval_shape(optimizer.init, params)),
      "clipped sum": 4 * number,
    },
  )


def _bytes(tree: Any) -> int:
  import jax

  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _whole(name: str, value: float) -> int:
  if value != int(value) or value < 1:
    raise ValueError(f"--{name}={value:g} must be a whole number >= 1.")
  return int(value)
