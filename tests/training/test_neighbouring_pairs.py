"""Batches that differ in one unit, under teachers that say whatever they like.

A teacher may have been chosen by an adversary who has read all other releases:
what it predicts must not let one unit move the sum any further.

Shapes: B rows, M masked, V vocabulary.
"""

import functools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run

from dptrain.clipping import rules
from dptrain.data import masking
from dptrain.models import distillation
from dptrain.training import objective
from dptrain.training import step as step_lib

NORM, ROWS = 0.05, 4


@functools.cache
def replica(loss):
  model = small_run.QuickModel(small_run.model().bert)
  own = objective.Objective(model, masking.MaskingSettings())
  step = step_lib.PrivateStep(
    own.losses,
    rules.ClippingRule("flat", NORM),
    optax.sgd(1.0),
    clipping_method="vmap",
  )
  params = model.init(jax.random.key(0))

  @jax.jit
  def summed(tokens, is_padding, logits, weight, key):
    targets = distillation.Targets(
      logits,
      jnp.full(ROWS, weight),
      distillation.Distillation(loss, temperature=2.0),
    )
    batch = {
      "tokens": tokens,
      "example_ids": jnp.arange(ROWS),
      "is_padding": is_padding,
      "targets": targets,
    }
    return step.accumulate(params, step.zeros(params, batch), batch, key)

  return summed


def sums(loss, left_out, seed, size, weight, broken=()):
  draw = np.random.default_rng(seed)
  slots = masking.MaskingSettings().num_slots(small_run.LENGTH)
  logits = size * draw.normal(size=(ROWS, slots, small_run.VOCABULARY))
  logits[list(broken)] = np.nan
  is_padding = np.arange(ROWS) == left_out
  found = replica(loss)(
    small_run.store(ROWS, seed).tokens,
    is_padding,
    logits.astype(np.float32),
    np.float32(weight),
    jax.random.key(seed, impl="threefry2x32"),
  )
  return found.gradients


def distance(one, other):
  gap = jax.tree.map(
    lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64),
    one,
    other,
  )
  return float(optax.tree.norm(gap))


@pytest.mark.parametrize("loss", distillation.LOSSES)
@settings(max_examples=20, deadline=None)
@given(
  unit=st.integers(0, ROWS - 1),
  seed=st.integers(0, 2**31),
  size=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
  weight=st.sampled_from([0.1, 1.0, 100.0]),
)
def test_one_unit_moves_the_sum_by_the_clip_norm(
  loss, unit, seed, size, weight
):
  with_it = sums(loss, None, seed, size, weight)
  without = sums(loss, unit, seed, size, weight)
  assert 0.0 < distance(with_it, without) <= NORM * (1 + 1e-4)


@pytest.mark.parametrize("loss", distillation.LOSSES)
def test_teachers_that_are_no_numbers_silence_an_example(loss):
  broken = sums(loss, None, 3, 1.0, 1.0, broken=[2])
  without = sums(loss, 2, 3, 1.0, 1.0)
  assert distance(broken, without) == 0.0
