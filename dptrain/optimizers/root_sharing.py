"""Dealing a stack of matrices out to the devices of a mesh, and back.

Without it every device would compute every root: an optimizer's update is the
same work on all of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec


def shared(
  function: Callable[..., Any], mesh: Mesh | None, *stacks: jax.Array
) -> Any:
  """Applies a function to stacks, each device to its share of the rows.

  Args:
    function: from arrays [n, ...] to a tree of arrays [n, ...], whose row i
      depends on row i alone, for every n.
    mesh: whose devices share the work, along all of its axes; None for the mesh
      of `jax.set_mesh` or `jax.sharding.use_abstract_mesh`, if there is one. On
      a single device, or inside a `shard_map`, nothing is shared.
    *stacks: arrays [N, ...], the same on all devices.

  Returns:
    What the function returns for N rows. On D devices each computes
    ceil(N / D) rows (the last row is repeated to fill up), and every array is
    gathered once.
  """
  used = mesh if mesh is not None else jax.sharding.get_abstract_mesh()
  if used.empty or used.size == 1 or _inside_a_shard_map():
    return function(*stacks)
  rows = stacks[0].shape[0]
  size = -(-rows // used.size)
  axes = used.axis_names

  def share(*whole: jax.Array) -> Any:
    # Stacks come in whole and are cut here: were they cut by the mesh, jax
    # would let their sharding spread to what surrounds this.
    first = jax.lax.axis_index(axes) * size
    own = jnp.minimum(first + jnp.arange(size), rows - 1)
    return jax.tree.map(
      lambda x: jax.lax.all_gather(x, axes, tiled=True),
      function(*(x[own] for x in whole)),
    )

  found = jax.shard_map(
    share,
    mesh=used,
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(),
    check_vma=False,
  )(*stacks)
  return jax.tree.map(lambda x: x[:rows], found)


def _inside_a_shard_map() -> bool:
  types = jax.sharding.get_abstract_mesh().axis_types
  return jax.sharding.AxisType.Manual in types
