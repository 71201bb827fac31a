"""Where a fresh run starts: the thin loop's own parameters, sharded."""

from typing import Any

from flax import serialization
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from t5x import utils

from dptrain.t5x_bridge import launch as launch_lib
from dptrain.t5x_bridge import optimizers


class SeededInitializer(utils.TrainStateInitializer):
  """Starts from the secret seed; t5x's `random_seed` decides nothing.

  To be bound to `train.train_state_initializer_cls`. Restoring is t5x's own.
  Every process computes the whole state before it is sharded, so that it is bit
  for bit the same on any mesh: it must fit on one device once.
  """

  def __init__(self, *, launch: launch_lib.Launch, **settings: Any):
    """Takes the run, and what t5x gives every initializer."""
    super().__init__(**settings)
    optimizers.private_state(self.global_train_state_shape)
    self._launch = launch

  def from_scratch(self, init_rng: Any) -> Any:
    """The train state before the first update; `init_rng` is not read."""
    del init_rng
    state = self._launch.prepared.initial_state()
    slot = optimizers.fresh_state(state["opt_state"])
    whole = self.global_train_state_shape.restore_state(
      {
        "target": state["params"],
        "state": {
          "step": jax.numpy.zeros((), jax.numpy.int32),
          "param_states": serialization.to_state_dict(slot),
        },
      }
    )
    return jax.tree.map(
      _sharded,
      whole,
      shardings(self._partitioner, self.train_state_axes, whole),
    )


def shardings(partitioner: Any, axes: Any, like: Any) -> Any:
  """Shardings on t5x's mesh.

  Args:
    partitioner: t5x's.
    axes: tree of `PartitionSpec`, or None for what is replicated.
    like: tree of arrays, or their shapes, whose structure `axes` has but for
      its Nones.

  Returns:
    A tree of the structure of `like`.
  """

  def sharding(spec: Any, part: Any) -> Any:
    chosen = NamedSharding(
      partitioner.mesh, PartitionSpec() if spec is None else spec
    )
    return jax.tree.map(lambda _: chosen, part)

  return jax.tree.map(sharding, axes, like, is_leaf=lambda x: x is None)


def _sharded(x: Any, sharding: NamedSharding) -> jax.Array:
  host = jax.device_get(x)
  return jax.make_array_from_callback(
    host.shape, sharding, lambda index: host[index]
  )
