"""The private step on a mesh: examples are clipped where they are.

Every shard of the data axis keeps a sum of its own; they meet once per update,
when noise is due. Until then no collective touches a gradient, however many
physical batches there are.

Shapes: B physical batch over all shards, S shards of the data axis.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from dptrain.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class ShardedStep:
  """As `PrivateStep`, over the data axis of a mesh; other axes are left to jax.

  Formal guarantee: that of `PrivateStep`. The sum over shards of sums of
  clipped gradients is the sum over the physical batch: an example is on one
  shard, and clipped there by the norm of its whole gradient (over a model axis,
  jax adds up the norm's parts). Noise is added once, to the sum over all
  shards, and does not depend on the mesh if `jax_threefry_partitionable` is on.

  Attributes:
    step: the private step; its `microbatch_size` is that of one shard.
    mesh: the devices.
    data_axis: the mesh's axis along which examples are dealt out.
  """

  step: step_lib.PrivateStep
  mesh: Mesh
  data_axis: str = "data"

  def __post_init__(self) -> None:
    if self.data_axis not in self.mesh.axis_names:
      raise ValueError(
        f"data_axis={self.data_axis!r} is none of the mesh's axes"
        f" {self.mesh.axis_names}; name the one that examples are dealt along."
      )

  @property
  def num_shards(self) -> int:
    """S."""
    return int(self.mesh.shape[self.data_axis])

  def batch_sharding(self) -> NamedSharding:
    """How the rows of a physical batch are dealt out."""
    return NamedSharding(self.mesh, PartitionSpec(self.data_axis))

  def check(self, physical_batch_size: int) -> None:
    """Raises ValueError unless S divides B."""
    if physical_batch_size % self.num_shards:
      raise ValueError(
        f"physical_batch_size={physical_batch_size} is not a multiple of the"
        f" {self.num_shards} shards of mesh axis {self.data_axis!r}; choose a"
        " multiple, or a smaller data axis."
      )

  def init(self, params: Any) -> Any:
    """As `PrivateStep.init`."""
    return self.step.init(params)

  def zeros(
    self, params: Any, batch: Any, opt_state: Any = None
  ) -> step_lib.Accumulator:
    """An empty accumulator: arrays of `PrivateStep.zeros`, [S, ...] each."""
    shards = self.num_shards

    def stacked(x: jax.Array) -> jax.Array:
      every = jnp.broadcast_to(x, (shards, *x.shape))
      return jax.lax.with_sharding_constraint(every, self.batch_sharding())

    one = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        (x.shape[0] // shards, *x.shape[1:]), x.dtype
      ),
      batch,
    )
    return jax.tree.map(stacked, self.step.zeros(params, one, opt_state))

  def accumulate(
    self,
    params: Any,
    accumulator: step_lib.Accumulator,
    batch: Any,
    examples_key: jax.Array,
  ) -> step_lib.Accumulator:
    """As `PrivateStep.accumulate`, each shard for its own rows."""

    def local(
      params: Any, accumulator: Any, batch: Any, examples_key: jax.Array
    ) -> Any:
      own = jax.tree.map(lambda x: x[0], accumulator)
      own = self.step.accumulate(params, own, batch, examples_key)
      return jax.tree.map(lambda x: x[None], own)

    along = PartitionSpec(self.data_axis)
    everywhere = PartitionSpec()
    return jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(everywhere, along, along, everywhere),
      out_specs=along,
      axis_names={self.data_axis},
      # Taps are custom derivatives: what varies along the mesh is not inferred.
      check_vma=False,
    )(params, accumulator, batch, examples_key)

  def finish(
    self,
    params: Any,
    opt_state: Any,
    accumulator: step_lib.Accumulator,
    *,
    noise_key: jax.Array,
    noise_multiplier: jax.Array | float,
    expected_batch_size: jax.Array | float,
  ) -> tuple[Any, Any, dict[str, jax.Array]]:
    """As `PrivateStep.finish`, after the one sum over all shards."""
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), accumulator)
    if accumulator.adapting is not None:
      # The same on every shard: not a sum.
      adapting = accumulator.adapting._replace(
        l2_clip_norm=accumulator.adapting.l2_clip_norm[0],
        tally=jnp.sum(accumulator.adapting.tally),
      )
      total = total._replace(adapting=adapting)
    return self.step.finish(
      params,
      opt_state,
      total,
      noise_key=noise_key,
      noise_multiplier=noise_multiplier,
      expected_batch_size=expected_batch_size,
    )
