"""Clipped sums of models whose gradients are known: they are the examples."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.clipping import per_example
from dptrain.clipping import rules

SHAPES = {"a": (3,), "b": (2, 2)}
NAN, INF = float("nan"), float("inf")


def linear_loss(params, batch, keys):
  """<params, example>: the gradient of an example is the example."""
  del keys
  losses = sum(
    jnp.einsum("...,b...->b", params[name], batch[name]) for name in params
  )
  return losses, {"twice": 2 * losses}


def examples(rows):
  """Rows of 7 numbers as a batch of the parameters' shapes."""
  rows = np.asarray(rows, np.float32).reshape(-1, 7)
  return {"a": rows[:, :3], "b": rows[:, 3:].reshape(-1, 2, 2)}


@jax.jit(static_argnames="rule")
def clip(batch, is_padding, rule):
  params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
  keys = jax.random.split(jax.random.key(0), is_padding.shape[0])
  return per_example.clipped_sum(
    linear_loss, params, batch, keys, is_padding, rule
  )


def clipped(rows, rule, padding=()):
  """The clipped sum as one vector [7], and all that came with it."""
  batch = examples(rows)
  is_padding = np.isin(np.arange(len(batch["a"])), padding)
  result = clip(batch, is_padding, rule)
  flat = [np.asarray(x).ravel() for x in jax.tree.leaves(result.gradients)]
  return np.concatenate(flat), result


rule_strategy = st.builds(
  rules.ClippingRule,
  st.sampled_from(rules.KINDS),
  st.sampled_from([1e-3, 0.1, 1.0, 50.0]),
  st.sampled_from([1e-3, 0.01, 1.0]),
)
numbers = st.one_of(
  st.floats(-10, 10, width=32),
  st.sampled_from([0.0, 1e-30, -1e-20, 1e12, -1e18, 1e30, 3e38, NAN, INF]),
)
batches = st.lists(
  st.lists(numbers, min_size=7, max_size=7), min_size=4, max_size=4
)


@settings(max_examples=200, deadline=None)
@given(batches, rule_strategy, st.integers(0, 3))
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(
  rows, rule, which
):
  others = [i for i in range(4) if i != which]
  alone, _ = clipped(rows, rule, padding=others)
  assert np.linalg.norm(alone) <= rule.sensitivity * (1 + 1e-5)
  whole, _ = clipped(rows, rule)
  without, _ = clipped(rows, rule, padding=[which])
  # The sum itself is rounded, too.
  moved = np.linalg.norm(whole - without)
  assert moved <= rule.sensitivity * (1 + 1e-5)
  assert np.isfinite(whole).all()


@settings(max_examples=100, deadline=None)
@given(
  st.lists(
    st.lists(st.floats(-10, 10, width=32), min_size=7, max_size=7),
    min_size=4,
    max_size=4,
  ),
  rule_strategy,
)
def test_equals_a_loop_in_float64(rows, rule):
  expected = np.zeros(7)
  for row in np.asarray(rows, np.float32).astype(np.float64):
    norm = np.linalg.norm(row)
    if rule.kind == "automatic":
      expected += row / (norm + rule.automatic_gamma)
    else:
      row = row if norm <= rule.l2_clip_norm else row / norm * rule.l2_clip_norm
      expected += row if rule.kind == "flat" else row / rule.l2_clip_norm
  found, _ = clipped(rows, rule)
  np.testing.assert_allclose(found, expected, atol=4e-6 * rule.sensitivity)


@pytest.mark.parametrize("kind", rules.KINDS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30])
def test_non_finite_examples_contribute_zero(kind, bad):
  rule = rules.ClippingRule(kind)
  good = [1.0, -2, 3, 0, 0, 0.5, 1]
  # In each leaf, beside padding and without it.
  for place in (0, 6):
    row = list(good)
    row[place] = bad
    expected, _ = clipped([good, good], rule)
    found, result = clipped([good, row, good], rule)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(result.contributes, [True, False, True])
    found, result = clipped([good, row, good, row], rule, padding=[3])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
      result.contributes, [True, False, True, False]
    )
    found, _ = clipped([row, row], rule)
    np.testing.assert_array_equal(found, np.zeros(7))


