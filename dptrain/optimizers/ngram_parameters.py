"""Which parameters are an N-Grammer's codebooks and n-gram tables.

By name, wherever in the tree they stand:

  ngrammer/codebook_{h}/embedding     [K, S + 1]: centres, and their masses
  ngrammer/table_{h}/embedding        [V, d], or [V, d + 1] with row counts
  ngrammer/right_table_{h}/embedding  likewise

Shapes: H heads, S their size, K clusters, V rows, d n-gram dimensions.
"""

from collections.abc import Callable, Mapping
import re
from typing import Any

import jax

# As in `dptrain.models.ngrammer`, which this wing must not import.
MODULE, LEAF = "ngrammer", "embedding"
_CODEBOOK = re.compile(r"codebook_\d+")
_TABLE = re.compile(r"(right_)?table_\d+")

Path = tuple[str, ...]


def is_codebook(path: Path) -> bool:
  """Whether the parameter of this path is a codebook.

  >>> is_codebook(("model", "ngrammer", "codebook_0", "embedding"))
  True
  """
  return _is(_CODEBOOK, path)


def is_table(path: Path) -> bool:
  """Whether the parameter of this path is an n-gram table."""
  return _is(_TABLE, path)


def names(path: tuple[Any, ...]) -> Path:
  """A path of `jax.tree_util` as names."""
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def divided(tree: Any, wanted: Callable[[Path], bool]) -> tuple[Any, Any]:
  """Nested dictionaries in two parts.

  Args:
    tree: the parameters, or a tree like them; FrozenDict or dict.
    wanted: by path.

  Returns:
    What is not wanted, and what is: trees without the other part's leaves and
    without dictionaries that are empty therefore. `joined` puts them together.

  >>> tree = {"a": {"b": 1}, "ngrammer": {"table_0": {"embedding": 2}}}
  >>> divided(tree, is_table)
  ({'a': {'b': 1}}, {'ngrammer': {'table_0': {'embedding': 2}}})
  """
  if not isinstance(tree, Mapping):
    return tree, {}
  return (
    _picked(tree, (), lambda path: not wanted(path)),
    _picked(tree, (), wanted),
  )


def joined(one: Any, other: Any) -> Any:
  """Undoes `divided`."""
  if not isinstance(one, Mapping):
    return one
  both = {**one, **other}
  for name in one.keys() & other.keys():
    both[name] = joined(one[name], other[name])
  # FrozenDict or dict, as the parameters are.
  kind: Any = type(one)
  return kind(both)


def _is(pattern: re.Pattern[str], path: Path) -> bool:
  return (
    len(path) >= 3
    and path[-3] == MODULE
    and pattern.fullmatch(path[-2]) is not None
    and path[-1] == LEAF
  )


def _picked(
  tree: Mapping[str, Any], path: Path, wanted: Callable[[Path], bool]
) -> Any:
  found = {}
  for name, part in tree.items():
    inner = (*path, str(name))
    if isinstance(part, Mapping):
      kept = _picked(part, inner, wanted)
      if kept or not part:
        found[name] = kept
    elif wanted(inner):
      found[name] = part
  kind: Any = type(tree)
  return kind(found)
