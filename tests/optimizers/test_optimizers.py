import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.models import bert
from dptrain.models import masked_lm
from dptrain.optimizers import adamw
from dptrain.optimizers import learning_rate
from dptrain.optimizers import sgd
from dptrain.optimizers import weight_decay

FACTORIES = {"adamw": adamw.adamw, "sgd": sgd.sgd}


def params():
  return {
    "dense": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), 2.0)},
    "norm": {"scale": jnp.full((3,), 2.0), "bias": jnp.full((3,), 2.0)},
    "embed": {"embedding": jnp.full((5, 2), 2.0)},
  }


def zeros(tree):
  return jax.tree.map(jnp.zeros_like, tree)


def run(optimizer, start, gradients):
  state = optimizer.init(start)
  for gradient in gradients:
    updates, state = optimizer.update(gradient, state, start)
    start = optax.apply_updates(start, updates)
  return start


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_with_no_gradient_only_matrices_shrink(factory):
  optimizer = factory(0.1, weight_decay=0.5)
  end = run(optimizer, params(), [zeros(params())] * 3)
  shrunk = 2.0 * (1 - 0.1 * 0.5) ** 3
  np.testing.assert_allclose(end["dense"]["kernel"], shrunk, rtol=1e-6)
  np.testing.assert_allclose(end["embed"]["embedding"], shrunk, rtol=1e-6)
  for leaf in (end["dense"]["bias"], *end["norm"].values()):
    np.testing.assert_array_equal(leaf, 2.0)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_norms_and_biases_decay_when_told_to(factory):
  optimizer = factory(0.1, weight_decay=0.5, decay_norms_and_biases=True)
  for leaf in jax.tree.leaves(run(optimizer, params(), [zeros(params())])):
    np.testing.assert_allclose(leaf, 1.9, rtol=1e-6)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_frozen_dicts_are_parameters_too(factory):
  frozen = flax.core.freeze(params())
  end = run(factory(0.1, weight_decay=0.5), frozen, [zeros(frozen)])
  assert isinstance(end, flax.core.FrozenDict)
  np.testing.assert_allclose(end["dense"]["kernel"], 1.9, rtol=1e-6)
  np.testing.assert_array_equal(end["norm"]["scale"], 2.0)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_decay_goes_by_name_in_both_layouts_of_layers(scan, layer_norm):
  model = masked_lm.MaskedLanguageModel(
    bert.Bert(
      vocab_size=10,
      num_layers=2,
      width=4,
      num_heads=2,
      layer_norm=layer_norm,
      scan_layers=scan,
    )
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0, impl="threefry2x32"))
  mask = weight_decay.decayed(shapes)
  seen = {True: set(), False: set()}
  for path, decays in jax.tree_util.tree_leaves_with_path(mask):
    seen[decays].add(path[-1].key)
  assert seen == {True: {"kernel", "embedding"}, False: {"bias", "scale"}}
  if scan:  # the trap: these are matrices here
    assert shapes["layers"]["mlp_norm"]["scale"].ndim == 2


def test_adamw_is_the_paper_in_numpy():
  rng = np.random.default_rng(0)
  start = rng.normal(size=(3, 2))
  gradients = rng.normal(size=(5, 3, 2))
  lr, b1, b2, eps, decay = 0.05, 0.8, 0.9, 1e-3, 0.7
  w, m, v = start.copy(), 0.0, 0.0
  for t, g in enumerate(gradients, 1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    w = w - lr * (step + decay * w)
  end = run(
    adamw.adamw(lr, b1, b2, eps, decay),
    {"kernel": jnp.asarray(start)},
    [{"kernel": jnp.asarray(g)} for g in gradients],
  )
  np.testing.assert_allclose(end["kernel"], w, rtol=1e-4)


@pytest.mark.parametrize(
  ("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)]
)
def test_sgd_keeps_decay_out_of_the_momentum(momentum, nesterov):
  rng = np.random.default_rng(0)
  start = rng.normal(size=(3, 2))
  gradients = rng.normal(size=(5, 3, 2))
  lr, decay = 0.1, 0.5
  w, m = start.copy(), 0.0
  for g in gradients:
    m = momentum * m + g
    step = g + momentum * m if nesterov else m
    w = w - lr * (step + decay * w)
  end = run(
    sgd.sgd(lr, momentum, nesterov, decay),
    {"kernel": jnp.asarray(start)},
    [{"kernel": jnp.asarray(g)} for g in gradients],
  )
  np.testing.assert_allclose(end["kernel"], w, rtol=1e-4)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_schedules_drive_the_updates_and_the_decay(factory):
  schedule = learning_rate.warmup_linear_decay(0.2, 1, 3)
  end = run(
    factory(schedule, weight_decay=0.5), params(), [zeros(params())] * 3
  )
  rates = [0.1, 0.2, 0.1]
  expected = 2.0 * np.prod([1 - 0.5 * r for r in rates])
  np.testing.assert_allclose(end["dense"]["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("factory", "bad", "message"),
  [
    (adamw.adamw, {"learning_rate": 0.0}, "learning_rate=0.0"),
    (adamw.adamw, {"learning_rate": float("nan")}, "learning_rate=nan"),
    (adamw.adamw, {"b1": 1.0}, "b1=1.0"),
    (adamw.adamw, {"b2": -0.1}, "b2=-0.1"),
    (adamw.adamw, {"eps": 0.0}, "eps=0.0"),
    (adamw.adamw, {"weight_decay": -1.0}, "weight_decay=-1.0"),
    (adamw.adamw, {"weight_decay": 20.0}, "weight_decay=20.0 times"),
    (sgd.sgd, {"learning_rate": -1.0}, "learning_rate=-1.0"),
    (sgd.sgd, {"momentum": 1.0}, "momentum=1.0"),
    (sgd.sgd, {"momentum": 0.0, "nesterov": True}, "nesterov=True"),
    (sgd.sgd, {"weight_decay": float("inf")}, "weight_decay=inf"),
  ],
)
def test_refuses_bad_settings_by_name(factory, bad, message):
  with pytest.raises(ValueError, match=message):
    factory(**{"learning_rate": 0.1, **bad})
