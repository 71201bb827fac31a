"""Inverse p-th roots of stacks of positive semi-definite matrices, checked.

Shapes: N matrices of size b x b in one stack.

A factor of condition number 1e6 has an inverse that float32 cannot hold apart
from rounding: an eigenvalue of 1e-6 under a largest of 1 is known to 6 %. Roots
are therefore computed in float64 by default, inside an otherwise float32
program, and only rounded at the end. Relative errors at condition number 1e6,
size 256, p = 4 (tools/shampoo_figures.py): 2e-8 by eigendecomposition so, 2e-3
by Newton's iteration in float32, 5e-2 by a float32 eigendecomposition.

The residual that Newton's iteration sees does not tell of that; `root_error`
looks at the root itself.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from dptrain.optimizers import decompositions

_HIGHEST = lax.Precision.HIGHEST
_POWER_ITERATIONS = 100
_GROWTH = 1.2


@dataclasses.dataclass(frozen=True)
class RootSettings:
  """How roots are computed and when one is good enough.

  Attributes:
    method: "newton" (coupled Newton: products only, fast where products are),
      "eigh" (eigendecomposition, faster on CPU), or "auto": "eigh" on CPU,
      "newton" elsewhere.
    arithmetic: "float64" or "float32", inside the computation only. float64
      needs no setting of jax, but a device that multiplies in it at a decent
      speed (CPUs, data-centre GPUs).
    ridge: multiple of the largest eigenvalue that is added to every
      eigenvalue; it bounds the condition number by 1 / ridge.
    max_error: a root whose `root_error` exceeds this has failed.
    max_iterations: of Newton's iteration.
    keep: share of a matrix's smallest eigenvalue that `subtract` must leave.
      Where all of it may go, the direction that is estimated worst gets the
      largest root, 1 / ridge^(1/p): docs/optimizers.md has measurements.
  """

  method: Literal["auto", "newton", "eigh"] = "auto"
  arithmetic: Literal["float64", "float32"] = "float64"
  ridge: float = 1e-6
  max_error: float = 0.05
  max_iterations: int = 100
  keep: float = 0.05

  def __post_init__(self) -> None:
    if self.method not in ("auto", "newton", "eigh"):
      raise ValueError(
        f"RootSettings.method={self.method!r} must be 'auto', 'newton' or"
        " 'eigh'"
      )
    if self.arithmetic not in ("float64", "float32"):
      raise ValueError(
        f"RootSettings.arithmetic={self.arithmetic!r} must be 'float64' or"
        " 'float32'"
      )
    if not 0.0 < self.ridge < 1.0:
      raise ValueError(
        f"RootSettings.ridge={self.ridge} must lie in (0, 1), such as 1e-6"
      )
    if not 0.0 < self.max_error < 1.0:
      raise ValueError(
        f"RootSettings.max_error={self.max_error} must lie in (0, 1)"
      )
    if self.max_iterations < 1:
      raise ValueError(
        f"RootSettings.max_iterations={self.max_iterations} must be 1 or more"
      )
    if not 0.0 <= self.keep <= 1.0:
      raise ValueError(f"RootSettings.keep={self.keep} must lie in [0, 1]")

  def chosen_method(self) -> str:
    """The method, with "auto" resolved for the devices in use."""
    if self.method != "auto":
      return self.method
    return "eigh" if jax.default_backend() == "cpu" else "newton"


class Roots(NamedTuple):
  """Inverse roots and how good they are.

  Attributes:
    roots: [N, b, b] of the matrices' dtype.
    errors: [N] float32: `root_error` of each, as rounded.
  """

  roots: jax.Array
  errors: jax.Array


def check_order(name: str, p: int) -> None:
  """Raises ValueError unless `p` is a whole number from 1 to 16."""
  if isinstance(p, bool) or not isinstance(p, int) or not 1 <= p <= 16:
    raise ValueError(
      f"{name}={p!r} must be a whole number from 1 to 16: the p of A^(-1/p)"
    )


def inverse_roots(
  matrices: jax.Array,
  p: int,
  settings: RootSettings | None = None,
  subtract: jax.Array | None = None,
) -> Roots:
  """Computes (A + ridge * largest eigenvalue * I)^(-1/p) for each matrix A.

  Coupled Newton is that of Guo and Higham (SIAM J. Matrix Anal. Appl. 28(3),
  2006), as used by arXiv 2002.09018.

  Args:
    matrices: [N, b, b], symmetric up to rounding, positive semi-definite, any
      scale; zeros give errors of infinity.
    p: a whole number from 1 to 16.
    settings: how; None for the defaults.
    subtract: [N] what is taken off all eigenvalues of each matrix first, but
      never more than 1 - `keep` of its smallest one. Needs the
      eigendecomposition.

  Returns:
    Roots and their errors.

  Raises:
    ValueError: `p` is out of range, or `subtract` with Newton's method.
  """
  settings = settings or RootSettings()
  check_order("p", p)
  method = settings.chosen_method()
  if subtract is not None and settings.method == "auto":
    method = "eigh"
  if subtract is not None and method != "eigh":
    raise ValueError(
      f"RootSettings.method={settings.method!r} knows no eigenvalues, which"
      " taking noise off a factor needs: set RootSettings.method='eigh'"
    )
  dtype = matrices.dtype
  with jax.enable_x64(True):
    exact = _cast(matrices, jnp.float64)
    exact = (exact + jnp.swapaxes(exact, -1, -2)) / 2
    work = _cast(exact, jnp.dtype(settings.arithmetic))
    if method == "eigh":
      roots, added = _by_eigh(work, p, settings, subtract)
    else:
      roots, added = _by_newton(work, p, settings)
    roots = _cast(roots, dtype)
    exact += _cast(added, jnp.float64)[:, None, None] * jnp.eye(
      exact.shape[-1], dtype=jnp.float64
    )
    errors = _cast(root_error(exact, roots, p), jnp.float32)
  return Roots(roots, errors)


def root_error(matrices: jax.Array, roots: jax.Array, p: int) -> jax.Array:
  """Bounds the relative error of inverse roots, in the spectral norm.

  With X^p = C C^T, the norm e of K = C^T A C - I says that A lies between
  (1 - e) X^-p and (1 + e) X^-p in Loewner's order. The root is operator
  monotone, so A^(-1/p) lies between (1 + e)^(-1/p) X and (1 - e)^(-1/p) X, and
  ||A^(-1/p) - X|| <= ((1 - e)^(-1/p) - 1) ||X||. This holds direction by
  direction, for small roots as for large ones. ||X^p A - I|| bounds the same,
  but amplifies the rounding of X by the condition number and K only by its
  square root. e is taken in the Frobenius norm, which is not smaller.

  Args:
    matrices: [N, b, b] symmetric.
    roots: [N, b, b] claimed A^(-1/p).
    p: as there.

  Returns:
    [N] float64: the bound; infinity where it is void or the claimed root is
    not positive definite.
  """
  with jax.enable_x64(True):
    a = _cast(matrices, jnp.float64)
    x = _cast(roots, jnp.float64)
    x = (x + jnp.swapaxes(x, -1, -2)) / 2
    lower = decompositions.cholesky(x)  # NaN unless positive definite
    definite = jnp.isfinite(lower).all((-2, -1))
    c = lower if p == 1 else _power(x, p // 2)
    if p % 2 and p > 1:
      c = _product(c, lower)
    k = _product(jnp.swapaxes(c, -1, -2), _product(a, c))
    k -= jnp.eye(k.shape[-1], dtype=k.dtype)
    e = jnp.sqrt(jnp.sum(k * k, (-2, -1)))
    good = definite & (e < 1.0)
    bound = (1.0 - jnp.where(good, e, 0.0)) ** (-1.0 / p) - 1.0
    return jnp.where(good, bound, jnp.inf)


def largest_eigenvalue(matrices: jax.Array) -> jax.Array:
  """Estimates the largest eigenvalues of [N, b, b], by power iteration."""
  # A start that no matrix of structure is likely to be orthogonal to.
  start = jnp.cos(jnp.arange(matrices.shape[-1]) ** 2 * 0.7) + 1.5
  start = start.astype(matrices.dtype)

  def step(_: int, v: jax.Array) -> jax.Array:
    v = jnp.einsum("nij,nj->ni", matrices, v, precision=_HIGHEST)
    return v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-300)

  v = jnp.broadcast_to(start / jnp.linalg.norm(start), matrices.shape[:-1])
  v = lax.fori_loop(0, _POWER_ITERATIONS, step, v)
  found = jnp.einsum("ni,nij,nj->n", v, matrices, v, precision=_HIGHEST)
  return jnp.maximum(found, jnp.max(_diagonal(matrices), axis=-1))


def _by_eigh(
  a: jax.Array,
  p: int,
  settings: RootSettings,
  subtract: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Roots [N, b, b] and what was added to the eigenvalues [N]."""
  values, vectors = decompositions.eigh(a)
  # Rounding may leave eigenvalues just below 0.
  taken = jnp.zeros_like(values[:, 0])
  if subtract is not None:
    most = (1.0 - settings.keep) * _at_least_0(values[:, 0])
    taken = jnp.clip(_cast(subtract, a.dtype), 0.0, most)
  values = _at_least_0(values - taken[:, None])
  added = settings.ridge * values[:, -1]
  scaled = vectors * (values + added[:, None])[:, None, :] ** (-1.0 / p)
  roots = _product(scaled, jnp.swapaxes(vectors, -1, -2))
  return roots, added - taken


