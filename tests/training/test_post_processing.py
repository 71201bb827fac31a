"""After the noise no optimizer reads anything of the examples.

Two updates of different clipped sums whose noise makes up for the difference
have one privatised gradient: whatever follows must be the same, bit for bit.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain import configuration
from dptrain.clipping import rules
from dptrain.optimizers import codebook_learning
from dptrain.optimizers import codebook_settings
from dptrain.training import step as step_lib

FOLDER = pathlib.Path(configuration.__file__).parents[1] / "gin" / "optimizers"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gin"))
STEPS, BATCH = 4, 8.0


def optimizer_of(name):
  run = configuration.training_run(
    ["demo.gin", f"optimizers/{name}.gin"],
    ["MODEL_DIR = 'unused'", "TASK = 'not read'"],
  )
  return run.optimizer


def params_like(ngrammer=False):
  """Matrices and vectors under the names that optimizers look at."""
  draw = np.random.default_rng(0)
  if ngrammer:
    tables = {
      name: {"embedding": jnp.asarray(draw.normal(size=(6, 4)), jnp.float32)}
      for name in ("codebook_0", "table_0", "right_table_0")
    }
    return params_like() | {"ngrammer": tables}
  return {
    "layer": {
      "kernel": jnp.asarray(draw.normal(size=(6, 4)), jnp.float32),
      "bias": jnp.zeros(4),
    },
    "norm": {"scale": jnp.ones(4)},
  }


def eighths(draw, like):
  """Whole numbers of eighths: their sums are exact."""
  return jax.tree.map(
    lambda x: jnp.asarray(draw.integers(-64, 64, x.shape) / 8, jnp.float32),
    like,
  )


def unread(params, batch, keys):
  raise AssertionError("the loss is read after the noise")


def trained(optimizer, sums, noises, params=None):
  """Parameters and state after updates with these sums and this noise."""
  params = params_like() if params is None else params
  step = step_lib.PrivateStep(
    unread, rules.ClippingRule("flat", 1.0), optimizer
  )
  finish = jax.jit(
    lambda params, state, total, noise: step.finish(
      params,
      state,
      step_lib.Accumulator(total, None),
      noise_key=jax.random.key(0),
      noise_multiplier=1.0,
      expected_batch_size=BATCH,
      unit_noise=(noise, None, None),
    )[:2]
  )
  state = step.init(params)
  for total, noise in zip(sums, noises, strict=True):
    params, state = finish(params, state, total, noise)
  return params, state


def twice(optimizer, like):
  """Two trainings of other sums and the same privatised gradients."""
  draw = np.random.default_rng(1)
  privatised = [eighths(draw, like) for _ in range(STEPS)]
  results = []
  for _ in range(2):
    sums = [eighths(draw, like) for _ in range(STEPS)]
    noises = [
      jax.tree.map(jnp.subtract, p, s)
      for p, s in zip(privatised, sums, strict=True)
    ]
    results.append(trained(optimizer, sums, noises, like))
  return results


@pytest.mark.parametrize("name", NAMES)
def test_the_privatised_gradient_is_all_that_an_optimizer_reads(name):
  results = twice(optimizer_of(name), params_like())
  jax.tree.map(np.testing.assert_array_equal, *results)
  begun = params_like()
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), results[0][0], begun)
  assert moved["layer"]["kernel"]


@pytest.mark.parametrize("learning", ["private", "gradient", "frozen"])
def test_it_is_all_that_codebooks_and_tables_learn_from(learning):
  optimizer = codebook_learning.learn_codebooks(
    optimizer_of("adamw"),
    codebook_settings.CodebookSettings(
      mass_floor=0.5, restart_after=2, row_threshold=0.5
    ),
    learning=learning,
    select_rows=True,
  )
  begun = params_like(ngrammer=True)
  results = twice(optimizer, begun)
  jax.tree.map(np.testing.assert_array_equal, *results)
  for name, moves in (("table_0", True), ("codebook_0", learning != "frozen")):
    before, after = (p["ngrammer"][name] for p in (begun, results[0][0]))
    assert bool((before["embedding"] != after["embedding"]).any()) == moves


def test_an_optimizer_that_reads_the_sum_is_seen():
  """What the test above would see: an optimizer that knows the sums."""
  draw, like = np.random.default_rng(1), params_like()
  privatised = eighths(draw, like)
  results = []
  for _ in range(2):
    total = eighths(draw, like)
    leak = optax.stateless(
      lambda updates, _, total=total: jax.tree.map(
        lambda u, t: u + 1e-3 * t, updates, total
      )
    )
    noise = jax.tree.map(jnp.subtract, privatised, total)
    results.append(trained(leak, [total], [noise])[0])
  one, other = (result["layer"]["kernel"] for result in results)
  assert not np.array_equal(one, other)
