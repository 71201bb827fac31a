"""An audit that looks at nothing but what codebooks learn.

The observer knows every record, every released parameter and the mechanism; not
who is in. Each update's codebook gradient is a sum over those who are, so it
solves for them by least squares and adds up what it finds. The exact means of
arXiv 2207.06366 hand it the answer; privatised ones must not.

Shapes: m canaries, T length, H heads, K clusters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.auditing import verdict
from dptrain.clipping import rules
from dptrain.models import bert
from dptrain.models import masked_lm
from dptrain.models import ngrammer
from dptrain.optimizers import ngram_parameters
from dptrain.privacy import accounting
from dptrain.training import ngram_learning
from dptrain.training import step as step_lib

M, T, VOCABULARY, UPDATES, NOISE = 64, 8, 128, 4, 2.5
DELTA, SIGNIFICANCE = 1e-5, 0.025
RULE = rules.ClippingRule("flat", 1.0)
PADDING = 0


def canaries(seed):
  """Batch of the records that may be in, and who is."""
  rng = np.random.default_rng(seed)
  # Each repeats a word of its own: as far apart as records can be.
  words = rng.permutation(np.arange(5, VOCABULARY))[:M]
  tokens = np.repeat(words[:, None], T, axis=1)
  included = rng.integers(0, 2, M).astype(bool)
  batch = {
    "inputs": jnp.asarray(tokens, jnp.int32),
    "positions": jnp.zeros((M, 1), jnp.int32),
    "labels": jnp.asarray(rng.integers(5, VOCABULARY, (M, 1)), jnp.int32),
    "weights": jnp.ones((M, 1)),
    "example_ids": jnp.arange(M),
    "is_padding": jnp.zeros(M, bool),
  }
  return batch, included


def codebooks(tree):
  """What of a gradient tree is the codebooks', as one vector."""
  part = ngram_parameters.divided(tree, ngram_parameters.is_codebook)[1]
  return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(part)])


class Observed:
  """A run of which the codebooks' gradients are read, and nothing else."""

  def __init__(self, learning):
    settings = ngrammer.NGrammerSettings(
      num_clusters=128,
      table_size=32,
      ngram_dim=2,
      learning=learning,
      # Most of an example's norm is what codebooks learn: the best case.
      weight=100.0,
    )
    self.model = masked_lm.MaskedLanguageModel(
      bert.Bert(
        vocab_size=VOCABULARY,
        num_layers=1,
        width=8,
        num_heads=2,
        max_length=T,
        ngrammer=settings,
      )
    )
    self.exact = ngram_learning.unprotected_codebooks(self.model)
    optimizer = ngram_learning.optimizer_for(self.model, optax.sgd(0.1))

    # In front of everything, as any optimizer may stand.
    def read(gradient, state, params=None, **extra):
      updates, inner = optimizer.update(gradient, state[0], params, **extra)
      return updates, (inner, codebooks(gradient))

    watched = optax.GradientTransformationExtraArgs(
      lambda params: (optimizer.init(params), codebooks(params)), read
    )
    self.step = step_lib.PrivateStep(
      self.model.losses, RULE, watched, unprotected_codebooks=self.exact
    )
    self.updated = jax.jit(self._updated)
    self.alone = jax.jit(jax.vmap(self._alone, in_axes=(None, 0, None)))

  def _alone(self, params, row, key):
    """What one canary would add to the codebooks' sum."""
    one = jax.tree.map(lambda x: x[None], row)

    def told(params):
      losses, aux = self.model.losses(params, one, key[None])
      return losses[0] if self.exact is None else aux["codebook_term"][0]

    gradient = jax.grad(told)(params)
    scale = RULE.scales(optax.tree.norm(gradient))
    return codebooks(gradient) * (scale if self.exact is None else 1.0)

  def _updated(self, params, state, batch, key):
    sums = self.step.zeros(params, batch, state)
    params, state, _ = self.step.finish(
      params,
      state,
      self.step.accumulate(params, sums, batch, key),
      noise_key=jax.random.fold_in(key, 1),
      noise_multiplier=NOISE,
      expected_batch_size=1.0,
    )
    return params, state

  def scores(self, seed):
    """Log likelihood ratios [m] and the coins."""
    batch, included = canaries(seed)
    params = self.model.init(jax.random.key(seed))
    state, total = self.step.init(params), np.zeros(M)
    those = {**batch, "is_padding": jnp.asarray(~included)}
    for number in range(UPDATES):
      key = jax.random.fold_in(jax.random.key(seed + 1), number)
      known = np.asarray(self.alone(params, batch, key), np.float64)
      params, state = self.updated(params, state, those, key)
      inverse = np.linalg.pinv(known.T, rcond=1e-6)
      found = inverse @ np.asarray(state[1], np.float64)
      spread = NOISE * RULE.sensitivity * np.linalg.norm(inverse, axis=1)
      total += (found - 0.5) / spread**2
    return total, included

  def guesses(self, seeds):
    return [
      verdict.guess(*self.scores(seed), M, SIGNIFICANCE, DELTA)
      for seed in range(seeds)
    ]


@pytest.fixture(scope="module")
def claim():
  release = accounting.Releases(UPDATES, 1.0, NOISE)
  return accounting.epsilon([release], DELTA).value


def test_private_codebooks_stay_below_the_claim(claim):
  found = Observed("private").guesses(4)
  assert max(f.epsilon_one_run_fdp for f in found) <= claim
  # The observer is no fool: it sees more than coins would show.
  assert sum(f.correct for f in found) >= 2 * M + 2 * np.sqrt(M)


def test_exact_means_are_seen_to_leak(claim):
  (found,) = Observed("unprotected").guesses(1)
  assert found.correct == M
  # The claim is a Gaussian's, and so is what this bound takes for granted.
  assert found.epsilon_one_run_fdp > claim
