"""Distances to teachers: float64 references, gradients, and examples alone."""

import dataclasses

import flax.linen as nn
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.models import bert
from dptrain.models import distillation
from dptrain.models import losses
from dptrain.models import masked_lm
from dptrain.models import sampled_softmax

NAN, INF = float("nan"), float("inf")
SHAPES = st.sampled_from([([], 2), ([3], 23), ([2, 1], 3)])


# --- References. -------------------------------------------------------------


def softmax(logits):
  below = np.exp(logits - logits.max(-1, keepdims=True))
  return below / below.sum(-1, keepdims=True)


def joined(distance, teachers):
  """The teachers' probabilities at the temperature, [..., V] of [K, ..., V]."""
  teachers = np.asarray(teachers, np.float64)
  if distance.average == "logits":
    return softmax(teachers.mean(0) / distance.temperature)
  return softmax(teachers / distance.temperature).mean(0)


def reference(distance, logits, teachers):
  """The term in float64, from its definition."""
  logits, heat = np.asarray(logits, np.float64), distance.temperature
  q = joined(distance, teachers)
  if distance.loss == "logit_mse":
    # Up to a constant, which goes, these are logits of q.
    gap = logits - heat * np.log(q)
    return gap.var(-1) / 2
  p = softmax(logits / heat)
  if distance.loss == "cross_entropy":
    return heat**2 * -(q * np.log(p)).sum(-1)
  there = (q * np.log(q / p)).sum(-1)
  back = (p * np.log(p / q)).sum(-1)
  return heat**2 * (there + back) / 2


def drawn(shape, seed, count=1, scale=3.0):
  """Logits [..., V] of a student and [K, ..., V] of teachers."""
  lead, classes = shape
  draw = np.random.default_rng(seed)
  found = draw.standard_normal((count + 1, *lead, classes), np.float32)
  return scale * found[0], scale * found[1:]


# --- Values and gradients of a position. -------------------------------------


@pytest.mark.parametrize("loss", distillation.LOSSES)
@settings(max_examples=15, deadline=None)
@given(
  shape=SHAPES,
  seed=st.integers(0, 2**31),
  count=st.integers(1, 3),
  average=st.sampled_from(distillation.AVERAGES),
  temperature=st.sampled_from([0.5, 1.0, 2.0, 7.0]),
)
def test_terms_are_those_of_float64(
  loss, shape, seed, count, average, temperature
):
  distance = distillation.Distillation(
    loss, weight=9.0, temperature=temperature, average=average
  )
  logits, teachers = drawn(shape, seed, count)
  targets = distance.averaged([jnp.asarray(each) for each in teachers])
  assert targets.shape == logits.shape
  found = distance.positions(jnp.asarray(logits), targets)
  assert (found.shape, found.dtype) == (tuple(shape[0]), jnp.float32)
  expected = reference(distance, logits, teachers)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("loss", distillation.LOSSES)
def test_gradients_are_those_of_float64(loss, temperature):
  distance = distillation.Distillation(loss, temperature=temperature)
  logits, teachers = drawn(([], 7), 1)
  found = jax.grad(distance.positions)(jnp.asarray(logits), teachers[0])
  step, wide = 1e-5, logits.astype(np.float64)
  around = [
    [
      reference(distance, wide + sign * step * unit, teachers)
      for sign in (1, -1)
    ]
    for unit in np.eye(7)
  ]
  expected = [(up - down) / (2 * step) for up, down in around]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_who_predicts_as_the_teacher_does_has_nothing_to_learn():
  logits, _ = drawn(([4], 11), 2)
  for loss in distillation.LOSSES:
    distance = distillation.Distillation(loss, temperature=2.0)
    slope = jax.grad(lambda z, d=distance: d.positions(z, logits).sum())(
      jnp.asarray(logits)
    )
    np.testing.assert_allclose(slope, 0, atol=2e-6)
    if loss != "cross_entropy":
      np.testing.assert_array_equal(distance.positions(logits, logits), 0)


