import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.models import axes
from dptrain.models import bert

SMALL = {
  "vocab_size": 37,
  "num_layers": 2,
  "width": 16,
  "num_heads": 2,
  "max_length": 12,
}


def key(seed=0):
  return jax.random.key(seed, impl="threefry2x32")


def tokens(batch=4, length=10, masked=3, seed=0):
  rng = np.random.default_rng(seed)
  inputs = rng.integers(1, 37, (batch, length)).astype(np.int32)
  inputs[0, 6:] = bert.PAD_ID
  positions = rng.integers(0, 6, (batch, masked)).astype(np.int32)
  return jnp.asarray(inputs), jnp.asarray(positions)


def init(model, seed=0):
  inputs, positions = tokens()
  boxed = jax.jit(model.init)(key(seed), inputs, positions)
  params = axes.unboxed(boxed)["params"]
  # Fresh biases are 0 and scales 1: move them, so that each one matters.
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(key(seed + 1), len(leaves))
  return jax.tree.unflatten(
    tree,
    [
      x + 0.1 * jax.random.normal(k, x.shape)
      for x, k in zip(leaves, keys, strict=True)
    ],
  )


def stack(params):
  """Turns layer_0, layer_1, ... into one stacked 'layers'."""
  layers = [params[f"layer_{i}"] for i in range(SMALL["num_layers"])]
  rest = {k: v for k, v in params.items() if not k.startswith("layer_")}
  return {**rest, "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def close(actual, expected, rtol=1e-4, atol=1e-5):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    actual,
    expected,
  )


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, inputs, positions):
  return model.apply({"params": params}, inputs, positions)


def objective(model, params, inputs, positions):
  logits = model.apply({"params": params}, inputs, positions)
  return jnp.mean(jnp.square(logits[..., :5] - 1.0)), logits


gradients = jax.jit(
  jax.grad(objective, argnums=1, has_aux=True), static_argnums=0
)


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_scan_and_remat_change_neither_outputs_nor_gradients(
  layer_norm, remat, scan
):
  plain = bert.Bert(**SMALL, layer_norm=layer_norm)
  other = plain.clone(scan_layers=scan, remat=remat)
  params = init(plain)
  batch = tokens()
  expected_grads, expected = gradients(plain, params, *batch)
  restack = stack if scan else lambda x: x
  actual_grads, actual = gradients(other, restack(params), *batch)
  close(actual, expected)
  close(actual_grads, restack(expected_grads))
  for leaf in jax.tree.leaves(actual_grads["head_dense"]):
    assert np.abs(leaf).max() > 0


def _dense(x, p):
  return np.tensordot(x, p["kernel"], 1) + p["bias"]


def _norm(x, p, epsilon=1e-6):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)
  return x * p["scale"] + p["bias"]


def _gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def _attention(x, p, visible):
  q, k, v = (_dense(x, p[n]) for n in ("query", "key", "value"))
  heads = []
  for h in range(q.shape[1]):
    scores = q[:, h] @ k[:, h].T / np.sqrt(q.shape[-1])
    weights = np.where(visible, np.exp(scores - scores.max()), 0.0)
    heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, h])
  y = np.stack(heads, 1)
  return np.einsum("thk,hkd->td", y, p["out"]["kernel"]) + p["out"]["bias"]


def naive(p, inputs, positions, layer_norm):
  """One example at a time, float64 numpy, from the papers' formulas."""
  table = p["token_embedding"]["embedding"]
  x = table[inputs] + p["position_embedding"]["embedding"][: len(inputs)]
  if layer_norm == "post":
    x = _norm(x, p["embedding_norm"])
  for i in range(SMALL["num_layers"]):
    q = p[f"layer_{i}"]
    for branch, norm in (
      (lambda y, q=q: _attention(y, q["attention"], inputs != 0), "attention"),
      (
        lambda y, q=q: _dense(_gelu(_dense(y, q["mlp_in"])), q["mlp_out"]),
        "mlp",
      ),
    ):
      norm = q[norm + "_norm"]
      if layer_norm == "pre":
        x = x + branch(_norm(x, norm))
      else:
        x = _norm(x + branch(x), norm)
  if layer_norm == "pre":
    x = _norm(x, p["final_norm"])
  x = _norm(_gelu(_dense(x[positions], p["head_dense"])), p["head_norm"])
  return x @ table.T + p["output_bias"]["bias"]


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_agrees_with_a_naive_model_in_numpy(layer_norm):
  model = bert.Bert(**SMALL, layer_norm=layer_norm, head_size=5, mlp_width=7)
  params = init(model)
  inputs, positions = tokens()
  logits = apply(model, params, inputs, positions)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for i in range(len(inputs)):
    expected = naive(
      p, np.asarray(inputs[i]), np.asarray(positions[i]), layer_norm
    )
    np.testing.assert_allclose(logits[i], expected, rtol=1e-4, atol=1e-4)


