import pathlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.optimizers import adamw
from dptrain.optimizers import lamb
from dptrain.optimizers import lars
from dptrain.optimizers import nesterov
from dptrain.optimizers import sgd
from dptrain.optimizers import shampoo
from dptrain.optimizers import sm3
from dptrain.optimizers import soap
from dptrain.optimizers import weight_decay
import gin

GIN = pathlib.Path(__file__).parents[2] / "gin"
FACTORIES = {
  "adamw": adamw.adamw,
  "adapted_sgd": weight_decay.with_decay,
  "grafted_sm3": weight_decay.with_decay,
  "lamb": lamb.lamb,
  "lars": lars.lars,
  "nesterov": nesterov.nesterov,
  "sgd": sgd.sgd,
  "shampoo": shampoo.shampoo,
  "sm3": sm3.sm3,
  "soap": soap.soap,
}
# What decay alone takes off a weight in an update; others: 0.5 * rate.
TAKEN = {
  "lamb": lambda rates: rates[-1],  # a layer moves by its rate
  # 0.001 of the norm, kept in the momentum; to first order in it.
  "lars": lambda rates: (
    1e-3 * sum(r * 0.9**n for n, r in enumerate(rates[::-1]))
  ),
}
MACROS = [
  "LEARNING_RATE = 0.2",
  "WARMUP_STEPS = 1",
  "TOTAL_STEPS = 3",
  "WEIGHT_DECAY = 0.5",
]


@pytest.fixture(autouse=True)
def _clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


def test_every_file_is_tested():
  files = {f.stem for f in (GIN / "optimizers").glob("*.gin")}
  assert files == set(FACTORIES)


@pytest.mark.parametrize("name", FACTORIES)
def test_builds_the_optimizer_its_macros_describe(name):
  gin.parse_config_files_and_bindings(
    [
      str(GIN / "models" / "bert_tiny.gin"),
      str(GIN / "optimizers" / f"{name}.gin"),
    ],
    [*MACROS, "VOCABULARY_SIZE = 100"],
  )
  factory = FACTORIES[name]
  module = factory.__module__.rsplit(".", 1)[-1]
  bound = f"{module}.{factory.__name__}"
  assert bound in repr(gin.query_parameter("%OPTIMIZER"))
  optimizer = gin.get_configurable(factory)()
  weights = {"kernel": jnp.full((2, 2), 2.0)}
  state = optimizer.init(weights)
  taken = TAKEN.get(name, lambda rates: 0.5 * rates[-1])
  rates = [0.1, 0.2, 0.1]
  for update in range(3):
    expected = weights["kernel"] * (1 - taken(rates[: update + 1]))
    updates, state = optimizer.update(
      {"kernel": jnp.zeros((2, 2))}, state, weights
    )
    weights = optax.apply_updates(weights, updates)
    np.testing.assert_allclose(weights["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("missing", MACROS)
def test_a_missing_macro_is_named(name, missing):
  with pytest.raises(ValueError, match=f"for '{missing.split()[0]}/"):
    gin.parse_config_files_and_bindings(
      [str(GIN / "optimizers" / f"{name}.gin")],
      [m for m in MACROS if m != missing],
    )
