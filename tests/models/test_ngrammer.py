"""The N-Grammer layer against the paper's equations, and in its encoder."""

import functools

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import naive_ngrammer
import numpy as np
import pytest

from dptrain.models import axes
from dptrain.models import bert
from dptrain.models import encoder_layer
from dptrain.models import ngrammer

B, T, D, H = 2, 7, 16, 2
SMALL = {"num_clusters": 6, "table_size": 23, "ngram_dim": 3}


def small(**options):
  return ngrammer.NGrammerSettings(**{**SMALL, **options})


def key(seed=0):
  return jax.random.key(seed, impl="threefry2x32")


def drawn(init, *args, **options):
  """Parameters, all of them random, in float64 if there is any."""
  draw = np.random.default_rng(1)
  # Shapes only: what a fresh model starts from would have to be compiled.
  shapes = jax.eval_shape(lambda: init(key(), *args, **options)["params"])
  return jax.tree.map(
    lambda p: jnp.asarray(0.4 * draw.standard_normal(p.shape), float),
    axes.unboxed(shapes),
  )


def inputs(seed=0, batch=B, length=T, width=D, heads=H):
  draw = np.random.default_rng(seed)
  attention = draw.random((batch, heads, length, length))
  return {
    "x": draw.standard_normal((batch, length, width)),
    "is_token": draw.random((batch, length)) < 0.8,
    "segment_ids": np.sort(draw.integers(0, 3, (batch, length)), axis=1),
    "attention": attention,
  }


def run(settings, given, heads=H, params=None):
  layer = ngrammer.NGrammer(settings, heads)
  x, rest = jnp.asarray(given["x"]), {k: given[k] for k in given if k != "x"}
  if params is None:
    params = drawn(layer.init, x, **rest)
  found = jax.jit(layer.apply)({"params": params}, x, **rest)
  return jax.tree.map(np.asarray, params), np.asarray(found)


def expected(params, settings, given):
  segments = given.get("segment_ids")
  return np.stack(
    [
      naive_ngrammer.layer(
        params,
        given["x"][i],
        settings,
        given["is_token"][i],
        None if segments is None else segments[i],
        given["attention"][i],
      )
      for i in range(len(given["x"]))
    ]
  )


