"""Taps on models that could fool them, held against per-example gradients."""

import clipped_models
import clipping_cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.clipping import layer_rules
from dptrain.clipping import marks
from dptrain.clipping import methods
from dptrain.clipping import parameter_trees
from dptrain.clipping import taps

D = clipped_models.D


@pytest.mark.parametrize("name", clipping_cases.CASES)
def test_equals_vmap(name):
  loss_fn, params, batch = clipping_cases.CASES[name]()
  # Without taps, two_pass is one_pass.
  tried = methods.METHODS[1 : 4 if clipping_cases.USES[name] else 3]
  found, uses = clipped_models.errors(loss_fn, params, batch, tried)
  assert max(found.values()) < clipped_models.TOLERANCE.get(name, 1e-5), found
  assert len(uses) == clipping_cases.USES[name]


@pytest.mark.parametrize("name", ["jitted_loss", "sharedtwice"])
def test_a_second_survey_finds_the_same(name):
  loss_fn, params, batch = clipping_cases.CASES[name]()
  keys = clipped_models.keys_of(batch)
  first = methods.choose(loss_fn, params, batch, keys, "one_pass")
  assert first.uses
  assert methods.choose(loss_fn, params, batch, keys, "one_pass") == first


def test_layers_with_one_input_keep_it_once():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = jnp.tanh(x)
      narrow = nn.Dense(D, dtype=jnp.bfloat16, name="c")(x)
      return nn.Dense(D, name="a")(x) * nn.DenseGeneral(D, name="b")(x) + narrow

  loss_fn, params, batch = clipped_models.of_model(Model)
  keys = clipped_models.keys_of(batch)
  uses = methods.choose(loss_fn, params, batch, keys, "one_pass").uses
  uses = {use.weight[0]: use for use in uses}
  assert uses["a"].same_inputs is uses["c"].same_inputs is None
  assert uses["b"].same_inputs == uses["a"].name
  assert uses["c"].inputs_dtype == jnp.bfloat16


def test_a_call_that_the_survey_has_not_seen_is_refused():
  loss_fn, params, batch = clipping_cases.CASES["sharedtwice"]()
  keys = clipped_models.keys_of(batch)
  choice = methods.choose(loss_fn, params, batch, keys, "one_pass")
  fewer = tuple(use for use in choice.uses if use.number == 0)
  for method in ("one_pass", "two_pass"):
    with pytest.raises(
      RuntimeError, match="called more often than when it was"
    ):
      methods.clipped_sum(
        loss_fn,
        params,
        batch,
        keys,
        np.zeros(3, bool),
        clipped_models.rules.ClippingRule(),
        choice._replace(method=method, uses=fewer),
      )


def test_parameters_by_path():
  tree = {"b": {"x": np.ones(2)}, "a": {}, "none": None}
  flat = parameter_trees.leaves_by_path(tree)
  assert list(flat) == [("b", "x")]
  more = parameter_trees.with_leaves(tree, {**flat, ("b", "y"): 1})
  assert more == {"b": {"x": flat["b", "x"], "y": 1}, "a": {}, "none": None}
  assert tree["b"].keys() == {"x"}
  for bad in ([np.ones(1)], {"a": (np.ones(1),)}, {1: np.ones(1)}, np.ones(1)):
    with pytest.raises(TypeError, match="nested dictionaries"):
      parameter_trees.leaves_by_path(bad)
  with pytest.raises(TypeError, match=r"taps need arrays.*0\.5"):
    parameter_trees.leaves_by_path({"a": 0.5})


# --- Layers of one's own. ----------------------------------------------------


@pytest.fixture(autouse=True)
def own_rules(monkeypatch):
  monkeypatch.setattr(layer_rules, "RULES", dict(layer_rules.RULES))


class Project(nn.Module):
  """x @ W; `back` is x @ W^T."""

  scale: float = 1.0

  def setup(self):
    self.weight = self.param("weight", nn.initializers.normal(), (D, 4))

  def __call__(self, x):
    return self.scale * (x @ self.weight)

  def back(self, x):
    return x @ self.weight.T


class AutoEncoder(nn.Module):
  scale: float = 1.0

  @nn.compact
  def __call__(self, x):
    project = Project(self.scale)
    return nn.Dense(D)(project.back(jnp.tanh(project(x))))


def own_model(model):
  x = clipped_models.reals()
  params = clipped_models.initial(model, x[:1])
  return clipped_models.losses_of(model), params, x


def given(module, x):
  del module
  return x


def register_project(method="__call__", kind="product", flatten=given, **more):
  rule = layer_rules.LayerRule("weight", kind, flatten, **more)
  taps.register(Project, method, rule)


