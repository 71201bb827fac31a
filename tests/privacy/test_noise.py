import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dptrain.privacy import keys
from dptrain.privacy.noise import gaussian_like

SEED = keys.fixed_seed(0)
KEY = SEED.key("noise", "b", 0)
TREE = {
  "a": jnp.zeros((200, 150)),
  "b": {"kernel": jnp.zeros((200, 150)), "bias": jnp.zeros(30_000)},
}


def flat(tree):
  return [
    np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)
  ]


@pytest.mark.parametrize("stddev", [1.0, 0.01, 250.0])
def test_noise_has_the_asked_deviation_and_is_normal(stddev):
  values = np.concatenate(flat(gaussian_like(KEY, TREE, stddev)))
  n = len(values)
  assert abs(values.mean()) < 4 * stddev / n**0.5
  # The sample variance of n normal draws deviates by sqrt(2 / n).
  assert abs(values.var() / stddev**2 - 1) < 4 * (2 / n) ** 0.5
  assert stats.kstest(values / stddev, "norm").pvalue > 1e-3
  assert np.abs(values / stddev).max() < 6


def test_a_traced_deviation_gives_the_same_noise():
  traced = jax.jit(lambda s: gaussian_like(KEY, TREE, s))(jnp.float32(2.5))
  for a, b in zip(
    flat(traced), flat(gaussian_like(KEY, TREE, 2.5)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_leaves_get_independent_noise():
  leaves = flat(gaussian_like(KEY, TREE, 1.0))
  for i in range(3):
    for j in range(i):
      correlation = np.corrcoef(leaves[i], leaves[j])[0, 1]
      assert abs(correlation) < 4 / len(leaves[i]) ** 0.5
      # Nor does one leaf's noise hold another's values in another order.
      assert np.intersect1d(leaves[i], leaves[j]).size < 200


def test_the_noise_is_not_that_of_the_bare_key():
  # Whoever draws from the key itself must not get a leaf's noise.
  bare = np.asarray(jax.random.normal(KEY, (200, 150))).ravel()
  for leaf in flat(gaussian_like(KEY, TREE, 1.0)):
    assert abs(np.corrcoef(leaf, bare)[0, 1]) < 4 / len(bare) ** 0.5


def test_a_key_decides_the_noise():
  again = [flat(gaussian_like(KEY, TREE, 1.0)) for _ in range(2)]
  np.testing.assert_array_equal(*again)
  other = flat(gaussian_like(SEED.key("noise", "b", 1), TREE, 1.0))
  for a, b in zip(again[0], other, strict=True):
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / len(a) ** 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32"])
def test_noise_is_float32_whatever_the_leaves_are(dtype):
  tree = [jnp.ones((3, 5), dtype), jnp.ones((), dtype)]
  noise = gaussian_like(KEY, tree, 1.0)
  assert [leaf.dtype for leaf in noise] == [jnp.float32] * 2
  assert [leaf.shape for leaf in noise] == [(3, 5), ()]
  wide = gaussian_like(KEY, [x.astype("float32") for x in tree], 1.0)
  for a, b in zip(noise, wide, strict=True):
    np.testing.assert_array_equal(a, b)


def test_shapes_are_enough():
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
  noise = gaussian_like(KEY, shapes, 1.0)
  assert jax.tree.structure(noise) == jax.tree.structure(TREE)
  for a, b in zip(
    flat(noise), flat(gaussian_like(KEY, TREE, 1.0)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


_SHARDED = """
import jax, numpy as np
from dptrain.privacy import keys, noise
assert jax.device_count() == 8
key = keys.fixed_seed(0).key("noise", "b", 0)
tree = {"a": jax.ShapeDtypeStruct((64, 24), "float32"),
        "b": jax.ShapeDtypeStruct((16,), "bfloat16")}
mesh = jax.make_mesh((4, 2), ("x", "y"))
spec = jax.sharding.PartitionSpec
def draw(*specs):
  named = [jax.sharding.NamedSharding(mesh, s) for s in specs]
  out = jax.jit(lambda k: noise.gaussian_like(k, tree, 0.5),
                out_shardings={"a": named[0], "b": named[1]})(key)
  assert out["a"].sharding.is_equivalent_to(named[0], 2)
  return jax.device_get(out)
here = jax.device_get(noise.gaussian_like(key, tree, 0.5))
for specs in [(spec(), spec()), (spec("x"), spec("y")),
              (spec("y", "x"), spec(("x", "y")))]:
  for name, value in draw(*specs).items():
    np.testing.assert_allclose(value, here[name], rtol=1e-6, atol=1e-7)
print("same on 8 devices")
"""


def test_noise_does_not_depend_on_sharding():
  flags = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", _SHARDED],
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert "same on 8 devices" in done.stdout, done.stderr
