from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.models import bert
from dptrain.models import masked_lm

V, T, M, B = 23, 8, 3, 4


def key(seed=0):
  return jax.random.key(seed, impl="threefry2x32")


def build(dropout_rate=0.0, scan_layers=False):
  return masked_lm.MaskedLanguageModel(
    bert.Bert(
      vocab_size=V,
      num_layers=2,
      width=8,
      num_heads=2,
      max_length=T,
      dropout_rate=dropout_rate,
      scan_layers=scan_layers,
    )
  )


def make_batch(seed=0, size=B):
  rng = np.random.default_rng(seed)
  weights = (rng.random((size, M)) < 0.7).astype(np.float32)
  return {
    "inputs": jnp.asarray(rng.integers(0, V, (size, T)), jnp.int32),
    "positions": jnp.asarray(rng.integers(0, T, (size, M)), jnp.int32),
    "labels": jnp.asarray(rng.integers(0, V, (size, M)), jnp.int32),
    "weights": jnp.asarray(weights),
  }


def replace(batch, other, row):
  return {k: v.at[row].set(other[k][row]) for k, v in batch.items()}


PLAIN, DROPPING = build(), build(0.3, scan_layers=True)
MODELS = {"plain": PLAIN, "dropout": DROPPING}
PARAMS = {
  name: jax.tree.map(lambda x: 10 * x, jax.jit(model.init)(key()))
  for name, model in MODELS.items()
}
KEYS = jax.random.split(key(7), B)
LOSSES = {name: jax.jit(model.losses) for name, model in MODELS.items()}


def close(actual, expected, **tolerance):
  tolerance = {"rtol": 1e-5, "atol": 1e-6, **tolerance}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance),
    actual,
    expected,
  )


def plain_logits(batch):
  return jax.jit(PLAIN.bert.apply)(
    {"params": PARAMS["plain"]}, batch["inputs"], batch["positions"]
  )


def test_losses_are_masked_means_of_the_cross_entropy():
  batch = make_batch()
  batch["weights"] = jnp.array([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
  losses, aux = LOSSES["plain"](PARAMS["plain"], batch)
  logits = plain_logits(batch)
  logits = np.asarray(logits, np.float64)
  for i in range(B):
    rows = [
      (logits[i, m], int(batch["labels"][i, m]))
      for m in range(M)
      if batch["weights"][i, m]
    ]
    terms = [np.log(np.exp(z).sum()) - z[y] for z, y in rows]
    expected = np.mean(terms) if terms else 0.0
    assert losses[i] == pytest.approx(expected, rel=1e-4)
    assert aux["loss_sum"][i] == pytest.approx(sum(terms), rel=1e-4)
    assert aux["masked"][i] == len(terms)
    assert aux["correct"][i] == sum(z.argmax() == y for z, y in rows)
  assert losses.dtype == jnp.float32
  assert {x.dtype for x in aux.values()} == {jnp.dtype("float32")}
  assert {x.shape for x in (losses, *aux.values())} == {(B,)}


def test_right_predictions_are_counted():
  batch = make_batch()
  logits = plain_logits(batch)
  batch["labels"] = jnp.argmax(logits, -1).at[0, 0].add(1) % V
  batch["weights"] = jnp.ones((B, M))
  _, aux = LOSSES["plain"](PARAMS["plain"], batch)
  assert aux["correct"].tolist() == [M - 1, M, M, M]


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), row=st.integers(0, B - 1))
def test_no_example_changes_anothers_loss(name, seed, row):
  batch, other = make_batch(seed), make_batch(seed + 1)
  before = LOSSES[name](PARAMS[name], batch, KEYS)
  after = LOSSES[name](PARAMS[name], replace(batch, other, row), KEYS)
  others = np.arange(B) != row
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[others], b[others]),
    before,
    after,
  )


def test_every_loss_does_depend_on_its_own_example():
  batch, other = make_batch(0), make_batch(1)
  batch["weights"] = other["weights"] = jnp.ones((B, M))
  before, _ = LOSSES["plain"](PARAMS["plain"], batch)
  after, _ = LOSSES["plain"](PARAMS["plain"], other)
  assert (np.abs(before - after) > 1e-3).all()


@pytest.mark.parametrize("name", MODELS)
def test_single_examples_under_vmap_equal_the_batch(name):
  model, params, batch = MODELS[name], PARAMS[name], make_batch()

  def one(example, example_key):
    example = jax.tree.map(lambda x: x[None], example)
    result = model.losses(params, example, example_key[None])
    return jax.tree.map(lambda x: x[0], result)

  close(jax.jit(jax.vmap(one))(batch, KEYS), LOSSES[name](params, batch, KEYS))


@pytest.mark.parametrize("name", MODELS)
def test_the_place_and_company_in_a_batch_do_not_matter(name):
  losses, params, batch = LOSSES[name], PARAMS[name], make_batch()
  rows = jnp.array([3, 1])
  part = jax.tree.map(lambda x: x[rows], batch)
  whole = losses(params, batch, KEYS)
  close(
    losses(params, part, KEYS[rows]),
    jax.tree.map(lambda x: x[rows], whole),
  )


def test_per_example_gradients_sum_to_the_gradient_of_the_sum():
  params, batch = PARAMS["dropout"], make_batch()

  def one(params, example, example_key):
    example = jax.tree.map(lambda x: x[None], example)
    return DROPPING.losses(params, example, example_key[None])[0][0]

  each = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))(params, batch, KEYS)
  total = jax.jit(jax.grad(lambda p: DROPPING.losses(p, batch, KEYS)[0].sum()))(
    params
  )
  close(jax.tree.map(lambda g: g.sum(0), each), total, rtol=1e-3, atol=1e-4)


def test_dropout_follows_the_key_and_no_key_means_none():
  params, batch = PARAMS["dropout"], make_batch()
  batch["weights"] = jnp.ones((B, M))
  losses, _ = LOSSES["dropout"](params, batch, KEYS)
  again, _ = LOSSES["dropout"](params, batch, KEYS)
  np.testing.assert_array_equal(losses, again)
  moved, _ = LOSSES["dropout"](params, batch, KEYS.at[0].set(key(99)))
  assert (moved != losses).tolist() == [True, False, False, False]
  still, _ = LOSSES["dropout"](params, batch)
  undropped = build(0.0, scan_layers=True)
  without, _ = jax.jit(undropped.losses)(params, batch, KEYS)
  close(still, without)
  assert (np.abs(still - losses) > 1e-5).all()


def test_an_example_without_masks_has_a_zero_gradient():
  batch = make_batch()
  batch["weights"] = jnp.zeros((B, M))
  grad = jax.jit(jax.grad(lambda p: PLAIN.losses(p, batch)[0].sum()))
  grads = grad(PARAMS["plain"])
  assert all((x == 0).all() for x in jax.tree.leaves(grads))


def test_init_returns_plain_float32_dicts():
  params = jax.jit(PLAIN.init)(key())

  def walk(node):
    if type(node) is dict:
      for child in node.values():
        walk(child)
    else:
      assert isinstance(node, jax.Array)
      assert node.dtype == jnp.float32

  walk(params)
  assert masked_lm.num_parameters(params) == sum(
    x.size for x in jax.tree.leaves(params)
  )


def test_check_refuses_data_that_does_not_fit():
  PLAIN.check(T, V)
  with pytest.raises(ValueError, match=r"sequence_length=9 .*max_length=8"):
    PLAIN.check(T + 1, V)
  with pytest.raises(ValueError, match=r"vocab_size=24 .*vocab_size=23"):
    PLAIN.check(T, V + 1)
