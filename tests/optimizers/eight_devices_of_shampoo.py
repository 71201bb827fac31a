"""Roots on eight devices; `test_shampoo_on_devices.py` runs this file."""

import contextlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from dptrain.optimizers import inverse_roots
from dptrain.optimizers import preconditioner_refresh
from dptrain.optimizers import root_sharing
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import shampoo_settings
from dptrain.optimizers import shampoo_transform
from dptrain.optimizers import soap_settings
from dptrain.optimizers import soap_transform


def mesh():
  return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


def test_there_are_eight():
  assert jax.device_count() == 8


@pytest.mark.parametrize("rows", [1, 7, 8, 20])
def test_every_row_is_computed_once_whatever_their_number(rows):
  x = jnp.arange(rows * 3.0).reshape(rows, 3)
  y = 100 * jnp.arange(rows, dtype=jnp.float32)

  def function(x, y):
    assert x.shape[0] == -(-rows // 8)  # a share
    return x + y[:, None], y > 300

  found, flags = jax.jit(
    lambda x, y: root_sharing.shared(function, mesh(), x, y)
  )(x, y)
  np.testing.assert_array_equal(found, x + y[:, None])
  np.testing.assert_array_equal(flags, y > 300)


PARAMS = {
  "w": jnp.zeros((40, 4)),  # ten blocks of 4 x 4, so 20 factors
  "v": jnp.zeros((4, 12)),  # three more, 6 factors
}


def optimizer(method="eigh", delay=0, on=None):
  return shampoo_transform.scale_by_shampoo(
    shampoo_settings.ShampooSettings(
      refresh=preconditioner_refresh.RefreshSettings(1, 2, delay),
      blocking=shampoo_blocks.Blocking(4),
      roots=inverse_roots.RootSettings(method),
      mesh=on,
    )
  )


def program(made, ambient=None, placed=False):
  replicated = NamedSharding(mesh(), PartitionSpec())
  shardings = {"in_shardings": replicated, "out_shardings": replicated}
  update = jax.jit(
    lambda g, state: made.update(g, state), **(shardings if placed else {})
  )
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  with ambient or contextlib.nullcontext():
    return update.lower(grads, made.init(PARAMS)).compile()


def multiplied(text):
  """How many matrices there are in a product in float64: in root or check."""
  return {
    int(n)
    for line in text.splitlines()
    if " dot(" in line
    for n in re.findall(r"f64\[(\d+),4,4\]", line)
  }


def after(compiled, made, steps=4):
  state = made.init(PARAMS)
  rng = np.random.default_rng(0)
  for _ in range(steps):
    grads = {
      name: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
      for name, x in PARAMS.items()
    }
    found, state = compiled(
      *jax.device_put((grads, state), compiled.input_shardings[0])
    )
  return jax.device_get((found, state))


@pytest.mark.parametrize(
  ("how", "method", "delay", "share"),
  [
    ("argument", "eigh", 0, 4),
    ("argument", "newton", 0, 4),
    ("argument", "eigh", 2, 2),
    ("ambient", "eigh", 0, 4),
  ],
)
def test_each_device_computes_its_share_and_the_result_is_the_same(
  how, method, delay, share
):
  """26 factors: 4 on each of 8 devices; of the 13 of half a refresh, 2."""
  alone = optimizer(method, delay)
  if how == "argument":
    made = optimizer(method, delay, mesh())
    compiled = program(made, placed=True)
  else:
    made = alone
    ambient = jax.sharding.use_abstract_mesh(mesh().abstract_mesh)
    compiled = program(made, ambient, placed=True)
  text = compiled.as_text()
  assert ("lapack_dsyevd" in text) == (method == "eigh")
  assert multiplied(text) == {share}
  gathers = re.findall(r"= f32\[(\d+),4,4\]\S* all-gather\(", text)
  assert gathers == [str(8 * share)]  # once
  expected = after(program(alone), alone)
  for one, other in zip(
    jax.tree.leaves(after(compiled, made)),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_bases_of_soap_are_shared_too():
  def made(on):
    settings = soap_settings.SoapSettings(
      start=1, interval=1, blocking=shampoo_blocks.Blocking(4), mesh=on
    )
    return soap_transform.scale_by_soap(settings)

  compiled = program(made(mesh()), placed=True)
  text = compiled.as_text()
  assert re.findall(r"f32\[(\d+),4,4\]\S* all-gather\(", text) == ["32"] * 2
  assert not re.search(r"f32\[26,4,4\]\S* while\(", text)
  for one, other in zip(
    jax.tree.leaves(after(compiled, made(mesh()))),
    jax.tree.leaves(after(program(made(None)), made(None))),
    strict=True,
  ):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_without_a_mesh_every_device_computes_all():
  """What sharing is for."""
  assert multiplied(program(optimizer(), placed=True).as_text()) == {26}


def test_inside_a_shard_map_nothing_is_shared_again():
  x = jnp.arange(8.0)
  shares = []

  def function(x):
    shares.append(x.shape)
    return 2 * x

  found = jax.jit(
    jax.shard_map(
      lambda x: root_sharing.shared(function, None, x),
      mesh=mesh(),
      in_specs=PartitionSpec(),
      out_specs=PartitionSpec(),
      check_vma=False,
    )
  )(x)
  np.testing.assert_array_equal(found, 2 * x)
  assert shares == [(8,)]
