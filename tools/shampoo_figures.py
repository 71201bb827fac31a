"""Figures of docs/optimizers.md: how right roots are, and what noise does.

  python tools/shampoo_figures.py

First the relative error (spectral norm, against float64) and the proved bound
of A^(-1/p), A of size 256 and condition 1e6 in float32. Then the cosine between
the direction that noisy factors give and that of the clean ones, for gradients
of 64 x 64 whose rows' and columns' scales span 10^1.5, mean of 20 directions.
"""

import jax.numpy as jnp
import numpy as np

from dptrain.optimizers import inverse_roots

SIZE, CONDITION = 256, 1e6
SIDE, SPAN, DIRECTIONS = 64, 1.5, 20
KEEPS = (0.5, 0.2, 0.05, 0.01, 0.0)


def exact(a: np.ndarray, p: int, ridge: float) -> np.ndarray:
  """(A + ridge * largest eigenvalue * I)^(-1/p) in float64."""
  values, vectors = np.linalg.eigh(a.astype(np.float64))
  return vectors * (values + ridge * values[-1]) ** (-1 / p) @ vectors.T


def print_roots() -> None:
  """The table of errors and bounds."""
  draw = np.random.default_rng(0)
  q, _ = np.linalg.qr(draw.normal(size=(SIZE, SIZE)))
  a = (q * np.logspace(0, -np.log10(CONDITION), SIZE) @ q.T).astype(np.float32)
  a = (a + a.T) / 2
  print("roots: error / bound           p = 2         p = 4         p = 8")
  for method, arithmetic in (
    ("eigh", "float64"),
    ("newton", "float64"),
    ("newton", "float32"),
    ("eigh", "float32"),
  ):
    settings = inverse_roots.RootSettings(method, arithmetic)
    told = []
    for p in (2, 4, 8):
      found = inverse_roots.inverse_roots(jnp.asarray(a[None]), p, settings)
      wanted = exact(a, p, settings.ridge)
      wrong = np.linalg.norm(np.float64(found.roots[0]) - wanted, 2)
      error = wrong / np.linalg.norm(wanted, 2)
      told.append(f"{error:.1e} / {float(found.errors[0]):.0e}")
    print(f"  {method:7} in {arithmetic}   {'   '.join(told)}")


def print_noise() -> None:
  """The table of cosines."""
  scales = np.logspace(0, -SPAN, SIDE)
  signal = np.mean(np.outer(scales, scales) ** 2)
  clean = np.diag(scales**2 * np.sum(scales**2))
  heads = "   ".join(f"keep {keep:<4g}" for keep in KEEPS)
  print(f"updates, noise / signal variance: not subtracted   {heads}")
  for updates, ratio in (
    (400, 1),
    (400, 9),
    (400, 100),
    (50, 100),
    (2000, 100),
  ):
    draw = np.random.default_rng(updates + ratio)
    left, right = np.zeros((2, SIDE, SIDE))
    for _ in range(updates):
      g = np.outer(scales, scales) * draw.normal(size=(SIDE, SIDE))
      g += np.sqrt(ratio * signal) * draw.normal(size=(SIDE, SIDE))
      left, right = left + g @ g.T / updates, right + g.T @ g / updates
    fresh = np.outer(scales, scales) * draw.normal(
      size=(DIRECTIONS, SIDE, SIDE)
    )
    factors = jnp.asarray(np.stack([left, right]), jnp.float32)
    noise = jnp.full(2, SIDE * ratio * signal, jnp.float32)
    best = exact(clean, 4, 1e-6)
    wanted = best @ fresh @ best
    told = []
    for keep in (None, *KEEPS):
      settings = inverse_roots.RootSettings("eigh", keep=keep or 0.0)
      roots = inverse_roots.inverse_roots(
        factors, 4, settings, None if keep is None else noise
      ).roots
      found = np.asarray(roots[0] @ fresh @ roots[1])
      dots = np.sum(found * wanted, axis=(1, 2))
      lengths = np.linalg.norm(found, axis=(1, 2))
      cosines = dots / (lengths * np.linalg.norm(wanted, axis=(1, 2)))
      told.append(f"{cosines.mean():.3f}")
    print(f"  {updates}, {ratio}: {'   '.join(told)}")


if __name__ == "__main__":
  print_roots()
  print_noise()
