"""Every pair has the length of one and the direction of the other."""

import itertools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.optimizers import adagrad
from dptrain.optimizers import adamw
from dptrain.optimizers import grafting
from dptrain.optimizers import lamb
from dptrain.optimizers import lars
from dptrain.optimizers import layers
from dptrain.optimizers import nesterov
from dptrain.optimizers import rmsprop
from dptrain.optimizers import sgd
from dptrain.optimizers import sm3

OPTIMIZERS = {
  "adagrad": adagrad.adagrad(0.3),
  "adamw": adamw.adamw(1e-3),
  "corrected": adamw.adamw(1e-3, correct_noise=True),
  "lamb": lamb.lamb(0.02),
  "lars": lars.lars(0.1),
  "nesterov": nesterov.nesterov(0.2),
  "rmsprop": rmsprop.rmsprop(1e-2),
  "sgd": sgd.sgd(0.5, weight_decay=0.1),
  "sm3": sm3.sm3(0.1),
}


def tree(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  shapes = {
    "layers": {"kernel": (2, 4, 3), "bias": (2, 3)},
    "embed": {"embedding": (5, 2)},
    "temperature": (),
  }
  return jax.tree.map(
    lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def steps(optimizer, count=3):
  params = tree(0)
  state = optimizer.init(params)
  update = optax.with_extra_args_support(optimizer).update
  for seed in range(1, count + 1):
    updates, state = update(tree(seed), state, params, noise_variance=0.1)
  return updates


@pytest.fixture(scope="module")
def alone():
  return {name: steps(o) for name, o in OPTIMIZERS.items()}


def wide(x):
  return np.asarray(x, np.float64)


@pytest.mark.parametrize("per", grafting.PER)
@pytest.mark.parametrize("magnitude", OPTIMIZERS)
def test_every_pair(alone, magnitude, per):
  for direction in OPTIMIZERS:
    both = steps(
      grafting.graft(OPTIMIZERS[magnitude], OPTIMIZERS[direction], per)
    )
    trees = [
      jax.tree.leaves(t) for t in (both, alone[magnitude], alone[direction])
    ]
    if per == "global":
      trees = [[np.concatenate([wide(x).ravel() for x in t])] for t in trees]
    else:  # a stack is as many layers as it is long
      trees = [
        list(
          itertools.chain(
            *(x if x.ndim > 1 and len(x) == 2 else [x] for x in t)
          )
        )
        for t in trees
      ]
    for got, m, d in zip(*trees, strict=True):
      got, m, d = wide(got), wide(m), wide(d)
      expected = d * np.linalg.norm(m) / np.linalg.norm(d)
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
  exponents=st.tuples(st.integers(-25, 15), st.integers(-25, 15)),
  seed=st.integers(0, 2**32 - 1),
  per=st.sampled_from(grafting.PER),
)
def test_lengths_survive_where_their_squares_do_not(exponents, seed, per):
  rng = np.random.default_rng(seed)
  gradient = jnp.asarray(rng.normal(size=6), jnp.float32)
  m, d = (10.0**e for e in exponents)
  both = grafting.graft(optax.scale(m), optax.scale(-d), per)
  got, _ = both.update(gradient, both.init(gradient))
  np.testing.assert_allclose(wide(got), -m * wide(gradient), rtol=1e-5)


@pytest.mark.parametrize("per", grafting.PER)
@pytest.mark.parametrize(
  "pair",
  [
    (optax.set_to_zero(), optax.identity()),
    (optax.identity(), optax.set_to_zero()),
    (optax.set_to_zero(), optax.set_to_zero()),
  ],
)
def test_without_a_length_or_a_direction_nothing_moves(pair, per):
  both = grafting.graft(*pair, per=per)
  params = tree(0)
  got, _ = both.update(tree(1), both.init(params), params)
  for leaf in jax.tree.leaves(got):
    np.testing.assert_array_equal(leaf, 0.0)


def test_one_layer_without_direction_leaves_the_others_alone():
  gradient = {"a": jnp.zeros(3), "b": jnp.array([3.0, 4.0])}
  both = grafting.graft(optax.scale(2.0), optax.scale_by_sign())
  got, _ = both.update(gradient, both.init(gradient))
  np.testing.assert_array_equal(got["a"], 0.0)
  np.testing.assert_allclose(got["b"], 10 / np.sqrt(2), rtol=1e-6)


def test_stacks_are_layers_unless_told_otherwise():
  gradient = {"layers": {"kernel": jnp.array([[3.0, 4.0], [30.0, 40.0]])}}
  pair = optax.identity(), optax.scale_by_sign()
  for stacked, expected in (
    (layers.STACKED, [5.0, 50.0]),
    (None, [np.hypot(5, 50) / np.sqrt(2)] * 2),
  ):
    both = grafting.graft(*pair, stacked=stacked)
    got, _ = both.update(gradient, both.init(gradient))
    norms = np.linalg.norm(got["layers"]["kernel"], axis=1)
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


def test_each_keeps_a_state_of_its_own_and_nests():
  inner = grafting.graft(sgd.sgd(0.1), adamw.adamw(1e-3))
  outer = grafting.graft(inner, sm3.sm3(0.1), per="global")
  got, expected = steps(outer), steps(inner)
  np.testing.assert_allclose(
    layers.global_norm(got), layers.global_norm(expected), rtol=1e-5
  )


def test_bfloat16_steps_stay_bfloat16():
  gradient = jnp.full((4,), 3.0, jnp.bfloat16)
  both = grafting.graft(optax.scale(2.0), optax.scale_by_sign())
  got, _ = both.update(gradient, both.init(gradient))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(got, np.float32), 6.0, rtol=1e-2)


def test_norms_of_infinite_arrays_are_infinite():
  norms = layers.norms(
    {"a": jnp.array([1.0, jnp.inf]), "b": jnp.array(jnp.nan)}
  )
  assert np.isinf(norms["a"]).all()
  assert np.isnan(norms["b"]).all()


def test_an_unknown_kind_of_length_is_refused():
  with pytest.raises(ValueError, match="per='tensor'"):
    grafting.graft(optax.sgd(0.1), optax.sgd(0.1), per="tensor")
