import pathlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.optimizers import adamw
from dptrain.optimizers import sgd
from dptrain.optimizers import shampoo
import gin

GIN = pathlib.Path(__file__).parents[2] / "gin"
FACTORIES = {
  "adamw": adamw.adamw,
  "sgd": sgd.sgd,
  "shampoo": shampoo.shampoo,
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
  assert f"{name}.{name}" in repr(gin.query_parameter("%OPTIMIZER"))
  optimizer = gin.get_configurable(FACTORIES[name])()
  weights = {"kernel": jnp.full((2, 2), 2.0)}
  state = optimizer.init(weights)
  for rate in (0.1, 0.2, 0.1):
    expected = weights["kernel"] * (1 - 0.5 * rate)
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
