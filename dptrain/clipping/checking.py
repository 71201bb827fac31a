"""How far a method's norms and sums are from those of vmap.

Shapes: B batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dptrain.clipping import book_keeping
from dptrain.clipping import parameter_trees
from dptrain.clipping import per_example
from dptrain.clipping import rules
from dptrain.clipping import taps
from dptrain.clipping import two_pass

Path = taps.Path


def errors(
  loss_fn: per_example.PerExampleLoss,
  params: Any,
  batch: Any,
  keys: jax.Array,
  method: str,
  uses: tuple[taps.Use, ...],
) -> dict[Path, tuple[float, str]]:
  """Relative errors of a method by parameter, and of what.

  Args:
    loss_fn: per-example losses.
    params: nested dict of arrays.
    batch: tree of arrays [B, ...].
    keys: typed PRNG keys [B].
    method: "one_pass" or "two_pass".
    uses: the tapped uses.

  Returns:
    By path, the larger of two errors, with "norms" or "clipped sum".
  """
  truth = _gradients(loss_fn, params, batch, keys)

  # A function of its own: jax.jit remembers what it has compiled by function,
  # and the layers' rules may have changed since.
  @jax.jit
  def run(params: Any, batch: Any, keys: jax.Array) -> Any:
    return _of_method(loss_fn, params, batch, keys, method, uses)

  squares, total, scales = run(params, batch, keys)
  expected = {
    path: np.tensordot(_float64(scales), g, axes=1) for path, g in truth.items()
  }
  norms = {path: _norms(g) for path, g in truth.items()}
  whole = np.sqrt(sum(np.square(n) for n in norms.values()))
  whole_sum = np.sqrt(sum(np.sum(np.square(s)) for s in expected.values()))
  found: dict[Path, tuple[float, str]] = {}
  for path in truth:
    off = np.abs(np.sqrt(_float64(squares[path])) - norms[path])
    of_norms = _worst(off, norms[path] + 0.1 * whole)
    off = np.linalg.norm(_float64(total[path]) - expected[path])
    size = np.linalg.norm(expected[path]) + 0.1 * whole_sum
    of_sum = _worst(off, size)
    found[path] = max((of_norms, "norms"), (of_sum, "clipped sum"))
  return found


def _of_method(
  loss_fn: per_example.PerExampleLoss,
  params: Any,
  batch: Any,
  keys: jax.Array,
  method: str,
  uses: tuple[taps.Use, ...],
) -> tuple[dict[Path, jax.Array], dict[Path, jax.Array], jax.Array]:
  """Squared norms [B], clipped sums by path, and the factors [B] used."""
  shapes = {
    p: x.shape for p, x in parameter_trees.leaves_by_path(params).items()
  }
  if method == "two_pass":
    kept, squares = two_pass.first_pass(loss_fn, params, batch, keys, uses)
  else:
    kept = book_keeping.backward(loss_fn, params, batch, keys, uses)
    squares = book_keeping.squared_norms(uses, kept)
  padding = jnp.zeros(keys.shape[0], bool)
  rule = rules.ClippingRule("automatic", automatic_gamma=1e-6)
  clip = per_example.clip_factors(squares, kept.losses, padding, rule)
  if method == "two_pass":
    total = two_pass.sums(loss_fn, params, batch, keys, uses, kept, clip)
  else:
    total = book_keeping.weighted_sum(uses, kept, clip.scales, shapes)
  return squares, total, next(iter(clip.scales.values()))


def _gradients(
  loss_fn: per_example.PerExampleLoss, params: Any, batch: Any, keys: jax.Array
) -> dict[Path, np.ndarray]:
  """Per-example gradients [B, ...] by path."""

  def loss_of_one(params: Any, example: Any, key: jax.Array) -> jax.Array:
    one = jax.tree.map(lambda x: x[None], example)
    return loss_fn(params, one, key[None])[0][0]

  each = jax.vmap(jax.grad(loss_of_one), in_axes=(None, 0, 0))
  found = parameter_trees.leaves_by_path(jax.jit(each)(params, batch, keys))
  return {path: _float64(g) for path, g in found.items()}


def _norms(gradients: np.ndarray) -> np.ndarray:
  return np.sqrt(
    np.sum(np.square(gradients), axis=tuple(range(1, gradients.ndim)))
  )


def _worst(off: Any, size: Any) -> float:
  """The largest ratio; nan counts as infinite, nothing of nothing as 0."""
  off, size = np.broadcast_arrays(off, size)
  ratio = np.where(off == 0, 0.0, off / np.where(size == 0, 1e-300, size))
  return float(np.max(np.nan_to_num(ratio, nan=np.inf)))


def _float64(x: Any) -> np.ndarray:
  return np.asarray(x).astype(np.float64)
