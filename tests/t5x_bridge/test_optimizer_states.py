"""Any optax state is sharded as its parameters are, saved and restored."""

import jax
from jax.sharding import PartitionSpec
import optax
import pytest

pytest.importorskip("t5x", reason="t5x is missing")

import matrix_optimizer
from t5x import optimizers as t5x_optimizers

from dptrain.optimizers import adamw
from dptrain.optimizers import grafting
from dptrain.optimizers import lamb
from dptrain.optimizers import rmsprop
from dptrain.optimizers import sm3
from dptrain.optimizers import step_size_adaptation
from dptrain.t5x_bridge import optimizers

PARAMS = {"dense": {"kernel": (16, 64), "bias": (64,)}, "bias": (16,)}
AXES = {
  "dense": {
    "kernel": PartitionSpec("embed", "mlp"),
    "bias": PartitionSpec("mlp"),
  },
  "bias": PartitionSpec("embed"),
}


def derived(transformation, state_axes=None):
  params = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
    PARAMS,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  definition = optimizers.OptaxWrapper(transformation, state_axes)
  made = jax.eval_shape(definition.create, params)
  axes = definition.derive_logical_axes(made, AXES)
  assert isinstance(axes, t5x_optimizers.Optimizer)
  return axes.state.param_states


@pytest.mark.parametrize(
  "transformation",
  [
    optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    optax.lamb(optax.linear_schedule(1.0, 0.0, 10)),
    optax.adafactor(1e-3, min_dim_size_to_factor=4),
    optax.sm3(1e-3),
    optax.contrib.muon(1e-3),
    optax.contrib.schedule_free_adamw(1e-3),
    optax.contrib.prodigy(),
    optax.novograd(1e-3),
    optax.amsgrad(1e-3),
    optax.inject_hyperparams(optax.adam)(1e-3),
    optax.masked(
      optax.adam(1e-3),
      {"dense": {"kernel": True, "bias": False}, "bias": False},
    ),
    matrix_optimizer.matrices(1e-3),
    sm3.sm3(1e-3),
    adamw.adamw(1e-3, correct_noise=True),
    grafting.graft(rmsprop.rmsprop(1e-3), lamb.lamb(1e-3)),
    step_size_adaptation.adapt_step_size(sm3.sm3(1e-3, b1=0.0), gain_rate=0.1),
  ],
)
def test_states_of_all_kinds_get_axes(transformation):
  axes = derived(transformation)
  named = [x for x in jax.tree.leaves(axes) if isinstance(x, PartitionSpec)]
  assert named
  assert len(named) == len(jax.tree.leaves(axes))


def test_moments_get_the_axes_of_their_parameter():
  axes = derived(optax.adam(1e-3))[0]
  assert axes.mu == AXES
  assert axes.count == PartitionSpec()


def test_factored_moments_get_what_is_left():
  state = derived(optax.adafactor(1e-3, min_dim_size_to_factor=4))[0]
  (row,) = {state.v_row["dense"]["kernel"], state.v_col["dense"]["kernel"]} - {
    PartitionSpec("embed")
  }
  assert row == PartitionSpec("mlp")
  assert state.v["dense"]["bias"] == PartitionSpec("mlp")


def test_vectors_and_matrices_get_one_axis():
  accumulators = derived(optax.sm3(1e-3))[0].mu["dense"]["kernel"]
  assert accumulators == [PartitionSpec("embed"), PartitionSpec("mlp")]
  state = derived(matrix_optimizer.matrices(1e-3))
  assert state.left["dense"]["kernel"] == PartitionSpec("embed", None)
  assert state.right["dense"]["kernel"] == PartitionSpec("mlp", None)


def test_own_axes_win():
  def state_axes(path, shape):
    return ("blocks", None) if path.startswith("left/") else None

  state = derived(matrix_optimizer.matrices(1e-3), state_axes)
  assert state.left["dense"]["kernel"] == PartitionSpec("blocks", None)
  assert state.right["dense"]["kernel"] == PartitionSpec("mlp", None)


def test_a_parameter_is_found_by_its_whole_name():
  names = {("bias",): 0, ("dense", "bias"): 1}
  assert optimizers.parameter_within(("0", "mu", "dense", "bias"), names) == (
    "dense",
    "bias",
  )
  assert optimizers.parameter_within(("0", "mu", "bias"), names) == ("bias",)
  assert optimizers.parameter_within(("0", "count"), names) is None
