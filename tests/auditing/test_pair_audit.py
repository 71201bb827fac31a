"""An audit of shard A by who sees nothing but what the other replica learned.

Replica B has neither clipping nor noise, and the observer knows its records,
keys and parameters: whatever A tells B, B tells the observer. Its probes hold
the canaries' words, so that the predictions which it is taught are those that
the canaries moved. Canary i says word i over and over.

Shapes: m canaries, T length, V vocabulary.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.auditing import verdict
from dptrain.clipping import rules
from dptrain.data import masking
from dptrain.models import bert
from dptrain.models import distillation
from dptrain.models import masked_lm
from dptrain.privacy import accounting
from dptrain.training import objective
from dptrain.training import programs
from dptrain.training import step as step_lib

M, T, VOCABULARY, UPDATES, NOISE, NORM = 64, 8, 96, 4, 2.5, 0.5
RATE, WEIGHT = 0.5, 0.5
DELTA, SIGNIFICANCE = 1e-5, 0.025
WORDS = np.arange(5, 5 + M)
DISTILLATION = distillation.Distillation("logit_mse", weight=WEIGHT)


@dataclasses.dataclass(frozen=True)
class Table(masked_lm.MaskedLanguageModel):
  """Predicts a word from itself: row w of a table has the logits after w."""

  def init(self, key):
    del key
    return {"table": jnp.zeros((VOCABULARY, VOCABULARY))}

  def _logits(self, params, batch, keys):
    del keys
    words = jnp.take_along_axis(batch["inputs"], batch["positions"], axis=1)
    return params["table"][words], {}


def replica(norm):
  """Objective and step of one of the two."""
  encoder = bert.Bert(VOCABULARY, 1, 8, 1, max_length=T)
  kept = masking.MaskingSettings(replace_with_mask=0.0, replace_with_random=0.0)
  own = objective.Objective(Table(encoder), kept)
  rule = rules.ClippingRule("flat", norm)
  return own, step_lib.PrivateStep(
    own.losses, rule, optax.sgd(RATE), clipping_method="vmap"
  )


A, B = replica(NORM), replica(1e9)


@jax.jit
def updated(params, teacher, included, key, noise_multiplier, norm):
  """One update of a replica that the other one teaches; its own way."""
  own, step = A
  step = dataclasses.replace(
    step, rule=dataclasses.replace(step.rule, l2_clip_norm=norm)
  )
  batch = {
    "tokens": jnp.repeat(jnp.asarray(WORDS, jnp.int32)[:, None], T, axis=1),
    "example_ids": jnp.arange(M),
    "is_padding": ~included,
  }
  batch = programs.targets(
    own, DISTILLATION, (own.model,), (teacher,), batch, key, WEIGHT
  )
  state = step.init(params)
  sums = step.accumulate(params, step.zeros(params, batch), batch, key)
  after, _, _ = step.finish(
    params,
    state,
    sums,
    noise_key=jax.random.fold_in(key, 7),
    noise_multiplier=noise_multiplier,
    expected_batch_size=1.0,
  )
  return after


def hard(table):
  """Gradient of each word's own loss by its own row: [m, V]."""
  rows = np.asarray(table, np.float64)[WORDS]
  probs = np.exp(rows - rows.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  return probs - np.eye(VOCABULARY)[WORDS]


def centred(rows):
  return rows - rows.mean(-1, keepdims=True)


def soft(own, teacher):
  """Gradient of the distance to a teacher's rows: [m, V]."""
  return WEIGHT * centred(own - teacher) / VOCABULARY


def scores(seed, noise_multiplier=NOISE):
  """Log likelihood ratios [m] from B's parameters alone, and the coins."""
  included = np.random.default_rng(seed).integers(0, 2, M).astype(bool)
  everyone = np.ones(M, bool)
  a, b = A[0].model.init(None), B[0].model.init(None)
  seen, total = [], np.zeros(M)
  for number in range(UPDATES + 1):
    key = jax.random.fold_in(jax.random.key(seed), number)
    b_key = jax.random.fold_in(key, 1)
    b_after = updated(b, a, everyone, b_key, 0.0, B[1].rule.l2_clip_norm)
    a_after = updated(a, b, included, key, noise_multiplier, NORM)
    before, after = (
      np.asarray(p["table"], np.float64)[WORDS] for p in (b, b_after)
    )
    gradient = (before - after) / RATE
    pull = gradient - hard(b["table"])
    seen.append((centred(before) - pull * VOCABULARY / WEIGHT, before))
    a, b = a_after, b_after
  for (rows, taught_by), (rows_after, _) in itertools.pairwise(seen):
    whole = np.zeros((VOCABULARY, VOCABULARY))
    whole[WORDS] = rows
    known = hard(whole) + soft(rows, taught_by)
    norms = np.linalg.norm(known, axis=-1, keepdims=True)
    known *= np.minimum(1.0, NORM / norms)
    moved = (rows - rows_after) / RATE
    size = np.sum(known**2, axis=-1)
    found = np.sum(moved * known, axis=-1) / size
    total += (found - 0.5) * size / (NOISE * NORM) ** 2
  return total, included


@pytest.fixture(scope="module")
def claim():
  release = accounting.Releases(UPDATES, 1.0, NOISE)
  return accounting.epsilon([release], DELTA).value


def test_what_the_other_replica_learned_stays_below_the_claim(claim):
  found = [
    verdict.guess(*scores(seed), M, SIGNIFICANCE, DELTA) for seed in range(4)
  ]
  assert max(f.epsilon_one_run_fdp for f in found) <= claim
  # It does see shard A, as far as A's noise lets it.
  assert sum(f.correct for f in found) >= 2 * M + 2 * np.sqrt(M)


def test_weights_without_noise_would_be_seen_through_the_other_replica(claim):
  found = verdict.guess(*scores(0, 0.0), M, SIGNIFICANCE, DELTA)
  assert found.correct == M
  assert found.epsilon_one_run_fdp > claim