def _by_newton(
  a: jax.Array, p: int, settings: RootSettings
) -> tuple[jax.Array, jax.Array]:
  """Roots [N, b, b] and what was added to the eigenvalues [N]."""
  eye = jnp.eye(a.shape[-1], dtype=a.dtype)
  largest = largest_eigenvalue(a)
  added = settings.ridge * largest
  a = a / largest[:, None, None] + settings.ridge * eye
  # Two upper bounds of the largest eigenvalue, 1 to 1 + ridge by now.
  bound = jnp.minimum(
    jnp.sqrt(jnp.sum(a * a, (-2, -1))), jnp.max(jnp.sum(jnp.abs(a), -1), -1)
  )
  z = ((1.0 + p) / (2.0 * bound))[:, None, None]
  tolerance = 1e-11 if a.dtype == jnp.float64 else 1e-6
  m = z * a
  first = (m, z ** (1.0 / p) * eye, _distance(m), jnp.ones_like(bound, bool))

  def going(carry: tuple) -> jax.Array:
    return (carry[0] < settings.max_iterations) & jnp.any(carry[1][3])

  def step(carry: tuple) -> tuple:
    iteration, (m, x, error, active) = carry
    w = ((1 + p) * eye - m) / p
    new_m = _symmetric(_product(_power(w, p), m))
    new_x = _symmetric(_product(x, w))
    new_error = _distance(new_m)
    better = active & (new_error <= _GROWTH * error)
    wide = better[:, None, None]
    m, x = jnp.where(wide, new_m, m), jnp.where(wide, new_x, x)
    error = jnp.where(better, new_error, error)
    return iteration + 1, (m, x, error, better & (error > tolerance))

  start = jnp.zeros((), jnp.int32)
  _, (_, x, _, _) = lax.while_loop(going, step, (start, first))
  return x * (largest ** (-1.0 / p))[:, None, None], added


