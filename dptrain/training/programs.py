"""The compiled programs of a run, on one device or on a mesh.

Shapes: B physical batch, S shards of a mesh.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax

from dptrain.models import distillation as distillation_lib
from dptrain.models import masked_lm
from dptrain.privacy import correlated_noise
from dptrain.privacy import noise
from dptrain.training import mesh as mesh_lib
from dptrain.training import objective as objective_lib
from dptrain.training import public_data
from dptrain.training import sharded_step
from dptrain.training import step as step_lib


class Programs(NamedTuple):
  """What a loop calls, in this order.

  Attributes:
    gathered: params -> parameters as the update needs them: whole along fsdp.
    zeros: (gathered, opt_state) -> an empty accumulator.
    accumulate: as `PrivateStep.accumulate`, on gathered parameters; takes the
      accumulator's memory over. On a mesh without model axis it has no
      collective.
    finish: as `PrivateStep.finish`, on parameters at rest. The one reduction of
      an update is in it.
    begin_noise: () -> the history of a branch's noise before its first update.
    next_noise: (noise key, history) -> what `finish` takes as `unit_noise`, and
      the history for the update after. None, both, where noise is independent.
  """

  gathered: Callable[[Any], Any]
  zeros: Callable[[Any, Any], step_lib.Accumulator]
  accumulate: Callable[..., step_lib.Accumulator]
  finish: Callable[..., tuple[Any, Any, dict[str, jax.Array]]]
  begin_noise: Callable[[], Any] | None = None
  next_noise: Callable[[jax.Array, Any], tuple[Any, Any]] | None = None


def make_programs(
  step: step_lib.PrivateStep,
  params: Any,
  batch: Any,
  layout: mesh_lib.Layout | None = None,
  banded: correlated_noise.BandedNoise | None = None,
) -> Programs:
  """Jits the private step; nothing is compiled until it is called.

  Args:
    step: the private step.
    params: shapes of the parameters.
    batch: shapes of a physical batch [B, ...].
    layout: of the mesh; None for one device.
    banded: how the noise of updates is correlated; None: not at all.

  Returns:
    The programs.
  """
  programs = _of_step(step, params, batch, layout)
  if banded is None:
    return programs
  opt_state = jax.eval_shape(step.init, params)
  like = step_lib.noised(jax.eval_shape(step.zeros, params, batch, opt_state))

  def next_noise(key: jax.Array, history: Any) -> tuple[Any, Any]:
    return banded.next(noise.gaussian_like(key, like, 1.0), history)

  return programs._replace(
    begin_noise=jax.jit(lambda: banded.begin(like)),
    next_noise=jax.jit(next_noise),
  )


def _of_step(
  step: step_lib.PrivateStep,
  params: Any,
  batch: Any,
  layout: mesh_lib.Layout | None,
) -> Programs:
  """The programs of `make_programs` under independent noise."""
  if layout is None:
    return Programs(
      gathered=lambda params: params,
      zeros=jax.jit(
        lambda params, opt_state: step.zeros(params, batch, opt_state)
      ),
      accumulate=jax.jit(step.accumulate, donate_argnums=1),
      # Parameters are not donated: a checkpoint may still be reading them.
      finish=jax.jit(step.finish, donate_argnums=()),
    )
  sharded = sharded_step.ShardedStep(
    step, layout.mesh, shard_axes=mesh_lib.SHARD_AXES
  )

  def zeros(params: Any, opt_state: Any) -> step_lib.Accumulator:
    return sharded.zeros(params, batch, opt_state)

  opt_state = jax.eval_shape(step.init, params)
  accumulator = accumulator_shardings(
    layout, jax.eval_shape(step.zeros, params, batch, opt_state)
  )
  if layout.gathered_params == layout.params:
    gathered = lambda params: params  # noqa: E731
  else:
    gathered = jax.jit(lambda x: x, out_shardings=layout.gathered_params)
  return Programs(
    gathered=gathered,
    zeros=jax.jit(zeros, out_shardings=accumulator),
    accumulate=jax.jit(
      sharded.accumulate, donate_argnums=1, out_shardings=accumulator
    ),
    finish=jax.jit(
      sharded.finish,
      out_shardings=(
        layout.params,
        layout.opt_state(params, opt_state),
        layout.replicated,
      ),
    ),
  )


def make_public(
  term: public_data.PublicTerm, layout: mesh_lib.Layout | None = None
) -> tuple[Callable[[Any], Any], Callable[..., Any]]:
  """Jits the public term: `PublicTerm.zeros` and `accumulate`.

  On a mesh each physical batch of public records has a reduction of its own.

  Args:
    term: what is computed.
    layout: of the mesh; None for one device.
  """
  places = {} if layout is None else {"out_shardings": layout.gathered_params}
  return (
    jax.jit(term.zeros, **places),
    jax.jit(term.accumulate, donate_argnums=1, **places),
  )


def targets(
  objective: objective_lib.Objective,
  distillation: distillation_lib.Distillation,
  models: Sequence[masked_lm.MaskedLanguageModel],
  params: Sequence[Any],
  batch: Any,
  examples_key: jax.Array,
  weight: jax.Array,
) -> Any:
  """What teachers predict of a physical batch, under the student's masks.

  Args:
    objective: the student's.
    distillation: how it learns.
    models: K teachers, at least one.
    params: of each.
    batch: a physical batch [B, ...].
    examples_key: of the update.
    weight: of the term, a scalar.

  Returns:
    The batch with an entry "targets" (`distillation.Targets`).
  """
  keys = step_lib.example_keys(batch, examples_key)
  masked = objective.masked_for_teachers(batch, keys)
  logits = distillation.averaged(
    [
      model.logits(own, masked)
      for model, own in zip(models, params, strict=True)
    ]
  )
  tokens = batch["tokens"]
  logits = logits.reshape(*tokens.shape[:-1], *logits.shape[1:])
  weights = jax.numpy.broadcast_to(
    jax.numpy.asarray(weight, logits.dtype), tokens.shape[:1]
  )
  taught = distillation_lib.Targets(logits, weights, distillation)
  return {**batch, "targets": taught}


def make_targets(
  objective: objective_lib.Objective,
  distillation: distillation_lib.Distillation,
  models: Sequence[masked_lm.MaskedLanguageModel],
  rows: Any = None,
) -> Callable[..., Any]:
  """Jits `targets`: (params, batch, examples_key, weight) -> batch.

  Args:
    objective: the student's.
    distillation: how it learns.
    models: the teachers.
    rows: sharding of a physical batch; None for one device.
  """
  made = functools.partial(targets, objective, distillation, tuple(models))
  return jax.jit(made, out_shardings=rows)


def accumulator_shardings(
  layout: mesh_lib.Layout, accumulator: step_lib.Accumulator
) -> step_lib.Accumulator:
  """Where the stacked accumulator is: every shard holds its own part.

  Args:
    layout: of the mesh.
    accumulator: its structure.
  """
  rest = accumulator._replace(gradients=None)
  placed = jax.tree.map(lambda _: layout.rows, rest)
  return placed._replace(gradients=layout.sums)
