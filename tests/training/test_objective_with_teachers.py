"""Teachers in the objective: the masks they see, units, and exact clipping."""

import contextlib
import dataclasses
import types
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from dptrain.clipping import methods
from dptrain.clipping import rules
from dptrain.data import masking
from dptrain.models import distillation
from dptrain.models import masked_lm
from dptrain.training import objective as objective_lib

V, T, K = small_run.VOCABULARY, small_run.LENGTH, 2
METHODS = ("vmap", "one_pass", "two_pass")
# Compiles tiny programs in half the time.
FAST = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


class Small(nn.Module):
  """As `Bert` from outside, tied weights included; compiles in a fifth."""

  vocab_size: int = V
  max_length: int = T
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, inputs, positions):
    tokens = nn.Embed(V, 4, name="tokens")
    x = tokens(inputs)
    x = jnp.tanh(nn.Dense(4)(x + x.mean(1, keepdims=True)))
    x = jnp.take_along_axis(x, positions[..., None], axis=1)
    return tokens.attend(x)


def objective_of(model=None):
  model = masked_lm.MaskedLanguageModel(Small()) if model is None else model
  return objective_lib.Objective(model, masking.MaskingSettings(0.3))


def params_of(objective, seed, dtype=np.float32):
  key = jax.random.key(0, impl="threefry2x32")
  draw = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: draw.standard_normal(x.shape).astype(dtype),
    jax.eval_shape(objective.model.init, key),
  )


def batch_of(units):
  """Records [3, T], or units [3, k, T], the last of which has one record."""
  tokens = small_run.store(3 * K).tokens
  if units:
    tokens = tokens.reshape(3, K, T).copy()
    tokens[2, 1] = 0
  else:
    tokens = tokens[:3]
  return {"tokens": tokens, "example_ids": np.arange(3, dtype=np.int32)}


def compiled(function, *arguments):
  """What a function gives, compiled quickly."""
  return jax.jit(function).lower(*arguments).compile(FAST)(*arguments)


def keys_of(seed=1):
  return jax.random.split(jax.random.key(seed, impl="threefry2x32"), 3)


def taught(objective, batch, teachers, distance, weight=0.7):
  """The batch with what teachers predict under the masks of `losses`."""
  masked = objective.masked_for_teachers(batch, keys_of())
  logits = distance.averaged(
    [objective.model.logits(params, masked) for params in teachers]
  )
  logits = logits.reshape(*batch["tokens"].shape[:-1], *logits.shape[1:])
  weights = jnp.full(3, weight, logits.dtype)
  return batch | {"targets": distillation.Targets(logits, weights, distance)}


# --- Masks. ------------------------------------------------------------------


class Recording:
  """A model that remembers what it was given."""

  bert = types.SimpleNamespace(vocab_size=V)

  def __init__(self):
    self.seen = []

  def losses(self, params, masked, keys):
    del params, keys
    self.seen.append(masked)
    return jnp.zeros(len(masked["inputs"])), {}


@pytest.mark.parametrize("units", [False, True])
def test_teachers_see_the_very_masks_of_the_student(units):
  objective, batch = objective_of(Recording()), batch_of(units)
  told = objective.masked_for_teachers(batch, keys_of())
  slots = told["labels"].shape[-1]
  shape = (*batch["tokens"].shape[:-1], slots, V)
  targets = distillation.Targets(
    jnp.zeros(shape), jnp.ones(3), distillation.Distillation()
  )
  objective.losses(None, batch, keys_of())
  objective.losses(None, batch | {"targets": targets}, keys_of())
  without, with_targets = objective.model.seen
  assert "targets" not in without
  rows = len(told["labels"])
  assert with_targets["targets"].logits.shape == (rows, slots, V)
  for masked in (without, with_targets):
    for name, array in told.items():
      np.testing.assert_array_equal(masked[name], array)
  assert set(told) == {"inputs", "positions", "labels", "weights"}
  # Fresh keys draw other masks.
  other = objective.masked_for_teachers(batch, keys_of(2))
  assert (np.asarray(other["inputs"]) != np.asarray(told["inputs"])).any()