@pytest.mark.parametrize("scale", [1e3, 1e4])
@pytest.mark.parametrize("average", distillation.AVERAGES)
@pytest.mark.parametrize("loss", distillation.LOSSES)
def test_extreme_logits_stay_finite_and_no_term_is_negative(
  loss, average, scale
):
  rows = scale * jnp.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
  distance = distillation.Distillation(loss, temperature=0.5, average=average)
  targets = distance.averaged([rows[::-1], rows])
  found, slope = jax.vmap(jax.value_and_grad(distance.positions))(rows, targets)
  assert np.isfinite(found).all()
  assert np.isfinite(slope).all()
  assert (found >= 0).all()


@settings(max_examples=15, deadline=None)
@given(
  seed=st.integers(0, 2**31), mine=st.floats(-50, 50), theirs=st.floats(-50, 50)
)
def test_logit_mse_is_blind_to_constants_and_temperature(seed, mine, theirs):
  logits, (teacher,) = drawn(([3], 8), seed)
  distance = distillation.Distillation("logit_mse")
  expected = distance.positions(logits, teacher)
  moved = distance.positions(
    logits + np.float32(mine), teacher + np.float32(theirs)
  )
  np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-4)
  hot = distillation.Distillation("logit_mse", temperature=5.0)
  np.testing.assert_array_equal(hot.positions(logits, teacher), expected)


def test_averages():
  _, teachers = drawn(([2], 9), 3, count=3)
  heat = 2.0
  for average in distillation.AVERAGES:
    distance = distillation.Distillation(average=average, temperature=heat)
    found = distance.averaged(list(teachers))
    q = jax.nn.softmax(found / heat, axis=-1)
    np.testing.assert_allclose(q, joined(distance, teachers), atol=1e-6)
    # In any order; one alone is itself, several of one are that one.
    np.testing.assert_allclose(
      distance.averaged(list(teachers[::-1])), found, atol=1e-5
    )
    np.testing.assert_array_equal(distance.averaged([teachers[0]]), teachers[0])
    same = jax.nn.softmax(distance.averaged([teachers[0]] * 3), axis=-1)
    np.testing.assert_allclose(same, softmax(teachers[0]), atol=1e-6)


# --- The weight. -------------------------------------------------------------


@pytest.mark.parametrize(
  ("burn_in", "ramp", "expected"),
  [
    (0, 0, [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
    (2, 0, [0.0, 0.0, 2.0, 2.0, 2.0, 2.0]),
    (0, 3, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]),
    (1, 3, [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]),
  ],
)
def test_the_weight_waits_then_grows(burn_in, ramp, expected):
  distance = distillation.Distillation(weight=2.0, burn_in=burn_in, ramp=ramp)
  assert [distance.weight_at(step) for step in range(6)] == expected


@given(
  weight=st.floats(0, 10),
  burn_in=st.integers(0, 50),
  ramp=st.integers(0, 50),
)
def test_the_weight_never_falls_and_ends_whole(weight, burn_in, ramp):
  distance = distillation.Distillation(
    weight=weight, burn_in=burn_in, ramp=ramp
  )
  found = [distance.weight_at(step) for step in range(burn_in + ramp + 3)]
  assert found == sorted(found)
  assert not any(found[:burn_in])
  assert found[burn_in + ramp :] == [weight] * 3
  assert weight == 0 or all(found[burn_in:]) or weight < 1e-300


# --- Refusals. ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("setting", "value", "told"),
  [
    ("loss", "kl", "is unknown; use one of 'cross_entropy', 'logit_mse'"),
    ("average", "median", "is unknown; use one of 'probabilities', 'logits'"),
    ("weight", -1.0, "finite and not negative; use 0 to learn from no teacher"),
    ("weight", NAN, "finite and not negative"),
    ("weight", INF, "finite and not negative"),
    ("weight", "1.0", "must be a number"),
    ("weight", True, "must be a number"),
    ("temperature", "hot", "must be a number"),
    ("temperature", 0.0, "finite and positive, such as 1"),
    ("temperature", -2.0, "finite and positive"),
    ("temperature", NAN, "finite and positive"),
    ("temperature", INF, "finite and positive"),
    ("burn_in", -1, "a number of updates, 0 or more"),
    ("burn_in", 1.5, "a number of updates"),
    ("ramp", True, "a number of updates"),
    ("ramp", -3, "a number of updates"),
  ],
)
def test_refuses_settings_out_of_range(setting, value, told):
  with pytest.raises(ValueError) as caught:
    distillation.Distillation(**{setting: value})
  message = str(caught.value)
  assert message.startswith(f"Distillation.{setting}={value!r} ")
  assert told in message


