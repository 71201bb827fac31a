"""What the observer reads, against float64 and hand-made noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run

from dptrain.auditing import canaries as canaries_lib
from dptrain.auditing import observer as observer_lib
from dptrain.clipping import methods
from dptrain.clipping import rules
from dptrain.data import masking
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.training import objective as objective_lib

CANARIES, RECORDS = 6, 20
SIZES = (5, 13)


def make_plan(clipping="flat", noise=1.5, norm=0.1):
  return plan_lib.make_plan(
    plan_lib.PrivacySettings(
      schedule=schedule.BatchSchedule(
        [schedule.Phase(SIZES[0], SIZES[0], 2), schedule.Phase(*SIZES, 4)]
      ),
      delta=1e-5,
      noise_multiplier=noise,
      clipping=clipping,
      l2_clip_norm=norm,
    ),
    CANARIES + RECORDS,
  )


def make_observer(optimizer=None, **plan):
  return observer_lib.Observer(
    optimizer or optax.sgd(0.1), make_plan(**plan), CANARIES
  )


def audited_model(base, observer):
  return observer_lib.CanaryModel(
    bert=base.bert,
    base=base,
    num_canaries=CANARIES,
    gradient_norm=observer.gradient_norm,
  )


def naive_log_ratio(x, prob, gain, noise):
  """Log of q N(x; gain, z) + (1 - q) N(x; 0, z) over N(x; 0, z)."""
  density = lambda mean: np.exp(-((x - mean) ** 2) / (2 * noise**2))  # noqa: E731
  mixed = prob * density(gain) + (1 - prob) * density(0.0)
  return np.log(mixed / density(0.0))


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("noise", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("prob", [1e-6, 0.02, 0.5, 1.0])
def test_log_ratios_equal_a_naive_formula(prob, noise, clipping):
  observer = make_observer(noise=noise, clipping=clipping)
  x = np.linspace(-5, 5, 41) * noise
  found = observer.log_ratios(jnp.asarray(x, jnp.float32), prob)
  gain = float(observer.gain)
  wanted = naive_log_ratio(x, prob, gain, noise)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  assert gain == pytest.approx(1.0, abs=2e-3)


def test_log_ratios_of_extreme_readings_are_finite():
  observer = make_observer(noise=0.01)
  x = jnp.array([-1e4, 1e4], jnp.float32)
  for prob in (1e-6, 1.0):
    found = observer.log_ratios(x, prob)
    assert jnp.isfinite(found).all()
    assert found[1] > found[0]


@pytest.mark.parametrize("clipping", ["flat", "normalized"])
def test_readings_of_hand_made_releases(clipping):
  """Four updates: x is 1 where the canary was, and the noise is read as is."""
  observer = make_observer(clipping=clipping)
  sensitivity = 0.1 if clipping == "flat" else 1.0
  optimizer = observer.as_optimizer()
  model = {"w": jnp.ones(3)}
  leaves = {f"leaf_{n}": jnp.ones(CANARIES) for n in range(4)}
  params = {"model": model, "canaries": leaves}
  state = optimizer.init(params)
  draw = np.random.default_rng(0)
  wanted = np.zeros((3, CANARIES))
  signs = np.array([1, -1, 1, -1])
  for step in range(4):
    size = SIZES[step // 2] if step < 3 else 13
    size = observer.plan.expected_batch_size(step)
    prob = observer.plan.sampling_prob(step)
    turn = (-1) ** step
    present = draw.integers(0, 2, CANARIES)
    noise = 1.5 * sensitivity * draw.normal(size=(4, CANARIES))
    direction = turn * signs[:, None] / 2
    total = sensitivity * present * direction + noise
    gradient = {
      "model": {"w": jnp.full(3, float(step))},
      "canaries": {
        f"leaf_{n}": jnp.asarray(total[n] / size, jnp.float32) for n in range(4)
      },
    }
    x = present + (direction * noise).sum(0) / sensitivity
    ratio = naive_log_ratio(x, prob, 1.0, 1.5)
    wanted += np.stack([ratio, x, x**2])
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  found = np.stack([state.scores, state.totals, state.squares])
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
  assert int(state.step) == 4
  # The model got the user's updates, and the directions are as they were.
  np.testing.assert_allclose(params["model"]["w"], 1 - 0.1 * (0 + 1 + 2 + 3))
  for leaf in params["canaries"].values():
    np.testing.assert_array_equal(leaf, np.ones(CANARIES))


def test_the_optimizer_sees_what_it_sees_in_any_run():
  seen = []

  def update(gradient, state, params):
    seen.append((gradient, params))
    return jax.tree.map(jnp.zeros_like, gradient), state

  spy = optax.GradientTransformation(lambda params: {"of": params}, update)
  optimizer = make_observer(spy).as_optimizer()
  leaves = {f"leaf_{n}": jnp.ones(CANARIES) for n in range(4)}
  model = {"kernel": jnp.ones(2)}
  params = {"model": model, "canaries": leaves}
  state = optimizer.init(params)
  assert state.inner == {"of": model}
  optimizer.update(params, state, params)
  assert jax.tree.structure(seen[0]) == jax.tree.structure((model, model))


# --- the canaries' own losses -------------------------------------------------


class Case:
  """A physical batch of all canaries, some out, and some records."""

  def __init__(self, base, **plan):
    self.base = base
    self.observer = make_observer(**plan)
    self.model = audited_model(base, self.observer)
    made = canaries_lib.make_canaries(
      bytes(range(32)), CANARIES, small_run.LENGTH, small_run.VOCABULARY
    )
    included = np.array([True, False, True, True, False, True])
    self.canaries = made._replace(included=included)
    records = canaries_lib.with_canaries(
      small_run.records(RECORDS), self.canaries
    )
    self.tokens = records.train.tokens
    ids = np.array([7, 1, 0, 3, 20, 2, 4, 9], np.int32)
    self.ids = ids
    self.batch = {
      "tokens": jnp.asarray(self.tokens[ids]),
      "example_ids": jnp.asarray(ids),
      "is_padding": jnp.zeros(len(ids), bool),
    }
    key = jax.random.key(3, impl="threefry2x32")
    self.keys = masking.example_keys(key, self.batch["example_ids"])
    self.losses = objective_lib.Objective(
      self.model, masking.MaskingSettings()
    ).losses
    self.params = jax.jit(self.model.init)(key)

  def clipped(self, method, rule, rows=None):
    rows = np.arange(len(self.ids)) if rows is None else np.asarray(rows)
    return jax.jit(
      lambda params: methods.clipped_sum(
        self.losses,
        params,
        jax.tree.map(lambda x: x[rows], self.batch),
        self.keys[rows],
        self.batch["is_padding"][rows],
        rule,
        method,
      )
    )(self.params)


@pytest.fixture(scope="module")
def bert():
  return Case(small_run.model())


@pytest.fixture(scope="module")
def by_vmap(bert):
  return bert.clipped("vmap", rules.ClippingRule("flat", 0.1)).gradients


@pytest.fixture(scope="module")
def quick():
  """Without layers that could be tapped: by vmap, compiled in a tenth."""
  return Case(small_run.QuickModel(small_run.model().bert))


def of_the_model_alone(case, rule, rows, method):
  """What `clipped` would be without canaries."""
  alone = objective_lib.Objective(case.base, masking.MaskingSettings())
  rows = np.asarray(rows)
  return jax.jit(
    lambda params: methods.clipped_sum(
      alone.losses,
      params,
      jax.tree.map(lambda x: x[rows], case.batch),
      case.keys[rows],
      jnp.zeros(len(rows), bool),
      rule,
      method,
    )
  )(case.params["model"])


def test_the_model_is_tapped_as_without_canaries(bert):
  shapes = jax.eval_shape(lambda: bert.params)
  chosen = methods.choose(bert.losses, shapes, bert.batch, bert.keys)
  assert chosen.method == "one_pass"
  weights = {use.weight for use in chosen.uses}
  assert {path[0] for path in weights} == {"model"}
  alone = objective_lib.Objective(bert.base, masking.MaskingSettings())
  plain = methods.choose(
    alone.losses, shapes["model"], bert.batch, bert.keys, "one_pass"
  )
  assert {path[1:] for path in weights} <= {use.weight for use in plain.uses}


@pytest.mark.parametrize("method", ["one_pass", "two_pass"])
def test_clipping_is_exact_beside_canaries(bert, by_vmap, method):
  ours = bert.clipped(method, rules.ClippingRule("flat", 0.1)).gradients
  for a, b in zip(*map(jax.tree.leaves, (ours, by_vmap)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def check_canaries(case, clipped):
  """Each canary of the batch moved its own coordinates by C, if it is in."""
  places = dict(zip(case.ids.tolist(), range(len(case.ids)), strict=True))
  for canary in range(5):
    norm = clipped.norms[places[canary]]
    expected = 10 * 0.1 if case.canaries.included[canary] else 0.0
    assert norm == pytest.approx(expected, rel=1e-5)
  leaves = clipped.gradients["canaries"]
  table = np.stack([leaves[f"leaf_{n}"] for n in range(4)])
  included = case.canaries.included * (np.arange(CANARIES) < 5)
  wanted = 0.05 * np.array([1, -1, 1, -1])[:, None] * included
  np.testing.assert_allclose(table, wanted, rtol=1e-5)


def test_a_canary_moves_its_own_coordinates_by_the_sensitivity(quick, bert):
  rule = rules.ClippingRule("flat", 0.1)
  check_canaries(quick, quick.clipped("vmap", rule))
  check_canaries(bert, bert.clipped("one_pass", rule))


OUT = [1, 6]  # the rows of canaries 1 and 4


def test_a_canary_that_is_left_out_contributes_exactly_nothing(quick, bert):
  """Both as gradient canary and, black-box, as a record of padding."""
  rule = rules.ClippingRule("automatic")
  for clipped in (
    quick.clipped("vmap", rule, OUT),
    of_the_model_alone(bert, rule, OUT, "one_pass"),
  ):
    assert clipped.contributes.all()
    for leaf in jax.tree.leaves(clipped.gradients):
      np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_other_examples_are_untouched(quick):
  rule = rules.ClippingRule("flat", 0.1)
  others = [0, 4, 7]
  ours = quick.clipped("vmap", rule, others)
  plain = of_the_model_alone(quick, rule, others, "vmap")
  np.testing.assert_allclose(ours.losses, plain.losses, rtol=1e-6)
  found = ours.gradients["model"]
  for a, b in zip(*map(jax.tree.leaves, (found, plain.gradients)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  for leaf in jax.tree.leaves(ours.gradients["canaries"]):
    np.testing.assert_array_equal(leaf, np.zeros(CANARIES))


def test_names_of_the_parameters_follow_their_structure(bert):
  names = bert.model.logical_axes()
  for (path, leaf), (other, axes) in zip(
    jax.tree_util.tree_leaves_with_path(bert.params),
    jax.tree_util.tree_leaves_with_path(
      names, is_leaf=lambda x: isinstance(x, tuple)
    ),
    strict=True,
  ):
    assert path == other
    assert len(axes) == leaf.ndim


def test_canaries_and_coins():
  made = canaries_lib.make_canaries(b"s" * 32, 4000, 16, 50)
  assert made.tokens.shape == (4000, 16)
  assert made.tokens.dtype == np.int32
  assert set(np.unique(made.tokens[:, 1:-1])) == set(range(5, 50))
  assert abs(made.included.mean() - 0.5) < 4 * 0.5 / 4000**0.5
  # The coins say nothing of the text, nor of each other.
  for other in (made.tokens[:, 5] % 2, np.roll(made.included, 1)):
    assert abs(np.corrcoef(made.included, other)[0, 1]) < 4 / 4000**0.5
  rows = made.rows()
  np.testing.assert_array_equal(rows[made.included], made.tokens[made.included])
  assert not rows[~made.included].any()
  again = canaries_lib.make_canaries(b"s" * 32, 4000, 16, 50)
  np.testing.assert_array_equal(again.included, made.included)
  other = canaries_lib.make_canaries(b"t" * 32, 4000, 16, 50)
  assert abs((other.included == made.included).mean() - 0.5) < 0.04
