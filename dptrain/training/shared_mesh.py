"""Replicas as groups of one mesh: one collective exchanges their weights.

Shapes: R replicas, each on an equal group of the devices.
"""

from collections.abc import Mapping, Sequence
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from dptrain.training import exchange as exchange_lib

_AXIS = "replica"


class SharedMesh:
  """An `exchange.Exchange` among replicas of one process.

  Weights stay on their devices. When all replicas have published after the same
  update, one all-gather along the axis of replicas puts all of them on all
  groups, each split as its own replica had it.
  """

  def __init__(self, replicas: int, keep: int = 2):
    """Takes the number of replicas.

    Args:
      replicas: R.
      keep: publications of each that are held.
    """
    self._descriptions: dict[str, Mapping[str, Any]] = {}
    self._held: list[list[exchange_lib.Publication]] = [
      [] for _ in range(replicas)
    ]
    self._keep = keep
    self._gathered: dict[int, list[Any]] = {}

  def introduce(self, description: Mapping[str, Any]) -> None:
    """See `exchange.Exchange`."""
    for name, found in self._descriptions.items():
      exchange_lib.check_fits(description, found, name, "one process")
    self._descriptions[str(len(self._descriptions))] = description

  def group(self) -> str:
    """See `exchange.Exchange`; the same whenever these runs meet."""
    runs = sorted(str(each["run"]) for each in self._descriptions.values())
    return hashlib.sha256("\x1f".join(runs).encode()).hexdigest()[:32]

  def publish(self, publication: exchange_lib.Publication) -> None:
    """See `exchange.Exchange`."""
    held = self._held[publication.replica]
    held.append(publication)
    del held[: -self._keep]

  def newest_step(self, replica: int) -> int | None:
    """See `exchange.Exchange`."""
    held = self._held[replica]
    return held[-1].step if held else None

  def read(self, replica: int, step: int) -> exchange_lib.Publication | None:
    """See `exchange.Exchange`."""
    held = self._held[replica]
    fitting = [each for each in held if each.step <= step] or held
    return fitting[-1] if fitting else None

  def placed(self, fingerprint: str, reader: int) -> Any:
    """See `exchange.Exchange`; None unless all published after one update."""
    for held in self._held:
      for each in held:
        if each.fingerprint == fingerprint:
          return self._of_all(each.step, each.replica, reader)
    return None

  def _of_all(self, step: int, replica: int, reader: int) -> Any:
    if step not in self._gathered:
      same = [
        next((each for each in held if each.step == step), None)
        for held in self._held
      ]
      if any(each is None for each in same):
        return None
      trees = [each.arrays for each in same if each is not None]
      self._gathered = {step: gathered(trees)}
    return jax.tree.map(lambda x: x[replica], self._gathered[step][reader])


def gathered(trees: Sequence[Any]) -> list[Any]:
  """Brings R trees, each on devices of its own, to all of those devices.

  One program with one all-gather per array, along an axis of replicas.

  Args:
    trees: of equal structure, shapes and PartitionSpecs, on disjoint meshes of
      one shape.

  Returns:
    For each replica a tree of arrays [R, ...], on its own mesh.
  """
  leaves = [jax.tree.leaves(tree) for tree in trees]
  meshes = [own[0].sharding.mesh for own in leaves]
  names = meshes[0].axis_names
  devices = np.stack([mesh.devices for mesh in meshes])
  whole = Mesh(devices, (_AXIS, *names))
  stacked, places = [], []
  for parts in zip(*leaves, strict=True):
    spec = parts[0].sharding.spec
    shards = [
      jnp.expand_dims(shard.data, 0)
      for part in parts
      for shard in part.addressable_shards
    ]
    stacked.append(
      jax.make_array_from_single_device_arrays(
        (len(trees), *parts[0].shape),
        NamedSharding(whole, PartitionSpec(_AXIS, *spec)),
        shards,
      )
    )
    places.append(NamedSharding(whole, PartitionSpec(None, *spec)))
  together = jax.jit(lambda arrays: arrays, out_shardings=places)(stacked)
  structure = jax.tree.structure(trees[0])
  return [
    jax.tree.unflatten(
      structure,
      [
        _on(mesh, array, own.sharding.spec)
        for array, own in zip(together, leaves[number], strict=True)
      ],
    )
    for number, mesh in enumerate(meshes)
  ]


def _on(mesh: Mesh, array: jax.Array, spec: PartitionSpec) -> jax.Array:
  """The shards of an array that lie on one group of its devices."""
  here = set(mesh.devices.flat)
  return jax.make_array_from_single_device_arrays(
    array.shape,
    NamedSharding(mesh, PartitionSpec(None, *spec)),
    [each.data for each in array.addressable_shards if each.device in here],
  )
