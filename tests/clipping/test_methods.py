"""The methods agree with one another, on any model, and keep the bound."""

import clipped_models
import clipping_cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models

from dptrain.clipping import methods
from dptrain.clipping import rules

B, T, D, V = (getattr(clipped_models, name) for name in "BTDV")
NAN = float("nan")
ALL = methods.METHODS[1:]
TAPPED = ("one_pass", "two_pass")


# --- The bound. --------------------------------------------------------------

TIED = random_models.Model((("one_input", "plain"),), True, "float32")


@pytest.mark.parametrize("kind", rules.KINDS)
def test_no_contribution_exceeds_the_sensitivity(kind):
  rule = rules.ClippingRule(kind, 1e-3, 1e-6)
  loss_fn, params, ids = random_models.of_random(TIED)
  run, _ = clipped_models.clipped(loss_fn, params, ids, rule)
  clipped_models.check_each_contribution(run, params, ids, rule)


def of_type(path):
  return path[-1]


@pytest.mark.parametrize(
  "groups", [rules.by_module, rules.by_parameter, of_type]
)
def test_groups(groups):
  rule = rules.ClippingRule("flat", 1e-3, groups=groups)
  loss_fn, params, ids = random_models.of_random(TIED)
  run, _ = clipped_models.clipped(loss_fn, params, ids, rule)
  # A group whose gradient is zero leaves its share of the bound.
  clipped_models.check_each_contribution(run, params, ids, rule, reached=0.5)
  found = run(params, ids, np.zeros(B, bool))
  truth = found.pop("vmap").gradients
  for method, other in found.items():
    for a, b in zip(
      jax.tree.leaves(other.gradients), jax.tree.leaves(truth), strict=True
    ):
      np.testing.assert_allclose(
        a, b, atol=1e-5 * rule.sensitivity, err_msg=method
      )


# --- Padding and what is not finite. -----------------------------------------


@pytest.fixture(scope="module")
def head():
  """Sums by method of (batch, is_padding), compiled once."""
  loss_fn, params, x = clipping_cases.CASES["bothkindsofsecondpass"]()
  run, _ = clipped_models.clipped(loss_fn, params, x)

  def ready(batch, is_padding=()):
    # The caller changes its batch afterwards, which may still be read.
    is_padding = np.isin(np.arange(B), is_padding)
    return jax.block_until_ready(run(params, batch.copy(), is_padding))

  return ready


@pytest.mark.parametrize("content", [NAN, np.inf, 1e30, 5.0])
def test_padding_contributes_exactly_zero(head, content):
  x = clipped_models.reals()
  expected = head(x, is_padding=[1])
  x[1] = content
  for method, found in head(x, is_padding=[1]).items():
    np.testing.assert_array_equal(found.contributes, [True, False, True])
    for a, b in zip(
      jax.tree.leaves(found.gradients),
      jax.tree.leaves(expected[method].gradients),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b, method)


@pytest.mark.parametrize("content", [NAN, np.inf])
def test_one_example_that_is_not_finite_touches_no_other(head, content):
  x = clipped_models.reals()
  expected = head(x, is_padding=[0])
  x[0, 1, 2] = content
  for method, found in head(x).items():
    np.testing.assert_array_equal(found.contributes, [False, True, True])
    for a, b in zip(
      jax.tree.leaves(found.gradients),
      jax.tree.leaves(expected[method].gradients),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b, method)


def test_nothing_finite_and_nothing_but_padding(head):
  x = clipped_models.reals()
  for batch, padding in ((np.full_like(x, NAN), []), (x, [0, 1, 2])):
    for found in head(batch, padding).values():
      assert not found.contributes.any()
      for leaf in jax.tree.leaves(found.gradients):
        np.testing.assert_array_equal(leaf, 0)


# --- What is chosen, and what is refused. ------------------------------------


def chosen(model_type, method="auto", like=lambda x: x):
  loss_fn, params, batch = clipped_models.of_model(model_type)
  keys = clipped_models.keys_of(batch)
  return methods.choose(
    lambda p, b, k: loss_fn(p, like(b), k), params, batch, keys, method
  )


