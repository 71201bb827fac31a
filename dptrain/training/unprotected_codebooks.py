"""Codebooks that follow the batch as it is: outside the guarantee.

arXiv 2207.06366 moves its clusters' centres to running means of the batch. That
is a release of private sums without clipping and without noise; it is here for
comparison (tests/auditing/test_codebook_audit.py sees it leak).

Shapes: B physical batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dptrain.clipping import per_example
from dptrain.optimizers import ngram_parameters

TERM = "codebook_term"


@dataclasses.dataclass(frozen=True)
class UnprotectedCodebooks:
  """Exact sums for codebooks, in the place of their privatised gradient.

  Formal guarantee: none. One example moves these sums as far as it likes, and
  they reach the parameters without noise.

  Attributes:
    term: name of the auxiliary entry [B] of the loss whose gradient by the
      codebooks is what each example contributes to them.
  """

  term: str = TERM

  def zeros(self, params: Any) -> Any:
    """Empty sums: float32, for the codebooks among the parameters."""
    return jax.tree.map(
      lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
      _divided(params)[1],
    )

  def added(
    self,
    sums: Any,
    loss_fn: per_example.PerExampleLoss,
    params: Any,
    batch: Any,
    keys: jax.Array,
  ) -> Any:
    """Adds what the examples of one physical batch contribute. PRIVATE.

    Args:
      sums: so far.
      loss_fn: per-example losses; beside them, a dictionary with `term`.
      params: the parameters.
      batch: arrays [B, ...]; "is_padding" [B] bool marks rows that are not
        examples.
      keys: [B], one for each example: those of its clipped gradient.

    Returns:
      The sums with the batch added; nothing is clipped.

    Raises:
      ValueError: the loss returns no such entry.
    """
    rest, codebooks = _divided(params)

    def total(codebooks: Any) -> jax.Array:
      joined = ngram_parameters.joined(rest, codebooks)
      _, aux = loss_fn(joined, batch, keys)
      if self.term not in aux:
        raise ValueError(
          f"PrivateStep.unprotected_codebooks reads {self.term!r}, which the"
          f" loss does not return among {sorted(aux)}: set the model's"
          " NGrammerSettings.learning='unprotected', or leave it out."
        )
      return jnp.sum(jnp.where(batch["is_padding"], 0.0, aux[self.term]))

    return jax.tree.map(
      lambda s, g: s + g.astype(s.dtype), sums, jax.grad(total)(codebooks)
    )

  def in_place(
    self, gradient: Any, sums: Any, expected_batch_size: jax.Array | float
  ) -> Any:
    """A gradient whose part by the codebooks is exact.

    Args:
      gradient: the noisy mean.
      sums: over all examples of the update.
      expected_batch_size: what `gradient` was divided by.
    """
    rest, noisy = _divided(gradient)
    exact = jax.tree.map(
      lambda s, g: (s / expected_batch_size).astype(g.dtype), sums, noisy
    )
    return ngram_parameters.joined(rest, exact)


def _divided(tree: Any) -> tuple[Any, Any]:
  return ngram_parameters.divided(tree, ngram_parameters.is_codebook)
