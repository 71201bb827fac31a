"""The private step against plain loops: sums, noise, division, padding."""

import contextlib
import dataclasses
import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run

from dptrain.clipping import rules
from dptrain.data import batches
from dptrain.data import masking
from dptrain.models import bert
from dptrain.models import encoder_layer
from dptrain.models import masked_lm
from dptrain.privacy import noise
from dptrain.training import objective as objective_lib
from dptrain.training import step as step_lib


def key(number):
  return jax.random.key(number, impl="threefry2x32")


def norm(tree):
  leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  return np.linalg.norm(np.concatenate(leaves))


def relative_error(found, truth):
  return norm(jax.tree.map(np.subtract, found, truth)) / norm(truth)


def one_by_one(losses, params, batch, examples_key):
  """The gradients of the true examples, as float64, one at a time."""

  @jax.jit
  def gradient(tokens, key):
    def loss(params):
      return losses(params, {"tokens": tokens[None]}, key[None])[0][0]

    return jax.grad(loss)(params)

  return [
    jax.tree.map(
      lambda x: np.asarray(x, np.float64),
      gradient(tokens, jax.random.fold_in(examples_key, number)),
    )
    for tokens, number, is_padding in zip(
      batch["tokens"], batch["example_ids"], batch["is_padding"], strict=True
    )
    if not is_padding
  ]


def clip_and_add(gradients, rule):
  """The definition of the clipped sum, in float64."""
  total = jax.tree.map(np.zeros_like, gradients[0])
  for gradient in gradients:
    if rule.kind == "automatic":
      scale = 1 / (norm(gradient) + rule.automatic_gamma)
    else:
      scale = min(1, rule.l2_clip_norm / norm(gradient))
      scale /= rule.l2_clip_norm if rule.kind == "normalized" else 1
    total = jax.tree.map(lambda t, g, s=scale: t + s * g, total, gradient)
  return total


def bert_step(model=None, rule=None):
  model = model or small_run.model()
  objective = objective_lib.Objective(model, masking.MaskingSettings())
  rule = rule or rules.ClippingRule("normalized", l2_clip_norm=1.0)
  step = step_lib.PrivateStep(objective.losses, rule, optax.sgd(1.0))
  return step, jax.jit(model.init)(key(1))


def physical(indices, size):
  return list(
    batches.physical_batches(small_run.store(), np.asarray(indices), size)
  )


def in_double():
  """Lets the model compute in float64, which its settings do not offer."""
  names = {name: getattr(jnp, name) for name in dir(jnp) if name[0] != "_"}
  double = types.SimpleNamespace(**names | {"float32": jnp.float64})
  stack = contextlib.ExitStack()
  stack.enter_context(jax.enable_x64(True))
  for module in (bert, encoder_layer, masked_lm):
    stack.enter_context(mock.patch.object(module, "jnp", double))
  stack.enter_context(
    mock.patch.object(bert, "_dtype_name", return_value="float32")
  )
  return stack


@functools.cache
def reference(precision):
  """A step, parameters, a batch with padding, and its gradients one by one."""
  step, params = bert_step(small_run.model(dtype=precision))
  params = jax.tree.map(lambda x: x.astype(precision), params)
  (batch,) = physical(range(13), 16)
  return step, params, batch, one_by_one(step.loss_fn, params, batch, key(2))


@pytest.mark.parametrize(
  ("kind", "method"),
  [("flat", "vmap"), ("normalized", "one_pass"), ("automatic", "two_pass")],
)
@pytest.mark.parametrize(
  ("precision", "tolerance"), [("float64", 1e-6), ("float32", 1e-5)]
)
def test_the_sum_equals_a_loop_over_examples(
  kind, method, precision, tolerance
):
  with in_double() if precision == "float64" else contextlib.nullcontext():
    step, params, batch, gradients = reference(precision)
    # So that "flat" scales some of them and leaves others.
    middle = float(np.median([norm(gradient) for gradient in gradients]))
    rule = rules.ClippingRule(kind, l2_clip_norm=middle)
    step = dataclasses.replace(step, rule=rule, clipping_method=method)
    found = jax.jit(step.accumulate)(
      params, step.zeros(params, batch), batch, key(2)
    ).gradients
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {precision}
    assert relative_error(found, clip_and_add(gradients, rule)) < tolerance


def test_tied_embeddings_have_one_gradient():
  _, params = bert_step()
  tables = [
    x for x in jax.tree.leaves(params) if small_run.VOCABULARY in x.shape
  ]
  assert sorted(x.ndim for x in tables) == [1, 2]  # the table and the bias


def test_updates_do_not_depend_on_the_physical_batch_size():
  step, params = bert_step(small_run.QuickModel(small_run.model().bert))
  state = step.optimizer.init(params)
  indices = np.sort(np.random.default_rng(0).choice(200, 90, replace=False))
  accumulate = jax.jit(step.accumulate)

  @jax.jit
  def finish(accumulator):
    return step.finish(
      params,
      state,
      accumulator,
      noise_key=key(3),
      noise_multiplier=0.5,
      expected_batch_size=80.0,
    )[0]

  found = []
  for size in (4, 16, 64):
    dealt = physical(indices, size)
    accumulator = step.zeros(params, dealt[0])
    for batch in dealt:
      accumulator = accumulate(params, accumulator, batch, key(2))
    found.append(finish(accumulator))
  moved = jax.tree.map(np.subtract, found[0], params)
  for other in found[1:]:
    difference = norm(jax.tree.map(np.subtract, found[0], other))
    assert difference < 1e-6 * norm(moved)


# --- what follows is about noise and division: a model of one vector ---------


