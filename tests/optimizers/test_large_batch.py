"""LAMB, LARS and Nesterov momentum against their papers and Optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.optimizers import lamb
from dptrain.optimizers import lars
from dptrain.optimizers import nesterov
from dptrain.optimizers import sgd
from dptrain.optimizers import weight_decay

RNG = np.random.default_rng(0)
START = {
  "kernel": RNG.normal(size=(3, 2)),
  "norm": {"scale": np.ones(3), "bias": np.zeros(3)},
}
GRADIENTS = [
  jax.tree.map(lambda x: RNG.normal(size=x.shape), START) for _ in range(5)
]


def run(optimizer, start=START, gradients=GRADIENTS):
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for g in gradients:
    g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params


def close(a, b, rtol=1e-4):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def test_lamb_is_the_paper_in_numpy():
  lr, b1, b2, eps, decay = 0.02, 0.8, 0.9, 1e-6, 0.3
  w, m, v = START["kernel"].copy(), 0.0, 0.0
  bias, mb, vb = START["norm"]["bias"].copy(), 0.0, 0.0
  for t, g in enumerate(GRADIENTS, 1):
    k, b = g["kernel"], g["norm"]["bias"]
    m, v = b1 * m + (1 - b1) * k, b2 * v + (1 - b2) * k * k
    u = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * w
    w = w - lr * np.linalg.norm(w) / np.linalg.norm(u) * u
    mb, vb = b1 * mb + (1 - b1) * b, b2 * vb + (1 - b2) * b * b
    bias = bias - lr * mb / (1 - b1**t) / (np.sqrt(vb / (1 - b2**t)) + eps)
  end = run(lamb.lamb(lr, b1, b2, eps, decay))
  close(end["kernel"], w)
  close(end["norm"]["bias"], bias)


def test_lamb_is_optax_lamb_where_that_adapts_everything():
  ours = lamb.lamb(
    0.02,
    eps=1e-6,
    weight_decay=0.1,
    decay_norms_and_biases=True,
    adapt_norms_and_biases=True,
  )
  close(run(ours), run(optax.lamb(0.02, weight_decay=0.1)))


def test_lars_is_the_paper_in_numpy():
  lr, momentum, c, decay = 5.0, 0.8, 0.01, 0.3
  w, step = START["kernel"].copy(), 0.0
  bias, step_b = START["norm"]["bias"].copy(), 0.0
  for g in GRADIENTS:
    k = g["kernel"]
    norm = np.linalg.norm(w)
    rate = c * norm / (np.linalg.norm(k) + decay * norm)
    step = momentum * step + lr * rate * (k + decay * w)
    w = w - step
    step_b = momentum * step_b + lr * g["norm"]["bias"]
    bias = bias - step_b
  end = run(lars.lars(lr, momentum, c, weight_decay=decay))
  close(end["kernel"], w)
  close(end["norm"]["bias"], bias)


@pytest.mark.parametrize("look_ahead", [False, True])
def test_lars_is_optax_lars_without_decay(look_ahead):
  ours = lars.lars(5.0, nesterov=look_ahead, adapt_norms_and_biases=True)
  close(run(ours), run(optax.lars(5.0, nesterov=look_ahead)))


@pytest.mark.parametrize(
  "make",
  [
    lambda: lamb.lamb(0.02, weight_decay=0.1),
    lambda: lars.lars(5.0, weight_decay=0.1),
  ],
  ids=["lamb", "lars"],
)
def test_stacked_layers_move_as_they_do_alone(make):
  stack = {"kernel": (3, 4, 2), "bias": (3, 2)}
  scales = np.array([1.0, 10.0, 0.1])
  rng = np.random.default_rng(1)

  def drawn():
    return {
      name: rng.normal(size=shape) * scales.reshape(-1, *[1] * (len(shape) - 1))
      for name, shape in stack.items()
    }

  start, gradients = drawn(), [drawn() for _ in range(3)]
  together = run(make(), {"layers": start}, [{"layers": g} for g in gradients])[
    "layers"
  ]

  def apart(t):
    return {
      f"layers_{n}": jax.tree.map(lambda x, n=n: x[n], t) for n in range(3)
    }

  alone = run(make(), apart(start), [apart(g) for g in gradients])
  close(apart(together), alone)


def test_nesterov_is_sgd_looking_ahead():
  ours = nesterov.nesterov(0.1, 0.8, weight_decay=0.2)
  close(run(ours), run(sgd.sgd(0.1, 0.8, True, 0.2)))


def test_coupled_decay_is_an_l2_term():
  lr, momentum, decay = 0.1, 0.8, 0.2
  w, m = START["kernel"].copy(), 0.0
  for g in GRADIENTS:
    whole = g["kernel"] + decay * w
    m = momentum * m + whole
    w = w - lr * (whole + momentum * m)
  ours = nesterov.nesterov(lr, momentum, decay, decoupled=False)
  end = run(ours)
  close(end["kernel"], w)
  close(end["norm"], run(nesterov.nesterov(lr, momentum))["norm"])


@pytest.mark.parametrize(
  ("make", "shrinks_by"),
  [
    (lambda: lamb.lamb(0.1, weight_decay=0.5), 0.1),
    (lambda: lars.lars(50.0, momentum=0.0, weight_decay=0.01), 0.05),
    (lambda: nesterov.nesterov(0.1, 0.5, 0.5), 0.05),
  ],
  ids=["lamb", "lars", "nesterov"],
)
def test_without_gradients_only_matrices_shrink(make, shrinks_by):
  zeros = jax.tree.map(np.zeros_like, START)
  end = run(make(), gradients=[zeros] * 3)
  close(end["kernel"], START["kernel"] * (1 - shrinks_by) ** 3)
  close(end["norm"], START["norm"])


def test_a_matrix_that_starts_at_zero_leaves_it():
  zero = {"kernel": np.zeros((2, 2))}
  gradients = [{"kernel": np.ones((2, 2))}]
  for optimizer in (lamb.lamb(0.1), lars.lars(0.1)):
    assert (np.abs(run(optimizer, zero, gradients)["kernel"]) > 0).all()


@pytest.mark.parametrize("make", [lamb.lamb, lars.lars])
def test_missing_parameters_are_named(make):
  optimizer = make(0.1, weight_decay=0.0)
  params = {"kernel": jnp.ones((2, 2))}
  with pytest.raises(ValueError, match="params"):
    optimizer.update(params, optimizer.init(params))


@pytest.mark.parametrize(
  ("factory", "bad", "message"),
  [
    (lamb.lamb, {"learning_rate": 0.0}, "learning_rate=0.0"),
    (lamb.lamb, {"b1": 1.0}, "b1=1.0"),
    (lamb.lamb, {"b2": 1.0}, "b2=1.0"),
    (lamb.lamb, {"weight_decay": -1.0}, "weight_decay=-1.0"),
    (lars.lars, {"momentum": 1.0}, "momentum=1.0"),
    (lars.lars, {"trust_coefficient": 0.0}, "trust_coefficient=0.0"),
    (lars.lars, {"momentum": 0.0, "nesterov": True}, "nesterov=True"),
    (nesterov.nesterov, {"momentum": 0.0}, "momentum=0.0"),
    (nesterov.nesterov, {"weight_decay": float("nan")}, "weight_decay=nan"),
  ],
)
def test_large_batch_optimizers_refuse_bad_settings(factory, bad, message):
  with pytest.raises(ValueError, match=message):
    factory(**{"learning_rate": 0.1, **bad})


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("rate", [0.1, optax.linear_schedule(0.1, 0.2, 2)])
def test_decay_behind_an_optimizer_is_sgds_own(rate, everything):
  ours = weight_decay.with_decay(sgd.sgd(rate), rate, 0.5, everything)
  theirs = sgd.sgd(rate, 0.9, False, 0.5, everything)
  close(run(ours), run(theirs))


def test_lamb_takes_noise_off_before_it_measures_steps():
  s = 0.7
  plain = lamb.lamb(0.02, 0.0, 0.9, weight_decay=0.0)
  aware = lamb.lamb(
    0.02, 0.0, 0.9, weight_decay=0.0, correct_noise=True, noise_floor=0.1
  )
  params = {"kernel": jnp.asarray(START["kernel"], jnp.float32)}
  g = {"kernel": jnp.array([[3.0, 0.1], [0.7, 2.0], [0.0, 1.0]])}
  got, _ = aware.update(g, aware.init(params), params, noise_variance=s * s)
  step = g["kernel"] / np.sqrt(
    np.maximum(g["kernel"] ** 2 - s * s, 0.1 * s * s)
  )
  ratio = np.linalg.norm(params["kernel"]) / np.linalg.norm(step)
  np.testing.assert_allclose(got["kernel"], -0.02 * ratio * step, rtol=1e-4)
  close(
    aware.update(g, aware.init(params), params, noise_variance=0.0)[0],
    plain.update(g, plain.init(params), params)[0],
  )
  with pytest.raises(ValueError, match="given no noise_variance"):
    aware.update(g, aware.init(params), params)
