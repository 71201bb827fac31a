"""Where a run's arrays live: a mesh of devices and what is dealt along it.

Axes of the mesh:

  data   examples; every device of it holds all parameters.
  fsdp   examples too; parameters at rest and optimizer state are split along
         it, and gathered once per update.
  model  dimensions of the parameters (vocabulary, MLP, heads); jax splits the
         computation accordingly.

Shapes: P physical batch over all devices, S = data * fsdp shards of it, N
devices.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from flax.linen import spmd
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from dptrain.training import settings as settings_lib

AXES = ("data", "fsdp", "model")
SHARD_AXES = ("data", "fsdp")
RULES = (
  ("vocab", "model"),
  ("mlp", "model"),
  ("heads", "model"),
  ("embed", "fsdp"),
)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """How devices are arranged; changes speed, memory and rounding, no result.

  Attributes:
    data: devices along the data axis; None for all that the others leave.
    fsdp: devices along the fsdp axis.
    model: devices along the model axis.
    rules: pairs of a parameter's logical axis (`dptrain.models.axes`) and the
      mesh axis along which it is split, or None; earlier ones win.
  """

  data: int | None = None
  fsdp: int = 1
  model: int = 1
  rules: Sequence[tuple[str, str | None]] = RULES

  def __post_init__(self) -> None:
    for name in AXES:
      size = getattr(self, name)
      if size is not None or name != "data":
        settings_lib.check_whole(f"MeshSettings.{name}", size, least=1)
    for rule in self.rules:
      if not (
        isinstance(rule, Sequence)
        and len(rule) == 2
        and isinstance(rule[0], str)
        and rule[1] in (*AXES[1:], None)
      ):
        raise ValueError(
          f"MeshSettings.rules has {rule!r}; each must be a pair of a logical"
          " axis (such as 'mlp') and 'fsdp', 'model' or None."
        )

  def sizes(self, num_devices: int, num_processes: int = 1) -> tuple[int, ...]:
    """Sizes of `AXES` on this many devices.

    Args:
      num_devices: N.
      num_processes: among which they are.

    Raises:
      ValueError: they do not fit.
    """
    others = self.fsdp * self.model
    data = self.data if self.data is not None else num_devices // others
    told = (
      f"MeshSettings.data={self.data}, fsdp={self.fsdp}, model={self.model}"
    )
    if self.data is None and (not data or num_devices % others):
      raise ValueError(
        f"{told}: fsdp * model = {others} does not divide the {num_devices}"
        " devices; choose sizes whose product does."
      )
    total = data * others
    if total > num_devices:
      raise ValueError(
        f"{told}: a mesh of {total} devices, but there are {num_devices};"
        " choose smaller sizes, or data=None for all that are left."
      )
    if num_processes > 1 and total != num_devices:
      raise ValueError(
        f"{told}: a mesh of {total} devices, but the {num_processes} processes"
        f" have {num_devices}, and all must take part; use data=None."
      )
    return data, self.fsdp, self.model


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh, and where on it every array of a run is.

  Attributes:
    mesh: devices, of axes `AXES`.
    specs: a PartitionSpec for each parameter, at rest.
    whole: names of parameters, with a dimension that a rule would split but
      whose size does not allow it: it stays whole.
  """

  mesh: Mesh
  specs: Any
  whole: tuple[str, ...] = ()

  @property
  def num_shards(self) -> int:
    """S, the parts into which a physical batch is dealt."""
    return math.prod(self.mesh.shape[axis] for axis in SHARD_AXES)

  def described(self) -> str:
    """The mesh and how parameters are split, in words."""
    specs = jax.tree_util.tree_leaves_with_path(
      self.specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    split = [f"{jax.tree_util.keystr(path)}{spec}" for path, spec in specs]
    return f"{dict(self.mesh.shape)} {' '.join(split)}"

  @property
  def replicated(self) -> NamedSharding:
    """On every device, whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def rows(self) -> NamedSharding:
    """Arrays [P, ...] of a physical batch."""
    return NamedSharding(self.mesh, PartitionSpec(SHARD_AXES))

  @property
  def params(self) -> Any:
    """Parameters at rest."""
    return self._placed(lambda spec: spec)

  @property
  def gathered_params(self) -> Any:
    """Parameters during an update: whole along fsdp."""
    return self._placed(_without_fsdp)

  @property
  def sums(self) -> Any:
    """Stacks [S, ...] of one array like each parameter for every shard."""
    return self._placed(
      lambda spec: PartitionSpec(SHARD_AXES, *_without_fsdp(spec))
    )

  def opt_state(self, params: Any, opt_state: Any) -> Any:
    """Shardings of an optimizer's state.

    An array whose name ends in a parameter's name and which has its shape is
    split as that parameter is; any other is on every device.

    Args:
      params: shapes of the parameters.
      opt_state: shapes of the state.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    found = {
      (path, leaf.shape): sharding
      for (path, leaf), sharding in zip(
        flat, jax.tree.leaves(self.params), strict=True
      )
    }

    def place(path: Any, leaf: Any) -> NamedSharding:
      for start in range(len(path) + 1):
        if (path[start:], leaf.shape) in found:
          return found[path[start:], leaf.shape]
      return self.replicated

    return jax.tree_util.tree_map_with_path(place, opt_state)

  def check_batch(
    self, name: str, size: int, microbatch_size: int | None = None
  ) -> None:
    """Refuses a physical batch that cannot be dealt out.

    Args:
      name: the setting, for the message.
      size: P.
      microbatch_size: rows that a shard clips at once; None for all.

    Raises:
      ValueError: S does not divide it, or the microbatch not a shard's part.
    """
    shards = self.num_shards
    axes = ", ".join(f"{axis}={self.mesh.shape[axis]}" for axis in SHARD_AXES)
    if size % shards:
      raise ValueError(
        f"{name}={size} is not a multiple of the {shards} shards of the mesh"
        f" ({axes}); choose a multiple, or another mesh."
      )
    if microbatch_size and size // shards % microbatch_size:
      raise ValueError(
        f"TrainingRun.microbatch_size={microbatch_size} does not divide the"
        f" {size // shards} rows of {name}={size} that each of the"
        f" {shards} shards ({axes}) gets; choose a divisor of it."
      )

  def own_rows(self, size: int) -> np.ndarray:
    """Numbers of the rows of a physical batch that this process builds.

    Row r goes to shard r modulo S: what is missing from the last batch of an
    update is then missing from all shards alike.

    Args:
      size: P.

    Returns:
      Numbers in [0, P), in the order of this process's devices.
    """
    index = self.rows.addressable_devices_indices_map((size,))
    starts = {rows[0].indices(size)[:2] for rows in index.values() if rows}
    places = np.concatenate([np.arange(*start) for start in sorted(starts)])
    part = size // self.num_shards
    return places % part * self.num_shards + places // part

  def place(self, rows: Any, size: int) -> Any:
    """A physical batch on its devices.

    Args:
      rows: host arrays, of this process's `own_rows`.
      size: P.
    """
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(
        self.rows, x, (size, *x.shape[1:])
      ),
      rows,
    )

  def _placed(self, change: Any) -> Any:
    return jax.tree.map(
      lambda spec: NamedSharding(self.mesh, change(spec)),
      self.specs,
      is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def make_layout(
  settings: MeshSettings,
  model: Any,
  devices: Sequence[jax.Device] | None = None,
) -> Layout | None:
  """Arranges the devices.

  Args:
    settings: of the mesh.
    model: `masked_lm.MaskedLanguageModel`, for names and shapes of parameters;
      those without a name are on every device.
    devices: to arrange; None: all of them.

  Returns:
    The layout; None if it is jax's one device, which needs none.

  Raises:
    ValueError: the mesh does not fit the devices.
  """
  chosen = jax.devices() if devices is None else list(devices)
  sizes = settings.sizes(len(chosen), jax.process_count())
  total = math.prod(sizes)
  if total == 1 and devices is None:
    return None
  mesh = Mesh(np.array(chosen[:total]).reshape(sizes), AXES)
  key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
  shapes = jax.eval_shape(model.init, key)
  names = dict(
    jax.tree_util.tree_leaves_with_path(
      model.logical_axes(), is_leaf=lambda x: isinstance(x, tuple)
    )
  )
  whole: list[str] = []

  def spec(path: Any, leaf: Any) -> PartitionSpec:
    unnamed = (None,) * len(leaf.shape)
    own = names.get(path, unnamed)
    wanted = spmd.logical_to_mesh_axes(own, list(settings.rules)) or unnamed
    parts = []
    for name, axis, length in zip(own, wanted, leaf.shape, strict=True):
      if axis is not None and length % mesh.shape[axis]:
        whole.append(f"{jax.tree_util.keystr(path)} {name}={length}")
        axis = None
      parts.append(axis)
    return PartitionSpec(*parts)

  specs = jax.tree_util.tree_map_with_path(spec, shapes)
  return Layout(mesh, specs, tuple(whole))


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
  return PartitionSpec(*[None if axis == "fsdp" else axis for axis in spec])