@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
def test_a_good_rule(method):
  register_project()
  register_project("back", "attend")
  loss_fn, params, x = own_model(AutoEncoder())
  keys = clipped_models.keys_of(x)
  uses = methods.choose(loss_fn, params, x, keys, method).uses
  kinds = [use.kind for use in uses if use.weight == ("Project_0", "weight")]
  assert kinds == ["product", "attend"]
  methods.check_against_vmap(loss_fn, params, x, keys, method=method)


@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
def test_a_bad_rule_is_named(method):
  register_project()
  register_project("back", "attend")
  loss_fn, params, x = own_model(AutoEncoder(scale=1.1))
  keys = clipped_models.keys_of(x)
  with pytest.raises(ValueError, match=rf"{method} .*'Project_0/weight' wrong"):
    methods.check_against_vmap(loss_fn, params, x, keys, method=method)
  methods.check_against_vmap(loss_fn, params, x, keys, method=method, rtol=0.5)


def test_a_rule_for_one_of_two_methods_leaves_the_weight_alone():
  register_project()
  loss_fn, params, x = own_model(AutoEncoder())
  keys = clipped_models.keys_of(x)
  uses = methods.choose(loss_fn, params, x, keys, "one_pass").uses
  assert [use.weight for use in uses] == [("Dense_0", "kernel")]
  methods.check_against_vmap(loss_fn, params, x, keys)


def test_a_subclass_that_calls_its_parent_can_be_registered():
  class Louder(nn.Dense):
    @nn.compact
    def __call__(self, x):
      return super().__call__(2 * x)

  rule = layer_rules.LayerRule("kernel", "product", lambda module, x: 2 * x)
  taps.register(Louder, "__call__", rule)
  loss_fn, params, x = own_model(Louder(D))
  keys = clipped_models.keys_of(x)
  assert len(methods.choose(loss_fn, params, x, keys, "one_pass").uses) == 1
  methods.check_against_vmap(loss_fn, params, x, keys)


@pytest.mark.parametrize(
  "bad",
  [
    {"flatten": lambda module, x: x[..., :1]},
    {"flatten": lambda module, x: x.reshape(1, -1, 2 * D)},
    {"kind": "attend"},
    {"kind": "lookup"},
    {"num_features": lambda module: 2},
  ],
)
def test_a_rule_that_cannot_fit_is_refused(bad):
  register_project(**bad)
  loss_fn, params, x = own_model(AutoEncoder())
  keys = clipped_models.keys_of(x)
  with pytest.raises(ValueError, match=r"rule of Project .* cannot belong to"):
    methods.choose(loss_fn, params, x, keys, "one_pass")
  choice = methods.choose(loss_fn, params, x, keys)
  assert choice.method == "vmap"
  assert "rule of Project" in choice.reason


def test_what_cannot_be_registered():
  rule = layer_rules.LayerRule("weight", "product", given)
  taps.register(Project, "__call__", rule)
  taps.register(Project, "__call__", rule)
  other = layer_rules.LayerRule("weight", "attend", given)
  with pytest.raises(ValueError, match="has a rule already"):
    taps.register(Project, "__call__", other)
  with pytest.raises(ValueError, match="has a rule already"):
    taps.register(nn.Dense, "__call__", rule)
  with pytest.raises(ValueError, match="'encode' is not a method of Project"):
    taps.register(Project, "encode", rule)
  with pytest.raises(
    ValueError, match=r"not a subclass of flax\.linen\.Module"
  ):
    taps.register(Project(), "__call__", rule)
  with pytest.raises(ValueError, match=r"kind='outer' is unknown.*'lookup'"):
    layer_rules.LayerRule("weight", "outer", given)


def test_more_ids_than_float32_counts_are_left_alone():
  module = nn.Embed(2**24 + 1, 1)
  rule = layer_rules.RULES[nn.Embed, "__call__"]
  assert rule.flatten(module, jnp.arange(3)) is None
  assert rule.flatten(nn.Embed(2**24, 1), jnp.arange(3)) is not None


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
def test_ids_name_the_row_that_flax_takes(dtype):
  rows = 100
  rule = layer_rules.RULES[nn.Embed, "__call__"]
  limits = np.iinfo(dtype)
  asked = [0, 99, 100, limits.max, limits.min, limits.min // 2, -1, -100, -101]
  asked = np.asarray([i for i in asked if i >= limits.min], dtype)
  found = rule.flatten(nn.Embed(rows, 1), jnp.asarray(asked))
  taken = jnp.take(jnp.arange(float(rows)), jnp.asarray(asked))
  expected = np.where(np.isnan(taken), rows, taken)
  np.testing.assert_array_equal(found, expected)


def test_jax_still_names_operations_as_expected():
  """Should these change, `marks` would leave every layer inside alone."""
  for wrap in (jax.jit, jax.checkpoint):
    jaxpr = jax.make_jaxpr(wrap(jnp.sin))(1.0)
    assert jaxpr.eqns[0].primitive.name in marks._TRANSPARENT
