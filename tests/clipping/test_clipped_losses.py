"""Clipped sums under each loss of the masked language model, by all methods."""

import clipped_models
import flax.linen as nn
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.clipping import methods
from dptrain.clipping import private_metrics
from dptrain.clipping import rules
from dptrain.models import bert
from dptrain.models import losses
from dptrain.models import masked_lm
from dptrain.models import sampled_softmax

V, T, M = 31, 6, 2
LOSSES = {
  "smoothed": losses.CrossEntropy(label_smoothing=0.1, z_loss=1e-2),
  "tempered": losses.BiTempered(0.5, 1.5, label_smoothing=0.1),
  "confident": losses.MinimumEntropy(losses.BiTempered(0.8, 1.3), 0.2),
  "sampled": losses.MinimumEntropy(losses.CrossEntropy(z_loss=1e-2), 0.2),
}
# Beside the loss: a few classes of many, so that some come twice.
OPTIONS = {"sampled": {"sampling": sampled_softmax.SampledSoftmax(40, 8)}}
TRIED = ("vmap", "one_pass", "two_pass", "auto")


class Small(nn.Module):
  """As `Bert` from outside, tied weights included; compiles in a fifth."""

  vocab_size: int = V
  max_length: int = T
  dropout_rate: float = 0.0
  logit_scale: float = 8.0

  @nn.compact
  def __call__(self, inputs, positions, *, deterministic=True, read_out=None):
    tokens = nn.Embed(V, 4, name="token_embedding")
    x = tokens(inputs)
    x = jnp.tanh(nn.Dense(4)(x + x.mean(1, keepdims=True)))
    x = jnp.take_along_axis(x, positions[..., None], axis=1)
    bias = bert.OutputBias(V, name="output_bias")
    return read_out(x, tokens, bias) if read_out else bias(tokens.attend(x))


def model_of(**options):
  return masked_lm.MaskedLanguageModel(Small(), **options)


def named(name):
  return model_of(loss=LOSSES[name], **OPTIONS.get(name, {}))


def params_of(model):
  key = jax.random.key(0, impl="threefry2x32")
  return clipped_models.drawn(jax.eval_shape(model.init, key))


def batch_of(size, seed=0):
  draw = np.random.default_rng(seed)
  return {
    # Few tokens, so that an example has some of them twice.
    "inputs": draw.integers(0, 5, (size, T), np.int32),
    "positions": draw.integers(0, T, (size, M), np.int32),
    "labels": draw.integers(0, 7, (size, M), np.int32),
    "weights": np.float32(draw.random((size, M)) < 0.8),
  }


def sums_by_method(model, params, size, rule):
  """Clipped sums by method as a compiled function of (params, batch, keys)."""
  # Its two programs may draw different classes: runs refuse it.
  left_out = "two_pass" if model.sampling else None

  def run(params, batch, keys):
    return {
      method: methods.clipped_sum(
        model.losses, params, batch, keys, np.zeros(size, bool), rule, method
      )
      for method in TRIED
      if method != left_out
    }

  shapes = params, batch_of(size), keys_of(size)
  return jax.jit(run).lower(*shapes).compile(clipped_models.FAST)


def keys_of(size, seed=1):
  return jax.random.split(jax.random.key(seed, impl="threefry2x32"), size)


def check_equal(found, rule):
  truth = found.pop("vmap")
  for method, other in found.items():
    np.testing.assert_allclose(
      other.norms, truth.norms, rtol=1e-4, err_msg=method
    )
    np.testing.assert_allclose(
      other.losses, truth.losses, rtol=1e-4, err_msg=method
    )
    for a, b in zip(
      jax.tree.leaves(other.gradients),
      jax.tree.leaves(truth.gradients),
      strict=True,
    ):
      np.testing.assert_allclose(
        a, b, atol=1e-5 * rule.sensitivity, err_msg=method
      )


RULE = rules.ClippingRule("flat", 1e-2)
COMPILED = {}


def compiled(name, size):
  if (name, size) not in COMPILED:
    model = named(name)
    params = params_of(model)
    COMPILED[name, size] = (
      sums_by_method(model, params, size, RULE),
      params,
    )
  return COMPILED[name, size]


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=10, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_all_methods_clip_every_loss_alike(name, data, seed):
  size = data.draw(st.sampled_from([3] if name in OPTIONS else [1, 3]))
  run, params = compiled(name, size)
  batch = batch_of(size, seed)
  found = run(params, batch, keys_of(size))
  masked = batch["weights"].sum(1) > 0
  norms = np.asarray(found["vmap"].norms)
  np.testing.assert_array_equal(norms > 0, masked)
  assert (norms[masked] > RULE.l2_clip_norm).all()
  bound = masked.sum() * RULE.sensitivity * (1 + 1e-5)
  assert clipped_models.norm_of(found["vmap"].gradients) <= bound
  check_equal(found, RULE)


@pytest.mark.parametrize("name", LOSSES)
def test_the_embedding_stays_tapped(name):
  model = named(name)
  uses = methods.choose(
    model.losses, params_of(model), batch_of(3), keys_of(3), "one_pass"
  ).uses
  kinds = {use.kind for use in uses if use.weight[0] == "token_embedding"}
  assert kinds == ({"lookup"} if name == "sampled" else {"lookup", "attend"})


@pytest.mark.parametrize("name", LOSSES)
def test_a_released_loss_is_within_its_range(name):
  """However large the loss, and whichever it is."""
  run, params = compiled(name, 3)
  batch = batch_of(3)
  batch["weights"][:] = 1.0
  params = jax.tree.map(lambda x: 100 * x, params)
  metrics = private_metrics.PrivateMetrics(names=("loss",), max_loss=0.5)
  for method, found in run(params, batch, keys_of(3)).items():
    assert (np.asarray(found.losses) > 0.5).any(), method
    sums = metrics.sums(found, RULE.l2_clip_norm)
    assert abs(float(sums[0])) <= 3 * metrics.sensitivity
    in_units = np.clip(np.asarray(found.losses) / 0.5, 0, 1) - 0.5
    np.testing.assert_allclose(sums[0], in_units.sum(), rtol=1e-5)


def test_bert_with_sampled_classes_keeps_its_table_tapped():
  encoder = bert.Bert(
    vocab_size=V, num_layers=1, width=4, num_heads=2, logit_scale=8.0
  )
  sampling = sampled_softmax.SampledSoftmax(5, 8)
  model = masked_lm.MaskedLanguageModel(encoder, sampling=sampling)
  params, batch = params_of(model), batch_of(2)
  uses = methods.choose(
    model.losses, params, batch, keys_of(2), "one_pass"
  ).uses
  table = [use for use in uses if use.weight[0] == "token_embedding"]
  rows = sorted(np.prod(use.outputs) // 4 for use in table)
  assert rows == [T, M * (1 + 5)]


def test_without_sampling_cosines_are_clipped_by_copies():
  """The lengths of the table's rows are a use of it that no tap covers."""
  encoder = bert.Bert(
    vocab_size=V, num_layers=1, width=4, num_heads=2, logit_scale=8.0
  )
  model = masked_lm.MaskedLanguageModel(encoder)
  uses = methods.choose(
    model.losses, params_of(model), batch_of(2), keys_of(2), "one_pass"
  ).uses
  assert "token_embedding" not in {use.weight[0] for use in uses}
