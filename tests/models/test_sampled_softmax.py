"""Classes drawn near the hidden state: how often, and what they count."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.models import bert
from dptrain.models import losses
from dptrain.models import masked_lm
from dptrain.models import sampled_softmax

V, D, T, M, B = 21, 4, 6, 2, 3


def key(seed=0):
  return jax.random.key(seed, impl="threefry2x32")


def vectors(rows, width=D, seed=0):
  draw = np.random.default_rng(seed)
  return draw.standard_normal((rows, width), np.float32)


# --- The distribution. -------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 21, 32])
def test_classes_are_drawn_as_often_as_their_probability_says(size):
  sampling = sampled_softmax.SampledSoftmax(20_000, 16)
  hidden = vectors(2, seed=1)

  @jax.jit
  def run(table):
    return sampling.draw(key(), hidden, sampling.tree(table))

  ids, log_probs = map(np.asarray, run(vectors(size)))
  assert ids.min() >= 0
  assert ids.max() < size
  for row_ids, row_logs in zip(ids, np.float64(log_probs), strict=True):
    found, first, counts = np.unique(
      row_ids, return_index=True, return_counts=True
    )
    # All have been drawn, each always with the same probability.
    np.testing.assert_array_equal(found, np.arange(size))
    probs = np.exp(row_logs[first])
    np.testing.assert_allclose(row_logs, row_logs[first][row_ids])
    assert probs.sum() == pytest.approx(1, abs=1e-5)
    deviations = np.sqrt(20_000 * probs * (1 - probs)) + 1e-3
    assert (np.abs(counts - 20_000 * probs) < 5 * deviations).all()


def test_probabilities_follow_the_kernel():
  sampling = sampled_softmax.SampledSoftmax(300, 2048, bandwidth=3.0)
  table, hidden = vectors(V), vectors(1, seed=1)
  ids, log_probs = sampling.draw(key(), hidden, sampling.tree(table))
  unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (hidden, table)]
  distances = np.sum(np.square(unit[0] - unit[1]), axis=1)
  kernel = np.exp(-1.5 * distances)
  expected = (kernel / kernel.sum())[np.asarray(ids[0])]
  np.testing.assert_allclose(np.exp(log_probs[0]), expected, atol=0.02)


# --- In the model. -----------------------------------------------------------


class Small(nn.Module):
  """As `Bert` from outside; compiles in a fifth."""

  logit_scale: float | None = 4.0
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, inputs, positions, *, deterministic=True, read_out=None):
    tokens = nn.Embed(V, D, name="token_embedding")
    x = tokens(inputs)
    x = jnp.tanh(nn.Dense(D)(x + x.mean(1, keepdims=True)))
    x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
    x = jnp.take_along_axis(x, positions[..., None], axis=1)
    bias = bert.OutputBias(V, name="output_bias")
    if read_out is not None:
      return read_out(x, tokens, bias)
    return bias(self.logit_scale * bert.unit(x) @ bert.unit(tokens.embedding).T)


def build(dropout_rate=0.0, **options):
  return masked_lm.MaskedLanguageModel(Small(4.0, dropout_rate), **options)


def sampled(num_negatives, **options):
  sampling = sampled_softmax.SampledSoftmax(num_negatives, 32)
  return build(sampling=sampling, **options)


FULL = build()
PARAMS = jax.jit(FULL.init)(key())
PARAMS["output_bias"]["bias"] = 0.5 * vectors(1, V, seed=8)[0]


def batch_of(seed=0, size=B):
  draw = np.random.default_rng(seed)
  return {
    "inputs": draw.integers(0, V, (size, T), np.int32),
    "positions": draw.integers(0, T, (size, M), np.int32),
    "labels": draw.integers(0, V, (size, M), np.int32),
    "weights": np.ones((size, M), np.float32),
  }


def test_the_sum_of_exponentials_has_the_right_expectation():
  model, batch = sampled(8), batch_of(size=1)

  @jax.jit
  @jax.vmap
  def draws(key):
    rows, _ = model._sampled(PARAMS, batch, key[None], model.sampling)
    return jnp.exp(jax.nn.logsumexp(sum(rows), axis=-1))[0]

  found = np.float64(draws(jax.random.split(key(1), 4000)))
  logits = FULL.bert.apply(
    {"params": PARAMS}, batch["inputs"], batch["positions"]
  )
  expected = np.exp(np.float64(logits[0])).sum(-1)
  errors = found.std(axis=0) / np.sqrt(len(found))
  assert (np.abs(found.mean(axis=0) - expected) < 4 * errors).all()
  assert (errors < 0.05 * expected).all()


def test_loss_and_gradient_come_near_those_of_all_classes():
  loss = losses.MinimumEntropy(losses.CrossEntropy(z_loss=0.05), 0.5)
  batch = batch_of(size=1)

  def mean_gradient(model, count):
    def one(params, key):
      return model.losses(params, batch, key[None])[0][0]

    def run(params):
      keys = jax.random.split(key(2), count)
      found = jax.vmap(lambda key: one(params, key))(keys)
      return jnp.mean(found)

    return jax.jit(jax.value_and_grad(run))(PARAMS)

  def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

  value, expected = mean_gradient(build(loss=loss), 1)
  errors, values = [], []
  for negatives in (4, 64):
    found = mean_gradient(sampled(negatives, loss=loss), 8192 // negatives)
    values.append(abs(found[0] - value))
    error = np.linalg.norm(flat(found[1]) - flat(expected))
    errors.append(error / np.linalg.norm(flat(expected)))
  assert values[1] < 0.02
  assert errors[1] < 0.05
  assert errors[1] < 0.5 * errors[0]


def test_gradient_reaches_drawn_rows_only():
  model, batch = sampled(3), batch_of(size=1)
  keys = key(5)[None]
  grads = jax.jit(jax.grad(lambda p: model.losses(p, batch, keys)[0].sum()))(
    PARAMS
  )
  touched = np.flatnonzero(np.any(grads["output_bias"]["bias"][:, None], 1))
  assert 2 <= len(touched) <= M * (1 + 3)
  table = np.flatnonzero(np.any(grads["token_embedding"]["embedding"], 1))
  assert set(table) <= {*touched, *batch["inputs"].ravel()}


def test_evaluation_is_that_of_all_classes():
  batch = batch_of()
  found = jax.jit(sampled(3).losses)(PARAMS, batch)
  expected = jax.jit(FULL.losses)(PARAMS, batch)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dropout_rate", [0.0, 0.3])
def test_an_example_draws_from_its_own_key_alone(dropout_rate):
  model = sampled(5, dropout_rate=dropout_rate)
  run = jax.jit(model.losses)
  batch, other, keys = batch_of(0), batch_of(1), jax.random.split(key(3), B)
  whole, _ = run(PARAMS, batch, keys)
  for row in range(B):
    keep = np.arange(B) != row
    swapped = {k: v.copy() for k, v in batch.items()}
    for name in swapped:
      swapped[name][row] = other[name][row]
    moved, _ = run(PARAMS, swapped, keys.at[row].set(key(9)))
    np.testing.assert_array_equal(moved[keep], whole[keep])
    assert moved[row] != whole[row]
  rekeyed, _ = run(PARAMS, batch, keys.at[1].set(key(99)))
  assert (rekeyed != whole).tolist() == [False, True, False]
  alone = [
    run(PARAMS, {k: v[i : i + 1] for k, v in batch.items()}, keys[i : i + 1])
    for i in range(B)
  ]
  np.testing.assert_allclose([x[0][0] for x in alone], whole, rtol=1e-4)


@pytest.mark.parametrize(
  ("make", "told"),
  [
    (lambda: sampled_softmax.SampledSoftmax(0), "num_negatives=0 must be"),
    (lambda: sampled_softmax.SampledSoftmax(5, True), "num_features=True must"),
    (lambda: sampled_softmax.SampledSoftmax(5, 5, -1.0), r"bandwidth=-1\.0"),
    (
      lambda: sampled(5, loss=losses.BiTempered(0.5)),
      r"loss=BiTempered.* needs all classes",
    ),
    (
      lambda: sampled(5, loss=losses.CrossEntropy(0.1)),
      r"needs all classes.*sampling=None",
    ),
    (
      lambda: dataclasses.replace(
        sampled(5), bert=FULL.bert.copy(logit_scale=None)
      ),
      r"Bert\.logit_scale=None",
    ),
    (
      lambda: bert.Bert(V, 1, D, 2, logit_scale=-1.0),
      r"logit_scale=-1\.0 must be",
    ),
  ],
)
def test_refuses_settings_that_do_not_fit(make, told):
  with pytest.raises(ValueError, match=told):
    make()


def test_bert_makes_logits_of_cosines():
  encoder = bert.Bert(V, 1, D, 2, max_length=T, logit_scale=4.0)
  batch = batch_of()
  params = jax.jit(masked_lm.MaskedLanguageModel(encoder).init)(key())
  params["output_bias"]["bias"] += 3.0
  logits = jax.jit(encoder.apply)(
    {"params": params}, batch["inputs"], batch["positions"]
  )
  assert logits.shape == (B, M, V)
  assert (np.abs(logits - 3.0) <= 4.0 + 1e-5).all()
  assert np.std(logits) > 0.5
