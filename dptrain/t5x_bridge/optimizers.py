"""Any optax state in t5x's train state, with logical axes for sharding."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import core
from flax import serialization
from flax import traverse_util
import jax
from jax.sharding import PartitionSpec
import numpy as np
import optax
from t5x import optimizers

from dptrain.t5x_bridge import fingerprint
from dptrain.t5x_bridge import launch as launch_lib

Path = tuple[str, ...]
StateAxes = Callable[[str, tuple[int, ...]], tuple[str | None, ...] | None]


class OptaxWrapper(optimizers.OptaxWrapper):
  """t5x's wrapper, for every optax transformation and not a list of some.

  An array of the state that stands under a parameter's name gets that
  parameter's axes, dimension by dimension, where sizes agree: moments (same
  shape), factored moments (a dimension less), SM3's vectors (one dimension),
  Shampoo's matrices (one dimension sharded). All others are replicated. A wrong
  guess costs speed, never correctness: axes decide only where numbers are.
  """

  def __init__(
    self,
    optax_optimizer: optax.GradientTransformation,
    state_axes: StateAxes | None = None,
  ):
    """Wraps an optimizer.

    Args:
      optax_optimizer: any optax transformation.
      state_axes: from an array's path ("0/mu/layers/kernel") and shape to its
        logical axes, or None to leave the decision to the rule above.
    """
    super().__init__(optax_optimizer)
    self._state_axes = state_axes

  def init_state(self, params: Any) -> optimizers.OptimizerState:
    """As t5x's, on plain dicts: masks and labels given as such would fail."""
    return super().init_state(core.unfreeze(params))

  def apply_gradient(
    self, hyper_params: Any, params: Any, state: Any, grads: Any
  ) -> tuple[Any, optimizers.OptimizerState]:
    """As t5x's, on plain dicts."""
    params, state = super().apply_gradient(
      hyper_params, core.unfreeze(params), state, core.unfreeze(grads)
    )
    return core.freeze(params), state

  def derive_logical_axes(
    self, optimizer: optimizers.Optimizer, param_logical_axes: Any
  ) -> optimizers.Optimizer:
    """The optimizer with each array replaced by its logical axes.

    A replicated array gets an empty PartitionSpec and not None: t5x restores
    what has None as float32, be it a count or a key.
    """
    names = traverse_util.flatten_dict(core.unfreeze(param_logical_axes))
    shapes = {
      path: leaf.shape
      for path, leaf in traverse_util.flatten_dict(
        core.unfreeze(optimizer.target)
      ).items()
    }
    state = serialization.to_state_dict(optimizer.state.param_states)
    flat = traverse_util.flatten_dict(state, keep_empty_nodes=True)
    axes = {
      path: leaf
      if leaf is traverse_util.empty_node
      else self._axes(path, leaf, names, shapes)
      for path, leaf in flat.items()
    }
    told = jax.tree.map(lambda _: None, optimizer.state_dict())
    told["target"] = param_logical_axes
    told["state"]["step"] = PartitionSpec()
    told["state"]["param_states"] = (
      traverse_util.unflatten_dict(axes) if isinstance(state, dict) else None
    )
    return optimizer.restore_state(core.unfreeze(told))

  def _axes(
    self,
    path: Path,
    leaf: Any,
    names: Mapping[Path, Any],
    shapes: Mapping[Path, tuple[int, ...]],
  ) -> PartitionSpec:
    shape = tuple(getattr(leaf, "shape", ()))
    if self._state_axes is not None:
      given = self._state_axes("/".join(path), shape)
      if given is not None:
        return PartitionSpec(*given)
    parameter = parameter_within(path, shapes)
    if parameter is None:
      return PartitionSpec()
    chosen = axes_by_size(shape, shapes[parameter], tuple(names[parameter]))
    return PartitionSpec(*chosen) if any(chosen) else PartitionSpec()