class Wide(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(64)(nn.Dense(64)(x))


class Narrow(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(x)


class Untappable(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.ConvTranspose(D, (2,))(x)


class ConvNet(nn.Module):
  """Many places and few channels, then few places and many channels."""

  @nn.compact
  def __call__(self, x):
    x = jnp.tanh(nn.Conv(4, (3, 3))(x.reshape(1, 4, 6, 1)))
    x = jnp.tanh(nn.Conv(4, (3, 3))(x))
    x = nn.Conv(24, (2, 3), (2, 6))(x)
    return nn.Dense(3, name="head")(jnp.tanh(x.reshape(1, -1)))


def test_choose_says_what_and_why():
  wide = chosen(Wide)
  assert wide.method == "one_pass"
  assert len(wide.uses) == 2
  assert "4,480 of 4,608 parameters are tapped" in wide.reason
  narrow = chosen(Narrow)
  assert (narrow.method, narrow.uses) == ("vmap", ())
  assert "more than their gradients take" in narrow.reason
  untappable = chosen(Untappable)
  assert untappable.method == "vmap"
  assert untappable.reason == "no layer of the model can be tapped"
  for method in TAPPED:
    asked = chosen(Narrow, method)
    assert (asked.method, len(asked.uses)) == (method, 1)
    assert asked.reason.startswith("as asked; 12 of 14 parameters")
  assert chosen(Wide, "vmap") == methods.Choice("vmap", (), "as asked")


def test_auto_leaves_first_convolutions_to_copies():
  auto = chosen(ConvNet)
  assert auto.method == "one_pass"
  assert [use.weight[0] for use in auto.uses] == ["Conv_2", "head"]
  assert len(chosen(ConvNet, "one_pass").uses) == 4
  loss_fn, params, x = clipped_models.of_model(ConvNet)

  @jax.jit
  def run(params, batch):
    keys, padding = clipped_models.keys_of(batch), np.zeros(B, bool)
    rule = rules.ClippingRule("automatic")
    return [
      methods.clipped_sum(loss_fn, params, batch, keys, padding, rule, method)
      for method in ("auto", "vmap")
    ]

  found = run(params, x)
  np.testing.assert_allclose(found[0].norms, found[1].norms, rtol=1e-5)
  for a, b in zip(*(jax.tree.leaves(x.gradients) for x in found), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_an_unknown_method_is_refused():
  with pytest.raises(ValueError, match=r"'ghost' is unknown; use one of.*auto"):
    chosen(Wide, "ghost")


@pytest.mark.parametrize("container", [list, tuple])
def test_parameters_in_a_list(container):
  model, x = nn.Dense(D), clipped_models.reals()
  params = container([clipped_models.initial(model, x)] * 2)

  def losses(params, batch, keys):
    for one in params:
      batch = jnp.tanh(model.apply({"params": one}, batch))
    return clipped_models.read_out(batch, batch.shape[0]), {}

  keys = clipped_models.keys_of(x)
  choice = methods.choose(losses, params, x, keys)
  assert choice.method == "vmap"
  assert "nested dictionaries" in choice.reason
  for method in TAPPED:
    with pytest.raises(TypeError, match="nested dictionaries"):
      methods.choose(losses, params, x, keys, method)
  found = methods.clipped_sum(
    losses, params, x, keys, np.zeros(B, bool), rules.ClippingRule()
  )
  assert isinstance(found.gradients, container)


def test_a_loss_that_minds_its_parameters_keys_is_left_to_vmap():
  loss_fn, params, x = clipped_models.of_model(Wide)
  start = params

  def near(params, batch, keys):
    far = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, start)
    return loss_fn(params, batch, keys)[0] + sum(jax.tree.leaves(far)), {}

  choice = methods.choose(near, params, x, clipped_models.keys_of(x))
  assert choice.method == "vmap"
  assert choice.reason.startswith("ValueError: ")


# --- check_against_vmap. -----------------------------------------------------


def test_check_against_vmap_names_the_worst_parameter(monkeypatch):
  loss_fn, params, x = clipped_models.of_model(Wide)
  keys = clipped_models.keys_of(x)
  methods.check_against_vmap(loss_fn, params, x, keys)
  right = methods.book_keeping.squared_norms

  def wrong(uses, kept):
    found = right(uses, kept)
    return found | {("Dense_1", "bias"): 0.9 * found["Dense_1", "bias"]}

  monkeypatch.setattr(methods.book_keeping, "squared_norms", wrong)
  with pytest.raises(ValueError, match=r"norms of parameter 'Dense_1/bias'"):
    methods.check_against_vmap(loss_fn, params, x, keys)


def test_check_against_vmap_fails_on_nan():
  loss_fn, params, x = clipped_models.of_model(Narrow)
  x[0] = NAN
  keys = clipped_models.keys_of(x)
  with pytest.raises(ValueError, match="wrong by inf"):
    methods.check_against_vmap(loss_fn, params, x, keys)
