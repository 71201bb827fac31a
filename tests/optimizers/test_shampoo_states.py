import logging

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import numpy_shampoo
import optax
import orbax.checkpoint as ocp
import pytest

from dptrain.optimizers import inverse_roots
from dptrain.optimizers import shampoo
from dptrain.optimizers import shampoo_blocks


def test_a_failed_root_keeps_the_old_one_and_is_counted():
  grads = numpy_shampoo.gradients({"w": (4, 4)}, 1)
  strict = numpy_shampoo.transform(
    roots=inverse_roots.RootSettings(max_error=1e-30)
  )
  _, state = numpy_shampoo.run(strict, grads * 3)
  assert state.failed_roots == 6
  for root in state.roots.values():
    np.testing.assert_array_equal(root, np.stack([np.eye(4)] * 2))


def test_nan_gradients_are_counted_and_training_goes_on():
  grads = numpy_shampoo.gradients({"v": (3, 3), "w": (4, 4)}, 4)
  spoiled = [dict(g) for g in grads]
  spoiled[1]["w"] = np.where(np.eye(4) > 0, np.nan, grads[1]["w"])
  found, state = numpy_shampoo.run(
    numpy_shampoo.transform(momentum=0.0), spoiled
  )
  clean, _ = numpy_shampoo.run(numpy_shampoo.transform(momentum=0.0), grads)
  assert state.non_finite == 1
  assert state.failed_roots == 0
  np.testing.assert_array_equal(found[1]["w"], 0.0)
  for mine, its in zip(found, clean, strict=True):
    np.testing.assert_array_equal(mine["v"], its["v"])
    assert np.isfinite(mine["w"]).all()
  assert np.linalg.norm(found[3]["w"]) > 0


def test_overflowing_factors_are_counted_and_stay():
  grads = numpy_shampoo.gradients({"w": (4, 4)}, 3)
  grads[1]["w"] = grads[1]["w"] * 1e30  # finite, its square not
  found, state = numpy_shampoo.run(
    numpy_shampoo.transform(graft="sgd", momentum=0.0), grads
  )
  assert state.non_finite == 2
  for x in jax.tree.leaves((found, state)):
    assert np.isfinite(np.asarray(x, np.float32)).all()


def test_parameters_without_gradient_do_not_move_nor_fail():
  grads = [{"w": np.zeros((4, 4))}] * 3
  found, state = numpy_shampoo.run(numpy_shampoo.transform(), grads)
  assert state.failed_roots == 0
  for x in found:
    np.testing.assert_array_equal(x["w"], 0.0)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: shampoo_blocks.Blocking(block_size=0), "block_size=0"),
    (lambda: shampoo_blocks.Blocking(merge_up_to=0), "merge_up_to=0"),
    (lambda: shampoo_blocks.Blocking(max_dim=2.5), "max_dim=2.5"),
    (lambda: shampoo_blocks.Blocking(min_rank=0), "min_rank=0"),
    (lambda: shampoo_blocks.Blocking(sides="left"), "sides='left'"),
    (lambda: shampoo_blocks.Blocking(long_dims="cut"), "long_dims='cut'"),
    (lambda: shampoo_blocks.Blocking(skip_names="bias"), "a list of strings"),
    (lambda: shampoo_blocks.Blocking(exponents=0), "exponents=0"),
    (lambda: shampoo_blocks.Blocking(exponents={2: 17}), "exponents=17"),
    (lambda: numpy_shampoo.refresh(interval=0), "interval=0"),
    (lambda: numpy_shampoo.refresh(start=0), "start=0"),
    (
      lambda: numpy_shampoo.refresh(statistics_interval=0),
      "statistics_interval=0",
    ),
    (lambda: numpy_shampoo.refresh(delay=-1), "delay=-1"),
    (lambda: numpy_shampoo.refresh(delay=2), "delay=2 exceeds interval=1"),
    (
      lambda: numpy_shampoo.refresh(statistics_interval=2),
      "start=1 comes before",
    ),
    (lambda: numpy_shampoo.settings(momentum=1.0), "momentum=1.0"),
    (lambda: numpy_shampoo.settings(beta2=0.0), "beta2=0.0"),
    (lambda: numpy_shampoo.settings(beta2=1.5), "beta2=1.5"),
    (lambda: numpy_shampoo.settings(eps=0.0), "eps=0.0"),
    (lambda: numpy_shampoo.settings(graft="lion"), "graft='lion'"),
    (
      lambda: numpy_shampoo.settings(momentum=0.0, nesterov=True),
      "nesterov=True",
    ),
    (lambda: numpy_shampoo.settings(statistics_bits=8), "statistics_bits=8"),
    (lambda: numpy_shampoo.settings(root_bits=4), "root_bits=4"),
    (
      lambda: numpy_shampoo.settings(
        subtract_noise=True, roots=inverse_roots.RootSettings("newton")
      ),
      "subtract_noise=True",
    ),
    (lambda: shampoo.shampoo(0.0), "learning_rate=0.0"),
    (lambda: shampoo.shampoo(0.1, weight_decay=20.0), "weight_decay=20.0"),
  ],
)
def test_bad_shampoo_settings_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_exponents_that_do_not_serve_a_rank_are_refused():
  blocking = shampoo_blocks.Blocking(merge_up_to=1, exponents={2: 4})
  optimizer = numpy_shampoo.transform(blocking=blocking)
  optimizer.init({"matrix": jnp.zeros((2, 3))})
  with pytest.raises(ValueError, match=r"no entry for 3.*tensor"):
    optimizer.init({"tensor": jnp.zeros((2, 3, 4))})


