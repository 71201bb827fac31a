import jax
import jax.numpy as jnp
import numpy as np
import numpy_shampoo
import optax
import orbax.checkpoint as ocp
import pytest

from dptrain.optimizers import eigenbases
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import soap
from dptrain.optimizers import soap_settings
from dptrain.optimizers import soap_transform


def transform(**changes):
  return soap_transform.scale_by_soap(soap_settings.SoapSettings(**changes))


def run(optimizer, grads, **extra):
  state = optimizer.init(jax.tree.map(jnp.asarray, grads[0]))
  update = jax.jit(optimizer.update)
  found = []
  for g in grads:
    updates, state = update(jax.tree.map(jnp.asarray, g), state, **extra)
    found.append(jax.device_get(updates))
  return found, state


def numpy_soap(grads, b1, b2, decay, start, interval, variance=None, floor=0.1):
  """Dense, in float64; bases as rows of directions here."""
  turn = [np.eye(d) for d in grads[0].shape]
  factors = [np.zeros((d, d)) for d in grads[0].shape]
  m = v = noise = 0.0

  def along(x, matrices):
    for i, matrix in enumerate(matrices):
      x = np.moveaxis(np.tensordot(matrix, x, (1, i)), 0, i)
    return x

  result = []
  for t, g in enumerate(grads, 1):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * along(g, turn) ** 2
    divisor = v
    if variance is not None:
      noise = b2 * noise + (1 - b2) * variance
      divisor = np.maximum(v - noise, floor * noise)
    u = along(m, turn) / (1 - b1**t) / (np.sqrt(divisor / (1 - b2**t)) + 1e-8)
    result.append(along(u, [x.T for x in turn]))
    for i in range(g.ndim):
      rows = np.moveaxis(g, i, 0).reshape(g.shape[i], -1)
      factors[i] = decay * factors[i] + (1 - decay) * rows @ rows.T
    if t >= start and (t - start) % interval == 0:
      before, turn = turn, []
      for old, f in zip(before, factors, strict=True):
        if t == start:
          turn.append(np.linalg.eigh(f)[1].T[::-1])
          continue
        values = np.sum(old @ f * old, axis=1)
        scaled = f / np.max(np.diag(f)) + 1e-6 * np.eye(len(f))
        image = (old @ scaled)[np.argsort(-values)]
        turn.append(np.linalg.qr(image.T)[0].T)
      v = along(v, [(n @ o.T) ** 2 for n, o in zip(turn, before, strict=True)])
  return result


@pytest.mark.parametrize(
  ("shapes", "variance"),
  [
    ({"matrix": (5, 4)}, None),
    ({"matrix": (4, 4)}, 0.3),
    ({"tensor": (3, 4, 2)}, None),
  ],
)
def test_soap_equals_a_dense_numpy_reference_over_50_updates(shapes, variance):
  grads = numpy_shampoo.gradients(shapes, 50)
  with jax.enable_x64(True):
    found, state = run(
      transform(
        b2=0.95,
        factor_decay=0.9,
        start=3,
        interval=4,
        blocking=shampoo_blocks.Blocking(merge_up_to=1),
        correct_noise=variance is not None,
      ),
      grads,
      noise_variance=variance,
    )
  assert state.failed_bases == 0
  for name in shapes:
    expected = numpy_soap(
      [g[name] for g in grads], 0.9, 0.95, 0.9, 3, 4, variance
    )
    for mine, its in zip(found, expected, strict=True):
      gap = np.linalg.norm(mine[name] - its) / np.linalg.norm(its)
      assert gap <= 1e-6


def test_before_its_first_basis_and_for_vectors_soap_is_adam():
  grads = numpy_shampoo.gradients({"kernel": (4, 4), "bias": (4,)}, 12)
  found, _ = run(transform(b2=0.99, start=6, interval=2), grads)
  expected, _ = run(optax.scale_by_adam(b2=0.99), grads)
  for t, (mine, its) in enumerate(zip(found, expected, strict=True), 1):
    np.testing.assert_allclose(mine["bias"], its["bias"], rtol=1e-4)
    same = np.allclose(mine["kernel"], its["kernel"], rtol=1e-4)
    assert same == (t <= 6)