# --- In the model. -----------------------------------------------------------

V, T, M, B = 23, 8, 3, 4


class Small(nn.Module):
  """As `Bert` from outside; compiles in a fifth."""

  vocab_size: int = V
  max_length: int = T
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, inputs, positions):
    tokens = nn.Embed(V, 4)
    x = tokens(inputs)
    x = jnp.tanh(nn.Dense(4)(x + x.mean(1, keepdims=True)))
    x = jnp.take_along_axis(x, positions[..., None], axis=1)
    return tokens.attend(x)


PLAIN = masked_lm.MaskedLanguageModel(Small())


def params_of(seed):
  draw = np.random.default_rng(seed)
  key = jax.random.key(0, impl="threefry2x32")
  return jax.tree.map(
    lambda x: draw.standard_normal(x.shape, np.float32),
    jax.eval_shape(PLAIN.init, key),
  )


def batch_of(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "inputs": rng.integers(0, V, (B, T)).astype(np.int32),
    "positions": rng.integers(0, T, (B, M)).astype(np.int32),
    "labels": rng.integers(0, V, (B, M)).astype(np.int32),
    "weights": np.float32([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
  }


def targets_of(distance, seed=0, weight=None):
  logits, _ = drawn(([B, M], V), seed)
  weight = np.float32(np.full(B, 1.0 if weight is None else weight))
  return distillation.Targets(jnp.asarray(logits), weight, distance)


@pytest.mark.parametrize("loss", distillation.LOSSES)
def test_examples_add_the_mean_over_their_own_masks(loss):
  smoothed = losses.CrossEntropy(label_smoothing=0.1)
  model = masked_lm.MaskedLanguageModel(Small(), smoothed)
  distance = distillation.Distillation(loss, temperature=2.0)
  batch, params, run = batch_of(), params_of(0), jax.jit(model.losses)
  rows = np.float32([0.5, 2.0, 0.25, 3.0])
  targets = targets_of(distance, weight=rows)
  plain, aux = run(params, batch)
  found, told = run(params, batch | {"targets": targets})
  logits = jax.jit(model.logits)(params, batch)
  terms = reference(distance, logits, targets.logits[None])
  for i in range(B):
    masked = batch["weights"][i] > 0
    expected = rows[i] * terms[i, masked].mean() if masked.any() else 0.0
    assert found[i] - plain[i] == pytest.approx(expected, rel=1e-4, abs=1e-5)
  # What evaluation reads does not know of teachers.
  jax.tree.map(np.testing.assert_array_equal, told, aux)
  # Nor does anything, of a weight of 0.
  none = dataclasses.replace(targets, weight=0 * rows)
  np.testing.assert_array_equal(
    run(params, batch | {"targets": none})[0], plain
  )


def test_teachers_count_at_masked_positions_of_their_own_example_alone():
  distance = distillation.Distillation("symmetric_kl")
  batch, params, run = batch_of(), params_of(0), jax.jit(PLAIN.losses)
  targets = targets_of(distance)
  found, _ = run(params, batch | {"targets": targets})
  other = targets_of(distance, seed=5)
  unused = batch["weights"][..., None] == 0
  elsewhere = dataclasses.replace(
    targets, logits=jnp.where(unused, other.logits, targets.logits)
  )
  after, _ = run(params, batch | {"targets": elsewhere})
  np.testing.assert_array_equal(after, found)
  # Entry i is that of row i, of batch and targets, alone.
  for row in range(B):
    here = np.arange(B) == row
    swapped = {
      name: np.where(here.reshape(-1, *[1] * (x.ndim - 1)), new, x)
      for (name, x), new in zip(
        batch.items(), batch_of(1).values(), strict=True
      )
    }
    changed = dataclasses.replace(
      targets,
      logits=jnp.where(here[:, None, None], other.logits, targets.logits),
      weight=np.where(here, np.float32(7.0), targets.weight),
    )
    after, _ = run(params, swapped | {"targets": changed})
    np.testing.assert_array_equal(after[~here], found[~here])
    if batch["weights"][row].any():
      assert after[row] != found[row]


def of_teachers(distance, students, teachers, joined_before=True):
  """The whole loss of a batch, of student's and teachers' parameters."""
  batch = batch_of()
  logits = [PLAIN.logits(params, batch) for params in teachers]
  joined_logits = distance.averaged(logits) if joined_before else logits[0]
  weight = jnp.full(B, 0.7)
  targets = distillation.Targets(joined_logits, weight, distance)
  return PLAIN.losses(students, batch | {"targets": targets})[0].sum()


@pytest.mark.parametrize("loss", distillation.LOSSES)
def test_no_gradient_reaches_a_teacher(loss):
  teachers = [params_of(1), params_of(2)]
  for options in ({}, {"average": "logits"}, {"joined_before": False}):
    before = options.get("joined_before", True)
    distance = distillation.Distillation(
      loss, average=options.get("average", "probabilities")
    )
    if before:  # `averaged` holds it back on its own.
      back = jax.grad(lambda x, d=distance: d.averaged([x, 2 * x]).sum())
      np.testing.assert_array_equal(back(jnp.arange(3.0)), 0)
    whole = jax.jit(
      jax.value_and_grad(
        lambda s, t, d=distance, b=before: of_teachers(d, s, t, b), (0, 1)
      )
    )
    value, (student, teacher) = whole(params_of(0), teachers)
    assert np.isfinite(value)
    for leaf in jax.tree.leaves(teacher):
      np.testing.assert_array_equal(leaf, 0)
    assert any(leaf.any() for leaf in jax.tree.leaves(student))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_symmetric_teaching_is_the_joint_loss_of_two_models(temperature):
  """One loss of both models at once: arXiv 2102.03349, section 4."""
  distance = distillation.Distillation("symmetric_kl", temperature=temperature)
  batch, weight = batch_of(), 0.7
  masked = np.maximum(batch["weights"].sum(1), 1)

  def joint(one, other):
    scores = [PLAIN.logits(params, batch) for params in (one, other)]
    log_p, log_q = [jax.nn.log_softmax(z / temperature, -1) for z in scores]
    there = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    back = (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
    distances = temperature**2 * (there + back) / 2
    means = (batch["weights"] * distances).sum(1) / masked
    labels = sum(PLAIN.losses(p, batch)[0].sum() for p in (one, other))
    return labels + weight * means.sum()

  both = params_of(0), params_of(1)
  expected = jax.jit(jax.grad(joint, (0, 1)))(*both)
  step = jax.jit(
    jax.grad(lambda mine, theirs: of_teachers(distance, mine, [theirs]))
  )
  for mine, theirs, slope in zip(both, both[::-1], expected, strict=True):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      step(mine, theirs),
      slope,
    )


def test_targets_pass_through_programs_with_their_settings():
  distance = distillation.Distillation(temperature=3.0)
  targets = targets_of(distance)
  through = jax.jit(lambda x: x)(targets)
  assert through.settings == distance
  np.testing.assert_array_equal(through.logits, targets.logits)
  assert len(jax.tree.leaves(targets)) == 2


def test_sampled_classes_refuse_teachers():
  encoder = bert.Bert(
    vocab_size=V, num_layers=1, width=8, num_heads=2, logit_scale=8.0
  )
  model = masked_lm.MaskedLanguageModel(
    encoder, sampling=sampled_softmax.SampledSoftmax(5, 8)
  )
  targets = targets_of(distillation.Distillation())
  keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), B)
  shapes = jax.eval_shape(model.init, keys[0])
  for given_keys in (keys, None):
    with pytest.raises(ValueError, match=r"sampling draws.*sampling=None"):
      jax.eval_shape(
        model.losses, shapes, batch_of() | {"targets": targets}, given_keys
      )
