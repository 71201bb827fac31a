"""What codebooks learn from: a part of each example's gradient, or none."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import naive_ngrammer
import numpy as np
import pytest

from dptrain.clipping import checking
from dptrain.clipping import methods
from dptrain.models import axes
from dptrain.models import bert
from dptrain.models import masked_lm
from dptrain.models import ngrammer
from dptrain.models import sampled_softmax

V, D, H, T, B, M = 9, 12, 2, 8, 3, 2
SMALL = {"num_clusters": 5, "table_size": 13, "ngram_dim": 2}
MODES = ("frozen", "private", "gradient", "unprotected")


def small(**options):
  return ngrammer.NGrammerSettings(**{**SMALL, **options})


def key(seed=0):
  return jax.random.key(seed, impl="threefry2x32")


def drawn(init, *args):
  draw = np.random.default_rng(2)
  shapes = axes.unboxed(jax.eval_shape(init, *args))
  return jax.tree.map(
    lambda p: jnp.asarray(0.4 * draw.standard_normal(p.shape), float), shapes
  )


def build(settings, loss_options=None, **options):
  encoder = bert.Bert(
    V,
    options.pop("num_layers", 1),
    D,
    H,
    mlp_width=8,
    max_length=T,
    ngrammer=settings,
    **options,
  )
  return masked_lm.MaskedLanguageModel(encoder, **loss_options or {})


def batch_of(seed=0):
  draw = np.random.default_rng(seed)
  # Few tokens: n-grams and clusters come more than once in an example.
  inputs = draw.integers(1, V, (B, T))
  inputs[0, 5:] = bert.PAD_ID
  return {
    "inputs": jnp.asarray(inputs, jnp.int32),
    "positions": jnp.asarray(draw.integers(0, 5, (B, M)), jnp.int32),
    "labels": jnp.asarray(draw.integers(1, V, (B, M)), jnp.int32),
    "weights": jnp.asarray([[1, 1], [1, 0], [0, 0]], jnp.float32),
  }


def embedded(params, batch, row):
  return np.asarray(params["token_embedding"]["embedding"])[
    np.asarray(batch["inputs"][row])
  ]


def plain(tree):
  return jax.tree.map(np.asarray, tree)


PARAMS = drawn(build(small()).init, key())


@jax.jit
def _all(params, batch):
  """Losses, aux and summed gradients of every mode."""
  found = {}
  for mode in MODES:
    model = build(small(learning=mode, weight=1.5))

    def total(params, model=model):
      losses, aux = model.losses(params, batch)
      return losses.sum(), (losses, aux)

    gradients, (losses, aux) = jax.grad(total, has_aux=True)(params)
    found[mode] = losses, aux, gradients
  return found


ALL = {}


def every_mode():
  if not ALL:
    ALL.update(plain(_all(PARAMS, batch_of())))
  return ALL


def counted(params, batch, settings):
  """[H, K, S + 1] summed over the batch, by numpy."""
  return sum(
    naive_ngrammer.sums_and_counts(
      plain(params["ngrammer"]),
      embedded(params, batch, row),
      settings,
      np.asarray(batch["inputs"][row]) != bert.PAD_ID,
    )
    for row in range(B)
  )


def test_no_mode_changes_the_value_of_a_loss():
  found = every_mode()
  for mode in MODES:
    losses, aux, _ = found[mode]
    np.testing.assert_array_equal(losses, found["frozen"][0])
    for name in ("loss_sum", "correct", "masked"):
      np.testing.assert_array_equal(aux[name], found["frozen"][1][name])
    assert ("codebook_term" in aux) == (mode == "unprotected")
  assert found["unprotected"][1]["codebook_term"].shape == (B,)


def test_the_private_gradient_of_codebooks_is_sums_and_counts():
  found = every_mode()["private"][2]["ngrammer"]
  expected = 1.5 * counted(PARAMS, batch_of(), small())
  assert expected[..., -1].min() == 0  # of a cluster that is empty
  for h in range(H):
    np.testing.assert_allclose(
      found[f"codebook_{h}"]["embedding"], expected[h], rtol=1e-4, atol=1e-6
    )
  # Shares of one example, by head, whatever its length.
  masses = sum(found[f"codebook_{h}"]["embedding"][:, -1].sum() for h in (0, 1))
  assert masses == pytest.approx(1.5 * B * np.sqrt(H), rel=1e-5)


def without_codebooks(gradients):
  rest = dict(gradients, ngrammer=dict(gradients["ngrammer"]))
  return rest, [rest["ngrammer"].pop(f"codebook_{h}") for h in range(H)]


@pytest.mark.parametrize("mode", ["private", "unprotected"])
def test_all_other_gradients_are_those_of_frozen_codebooks(mode):
  found, _ = without_codebooks(every_mode()[mode][2])
  expected, frozen = without_codebooks(every_mode()["frozen"][2])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    found,
    expected,
  )
  for leaf in jax.tree.leaves(frozen):
    np.testing.assert_array_equal(leaf, 0)
  assert np.abs(expected["ngrammer"]["table_0"]["embedding"]).max() > 0


def test_unprotected_codebooks_learn_beside_the_loss():
  _, trained = without_codebooks(every_mode()["unprotected"][2])
  for leaf in jax.tree.leaves(trained):
    np.testing.assert_array_equal(leaf, 0)
  model, batch = build(small(learning="unprotected", weight=7.0)), batch_of()
  found = jax.jit(
    jax.grad(lambda p: model.losses(p, batch)[1]["codebook_term"].sum())
  )(PARAMS)
  rest, books = without_codebooks(plain(found))
  # Weight 1, whatever the weight of the private mode is.
  expected = counted(PARAMS, batch, small())
  for h, book in enumerate(books):
    np.testing.assert_allclose(
      book["embedding"], expected[h], rtol=1e-4, atol=1e-6
    )
  for leaf in jax.tree.leaves(rest):
    np.testing.assert_array_equal(leaf, 0)


def test_quantization_loss_moves_centres_and_vectors_but_no_mass():
  settings, batch = small(learning="gradient", weight=1.5), batch_of()
  found = every_mode()["gradient"][2]
  params = plain(PARAMS)
  books = np.zeros((H, 5, D // H + 1))
  tokens = np.zeros((V, D))
  for row in range(B):
    ids = np.asarray(batch["inputs"][row])
    x, z = naive_ngrammer.points(
      params["ngrammer"], embedded(params, batch, row), settings
    )
    real = ids != bert.PAD_ID
    for t, h in np.ndindex(T, H):
      if real[t]:
        centre = params["ngrammer"][f"codebook_{h}"]["embedding"][z[t, h], :-1]
        away = 2 * (x[t, h] - centre) / (real.sum() * H)
        books[h, z[t, h], :-1] -= 1.5 * away
        part = slice(h * D // H, (h + 1) * D // H)
        tokens[ids[t], part] += settings.commitment * away
  for h in range(H):
    np.testing.assert_allclose(
      found["ngrammer"][f"codebook_{h}"]["embedding"],
      books[h],
      rtol=1e-4,
      atol=1e-6,
    )
  frozen = every_mode()["frozen"][2]["token_embedding"]["embedding"]
  np.testing.assert_allclose(
    found["token_embedding"]["embedding"] - frozen, tokens, rtol=1e-3, atol=1e-5
  )


def test_straight_through_gives_vectors_the_gradient_of_their_centres():
  settings = small(learning="gradient", straight_through=True, commitment=0.0)
  layer = ngrammer.NGrammer(settings, H)
  params = drawn(
    lambda: layer.init(key(), jnp.ones((1, T, D)), jnp.ones((1, T), bool))
  )["params"]
  draw = np.random.default_rng(4)
  x = jnp.asarray(draw.standard_normal((1, T, D)), jnp.float32)
  pull = jnp.asarray(draw.standard_normal((1, T, D)), jnp.float32)
  real = jnp.ones((1, T), bool)
  _, ids = naive_ngrammer.points(plain(params), x[0], settings)
  centres = jnp.stack(
    [params[f"codebook_{h}"]["embedding"][ids[:, h], :-1] for h in range(H)], 1
  ).reshape(1, T, D)

  def through(settings, x):
    model = ngrammer.NGrammer(settings, H)
    found = model.apply(
      {"params": params}, x, real, cluster_ids=jnp.asarray(ids)[None]
    )
    return jnp.sum(pull * found)

  found = jax.jit(jax.grad(lambda x: through(settings, x)))(x)
  otherwise = dataclasses.replace(settings, straight_through=False)
  expected = jax.jit(jax.grad(lambda x: through(otherwise, x)))(centres)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sides", ["left", "both"])
def test_row_counts_are_lookups_of_real_tokens(sides):
  settings = small(select_rows=True, row_weight=0.5, sides=sides)
  layer = ngrammer.NGrammer(settings, H)
  params = drawn(
    lambda: layer.init(key(), jnp.ones((1, T, D)), jnp.ones((1, T), bool))
  )["params"]
  draw = np.random.default_rng(4)
  x, real = draw.standard_normal((1, T, D), np.float32), draw.random(T) < 0.7

  @jax.jit
  @jax.grad
  def gradients(params):
    _, state = layer.apply(
      {"params": params}, x, real[None], mutable=[ngrammer.TERMS]
    )
    return state[ngrammer.TERMS][ngrammer.TRAINED][0].sum()

  found = plain(gradients(params))
  looked = naive_ngrammer.rows(plain(params), x[0], settings, real)
  assert len(set(looked[0, real, 0])) < real.sum()  # one counts twice
  share = 0.5 / np.sqrt(real.sum() * H * len(looked))
  for side, prefix in zip(looked, ("", "right_"), strict=False):
    for h in range(H):
      counts = np.bincount(side[real, h], minlength=13)
      table = found[f"{prefix}table_{h}"]["embedding"]
      np.testing.assert_allclose(table[:, -1], share * counts, rtol=1e-5)
      np.testing.assert_array_equal(table[:, :-1], 0)


@pytest.mark.parametrize("drawn_classes", [False, True])
def test_dropout_and_drawn_classes_leave_terms_as_they_are(drawn_classes):
  batch, keys = batch_of(), jax.random.split(key(3), B)
  settings = small(weight=1.5)
  model = build(settings, dropout_rate=0.3)
  if drawn_classes:
    sampling = {"sampling": sampled_softmax.SampledSoftmax(3, 8)}
    model = build(settings, sampling, logit_scale=4.0)

  @jax.jit
  @jax.grad
  def gradient(book):
    layer = {**PARAMS["ngrammer"], "codebook_0": {"embedding": book}}
    params = {**PARAMS, "ngrammer": layer}
    return model.losses(params, batch, keys)[0].sum()

  np.testing.assert_allclose(
    gradient(PARAMS["ngrammer"]["codebook_0"]["embedding"]),
    every_mode()["private"][2]["ngrammer"]["codebook_0"]["embedding"],
    rtol=1e-4,
    atol=1e-6,
  )


# --- Clipped through taps. ---------------------------------------------------


class Small(nn.Module):
  """Embedding, N-Grammer, read-out: all of it in the dtype it is given."""

  settings: ngrammer.NGrammerSettings

  @nn.compact
  def __call__(self, inputs):
    x = nn.Embed(V, D, name="token_embedding")(inputs)
    scores = jnp.einsum("btd,bud->btu", x, x)
    attention = jnp.stack([scores, -scores], axis=1)
    layer = ngrammer.NGrammer(self.settings, H, name="ngrammer")
    x = layer(x, inputs != bert.PAD_ID, attention=attention)
    return nn.Dense(3)(jnp.tanh(x))


def losses_of(settings):
  model = Small(settings)

  def losses(params, batch, keys):
    del keys
    found, state = model.apply(
      {"params": params}, batch, mutable=[ngrammer.TERMS]
    )
    sown = state[ngrammer.TERMS]["ngrammer"]
    term = sown[ngrammer.TRAINED][0]
    term -= jax.lax.stop_gradient(term)
    aux = {k: v[0] for k, v in sown.items() if k != ngrammer.TRAINED}
    return jnp.sum(jnp.square(found), (1, 2)) + term, aux

  return model, losses


TAPPED = {
  "frozen": {"learning": "frozen"},
  "private": {"select_rows": True, "sides": "both", "order": 3},
  "gradient": {"learning": "gradient", "straight_through": True},
  "unprotected": {"learning": "unprotected", "select_rows": True},
  "attention": {"pairing": "attention", "before_layer": 1},
}


@pytest.mark.parametrize("name", TAPPED)
def test_taps_stand_for_every_codebook_and_table_in_float64(name):
  settings = small(**TAPPED[name])
  model, losses = losses_of(settings)
  batch, keys = batch_of()["inputs"], jax.random.split(key(), B)
  with jax.enable_x64(True):
    params = drawn(model.init, key(), batch)["params"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float64")}
    uses = methods.choose(losses, params, batch, keys, "one_pass").uses
    found = checking.errors(losses, params, batch, keys, "one_pass", uses)
  tables = ["codebook", "table"]
  tables += ["right_table"] if settings.sides == "both" else []
  wanted = {
    ("ngrammer", f"{table}_{h}", "embedding")
    for table in tables
    for h in range(H)
  }
  assert wanted <= {use.weight for use in uses}
  assert {use.kind for use in uses if use.weight in wanted} == {"lookup"}
  assert max(found.values()) < (1e-10, ""), found
  # Rows that one example looks up more than once are there.
  looked = naive_ngrammer.rows(
    plain(params["ngrammer"]),
    embedded(params, {"inputs": batch}, 1),
    settings,
    np.ones(T, bool),
    attention=np.zeros((H, T, T)),
  )
  assert len(set(looked[0, :, 0])) < T


NGRAMS = {"codebook_0", "codebook_1", "table_0", "table_1"}


def test_the_whole_model_is_clipped_as_vmap_would():
  model = build(small(select_rows=True))
  batch, keys = batch_of(), jax.random.split(key(), B)
  params = drawn(model.init, key())
  uses = methods.choose(model.losses, params, batch, keys, "one_pass").uses
  assert {u.weight[1] for u in uses if u.weight[0] == "ngrammer"} == NGRAMS
  methods.check_against_vmap(model.losses, params, batch, keys, rtol=1e-4)


def test_taps_cover_an_encoder_that_hands_out_attention():
  plain = build(None, num_layers=2)
  with_it = build(small(**TAPPED["attention"]), num_layers=2)
  batch, keys = batch_of(), jax.random.split(key(), B)
  found = [
    {
      use.weight
      for use in methods.choose(
        model.losses,
        jax.eval_shape(model.init, key()),
        batch,
        keys,
        "one_pass",
      ).uses
    }
    for model in (plain, with_it)
  ]
  assert found[0] < found[1]
  assert {weight[1] for weight in found[1] - found[0]} == NGRAMS
