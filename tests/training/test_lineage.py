"""What names a branch sees all that may change an update."""

import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dptrain.clipping import rules
from dptrain.training import lineage
from dptrain.training import step as step_lib


def digest(table):
  """Of a step whose loss holds a table that no argument carries."""

  def losses(params, batch, keys):
    del keys
    return batch["x"] @ params["w"] + jnp.sum(table @ params["w"]), {}

  step = step_lib.PrivateStep(
    losses, rules.ClippingRule(), optax.sgd(0.1), clipping_method="vmap"
  )
  params = {"w": jnp.ones(8)}
  batch = {
    "x": jnp.ones((4, 8)),
    "is_padding": jnp.zeros(4, bool),
    "example_ids": jnp.zeros(4, jnp.int32),
  }
  return lineage.program_digest(step, params, step.init(params), batch)


def two_digests():
  draw = np.random.default_rng(0)
  return [
    digest(jnp.asarray(draw.normal(size=(4096, 8)), jnp.float32))
    for _ in range(2)
  ]


@pytest.mark.parametrize("hoisted", ["0", "1"])
def test_a_large_constant_is_part_of_the_program(hoisted):
  # A process of its own: jax heeds the setting from its start only.
  program = "import test_lineage; print(*test_lineage.two_digests())"
  told = subprocess.run(
    [sys.executable, "-c", program],
    cwd=pathlib.Path(__file__).parent,
    env=os.environ | {"JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS": hoisted},
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()
  assert len(set(told)) == 2


@pytest.mark.skipif(
  not hasattr(os, "sched_getaffinity"), reason="this system has no affinity"
)
def test_the_processors_that_may_be_used_are_part_of_the_environment(
  monkeypatch,
):
  before = lineage.environment(16)
  assert lineage.environment(16) == before
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(999)))
  assert lineage.environment(16) != before
