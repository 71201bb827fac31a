"""Losses against float64 references; the model's use of them."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from dptrain.models import bert
from dptrain.models import losses
from dptrain.models import masked_lm

NAN = float("nan")
LOSSES = {
  "plain": losses.CrossEntropy(),
  "smoothed": losses.CrossEntropy(label_smoothing=0.1, z_loss=1e-2),
  "bounded": losses.BiTempered(0.7, 1.0),
  "heavy": losses.BiTempered(1.0, 1.4),
  "tempered": losses.BiTempered(0.5, 2.0, label_smoothing=0.1),
  "nearly": losses.BiTempered(0.999, 1.001),
  "confident": losses.MinimumEntropy(weight=0.3),
  "both": losses.MinimumEntropy(losses.BiTempered(0.8, 1.3), 0.2),
}
SHAPES = st.sampled_from([([], 2), ([3], 23), ([2, 1], 3)])


# --- References. -------------------------------------------------------------


def log_t(t, x):
  return np.log(x) if t == 1 else (x ** (1 - t) - 1) / (1 - t)


def tempered_probs(t, logits):
  """exp_t(logits - c), c by bracketing."""
  below = logits - logits.max()

  def exp_t(c):
    if t == 1:
      return np.exp(below - c)
    return (1 + (t - 1) * (c - below)) ** (-1 / (t - 1))

  high = 1.0
  while exp_t(high).sum() > 1:
    high *= 2
  c = optimize.brentq(lambda c: exp_t(c).sum() - 1, 0, high, xtol=1e-14)
  return exp_t(c)


def reference(loss, logits, label):
  """The loss of one position in float64, from its definition."""
  logits = np.asarray(logits, np.float64)
  classes = len(logits)
  probs = tempered_probs(1, logits)
  if isinstance(loss, losses.MinimumEntropy):
    entropy = -np.sum(probs * np.log(probs))
    return reference(loss.loss, logits, label) + loss.weight * entropy
  target = np.full(classes, loss.label_smoothing / classes)
  target[label] += 1 - loss.label_smoothing
  if isinstance(loss, losses.CrossEntropy):
    log_z = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
    return -np.sum(target * np.log(probs)) + loss.z_loss * log_z**2
  t1, probs = loss.t1, tempered_probs(loss.t2, logits)
  there = target > 0
  gain = target[there] * (log_t(t1, target[there]) - log_t(t1, probs[there]))
  mass = (target ** (2 - t1) - probs ** (2 - t1)) / (2 - t1)
  return gain.sum() - mass.sum()


def drawn(shape, seed, scale=3.0):
  lead, classes = shape
  draw = np.random.default_rng(seed)
  logits = scale * draw.standard_normal((*lead, classes), np.float32)
  return logits, draw.integers(0, classes, lead).astype(np.int32)


# --- Values and gradients. ---------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_losses_are_those_of_float64(name, shape, seed):
  loss, (logits, labels) = LOSSES[name], drawn(shape, seed)
  found = loss(jnp.asarray(logits), jnp.asarray(labels))
  assert (found.shape, found.dtype) == (labels.shape, jnp.float32)
  rows = zip(logits.reshape(-1, shape[1]), labels.reshape(-1), strict=True)
  expected = np.reshape([reference(loss, *row) for row in rows], labels.shape)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_float64(name):
  loss, (logits, labels) = LOSSES[name], drawn(([4], 7), 1)
  found = jax.grad(lambda z: loss(z, labels).sum())(jnp.asarray(logits))
  step = 1e-5
  for row, label, slope in zip(logits, labels, found, strict=True):
    around = [
      [
        reference(loss, row.astype(np.float64) + sign * step * unit, label)
        for sign in (1, -1)
      ]
      for unit in np.eye(7)
    ]
    expected = [(up - down) / (2 * step) for up, down in around]
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 30522])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("t2", [1.05, 1.5, 4.0])
def test_tempered_probabilities_add_up_to_one(classes, scale, t2):
  logits, labels = drawn(([], classes), 3, scale)
  loss = losses.BiTempered(0.5, t2)
  expected = reference(loss, logits, labels)
  found, slope = jax.jit(jax.value_and_grad(loss))(logits, labels)
  assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
  # Moving all logits alike changes nothing.
  assert abs(slope.sum()) <= 1e-5 * abs(slope).sum() + 1e-7
  log_probs = losses._tempered_log_probs(t2, loss.num_iters, logits)
  assert np.exp(np.float64(log_probs)).sum() == pytest.approx(1, abs=2e-5)


def test_both_temperatures_one_is_cross_entropy():
  logits, labels = drawn(([5], 23), 4)
  for smoothing in (0.0, 0.2):
    tempered = losses.BiTempered(1.0, 1.0, label_smoothing=smoothing)
    plain = losses.CrossEntropy(smoothing)
    target = losses._targets(23, labels, smoothing)
    # The divergence is from the target, whose own entropy is not counted.
    own = -jax.scipy.special.xlogy(target, target).sum(-1)
    np.testing.assert_allclose(
      tempered(logits, labels) + own, plain(logits, labels), atol=1e-5
    )
    slopes = [
      jax.grad(lambda z, loss=loss: loss(z, labels).sum())(logits)
      for loss in (tempered, plain)
    ]
    np.testing.assert_allclose(*slopes, atol=1e-6)


@pytest.mark.parametrize("t1", [0.0, 0.5, 0.9])
def test_a_wrong_label_costs_no_more_than_the_bound(t1):
  logits = jnp.array([[0.0, 1e4, 0.0], [0.0, 50.0, 0.0], [0.0, 0.0, 0.0]])
  loss = losses.BiTempered(t1, 1.3)
  found = loss(logits, jnp.zeros(3, jnp.int32))
  assert (found <= 1 / (1 - t1)).all()
  assert found[0] > 0.4 / (1 - t1)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_have_finite_gradients_and_no_loss_is_negative(name):
  logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
  labels = jnp.array([0, 0, 1])
  loss = LOSSES[name]
  found, slopes = jax.vmap(jax.value_and_grad(loss))(logits, labels)
  assert np.isfinite(slopes).all()
  assert np.isfinite(found).all()
  assert (found >= -1e-6).all()


def test_log_weights_count_a_class_several_times():
  logits, labels = drawn(([4], 5), 6)
  weights = jnp.log(jnp.array([1.0, 2.0, 1.0, 3.0, 0.0]))
  repeated = jnp.array([0, 1, 1, 2, 3, 3, 3])
  labels = labels % 3
  first = jnp.array([0, 1, 3])[labels]
  for loss in (
    losses.CrossEntropy(z_loss=0.1),
    losses.MinimumEntropy(weight=0.5),
  ):
    np.testing.assert_allclose(
      loss(logits, labels, weights), loss(logits[:, repeated], first), rtol=1e-5
    )


# --- Refusals. ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("make", "told"),
  [
    (lambda: losses.CrossEntropy(label_smoothing=1.0), "label_smoothing=1.0"),
    (lambda: losses.CrossEntropy(label_smoothing=NAN), "label_smoothing=nan"),
    (lambda: losses.CrossEntropy(z_loss=-1.0), r"z_loss=-1\.0 .*, finite"),
    (lambda: losses.BiTempered(t1=1.1), r"t1=1.1 must lie in \[0, 1\]"),
    (lambda: losses.BiTempered(t2=0.9), "t2=0.9 must be finite and at least"),
    (lambda: losses.BiTempered(num_iters=0), "num_iters=0 must be a positive"),
    (lambda: losses.MinimumEntropy(weight=NAN), "weight=nan .*, finite"),
    (lambda: losses.MinimumEntropy(weight="a"), "weight='a' must be a number"),
    (lambda: losses.CrossEntropy(label_smoothing="a"), "='a' must be a number"),
    (lambda: losses.MinimumEntropy("ce"), "loss='ce' must be a loss"),
    (
      lambda: losses.BiTempered()(jnp.ones(3), jnp.array(1), jnp.zeros(3)),
      "cannot be estimated",
    ),
    (
      lambda: masked_lm.MaskedLanguageModel(PLAIN.bert, "tempered"),
      "MaskedLanguageModel.loss='tempered' must be a loss",
    ),
  ],
)
def test_refuses_settings_out_of_range(make, told):
  with pytest.raises(ValueError, match=told):
    make()


# --- In the model. -----------------------------------------------------------

V, T, M, B = 23, 8, 3, 4


def build(**options):
  return masked_lm.MaskedLanguageModel(
    bert.Bert(vocab_size=V, num_layers=1, width=8, num_heads=2, max_length=T),
    **options,
  )


PLAIN = build()
PARAMS = jax.tree.map(
  lambda x: 10 * x, jax.jit(PLAIN.init)(jax.random.key(0, impl="threefry2x32"))
)


def batch_of(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "inputs": rng.integers(0, V, (B, T)).astype(np.int32),
    "positions": rng.integers(0, T, (B, M)).astype(np.int32),
    "labels": rng.integers(0, V, (B, M)).astype(np.int32),
    "weights": np.float32([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
  }


def cross_entropy_alone(params, batch):
  """The losses as they were before there was a choice."""
  logits = PLAIN.bert.apply(
    {"params": params}, batch["inputs"], batch["positions"]
  )
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  labels = batch["labels"]
  picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
  weights = batch["weights"].astype(jnp.float32)
  hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
  loss_sum = -jnp.sum(weights * picked, axis=-1)
  masked = jnp.sum(weights, axis=-1)
  means = jnp.where(
    masked > 0, loss_sum / jnp.where(masked > 0, masked, 1.0), 0.0
  )
  correct = jnp.sum(weights * hits, axis=-1)
  return means, {"loss_sum": loss_sum, "correct": correct, "masked": masked}


def test_the_default_is_the_very_program_without_a_choice():
  def program(losses_of):
    def run(params, batch):
      grads = jax.grad(lambda p: losses_of(p, batch)[0].sum())(params)
      return losses_of(params, batch), grads

    return jax.jit(run).lower(PARAMS, batch_of()).as_text()

  assert program(PLAIN.losses) == program(cross_entropy_alone)
  chosen = build(loss=losses.CrossEntropy(z_loss=1e-4))
  assert program(chosen.losses) != program(cross_entropy_alone)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "plain"])
def test_examples_have_the_mean_over_their_own_masks(name):
  model, batch = build(loss=LOSSES[name]), batch_of()
  run = jax.jit(model.losses)
  found, aux = run(PARAMS, batch)
  logits = jax.jit(PLAIN.bert.apply)(
    {"params": PARAMS}, batch["inputs"], batch["positions"]
  )
  for i in range(B):
    terms = [
      reference(LOSSES[name], logits[i, m], batch["labels"][i, m])
      for m in range(M)
      if batch["weights"][i, m]
    ]
    expected = np.mean(terms) if terms else 0.0
    assert found[i] == pytest.approx(expected, rel=1e-4, abs=1e-5)
  # What evaluation reads is cross-entropy, whatever the loss.
  _, plain = jax.jit(cross_entropy_alone)(PARAMS, batch)
  jax.tree.map(np.testing.assert_array_equal, aux, plain)
  # Entry i is that of row i alone.
  other = batch_of(1)
  for row in range(B):
    swapped = {
      k: np.concatenate([v[:row], other[k][row : row + 1], v[row + 1 :]])
      for k, v in batch.items()
    }
    after, _ = run(PARAMS, swapped)
    keep = np.arange(B) != row
    np.testing.assert_array_equal(after[keep], found[keep])