def parameter_within(path: Path, parameters: Mapping[Path, Any]) -> Path | None:
  """The longest parameter's path that `path` contains as consecutive parts."""
  found: Path | None = None
  for start in range(len(path)):
    for end in range(len(path), start + len(found or ()), -1):
      if path[start:end] in parameters:
        found = path[start:end]
        break
  return found


def axes_by_size(
  shape: tuple[int, ...],
  parameter_shape: tuple[int, ...],
  names: tuple[str | None, ...],
) -> tuple[str | None, ...]:
  """Names for the dimensions of an array that belongs to a parameter.

  Each dimension takes the name of the first parameter's dimension of its size
  that is not taken yet; a name stands for one dimension only.

  Args:
    shape: of the array.
    parameter_shape: of the parameter.
    names: logical axes of the parameter.

  Returns:
    A name or None for each dimension of `shape`.
  """
  if shape == parameter_shape:
    return names
  free = [pair for pair in zip(parameter_shape, names, strict=True)]
  chosen: list[str | None] = []
  for size in shape:
    match = next((pair for pair in free if pair[0] == size and size > 1), None)
    if match is not None:
      free.remove(match)
    chosen.append(match[1] if match else None)
  return tuple(chosen)


class PrivateState(NamedTuple):
  """What stands in the optimizer's place of a private train state.

  Attributes:
    step_state: what `PrivateStep.init` and `finish` return, `without_none`.
    branch: uint8 [32], digest of the ledger's branch; zeros before the first
      launch has opened one.
    ledger_head: uint8 [32], hash of the ledger's last line when this state was
      made; zeros as above.
    fingerprint: uint32 [4], of parameters and `step_state` when they were made.
  """

  step_state: Any
  branch: Any
  ledger_head: Any
  fingerprint: Any


def fresh_state(step_state: Any) -> PrivateState:
  """What stands in the optimizer's place before a launch has opened a branch.

  Args:
    step_state: what `PrivateStep.init` returns.
  """
  step_state = without_none(step_state)
  none = launch_lib.NO_DIGEST
  words = np.zeros(fingerprint.WORDS, np.uint32)
  return PrivateState(step_state, none.copy(), none.copy(), words)


def without_none(tree: Any) -> Any:
  """The tree with () where it has None, which t5x would look for on disk.

  Args:
    tree: any tree of arrays.
  """
  return jax.tree.map(
    lambda x: () if x is None else x, tree, is_leaf=lambda x: x is None
  )


def with_none(tree: Any, like: Any) -> Any:
  """Undoes `without_none`.

  Args:
    tree: what it returned.
    like: a tree of the structure that it was given.
  """
  return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def private_state(train_state: Any) -> PrivateState:
  """What stands in the optimizer's place.

  Raises:
    ValueError: it is another optimizer's state.
  """
  slot = train_state.param_states
  if not isinstance(slot, PrivateState):
    raise ValueError(
      f"the model's optimizer has a {type(slot).__name__}, which keeps no"
      " ledger digest: bind its optimizer_def = @optimizers.PrivateOptimizer()"
      " (dptrain.t5x_bridge)."
    )
  return slot


class PrivateOptimizer(OptaxWrapper):
  """Keeps the private step's state, and with it where the ledger stood.

  What a checkpoint must know of the ledger is thus saved with its arrays, in
  one piece. `PrivateStep.finish` makes the updates; t5x never does.
  """

  def __init__(
    self, launch: launch_lib.Launch, state_axes: StateAxes | None = None
  ):
    """Takes the optimizer of the launch's run."""

    def init(params: Any) -> PrivateState:
      return fresh_state(launch.prepared.step.init(params))

    super().__init__(optax.GradientTransformation(init, _no_update), state_axes)


def _no_update(*_: Any) -> Any:
  raise ValueError(
    "PrivateOptimizer applies no gradients: a trainer that is not private would"
    " publish them. Bind train.trainer_cls = @trainer.PrivateTrainer"
    " (dptrain.t5x_bridge)."
  )