# --- state --------------------------------------------------------------------


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"refresh": numpy_shampoo.refresh(interval=3, delay=2)},
    {"statistics_bits": 16, "root_bits": 8, "momentum": 0.0},
  ],
  ids=["plain", "late", "packed"],
)
def test_a_saved_state_goes_on_where_it_was(tmp_path, changes):
  grads = numpy_shampoo.gradients({"w": (4, 4), "b": (3,)}, 8)
  optimizer = numpy_shampoo.transform(**changes)
  _, halfway = numpy_shampoo.run(optimizer, grads[:5])
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", halfway)
    checkpointer.wait_until_finished()
    shapes = jax.eval_shape(lambda: halfway)
    restored = checkpointer.restore(tmp_path / "state", shapes)
  assert jax.tree.structure(restored) == jax.tree.structure(halfway)
  update = jax.jit(optimizer.update)
  states = [halfway, restored]
  for g in grads[5:]:
    g = jax.tree.map(jnp.asarray, g)
    pair = [update(g, state) for state in states]
    states = [state for _, state in pair]
    jax.tree.map(np.testing.assert_array_equal, *pair)


def test_frozen_dicts_and_bare_arrays_are_parameters():
  grads = numpy_shampoo.gradients({"w": (4, 4)}, 3)
  plain, _ = numpy_shampoo.run(numpy_shampoo.transform(), grads)
  frozen, _ = numpy_shampoo.run(
    numpy_shampoo.transform(), [flax.core.freeze(g) for g in grads]
  )
  bare, _ = numpy_shampoo.run(
    numpy_shampoo.transform(), [g["w"] for g in grads]
  )
  np.testing.assert_array_equal(plain[-1]["w"], frozen[-1]["w"])
  np.testing.assert_array_equal(plain[-1]["w"], bare[-1])


def test_quantised_states_lose_what_was_measured():
  """Of a step's direction; the loss on a model is not measured."""
  grads = numpy_shampoo.gradients({"w": (32, 32)}, 30)
  late = numpy_shampoo.refresh(interval=5, delay=3)
  exact, _ = numpy_shampoo.run(numpy_shampoo.transform(refresh=late), grads)

  def angle(**bits):
    found, state = numpy_shampoo.run(
      numpy_shampoo.transform(refresh=late, **bits), grads
    )
    assert state.failed_roots == 0
    x, y = found[-1]["w"], exact[-1]["w"]
    return 1 - np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y))

  assert angle(root_bits=16) < 1e-6
  assert angle(root_bits=8) < 1e-2
  assert angle(statistics_bits=16) < 1e-3


# --- the whole optimizer ------------------------------------------------------


def test_says_at_start_up_what_is_preconditioned(caplog):
  params = {"w": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
  optimizer = shampoo.shampoo(0.1)
  with caplog.at_level(logging.INFO, "dptrain.optimizers"):
    optimizer.init(params)
    optimizer.init(params)
  assert len(caplog.records) == 1
  for line in shampoo.describe(params):
    assert line in caplog.text
  with caplog.at_level(logging.WARNING, "dptrain.optimizers"):
    shampoo.shampoo(0.1).init({"bias": jnp.zeros(3)})
  assert "preconditions nothing" in caplog.text


def test_weights_decay_apart_from_preconditioning():
  params = {"kernel": jnp.full((3, 3), 2.0), "bias": jnp.full((3,), 2.0)}
  optimizer = shampoo.shampoo(optax.constant_schedule(0.1), weight_decay=0.5)
  state = optimizer.init(params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, state, params)
  after = optax.apply_updates(params, updates)
  np.testing.assert_allclose(after["kernel"], 2.0 * 0.95, rtol=1e-6)
  np.testing.assert_array_equal(after["bias"], 2.0)


def test_an_ill_conditioned_problem_is_solved_where_adam_is_not():
  """A quadratic of condition 1e6 in rows and columns."""
  rng = np.random.default_rng(0)
  left, right = (
    np.linalg.qr(rng.normal(size=(8, 8)))[0] * np.logspace(0, -1.5, 8)
    for _ in range(2)
  )
  left, right = jnp.asarray(left.T), jnp.asarray(right)
  target = jnp.asarray(rng.normal(size=(8, 8)))

  def loss(w):
    return jnp.sum((left @ (w - target) @ right) ** 2)

  def after(optimizer):
    w = jnp.zeros((8, 8))
    state = optimizer.init(w)

    @jax.jit
    def step(w, state):
      updates, state = optimizer.update(jax.grad(loss)(w), state, w)
      return optax.apply_updates(w, updates), state

    for _ in range(150):
      w, state = step(w, state)
    return float(loss(w)) / float(loss(jnp.zeros((8, 8))))

  schedule = optax.linear_schedule(0.1, 0.0, 150)
  mine = after(
    shampoo.shampoo(schedule, numpy_shampoo.settings(beta2=0.95), 0.0)
  )
  assert mine < 0.5 * after(optax.adam(schedule))