@pytest.mark.parametrize("content", [0.0, 5.0, NAN, INF])
@pytest.mark.parametrize("kind", rules.KINDS)
def test_padding_contributes_exactly_zero(kind, content):
  rule = rules.ClippingRule(kind)
  good = [1.0, -2, 3, 0, 0, 0.5, 1]
  found, result = clipped([good, [content] * 7], rule, padding=[1])
  expected, _ = clipped([good], rule)
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(result.contributes, [True, False])
  nothing, _ = clipped([[content] * 7], rule, padding=[0])
  np.testing.assert_array_equal(nothing, np.zeros(7))


def test_a_finite_gradient_under_a_non_finite_loss_contributes_zero():
  def loss(params, batch, keys):
    return params["a"] @ batch["x"].T + batch["offset"], {}

  batch = {"x": jnp.ones((2, 3)), "offset": jnp.asarray([0.0, jnp.nan])}
  result = per_example.clipped_sum(
    loss,
    {"a": jnp.zeros(3)},
    batch,
    jax.random.split(jax.random.key(0), 2),
    jnp.zeros(2, bool),
    rules.ClippingRule(l2_clip_norm=100.0),
  )
  np.testing.assert_array_equal(result.gradients["a"], np.ones(3))


def test_what_comes_back_beside_the_sum():
  rows = [[3.0, 4, 0, 0, 0, 0, 0], [0.0] * 7]
  _, result = clipped(rows, rules.ClippingRule())
  np.testing.assert_allclose(result.norms, [5, 0])
  np.testing.assert_array_equal(result.losses, [0, 0])
  assert result.aux["twice"].shape == (2,)


def test_each_example_has_its_own_key():
  def loss(params, batch, keys):
    del batch
    return jax.vmap(lambda k: params["a"] @ jax.random.normal(k, (3,)))(
      keys
    ), {}

  keys = jax.random.split(jax.random.key(3), 5)
  result = per_example.clipped_sum(
    loss,
    {"a": jnp.zeros(3)},
    {"x": jnp.zeros(5)},
    keys,
    jnp.zeros(5, bool),
    rules.ClippingRule(l2_clip_norm=100.0),
  )
  expected = sum(jax.random.normal(key, (3,)) for key in keys)
  np.testing.assert_allclose(result.gradients["a"], expected, rtol=1e-5)


def test_a_bfloat16_parameter_is_summed_in_float32():
  params = {"a": jnp.zeros(2, jnp.bfloat16)}
  batch = {"a": jnp.full((512, 2), 1.0, jnp.bfloat16)}
  result = per_example.clipped_sum(
    linear_loss,
    params,
    batch,
    jax.random.split(jax.random.key(0), 512),
    jnp.zeros(512, bool),
    rules.ClippingRule(l2_clip_norm=100.0),
  )
  assert result.gradients["a"].dtype == jnp.float32
  np.testing.assert_array_equal(result.gradients["a"], [512.0, 512.0])


def test_the_sum_at_the_shape_that_jaxlib_0_10_2_gets_wrong():
  draw = np.random.default_rng(1)
  batch = {"a": draw.standard_normal((8, 8, 32128), np.float32)}
  rule = rules.ClippingRule(l2_clip_norm=1.0)

  @jax.jit
  def run(batch):
    return per_example.clipped_sum(
      linear_loss,
      {"a": jnp.zeros((8, 32128))},
      batch,
      jax.random.split(jax.random.key(0), 8),
      jnp.zeros(8, bool),
      rule,
    )

  truth = batch["a"].astype(np.float64)
  norms = np.sqrt((truth**2).sum((1, 2)))
  truth = (truth / np.maximum(norms, 1)[:, None, None]).sum(0)
  found = run(batch)
  np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
  error = np.linalg.norm(found.gradients["a"] - truth) / np.linalg.norm(truth)
  assert error < 1e-6