def test_blocks_and_layers_are_parameters_of_their_own():
  grads = numpy_shampoo.gradients({"a": (4, 4), "b": (3, 4)}, 8)
  together = [
    {
      "w": np.concatenate([g["a"], g["b"]]),
      "layers": {"w": np.stack([g["a"], 9 * g["a"]])},
    }
    for g in grads
  ]
  short = {"start": 2, "interval": 2}
  with jax.enable_x64(True):
    apart, _ = run(transform(**short), grads)
    found, _ = run(
      transform(**short, blocking=shampoo_blocks.Blocking(4)), together
    )
  for mine, its in zip(found, apart, strict=True):
    whole = np.concatenate([its["a"], its["b"]])
    np.testing.assert_allclose(mine["w"], whole, rtol=1e-5, atol=1e-6)
    for layer in mine["layers"]["w"]:
      np.testing.assert_allclose(layer, its["a"], rtol=1e-5)


def test_bases_are_those_of_the_factors_and_stay_with_them():
  rng = np.random.default_rng(0)
  start = rng.normal(size=(2, 6, 6)) * np.logspace(0, -1, 6)
  factors = jnp.asarray(start @ start.transpose(0, 2, 1), jnp.float32)
  eye = jnp.tile(jnp.eye(6), (2, 1, 1))
  first = eigenbases.decomposed(factors, eye)
  assert not first.failed.any()
  inside = first.vectors.transpose(0, 2, 1) @ factors @ first.vectors
  diagonal = np.diagonal(inside, axis1=1, axis2=2)
  assert (np.diff(diagonal) <= 0).all()
  np.testing.assert_allclose(
    inside, np.stack([np.diag(d) for d in diagonal]), atol=1e-4
  )
  other = rng.normal(size=(2, 6, 6)) * np.logspace(0, -1, 6)
  moved = jnp.asarray(other @ other.transpose(0, 2, 1), jnp.float32)
  vectors = first.vectors
  follow = jax.jit(eigenbases.followed)
  for _ in range(200):
    vectors = follow(moved, vectors).vectors
  inside = vectors.transpose(0, 2, 1) @ moved @ vectors
  diagonal = np.diagonal(inside, axis1=1, axis2=2)
  assert (np.diff(diagonal) <= 1e-5).all()
  off = inside - np.stack([np.diag(d) for d in diagonal])
  assert np.abs(off).max() < 1e-3 * diagonal.max()


def test_second_moments_follow_a_basis_that_is_only_put_in_another_order():
  old = jnp.asarray(
    np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
  )
  order = jnp.asarray([2, 0, 3, 1])
  found = eigenbases.overlaps(old[None][:, :, order] * -1.0, old[None])[0]
  np.testing.assert_allclose(found, np.eye(4)[order], atol=1e-6)


def test_second_moments_of_independent_coordinates_are_turned_right():
  """Drawn: variances in a new basis are the overlaps times those in the old."""
  rng = np.random.default_rng(0)
  old, new = (np.linalg.qr(rng.normal(size=(5, 5)))[0] for _ in range(2))
  deviations = np.logspace(0, -1, 5)
  x = (rng.normal(size=(100_000, 5)) * deviations) @ old.T
  found = np.asarray(eigenbases.overlaps(new[None], old[None])[0])
  np.testing.assert_allclose(
    found @ deviations**2, np.mean((x @ new) ** 2, axis=0), rtol=0.02
  )


def test_bases_that_fail_stay_and_are_counted():
  old = jnp.tile(jnp.eye(3), (3, 1, 1))
  bad = jnp.stack([jnp.full((3, 3), jnp.nan), jnp.zeros((3, 3)), jnp.eye(3)])
  for function in (eigenbases.decomposed, eigenbases.followed):
    found = function(bad, old)
    np.testing.assert_array_equal(found.failed, [True, False, False])
    np.testing.assert_array_equal(found.vectors[:2], old[:2])
    assert np.isfinite(found.vectors).all()


