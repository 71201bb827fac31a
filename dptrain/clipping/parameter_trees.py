"""Parameter trees by path: reading leaves and putting others beside them."""

from collections.abc import Mapping
from typing import Any

from flax.core import FrozenDict
from flax.core import freeze
import jax

Path = tuple[str, ...]


def leaves_by_path(tree: Any) -> dict[Path, Any]:
  """The leaves of nested mappings, by their path, in jax's order.

  Raises:
    TypeError: the tree has lists, tuples or other containers in it, keys that
      are not strings, or leaves that are not arrays.
  """
  found: dict[Path, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    where = jax.tree_util.keystr(path) or "the only leaf"
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if (
      len(names) != len(path)
      or not path
      or not all(isinstance(name, str) for name in names)
    ):
      raise TypeError(
        "taps need the parameters as nested dictionaries with strings for keys,"
        f" but {where} is inside another container"
      )
    if not hasattr(leaf, "shape"):
      raise TypeError(f"taps need arrays, but {where} is {leaf!r}")
    found[tuple(names)] = leaf
  return found


def with_leaves(tree: Any, flat: Mapping[Path, Any]) -> Any:
  """A copy of nested mappings with other leaves, or leaves put beside them."""
  copy = _copied(tree)
  for path, leaf in flat.items():
    node = copy
    for name in path[:-1]:
      node = node[name]
    node[path[-1]] = leaf
  return freeze(copy) if isinstance(tree, FrozenDict) else copy


def like(tree: Any, flat: Mapping[Path, Any]) -> Any:
  """A tree of the same structure, its leaves taken by path."""
  return jax.tree.unflatten(
    jax.tree.structure(tree), [flat[path] for path in leaves_by_path(tree)]
  )


def order(flat: Mapping[Path, Any]) -> list[Path]:
  """The keys in the order in which jax flattens the values."""
  return [
    path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(dict(flat))
  ]


def _copied(tree: Any) -> Any:
  if not isinstance(tree, Mapping):
    return tree
  return {name: _copied(node) for name, node in tree.items()}