def vector_step(size=7, rule=None, **settings):
  def losses(params, batch, keys):
    del keys
    return batch["x"] @ params["w"], {}

  rule = rule or rules.ClippingRule("flat", l2_clip_norm=2.0)
  step = step_lib.PrivateStep(losses, rule, optax.sgd(1.0), **settings)
  return step, {"w": jnp.zeros(size)}


def vector_batch(rows, padding=0):
  x = np.asarray(rows, np.float32)
  x = np.concatenate([x, np.full((padding, x.shape[1]), np.nan, np.float32)])
  return {
    "x": x,
    "example_ids": np.arange(len(x), dtype=np.int32),
    "is_padding": np.arange(len(x)) >= len(x) - padding,
  }


def update(step, params, dealt, *, number=0, multiplier=1.0, expected=10.0):
  accumulator = step.zeros(params, vector_batch(np.zeros((1, 7))))
  for batch in dealt:
    accumulator = step.accumulate(params, accumulator, batch, key(0))
  return step.finish(
    params,
    step.optimizer.init(params),
    accumulator,
    noise_key=key(number),
    noise_multiplier=multiplier,
    expected_batch_size=expected,
  )


def test_an_empty_draw_is_a_step_of_pure_noise():
  step, params = vector_step()
  drawn = noise.gaussian_like(key(5), params, 1.5 * 2.0)["w"]
  found, _, _ = update(step, params, [], number=5, multiplier=1.5)
  np.testing.assert_allclose(found["w"], -drawn / 10, rtol=1e-6)
  assert norm(found) > 0


@pytest.mark.parametrize("kind", rules.KINDS)
def test_the_noise_has_the_stated_deviation(kind):
  size, rule = 200_000, rules.ClippingRule(kind, l2_clip_norm=3.0)
  step, params = vector_step(size, rule)
  accumulator = step_lib.Accumulator({"w": jnp.zeros(size)}, None)
  found = []
  for number in (1, 2):
    moved, _, _ = step.finish(
      params,
      step.optimizer.init(params),
      accumulator,
      noise_key=key(number),
      noise_multiplier=0.7,
      expected_batch_size=50.0,
    )
    found.append(np.asarray(moved["w"], np.float64))
  deviation = 0.7 * (3.0 if kind == "flat" else 1.0) / 50
  for values in found:
    assert values.std() == pytest.approx(deviation, rel=0.01)
    assert abs(values.mean()) < 5 * deviation / size**0.5
    assert np.mean(np.abs(values) < deviation) == pytest.approx(
      0.6827, abs=0.01
    )
  correlation = np.corrcoef(*found)[0, 1]
  assert abs(correlation) < 5 / size**0.5


def test_noise_is_not_rounded_away_beside_a_large_sum():
  size, large = 200_000, 1e4
  step, params = vector_step(size, rules.ClippingRule(l2_clip_norm=3.0))
  moved, _, _ = step.finish(
    params,
    step.optimizer.init(params),
    step_lib.Accumulator({"w": jnp.full(size, large)}, None),
    noise_key=key(1),
    noise_multiplier=0.5,
    expected_batch_size=1.0,
  )
  values = -np.asarray(moved["w"], np.float64) - large
  assert values.std() == pytest.approx(1.5, rel=0.01)
  # As fine as float32 is at this size; bfloat16 has some 2,000 such values.
  assert len(np.unique(values)) > 5_000


def test_noise_is_added_once_however_many_physical_batches():
  step, params = vector_step()
  rows = np.random.default_rng(0).normal(size=(12, 7))
  whole, _, _ = update(step, params, [vector_batch(rows)], number=4)
  for parts in (2, 12):
    dealt = [vector_batch(part) for part in np.split(rows, parts)]
    found, _, _ = update(step, params, dealt, number=4)
    np.testing.assert_allclose(found["w"], whole["w"], rtol=1e-5, atol=1e-6)
  quiet, _, _ = update(step, params, [vector_batch(rows)], multiplier=0.0)
  drawn = noise.gaussian_like(key(4), params, 2.0)["w"]
  np.testing.assert_allclose(
    whole["w"], quiet["w"] - drawn / 10, rtol=1e-5, atol=1e-6
  )


def test_the_sum_is_divided_by_the_expected_size():
  step, params = vector_step()
  rows = np.full((6, 7), 0.1)
  for padding in (0, 5):
    batch = vector_batch(rows, padding)
    for expected in (6.0, 12.0, 100.0):
      found, _, _ = update(
        step, params, [batch], multiplier=0.0, expected=expected
      )
      np.testing.assert_allclose(found["w"], -0.6 / expected, rtol=1e-5)


def test_an_example_of_nan_moves_nothing_in_a_whole_update():
  step, params = vector_step()
  rows = np.random.default_rng(0).normal(size=(4, 7))
  expected, _, _ = update(step, params, [vector_batch(rows)])
  bad = np.concatenate([rows, [[np.nan] * 7]])
  for padding in (0, 3):
    found, _, _ = update(step, params, [vector_batch(bad, padding)])
    np.testing.assert_array_equal(found["w"], expected["w"])


def test_statistics_count_what_took_part():
  step, params = vector_step(collect_statistics=True)
  rows = [[1.0] * 7, [0.1] * 7, [np.inf] * 7]
  _, _, told = update(step, params, [vector_batch(rows, padding=2)])
  assert float(told["realised_batch_size"]) == 2
  assert float(told["clip_fraction"]) == 0.5
  assert float(told["non_finite_examples"]) == 1
  assert float(told["gradient_snr"]) > 0
  quiet, params = vector_step()
  assert update(quiet, params, [vector_batch(rows)])[2] == {}


def test_an_empty_draw_has_statistics_too():
  step, params = vector_step(collect_statistics=True)
  told = update(step, params, [])[2]
  assert float(told["realised_batch_size"]) == 0
  assert np.isfinite([float(x) for x in told.values()]).all()