def test_soap_counts_nan_gradients_and_goes_on():
  grads = numpy_shampoo.gradients({"v": (3, 3), "w": (4, 4)}, 8)
  spoiled = [dict(g) for g in grads]
  spoiled[4]["w"] = np.full((4, 4), np.nan)
  short = {"start": 2, "interval": 2}
  found, state = run(transform(**short), spoiled)
  clean, _ = run(transform(**short), grads)
  assert state.non_finite == 1
  assert state.failed_bases == 0
  for mine, its in zip(found, clean, strict=True):
    np.testing.assert_array_equal(mine["v"], its["v"])
    assert np.isfinite(mine["w"]).all()


def test_rank_deficient_and_tiny_gradients_do_no_harm():
  """One row alone moves, at the scale of a large private batch."""
  row = np.random.default_rng(0).normal(size=(20, 1, 4))
  grads = [{"w": 1e-9 * np.concatenate([r, np.zeros((3, 4))])} for r in row]
  found, state = run(transform(start=2, interval=2, eps=1e-15), grads)
  assert state.failed_bases == 0
  for x in found[5:]:
    assert np.abs(x["w"][0]).max() > 0.05
    assert np.abs(x["w"][1:]).max() < 1e-2


def test_a_saved_soap_goes_on_where_it_was(tmp_path):
  grads = numpy_shampoo.gradients({"w": (4, 4), "b": (3,)}, 8)
  optimizer = transform(start=2, interval=2)
  _, halfway = run(optimizer, grads[:5])
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", halfway)
    checkpointer.wait_until_finished()
    shapes = jax.eval_shape(lambda: halfway)
    restored = checkpointer.restore(tmp_path / "state", shapes)
  update = jax.jit(optimizer.update)
  states = [halfway, restored]
  for g in grads[5:]:
    pair = [update(jax.tree.map(jnp.asarray, g), state) for state in states]
    states = [state for _, state in pair]
    jax.tree.map(np.testing.assert_array_equal, *pair)


def test_bases_cost_nothing_where_none_are_due():
  params = {"w": jnp.zeros((4, 4))}
  optimizer = transform()
  lowered = jax.jit(optimizer.update).lower(params, optimizer.init(params))
  text = lowered.compile().as_text()
  entry = text[text.index("\nENTRY") :]
  for work in ("syevd", "geqrf"):
    assert work in text
    assert work not in entry


def test_weights_decay_apart_from_soap():
  params = {"kernel": jnp.full((3, 3), 2.0), "bias": jnp.full((3,), 2.0)}
  optimizer = soap.soap(optax.constant_schedule(0.1), weight_decay=0.5)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  after = optax.apply_updates(params, updates)
  np.testing.assert_allclose(after["kernel"], 2.0 * 0.95, rtol=1e-6)
  np.testing.assert_array_equal(after["bias"], 2.0)


def test_soap_says_what_it_turns(caplog):
  params = {"w": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
  blocking = shampoo_blocks.Blocking(exponents={7: 1})  # not read
  chosen = soap_settings.SoapSettings(blocking=blocking)
  lines = soap.describe(params, chosen)
  assert lines[1] == "w [4, 3]: 1 block of 4 x 3; 4, 3"
  with caplog.at_level("INFO", "dptrain.optimizers"):
    soap.soap(0.1, chosen).init(params)
  assert lines[1] in caplog.text


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ({"b1": 1.0}, "b1=1.0"),
    ({"b2": 1.0}, "b2=1.0"),
    ({"factor_decay": 0.0}, "factor_decay=0.0"),
    ({"eps": 0.0}, "eps=0.0"),
    ({"noise_floor": 0.0}, "noise_floor=0.0"),
    ({"interval": 0}, "interval=0"),
    ({"start": 0}, "start=0"),
  ],
)
def test_bad_soap_settings_are_refused(bad, message):
  with pytest.raises(ValueError, match=message):
    soap_settings.SoapSettings(**bad)


def test_a_loop_that_does_not_tell_soap_the_noise_is_refused():
  optimizer = transform(correct_noise=True)
  zeros = {"w": jnp.zeros((2, 2))}
  with pytest.raises(ValueError, match="noise_variance"):
    optimizer.update(zeros, optimizer.init(zeros))