@pytest.mark.parametrize("units", [False, True])
def test_a_model_that_teaches_itself_has_nothing_to_learn(units):
  """So the teacher's row and slot are the student's own."""
  objective = objective_of()
  one, other = (params_of(objective, seed) for seed in (1, 2))
  distance = distillation.Distillation("symmetric_kl")
  batch, run = batch_of(units), jax.jit(objective.losses)
  plain, _ = run(one, batch, keys_of())
  for teacher, differs in ((one, False), (other, True)):
    given = taught(objective, batch, [teacher], distance)
    gaps = np.asarray(run(one, given, keys_of())[0] - plain)
    assert (gaps > 0.1).all() if differs else (abs(gaps) < 1e-5).all()


def test_the_term_of_a_unit_is_the_mean_over_its_records():
  objective = objective_of()
  one, other = (params_of(objective, seed) for seed in (1, 2))
  batch, run = batch_of(True), jax.jit(objective.losses)
  given = taught(objective, batch, [other], distillation.Distillation())
  found = run(one, given, keys_of())[0]
  keys = jax.vmap(lambda key: jax.random.split(key, K))(keys_of())
  for unit, count in enumerate((K, K, 1)):
    each = [
      run(
        one,
        {
          "tokens": batch["tokens"][unit, record][None],
          "targets": dataclasses.replace(
            given["targets"],
            logits=given["targets"].logits[unit, record][None],
            weight=given["targets"].weight[unit][None],
          ),
        },
        keys[unit, record][None],
      )[0][0]
      for record in range(count)
    ]
    np.testing.assert_allclose(found[unit], np.mean(each), rtol=1e-5)


# --- Clipping. ---------------------------------------------------------------


@contextlib.contextmanager
def in_double():
  """Float64 throughout: a term is float32 otherwise, whatever its logits."""
  names = {name: getattr(jnp, name) for name in dir(jnp) if name[0] != "_"}
  double = types.SimpleNamespace(**names | {"float32": jnp.float64})
  with jax.enable_x64(True), mock.patch.object(distillation, "jnp", double):
    yield


@pytest.mark.parametrize(
  ("loss", "units"),
  [("cross_entropy", False), ("logit_mse", True), ("symmetric_kl", False)],
)
def test_all_methods_clip_label_and_teachers_together(loss, units):
  distance = distillation.Distillation(loss, temperature=1.5)
  rule, objective = rules.ClippingRule("flat", 1e-2), objective_of()
  kinds = set()

  def run(one, teachers):
    batch = taught(objective, batch_of(units), teachers, distance)
    absent, found = jnp.zeros(3, bool), {}
    for method in METHODS:
      rest = (one, batch, keys_of())
      choice = methods.choose(objective.losses, *rest, method)
      kinds.update((u.weight[0], u.kind) for u in choice.uses)
      found[method] = methods.clipped_sum(
        objective.losses, *rest, absent, rule, choice
      )
    # Each example by itself, from the definition of clipping.
    slopes = jax.jacrev(lambda p: objective.losses(p, *rest[1:])[0])(one)
    return found, slopes

  with in_double():
    one, *teachers = (
      params_of(objective, seed, np.float64) for seed in (1, 2, 3)
    )
    found, slopes = compiled(run, one, teachers)
  assert {("tokens", "lookup"), ("tokens", "attend")} <= kinds
  flat = np.concatenate([x.reshape(3, -1) for x in jax.tree.leaves(slopes)], 1)
  assert flat.dtype == np.float64
  norms = np.linalg.norm(flat, axis=1)
  assert (norms > rule.l2_clip_norm).all()
  expected = (flat * (rule.l2_clip_norm / norms)[:, None]).sum(0)
  for method, other in found.items():
    np.testing.assert_allclose(other.norms, norms, rtol=1e-10, err_msg=method)
    total = np.concatenate(
      [np.ravel(x) for x in jax.tree.leaves(other.gradients)]
    )
    error = abs(total - expected).max() / abs(expected).max()
    assert error < 1e-10, (method, error)