VARIANTS = {
  "paper": {},
  "order 3": {"order": 3, "table_size": 97},
  "both sides": {"sides": "both"},
  "both sides, order 3": {"sides": "both", "order": 3},
  "add": {"combine": "add", "ngram_dim": D // H, "sides": "both"},
  "lengths divided": {"prenormalize": True},
  "centres": {"learning": "gradient", "straight_through": True},
  "attention": {"pairing": "attention", "before_layer": 1},
  "earlier": {"pairing": "attention", "before_layer": 1, "causal": True},
  "counted rows": {"select_rows": True, "combine": "add", "ngram_dim": D // H},
}


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_are_those_of_the_equations(name, segmented):
  settings = small(**VARIANTS[name])
  given = inputs()
  if not segmented:
    given["segment_ids"] = None
  with jax.enable_x64(True):
    params, found = run(settings, given)
  np.testing.assert_allclose(
    found, expected(params, settings, given), rtol=1e-9, atol=1e-12
  )
  np.testing.assert_array_equal(found[~given["is_token"]], 0)


@hypothesis_settings(max_examples=5, deadline=None)
@given(
  st.integers(1, 3),
  st.integers(1, 5),
  st.integers(1, 3),
  st.integers(2, 4),
  st.integers(2, 3),
  st.integers(0, 99),
)
def test_outputs_at_any_shape(batch, length, heads, size, order, seed):
  settings = small(
    combine="add", ngram_dim=size, order=order, sides="both", num_clusters=5
  )
  width = heads * size
  data = inputs(seed, batch, length, width, heads)
  with jax.enable_x64(True):
    params, found = run(settings, data, heads)
  np.testing.assert_allclose(
    found, expected(params, settings, data), rtol=1e-8, atol=1e-10
  )


def test_parameters_are_as_named_and_start_as_said():
  settings = ngrammer.NGrammerSettings(
    num_clusters=50,
    table_size=300,
    ngram_dim=2,
    sides="both",
    select_rows=True,
  )
  boxed = jax.jit(ngrammer.NGrammer(settings, H).init)(
    key(), jnp.ones((1, 3, D)), jnp.ones((1, 3), bool)
  )
  params = axes.unboxed(boxed)["params"]
  assert set(params) == {
    *(f"{n}_{h}" for n in ("codebook", "table", "right_table") for h in (0, 1)),
    "ngram_norm",
    "right_ngram_norm",
    "unigram_norm",
  }
  book, table = (params[n]["embedding"] for n in ("codebook_1", "table_1"))
  assert book.shape == (50, D // H + 1)
  assert table.shape == (300, 3)
  np.testing.assert_array_equal(book[:, -1], 0)
  np.testing.assert_array_equal(table[:, -1], 0)
  assert np.std(book[:, :-1]) == pytest.approx(0.02, rel=0.15)
  assert np.std(table[:, :-1]) == pytest.approx(0.02, rel=0.15)
  assert params["ngram_norm"]["scale"].shape == (H, 2)
  assert params["unigram_norm"]["bias"].shape == (H, D // H)
  np.testing.assert_allclose(params["unigram_norm"]["scale"], 0.02)
  names = jax.tree.map(
    lambda box: box.names,
    boxed["params"],
    is_leaf=lambda x: hasattr(x, "names"),
  )
  assert names["codebook_0"]["embedding"] == ("clusters", "kv")
  assert names["right_table_0"]["embedding"] == ("ngrams", "kv")
  assert names["ngram_norm"]["scale"] == ("heads", "kv")


def test_later_layers_and_unit_vectors_start_otherwise():
  layer = ngrammer.NGrammer(small(prenormalize=True, before_layer=1), H)
  shown = jnp.ones((1, 3, D)), jnp.ones((1, 3), bool)
  params = axes.unboxed(layer.init(key(), *shown))["params"]
  np.testing.assert_array_equal(params["ngram_norm"]["scale"], 1)
  centres = params["codebook_0"]["embedding"][:, :-1]
  assert np.mean(np.sum(np.square(centres), 1)) == pytest.approx(1, rel=0.5)


# --- In the encoder. ---------------------------------------------------------

V = 11
ENCODER = {"vocab_size": V, "num_layers": 2, "width": D, "num_heads": H}


def build(settings, **options):
  return bert.Bert(**ENCODER, max_length=T, ngrammer=settings, **options)


def tokens(seed=0):
  draw = np.random.default_rng(seed)
  ids = draw.integers(1, V, (B, T)).astype(np.int32)
  ids[0, 5:] = bert.PAD_ID
  return jnp.asarray(ids), jnp.asarray([[0, 3], [6, 2]], jnp.int32)


@functools.cache
def encoder(name, **options):
  settings = small(**VARIANTS[name], **options)
  model = build(settings)
  return model, drawn(model.init, *tokens())


def by_hand(model, params, ids, weights_too=False):
  """`Bert` up to its last layer, the N-Grammer in front of layer 0 or 1."""
  settings, real = model.ngrammer, np.asarray(ids) != bert.PAD_ID
  x = params["token_embedding"]["embedding"][ids]
  attention = None

  def augmented(x):
    return np.float32(
      [
        naive_ngrammer.layer(
          jax.tree.map(np.asarray, params["ngrammer"]),
          np.asarray(x[i]),
          settings,
          real[i],
          attention=None if attention is None else np.asarray(attention[i]),
        )
        for i in range(B)
      ]
    )

  if settings.before_layer == 0:
    x = augmented(x)
  x = x + params["position_embedding"]["embedding"][:T]
  for i in range(2):
    if settings.before_layer == i == 1:
      x = augmented(x)
    block = encoder_layer.EncoderLayer(
      H, D // H, 4 * D, "pre", 1e-6, 0.0, "float32", True, True
    )
    x, attention = block.apply(
      {"params": params[f"layer_{i}"]}, x, real[:, None, None, :]
    )
  return (x, attention) if weights_too else x


@pytest.mark.parametrize("name", ["paper", "attention", "earlier"])
def test_the_encoder_puts_it_where_it_is_told(name):
  model, params = encoder(name)
  ids, positions = tokens()
  _, state = jax.jit(
    lambda p: model.apply(
      {"params": p},
      ids,
      positions,
      capture_intermediates=lambda m, name: (
        (m.name, name) == ("layer_1", "__call__")
      ),
    )
  )(params)
  found = state["intermediates"]["layer_1"]["__call__"][0][0]
  real = np.asarray(ids) != bert.PAD_ID
  np.testing.assert_allclose(
    np.asarray(found)[real],
    np.asarray(by_hand(model, params, ids))[real],
    rtol=2e-4,
    atol=2e-5,
  )


def test_attention_that_is_handed_out_is_the_softmax_of_products():
  model, params = encoder("attention")
  ids, _ = tokens()
  _, weights = by_hand(model, params, ids, weights_too=True)
  assert weights.shape == (B, H, T, T)
  np.testing.assert_allclose(np.sum(weights, -1), 1, rtol=1e-5)
  np.testing.assert_array_equal(weights[0, ..., 5:], 0)

  block = encoder_layer.EncoderLayer(
    H, D // H, 4 * D, "post", 1e-6, 0.0, "float32", True, True
  )
  x = np.random.default_rng(3).standard_normal((B, T, D), np.float32)
  mask = (np.asarray(ids) != 0)[:, None, None, :]
  p = params["layer_0"]
  y, weights = block.apply({"params": p}, x, mask)
  q, k = (
    np.einsum("btd,dhk->bhtk", x, p["attention"][n]["kernel"])
    + np.asarray(p["attention"][n]["bias"])[:, None]
    for n in ("query", "key")
  )
  scores = np.einsum("bhtk,bhuk->bhtu", q, k) / np.sqrt(D // H)
  scores = np.where(mask, np.exp(scores), 0)
  np.testing.assert_allclose(
    weights, scores / scores.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6
  )
  plain, nothing = block.clone(hand_out_attention=False).apply(
    {"params": p}, x, mask
  )
  assert nothing is None
  np.testing.assert_array_equal(y, plain)


def test_remat_and_bfloat16_change_no_cluster_they_need_not():
  model, params = encoder("attention")
  batch = tokens()
  plain = jax.jit(model.apply)({"params": params}, *batch)
  again = jax.jit(model.clone(remat=True).apply)({"params": params}, *batch)
  np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5)
  model, params = encoder("paper")
  plain = jax.jit(model.apply)({"params": params}, *batch)
  scanned = model.clone(scan_layers=True, dtype="bfloat16")
  layers = [params[f"layer_{i}"] for i in range(2)]
  rest = {k: v for k, v in params.items() if not k.startswith("layer_")}
  stacked = {**rest, "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
  narrow = jax.jit(scanned.apply)({"params": stacked}, *batch)
  np.testing.assert_allclose(narrow, plain, atol=0.1 * np.std(plain))


@pytest.mark.parametrize("prenormalize", [False, True])
def test_a_table_of_clusters_finds_the_same(prenormalize, monkeypatch):
  monkeypatch.setattr(ngrammer, "_BLOCK", 4)
  model, params = encoder("paper", prenormalize=prenormalize)
  table = ngrammer.cluster_table(params, model.ngrammer, H)
  assert table.shape == (V, H)
  assert table.dtype == jnp.int32
  vectors = np.asarray(params["token_embedding"]["embedding"])
  _, ids = naive_ngrammer.points(params["ngrammer"], vectors, model.ngrammer)
  np.testing.assert_array_equal(table, ids)
  apply = jax.jit(model.apply)
  plain = apply({"params": params}, *tokens())
  found = apply({"params": params}, *tokens(), cluster_table=table)
  np.testing.assert_array_equal(found, plain)
  # It is read: another table, another result.
  other = apply({"params": params}, *tokens(), cluster_table=(table + 1) % 6)
  assert np.abs(other - plain).max() > 1e-3


def test_tables_of_clusters_that_make_no_sense_are_refused():
  model, params = encoder("attention")
  with pytest.raises(ValueError, match="before_layer=1: clusters depend"):
    ngrammer.cluster_table(params, model.ngrammer, H)
  for without in (model, build(None)):
    with pytest.raises(ValueError, match="cluster_table is given, but no"):
      without.init(key(), *tokens(), cluster_table=jnp.zeros((V, H), int))


def test_without_it_nothing_of_it_is_there():
  model = build(None)
  params = axes.unboxed(jax.eval_shape(model.init, key(), *tokens()))["params"]
  assert "ngrammer" not in params
  with_it = axes.unboxed(jax.eval_shape(build(small()).init, key(), *tokens()))[
    "params"
  ]
  assert set(with_it) - set(params) == {"ngrammer"}


def test_every_parameter_has_axes():
  found = axes.logical_axes(build(small(sides="both")))["ngrammer"]
  assert found["codebook_0"]["embedding"] == ("clusters", "kv")
  assert found["table_1"]["embedding"] == ("ngrams", "kv")