def _power(a: jax.Array, exponent: int) -> jax.Array:
  """a^exponent, exponent 1 or more, by repeated squaring."""
  result = a
  for bit in f"{exponent:b}"[1:]:
    result = _product(result, result)
    if bit == "1":
      result = _product(result, a)
  return result


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=_HIGHEST)


def _symmetric(a: jax.Array) -> jax.Array:
  """Rounding must not grow into an antisymmetric part."""
  return (a + jnp.swapaxes(a, -1, -2)) / 2


def _distance(m: jax.Array) -> jax.Array:
  """Root mean square of the eigenvalues of m - I, [N].

  Every eigenvalue comes closer to 1 in every step of the iteration, so this
  never grows but by rounding. The largest entry may grow on the way.
  """
  gap = m - jnp.eye(m.shape[-1], dtype=m.dtype)
  return jnp.sqrt(jnp.sum(gap * gap, (-2, -1)) / m.shape[-1])


def _diagonal(a: jax.Array) -> jax.Array:
  return jnp.diagonal(a, axis1=-2, axis2=-1)


def _at_least_0(x: jax.Array) -> jax.Array:
  return jnp.maximum(x, 0.0)


def _cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """A cast that does not heed whether float64 is on outside."""
  return lax.convert_element_type(x, dtype)
