import jax
import jax.numpy as jnp
import numpy as np
import numpy_shampoo
import pytest

from dptrain.optimizers import inverse_roots
from dptrain.optimizers import shampoo_blocks


def numpy_late(grads, start, interval, delay):
  """Directions of an array whose roots are used `delay` updates late."""
  beta2, result, ready = 0.9, [], {}
  factors, roots = [np.zeros((d, d)) for d in grads[0].shape], None
  for t, g in enumerate(grads, 1):
    factors = [
      beta2 * factors[0] + (1 - beta2) * g @ g.T,
      beta2 * factors[1] + (1 - beta2) * g.T @ g,
    ]
    if t >= start and (t - start) % interval == 0:
      bias = 1 - beta2**t
      ready[t + delay] = [
        numpy_shampoo.inverse_root(f / bias, 4) for f in factors
      ]
    roots = ready.get(t, roots)
    result.append(g if roots is None else roots[0] @ g @ roots[1])
  return result


@pytest.mark.parametrize(
  ("interval", "delay"), [(1, 1), (4, 1), (4, 3), (5, 5), (6, 4), (3, 0)]
)
def test_late_roots_are_those_of_the_update_they_were_begun_at(interval, delay):
  grads = numpy_shampoo.gradients(
    {"a": (4, 4), "b": (4, 4), "c": (4, 3), "d": (8, 4)}, 18
  )
  with jax.enable_x64(True):
    found, state = numpy_shampoo.run(
      numpy_shampoo.transform(
        refresh=numpy_shampoo.refresh(start=3, interval=interval, delay=delay),
        graft=None,
        momentum=0.0,
        beta2=0.9,
        blocking=shampoo_blocks.Blocking(4),
      ),
      grads,
    )
  assert (state.late is None) == (delay == 0)
  expected = {
    name: numpy_late([g[name] for g in grads], 3, interval, delay)
    for name in "abc"
  }
  for part in (0, 4):
    expected[part] = numpy_late(
      [g["d"][part : part + 4] for g in grads], 3, interval, delay
    )
  for t, mine in enumerate(found):
    for name in "abc":
      np.testing.assert_allclose(mine[name], expected[name][t], rtol=1e-6)
    d = np.concatenate([expected[0][t], expected[4][t]])
    np.testing.assert_allclose(mine["d"], d, rtol=1e-6)


def test_a_late_share_is_a_share_of_the_work():
  """Of 12 factors over 4 updates, the program computes 3 at a time."""
  params = {"w": jnp.zeros((24, 4))}
  optimizer = numpy_shampoo.transform(
    refresh=numpy_shampoo.refresh(interval=4, delay=4),
    blocking=shampoo_blocks.Blocking(4),
    roots=inverse_roots.RootSettings("eigh"),
  )
  state = optimizer.init(params)
  text = jax.jit(optimizer.update).lower(params, state, params).as_text()
  products = [x for x in text.splitlines() if "dot_general" in x and "f64" in x]
  assert products
  assert all("tensor<3x4x4xf64>" in x for x in products)


def test_statistics_every_other_update():
  grads = numpy_shampoo.gradients({"w": (4, 3)}, 8)
  with jax.enable_x64(True):
    found, state = numpy_shampoo.run(
      numpy_shampoo.transform(
        refresh=numpy_shampoo.refresh(
          start=4, interval=2, statistics_interval=2
        ),
        momentum=0.0,
        graft=None,
        beta2=1.0,
      ),
      grads,
    )
  assert state.factor_count == 4
  g = [x["w"] for x in grads]
  left = numpy_shampoo.inverse_root(sum(x @ x.T for x in g[1::2]), 4)
  right = numpy_shampoo.inverse_root(sum(x.T @ x for x in g[1::2]), 4)
  np.testing.assert_allclose(found[7]["w"], left @ g[7] @ right, rtol=1e-6)


def test_roots_cost_nothing_where_none_are_due():
  params = {"w": jnp.zeros((4, 4))}
  optimizer = numpy_shampoo.transform(
    refresh=numpy_shampoo.refresh(interval=10)
  )
  state = optimizer.init(params)
  text = (
    jax.jit(optimizer.update).lower(params, state, params).compile().as_text()
  )
  entry = text[text.index("\nENTRY") :]
  assert "syevd" in text
  assert "syevd" not in entry
  assert "conditional" in entry
