"""The methods agree with one another, on any model, and keep the bound."""

import clipped_models
import flax.linen as nn
from hypothesis import Phase
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.clipping import methods
from dptrain.clipping import rules

B, T, D, V = (getattr(clipped_models, name) for name in "BTDV")
NAN = float("nan")
ALL = methods.METHODS[1:]
TAPPED = ("one_pass", "two_pass")


# --- Random models. ----------------------------------------------------------


class Block(nn.Module):
  """One of many layers; [1, T, D] in and out."""

  kind: str
  dtype: str

  @nn.compact
  def __call__(self, x, _=None):
    types = {"dtype": self.dtype, "param_dtype": self._param_dtype()}
    match self.kind:
      case "dense":
        y = nn.Dense(D, **types)(x)
      case "twice":
        layer = nn.Dense(D, **types)
        y = layer(jnp.tanh(layer(x)))
      case "one_input":
        y = nn.Dense(D, **types)(x) * nn.Dense(D, use_bias=False, **types)(x)
      case "heads":
        y = nn.DenseGeneral((2, 2), **types)(x)
        y = nn.DenseGeneral(D, axis=(-2, -1), **types)(y)
      case "over_tokens":
        y = nn.DenseGeneral(T, axis=1, **types)(x).swapaxes(1, 2)
      case "attention":
        y = nn.MultiHeadDotProductAttention(2, **types)(x)
      case "convolution":
        y = nn.Conv(D, (2,), **types)(x)
      case "einsum":
        y = nn.Einsum((D, D), "btd,de->bte", **types)(x)
      case "norms":
        y = nn.RMSNorm(**types)(nn.GroupNorm(2, **types)(x))
      case "positions":
        y = nn.Embed(T, D, **types)(jnp.arange(T))[None]
    y = x + jnp.tanh(nn.LayerNorm(**types)(y)).astype(x.dtype)
    return y if _ is None else (y, None)

  def _param_dtype(self):
    return "float64" if self.dtype == "float64" else "float32"


KINDS = (
  "dense",
  "twice",
  "one_input",
  "heads",
  "over_tokens",
  "attention",
  "convolution",
  "einsum",
  "norms",
  "positions",
)
WRAPS = ("plain", "remat", "scan", "scan of remat", "remat of scan")


class Model(nn.Module):
  """An embedding, blocks, and a head that may be tied to the embedding.

  Attributes:
    blocks: kind of each, and how it is wrapped.
    tied: whether the embedding is the head.
    dtype: of the computation.
  """

  blocks: tuple[tuple[str, str], ...]
  tied: bool
  dtype: str

  @nn.compact
  def __call__(self, ids):
    wide = "float64" if self.dtype == "float64" else "float32"
    types = {"dtype": self.dtype, "param_dtype": wide}
    embed = nn.Embed(V, D, **types)
    x = embed(ids)
    for kind, wrap in self.blocks:
      block = nn.remat(Block) if "remat" in wrap else Block
      if "scan" in wrap:
        block = Block if wrap == "remat of scan" else block
        block = clipped_models.scanned(block, 2, in_axes=nn.broadcast)
        block = nn.remat(block) if wrap == "remat of scan" else block
        x, _ = block(kind, self.dtype)(x, 0)
      else:
        x = block(kind, self.dtype)(x)
    if self.tied:
      return embed.attend(jnp.tanh(embed(ids[:, ::-1]) + x))
    return nn.Dense(V, **types)(x)


models = st.builds(
  Model,
  blocks=st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from(WRAPS)),
    min_size=1,
    max_size=1,
  ).map(tuple),
  tied=st.booleans(),
  dtype=st.just("float32"),
)
# Each example is compiled anew: few, but others each time.
few = settings(
  max_examples=2,
  deadline=None,
  database=None,
  phases=(Phase.explicit, Phase.generate),
)


