import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.optimizers import decompositions
from dptrain.optimizers import preconditioner_refresh
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import shampoo_settings
from dptrain.optimizers import shampoo_transform
from dptrain.optimizers import soap_settings
from dptrain.optimizers import soap_transform


def matrices():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 5, 5))
  return jnp.asarray(x @ x.transpose(0, 2, 1) + np.eye(5), jnp.float32)


def test_decompositions_are_numpys():
  a = matrices()
  values, vectors = decompositions.eigh(a)
  np.testing.assert_allclose(values, np.linalg.eigvalsh(a), rtol=1e-4)
  np.testing.assert_allclose(
    vectors * values[:, None] @ vectors.transpose(0, 2, 1), a, atol=1e-4
  )
  np.testing.assert_allclose(
    decompositions.cholesky(a), np.linalg.cholesky(a), atol=1e-4
  )
  np.testing.assert_allclose(
    np.abs(decompositions.orthonormal(a)), np.abs(np.linalg.qr(a)[0]), atol=1e-4
  )


REFRESH = preconditioner_refresh.RefreshSettings(1, 1)
BLOCKING = shampoo_blocks.Blocking(4)
OPTIMIZERS = {
  "shampoo": shampoo_transform.scale_by_shampoo(
    shampoo_settings.ShampooSettings(refresh=REFRESH, blocking=BLOCKING)
  ),
  "soap": soap_transform.scale_by_soap(
    soap_settings.SoapSettings(blocking=BLOCKING)
  ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_batched_lapack_call_on_cpu(name):
  """Two of them at once can wait for each other for ever."""
  optimizer, params = OPTIMIZERS[name], {"w": jnp.zeros((12, 12))}
  state = optimizer.init(params)
  text = jax.jit(optimizer.update).lower(params, state).as_text()
  calls = [line for line in text.splitlines() if "@lapack_" in line]
  assert calls
  for line in calls:
    for shape in re.findall(r"tensor<([\dx]+)xf\d+>", line):
      assert shape in ("4x4", "4"), line
