"""The private step on a mesh: examples are clipped where they are.

Every shard keeps a sum of its own; they meet once per update, when noise is
due. Until then no collective touches a gradient, however many physical batches
there are.

Shapes: B physical batch over all shards, S shards.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from dptrain.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class ShardedStep:
  """As `PrivateStep`, over some axes of a mesh; other axes are left to jax.

  Formal guarantee: that of `PrivateStep`. The sum over shards of sums of
  clipped gradients is the sum over the physical batch: an example is on one
  shard, and clipped there by the norm of its whole gradient (over a model axis,
  jax adds up the norm's parts). Noise is added once, to the sum over all
  shards, and does not depend on the mesh if `jax_threefry_partitionable` is on.

  Attributes:
    step: the private step; its `microbatch_size` is that of one shard.
    mesh: the devices.
    shard_axes: the mesh's axes along which examples are dealt out; S is the
      product of their sizes. Parameters must be whole along them: inside
      `accumulate`, what is not whole is gathered first.
  """

  step: step_lib.PrivateStep
  mesh: Mesh
  shard_axes: tuple[str, ...] = ("data",)

  def __post_init__(self) -> None:
    if unknown := set(self.shard_axes) - set(self.mesh.axis_names):
      raise ValueError(
        f"shard_axes={self.shard_axes!r}: {sorted(unknown)} are none of the"
        f" mesh's axes {self.mesh.axis_names}; name those that examples are"
        " dealt along."
      )

  @property
  def num_shards(self) -> int:
    """S."""
    return math.prod(self.mesh.shape[axis] for axis in self.shard_axes)

  def batch_sharding(self) -> NamedSharding:
    """How the rows of a physical batch are dealt out."""
    return NamedSharding(self.mesh, PartitionSpec(self.shard_axes))

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
      free = [PartitionSpec.UNCONSTRAINED] * x.ndim
      spec = PartitionSpec(self.shard_axes, *free)
      return jax.lax.with_sharding_constraint(
        every, NamedSharding(self.mesh, spec)
      )

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

    along = PartitionSpec(self.shard_axes)
    everywhere = PartitionSpec()
    return jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(everywhere, along, along, everywhere),
      out_specs=along,
      axis_names=set(self.shard_axes),
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
    **others: Any,
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
    # Optimizers may share their own work out over the mesh that is in use.
    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
      return self.step.finish(
        params,
        opt_state,
        total,
        noise_key=noise_key,
        noise_multiplier=noise_multiplier,
        expected_batch_size=expected_batch_size,
        **others,
      )