def of_random(model):
  ids = clipped_models.ids()
  params = clipped_models.initial(model, ids[:1])
  return clipped_models.losses_of(model), params, ids


@settings(few, max_examples=3)
@given(models)
def test_random_models(model):
  found, uses = clipped_models.errors(*of_random(model))
  assert uses
  assert max(found.values()) < 1e-5, found


@few
@given(models)
def test_random_models_in_float64(model):
  with jax.enable_x64(True):
    model = model.clone(dtype="float64")
    loss_fn, params, ids = of_random(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float64")}
    found, uses = clipped_models.errors(loss_fn, params, ids)
  assert uses
  assert max(found.values()) < 1e-10, found


@few
@given(models)
def test_random_models_in_bfloat16(model):
  """As near as bfloat16 is; and the bound holds as in float32."""
  loss_fn, params, ids = of_random(model.clone(dtype="bfloat16"))
  found, uses = clipped_models.errors(loss_fn, params, ids)
  assert uses
  assert max(found.values()) < 0.05, found
  check_each_contribution(
    loss_fn, params, ids, rules.ClippingRule("flat", 1e-4)
  )


def norm_of(gradients):
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradients)]
  return np.sqrt(sum(np.sum(np.square(x)) for x in leaves))


def check_each_contribution(loss_fn, params, batch, rule, tried=ALL, reached=1):
  """Each example alone moves the sum by its bound, not more."""
  run, _ = clipped_models.clipped(loss_fn, params, batch, rule, tried)
  for which in range(B):
    for method, found in run(params, batch, np.arange(B) != which).items():
      size = norm_of(found.gradients)
      assert size <= rule.sensitivity * (1 + 1e-6), method
      assert size >= reached * 0.99 * rule.sensitivity, method


# --- The bound. --------------------------------------------------------------

TIED = Model((("one_input", "plain"),), True, "float32")


@pytest.mark.parametrize("kind", rules.KINDS)
def test_no_contribution_exceeds_the_sensitivity(kind):
  rule = rules.ClippingRule(kind, 1e-3, 1e-6)
  check_each_contribution(*of_random(TIED), rule)


def of_type(path):
  return path[-1]


@pytest.mark.parametrize(
  "groups", [rules.by_module, rules.by_parameter, of_type]
)
def test_groups(groups):
  rule = rules.ClippingRule("flat", 1e-3, groups=groups)
  loss_fn, params, ids = of_random(TIED)
  tried = ("vmap", "one_pass")
  # A group whose gradient is zero leaves its share of the bound.
  check_each_contribution(loss_fn, params, ids, rule, tried, reached=0.5)
  run, _ = clipped_models.clipped(loss_fn, params, ids, rule, tried)
  found = run(params, ids, np.zeros(B, bool))
  for a, b in zip(
    *(jax.tree.leaves(found[name].gradients) for name in tried), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5 * rule.sensitivity)


def test_two_pass_refuses_groups():
  loss_fn, params, ids = of_random(TIED)
  rule = rules.ClippingRule(groups=rules.by_module)
  with pytest.raises(
    ValueError, match=r"two_pass method .* cannot clip groups"
  ):
    clipped_models.clipped(loss_fn, params, ids, rule, ("two_pass",))[0](
      params, ids, np.zeros(B, bool)
    )


# --- Padding and what is not finite. -----------------------------------------


class Head(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(nn.Dense(D)(x))
    return nn.Dense(D)(jnp.tanh(x)) * nn.Dense(D)(jnp.tanh(x))


@pytest.fixture(scope="module")
def head():
  """Sums by method of (batch, is_padding), compiled once."""
  loss_fn, params, x = clipped_models.of_model(Head)
  run, uses = clipped_models.clipped(loss_fn, params, x)
  assert len(uses) == 3
  return lambda batch, is_padding=(): run(
    params, batch, np.isin(np.arange(B), is_padding)
  )


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
    return nn.Conv(D, (2,))(x)


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