def test_padding_and_its_amount_change_nothing():
  model = bert.Bert(**SMALL)
  params = init(model)
  inputs, positions = tokens()
  longer = jnp.pad(inputs, ((0, 0), (0, 2)))
  close(
    apply(model, params, longer, positions),
    apply(model, params, inputs, positions),
  )


def test_an_example_of_padding_only_stays_finite():
  model = bert.Bert(**SMALL)
  params = init(model)
  empty = jnp.zeros((1, 10), jnp.int32)
  positions = jnp.zeros((1, 3), jnp.int32)
  grads, logits = gradients(model, params, empty, positions)
  assert all(
    bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((grads, logits))
  )


def test_bfloat16_computes_low_but_keeps_parameters_and_logits_float32():
  model = bert.Bert(**SMALL, dtype="bfloat16", scan_layers=True, remat=True)
  params = init(model)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  logits = apply(model, params, *tokens())
  assert logits.dtype == jnp.float32
  exact = apply(model.clone(dtype="float32"), params, *tokens())
  assert 0 < np.abs(logits - exact).max() < 0.3


def test_initial_values_are_berts():
  model = bert.Bert(**{**SMALL, "vocab_size": 5000})
  params = axes.unboxed(jax.jit(model.init)(key(), *tokens()))["params"]
  table = np.asarray(params["token_embedding"]["embedding"])
  assert np.abs(table).max() <= 0.04
  # A unit normal cut at two deviations has deviation 0.8796.
  assert table.std() == pytest.approx(0.02 * 0.8796, rel=0.01)
  layer = params["layer_0"]
  assert not layer["attention"]["query"]["bias"].any()
  assert (layer["mlp_norm"]["scale"] == 1).all()
  assert 0.01 < np.std(layer["attention"]["query"]["kernel"]) < 0.025


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("vocab_size", 0),
    ("num_layers", 0),
    ("num_layers", 2.0),
    ("width", -16),
    ("num_heads", 3),
    ("head_size", 0),
    ("mlp_width", 0),
    ("max_length", True),
    ("dropout_rate", 1.0),
    ("layer_norm", "both"),
    ("layer_norm_epsilon", 0.0),
    ("dtype", "float16"),
    ("dtype", "quick"),
  ],
)
def test_refuses_bad_settings_by_name(field, value):
  with pytest.raises(ValueError, match=f"Bert.{field}="):
    bert.Bert(**{**SMALL, field: value})


def test_refuses_inputs_longer_than_its_positions():
  model = bert.Bert(**SMALL)
  inputs, positions = tokens(length=13)
  with pytest.raises(ValueError, match="max_length=12"):
    model.init(key(), inputs, positions)


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
@pytest.mark.parametrize("scan", [False, True])
def test_every_dimension_of_every_parameter_is_named(layer_norm, scan):
  model = bert.Bert(**SMALL, layer_norm=layer_norm, scan_layers=scan)
  names = axes.logical_axes(model)
  boxed = jax.eval_shape(model.init, key(), *tokens())
  params = axes.unboxed(boxed)["params"]
  is_names = {"is_leaf": lambda x: isinstance(x, tuple)}
  assert jax.tree.structure(
    jax.tree.map(lambda _: 0, names, **is_names)
  ) == jax.tree.structure(params)
  sizes = {
    "vocab": {37},
    "positions": {12},
    "embed": {16},
    "mlp": {64, 16},
    "heads": {2},
    "kv": {8},
    "layers": {2},
  }

  def check(leaf_names, leaf):
    assert len(leaf_names) == leaf.ndim
    assert len(set(leaf_names)) == leaf.ndim, "a name may occur only once"
    for name, size in zip(leaf_names, leaf.shape, strict=True):
      assert size in sizes[name]

  jax.tree.map(check, names, params, **is_names)
  if scan:
    stacked = jax.tree.leaves(names["layers"], **is_names)
    assert all(n[0] == "layers" for n in stacked)


def test_initialises_on_a_mesh():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  rules = [("mlp", "data"), ("heads", "data"), ("vocab", "data")]
  model = bert.Bert(**SMALL, scan_layers=True)
  with mesh, nn.logical_axis_rules(rules):
    params = jax.jit(model.init)(key(), *tokens())
  close(
    axes.unboxed(params),
    axes.unboxed(jax.jit(model.init)(key(), *tokens())),
    atol=1e-6,
  )
