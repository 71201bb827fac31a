import logging

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from dptrain.optimizers import inverse_roots
from dptrain.optimizers import magnitudes
from dptrain.optimizers import preconditioner_refresh
from dptrain.optimizers import shampoo
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import shampoo_settings
from dptrain.optimizers import shampoo_transform

RIDGE = 1e-6


def refresh(**changes):
  return preconditioner_refresh.RefreshSettings(
    **{"start": 1, "interval": 1, **changes}
  )


def settings(**changes):
  return shampoo_settings.ShampooSettings(**{"refresh": refresh(), **changes})


def transform(**changes):
  return shampoo_transform.scale_by_shampoo(settings(**changes))


def gradients(shapes, steps, seed=0):
  """Correlated along every dimension, as gradients of layers are."""
  rng = np.random.default_rng(seed)
  result = []
  mixes = {
    name: [rng.normal(size=(d, d)) / np.sqrt(d) for d in shape]
    for name, shape in shapes.items()
  }
  for _ in range(steps):
    tree = {}
    for name, shape in shapes.items():
      g = rng.normal(size=shape)
      for axis, mix in enumerate(mixes[name]):
        g = np.moveaxis(np.tensordot(mix, g, (1, axis)), 0, axis)
      tree[name] = g
    result.append(tree)
  return result


def run(optimizer, grads, params=None, jit=True, **extra):
  """Updates [steps] and the last state."""
  if params is None:
    params = jax.tree.map(jnp.zeros_like, jax.tree.map(jnp.asarray, grads[0]))
  state = optimizer.init(params)
  update = jax.jit(optimizer.update) if jit else optimizer.update
  found = []
  for g in grads:
    updates, state = update(
      jax.tree.map(jnp.asarray, g), state, params, **extra
    )
    found.append(jax.device_get(updates))
  return found, state


# --- the reference: dense, in numpy -------------------------------------------


def numpy_root(a, p):
  values, vectors = np.linalg.eigh(a)
  values = np.maximum(values, 0) + RIDGE * values[-1]
  return (vectors * values ** (-1 / p)) @ vectors.T


class NumpyMagnitude:
  def __init__(self, name, b2, eps):
    self.name, self.b2, self.eps, self.v, self.t = name, b2, eps, 0.0, 0

  def __call__(self, g):
    self.t += 1
    if self.name.endswith("_normalized"):
      g = g / np.linalg.norm(g)
    kind = self.name.removesuffix("_normalized")
    if kind == "sgd":
      return g
    if kind == "sqrt_n":
      return np.sign(g)
    if kind == "adagrad":
      self.v = self.v + g * g
      return g / (np.sqrt(self.v) + self.eps)
    self.v = self.b2 * self.v + (1 - self.b2) * g * g
    v = self.v / (1 - self.b2**self.t) if kind == "adam" else self.v
    return g / (np.sqrt(v) + self.eps)


def numpy_shampoo(
  grads, beta2, momentum, moving_average, nesterov, graft, start, interval
):
  """Updates of one array of any rank."""
  factors = [np.zeros((d, d)) for d in grads[0].shape]
  roots = [np.eye(d) for d in grads[0].shape]
  magnitude = NumpyMagnitude(
    graft or "sgd", beta2 if beta2 < 1 else 0.999, 1e-8
  )
  m, result = 0.0, []
  for t, g in enumerate(grads, 1):
    for i in range(g.ndim):
      rows = np.moveaxis(g, i, 0).reshape(g.shape[i], -1)
      weight = 1 - beta2 if beta2 < 1 else 1
      factors[i] = beta2 * factors[i] + weight * rows @ rows.T
    if t >= start and (t - start) % interval == 0:
      bias = 1 - beta2**t if beta2 < 1 else 1
      roots = [numpy_root(f / bias, 2 * g.ndim) for f in factors]
    u = wanted = magnitude(g)
    if t >= start:
      u = g
      for i, root in enumerate(roots):
        u = np.moveaxis(np.tensordot(root, u, (1, i)), 0, i)
      if graft:
        u = u * np.linalg.norm(wanted) / np.linalg.norm(u)
    weight = 1 - momentum if moving_average else 1
    m = momentum * m + weight * u
    out = m
    if moving_average:
      out = m / (1 - momentum**t)
      if nesterov:
        out = momentum * m / (1 - momentum ** (t + 1)) + weight * u / (
          1 - momentum**t
        )
    elif nesterov:
      out = momentum * m + u
    result.append(out)
  return result


CASES = {
  "paper": dict(beta2=1.0, momentum=0.9, moving_average=False, graft="adagrad"),
  "default": dict(beta2=0.99, momentum=0.9, graft="adam"),
  "nesterov": dict(beta2=0.9, nesterov=True, graft="rmsprop_normalized"),
  "sums": dict(beta2=0.95, moving_average=False, nesterov=True, graft="sgd"),
  "bare": dict(beta2=0.95, momentum=0.0, graft=None),
  "signs": dict(beta2=1.0, momentum=0.5, graft="sqrt_n"),
  "late": dict(beta2=0.97, graft="adagrad_normalized", start=7, interval=5),
  "rms": dict(beta2=0.9, graft="rmsprop", start=3, interval=2),
}


@pytest.mark.parametrize(
  ("case", "method", "shapes"),
  [(case, "eigh", {"matrix": (5, 4)}) for case in CASES]
  + [
    ("default", "newton", {"matrix": (5, 4)}),
    ("paper", "newton", {"matrix": (5, 4)}),
    ("default", "eigh", {"tensor": (3, 4, 2), "cube": (3, 3, 3)}),
  ],
)
def test_equals_a_dense_numpy_reference_over_50_updates(case, method, shapes):
  grads = gradients(shapes, 50)
  plain = dict(start=1, interval=1, momentum=0.9, moving_average=True)
  chosen = {"nesterov": False, **plain, **CASES[case]}
  ours = {k: v for k, v in chosen.items() if k not in ("start", "interval")}
  with jax.enable_x64(True):
    found, state = run(
      transform(
        refresh=refresh(start=chosen["start"], interval=chosen["interval"]),
        roots=inverse_roots.RootSettings(method, ridge=RIDGE),
        blocking=shampoo_blocks.Blocking(merge_up_to=1),
        **ours,
      ),
      grads,
    )
  assert state.failed_roots == 0
  for name in shapes:
    expected = numpy_shampoo([g[name] for g in grads], **chosen)
    for mine, its in zip(found, expected, strict=True):
      gap = np.linalg.norm(mine[name] - its) / np.linalg.norm(its)
      assert gap <= 1e-6


def test_float32_follows_the_reference_too():
  grads = gradients({"w": (6, 4)}, 50)
  chosen = dict(beta2=0.99, momentum=0.9, moving_average=True, nesterov=False)
  found, _ = run(
    transform(graft="adam", **{k: chosen[k] for k in ("beta2",)}), grads
  )
  expected = numpy_shampoo(
    [g["w"] for g in grads], **chosen, graft="adam", start=1, interval=1
  )
  for mine, its in zip(found[2:], expected[2:], strict=True):
    np.testing.assert_allclose(mine["w"], its, atol=2e-3 * np.abs(its).max())


def test_parameters_that_are_skipped_follow_the_magnitude():
  grads = gradients({"kernel": (4, 4), "bias": (4,)}, 5)
  found, _ = run(transform(graft="adam", momentum=0.0, beta2=0.9), grads)
  expected = NumpyMagnitude("adam", 0.9, 1e-8)
  for mine, g in zip(found, grads, strict=True):
    np.testing.assert_allclose(mine["bias"], expected(g["bias"]), rtol=1e-4)


# --- blocks -------------------------------------------------------------------


def test_blocks_no_smaller_than_the_dimensions_change_nothing():
  grads = gradients({"w": (6, 4)}, 4)
  with jax.enable_x64(True):
    whole, _ = run(transform(blocking=shampoo_blocks.Blocking(6)), grads)
    wider, _ = run(transform(blocking=shampoo_blocks.Blocking(99)), grads)
  for one, other in zip(whole, wider, strict=True):
    np.testing.assert_array_equal(one["w"], other["w"])


def test_each_block_is_a_parameter_of_its_own():
  """Also where blocks are padded: 7 rows make blocks of 4 and 3."""
  grads = gradients({"w": (7, 4)}, 5)
  parts = [{"a": g["w"][:4], "b": g["w"][4:]} for g in grads]
  with jax.enable_x64(True):
    found, _ = run(
      transform(blocking=shampoo_blocks.Blocking(4), graft=None), grads
    )
    apart, _ = run(transform(graft=None), parts)
  for mine, its in zip(found, apart, strict=True):
    whole = np.concatenate([its["a"], its["b"]])
    np.testing.assert_allclose(mine["w"], whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("graft", ["adam", "rmsprop_normalized", "sqrt_n"])
def test_stacked_layers_are_parameters_of_their_own(graft):
  grads = gradients({"a": (5, 3), "b": (5, 3)}, 6)
  for g in grads:
    g["b"] *= 100.0  # a layer of another scale
  stacked = [{"layers": {"kernel": np.stack([g["a"], g["b"]])}} for g in grads]
  with jax.enable_x64(True):
    found, _ = run(transform(graft=graft), stacked)
    apart, _ = run(transform(graft=graft), grads)
  for mine, its in zip(found, apart, strict=True):
    kernel = mine["layers"]["kernel"]
    np.testing.assert_allclose(kernel[0], its["a"], rtol=1e-9)
    np.testing.assert_allclose(kernel[1], its["b"], rtol=1e-9)


# --- grafting -----------------------------------------------------------------


GRAFTED = gradients({"a": (4, 4), "b": (4, 4), "w": (4, 4)}, 3)
GRAFTED = [
  {"w": g["w"], "layers": {"w": np.stack([g["a"], 9 * g["b"]])}}
  for g in GRAFTED
]


@pytest.fixture(scope="module")
def directions():
  with jax.enable_x64(True):
    return run(transform(graft=None, momentum=0.0), GRAFTED)[0]


@pytest.mark.parametrize("graft", [*magnitudes.NAMES, optax.scale_by_adam()])
def test_length_of_one_direction_of_the_other(graft, directions):
  never = refresh(start=99)
  with jax.enable_x64(True):
    both, _ = run(transform(graft=graft, momentum=0.0), GRAFTED)
    length, _ = run(
      transform(graft=graft, refresh=never, momentum=0.0), GRAFTED, jit=False
    )
  for mine, direction, magnitude in zip(both, directions, length, strict=True):
    pairs = [(mine["w"], direction["w"], magnitude["w"])]
    layers = [x["layers"]["w"] for x in (mine, direction, magnitude)]
    pairs += list(zip(*layers, strict=True))
    for x, d, m in pairs:
      assert np.linalg.norm(x) == pytest.approx(np.linalg.norm(m), rel=1e-9)
      np.testing.assert_allclose(
        x / np.linalg.norm(x), d / np.linalg.norm(d), rtol=1e-9, atol=1e-12
      )


def test_tiny_gradients_have_a_length():
  """Squares of 1e-25 vanish in float32; DP gradients can be small."""
  grads = [{"w": 1e-25 * g["w"]} for g in gradients({"w": (4, 4)}, 3)]
  found, _ = run(transform(graft="sgd", momentum=0.0), grads)
  for mine, g in zip(found, grads, strict=True):
    assert np.linalg.norm(mine["w"] * 1e25) == pytest.approx(
      np.linalg.norm(g["w"] * 1e25), rel=1e-5
    )


# --- when ---------------------------------------------------------------------


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
      ready[t + delay] = [numpy_root(f / bias, 4) for f in factors]
    roots = ready.get(t, roots)
    result.append(g if roots is None else roots[0] @ g @ roots[1])
  return result


@pytest.mark.parametrize(
  ("interval", "delay"), [(1, 1), (4, 1), (4, 3), (5, 5), (6, 4), (3, 0)]
)
def test_late_roots_are_those_of_the_update_they_were_begun_at(interval, delay):
  grads = gradients({"a": (4, 4), "b": (4, 4), "c": (4, 3), "d": (8, 4)}, 18)
  with jax.enable_x64(True):
    found, state = run(
      transform(
        refresh=refresh(start=3, interval=interval, delay=delay),
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
  optimizer = transform(
    refresh=refresh(interval=4, delay=4),
    blocking=shampoo_blocks.Blocking(4),
    roots=inverse_roots.RootSettings("eigh"),
  )
  state = optimizer.init(params)
  text = jax.jit(optimizer.update).lower(params, state, params).as_text()
  products = [x for x in text.splitlines() if "dot_general" in x and "f64" in x]
  assert products
  assert all("tensor<3x4x4xf64>" in x for x in products)


def test_statistics_every_other_update():
  grads = gradients({"w": (4, 3)}, 8)
  with jax.enable_x64(True):
    found, state = run(
      transform(
        refresh=refresh(start=4, interval=2, statistics_interval=2),
        momentum=0.0,
        graft=None,
        beta2=1.0,
      ),
      grads,
    )
  assert state.factor_count == 4
  g = [x["w"] for x in grads]
  left = numpy_root(sum(x @ x.T for x in g[1::2]), 4)
  right = numpy_root(sum(x.T @ x for x in g[1::2]), 4)
  np.testing.assert_allclose(found[7]["w"], left @ g[7] @ right, rtol=1e-6)


def test_roots_cost_nothing_where_none_are_due():
  params = {"w": jnp.zeros((4, 4))}
  optimizer = transform(refresh=refresh(interval=10))
  state = optimizer.init(params)
  text = (
    jax.jit(optimizer.update).lower(params, state, params).compile().as_text()
  )
  entry = text[text.index("\nENTRY") :]
  assert "syevd" in text
  assert "syevd" not in entry
  assert "conditional" in entry


# --- what goes wrong ----------------------------------------------------------


def test_a_failed_root_keeps_the_old_one_and_is_counted():
  grads = gradients({"w": (4, 4)}, 1)
  strict = transform(roots=inverse_roots.RootSettings(max_error=1e-30))
  _, state = run(strict, grads * 3)
  assert state.failed_roots == 6
  for root in state.roots.values():
    np.testing.assert_array_equal(root, np.stack([np.eye(4)] * 2))


def test_nan_gradients_are_counted_and_training_goes_on():
  grads = gradients({"v": (3, 3), "w": (4, 4)}, 4)
  spoiled = [dict(g) for g in grads]
  spoiled[1]["w"] = np.where(np.eye(4) > 0, np.nan, grads[1]["w"])
  found, state = run(transform(momentum=0.0), spoiled)
  clean, _ = run(transform(momentum=0.0), grads)
  assert state.non_finite == 1
  assert state.failed_roots == 0
  np.testing.assert_array_equal(found[1]["w"], 0.0)
  for mine, its in zip(found, clean, strict=True):
    np.testing.assert_array_equal(mine["v"], its["v"])
    assert np.isfinite(mine["w"]).all()
  assert np.linalg.norm(found[3]["w"]) > 0


def test_overflowing_factors_are_counted_and_stay():
  grads = gradients({"w": (4, 4)}, 3)
  grads[1]["w"] = grads[1]["w"] * 1e30  # finite, its square not
  found, state = run(transform(graft="sgd", momentum=0.0), grads)
  assert state.non_finite == 2
  for x in jax.tree.leaves((found, state)):
    assert np.isfinite(np.asarray(x, np.float32)).all()


def test_parameters_without_gradient_do_not_move_nor_fail():
  grads = [{"w": np.zeros((4, 4))}] * 3
  found, state = run(transform(), grads)
  assert state.failed_roots == 0
  for x in found:
    np.testing.assert_array_equal(x["w"], 0.0)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: shampoo_blocks.Blocking(block_size=0), "block_size=0"),
    (lambda: shampoo_blocks.Blocking(merge_up_to=0), "merge_up_to=0"),
    (lambda: shampoo_blocks.Blocking(max_dim=2.5), "max_dim=2.5"),
    (lambda: shampoo_blocks.Blocking(min_rank=0), "min_rank=0"),
    (lambda: shampoo_blocks.Blocking(sides="left"), "sides='left'"),
    (lambda: shampoo_blocks.Blocking(long_dims="cut"), "long_dims='cut'"),
    (lambda: shampoo_blocks.Blocking(skip_names="bias"), "a list of strings"),
    (lambda: shampoo_blocks.Blocking(exponents=0), "exponents=0"),
    (lambda: shampoo_blocks.Blocking(exponents={2: 17}), "exponents=17"),
    (lambda: refresh(interval=0), "interval=0"),
    (lambda: refresh(start=0), "start=0"),
    (lambda: refresh(statistics_interval=0), "statistics_interval=0"),
    (lambda: refresh(delay=-1), "delay=-1"),
    (lambda: refresh(delay=2), "delay=2 exceeds interval=1"),
    (lambda: refresh(statistics_interval=2), "start=1 comes before"),
    (lambda: settings(momentum=1.0), "momentum=1.0"),
    (lambda: settings(beta2=0.0), "beta2=0.0"),
    (lambda: settings(beta2=1.5), "beta2=1.5"),
    (lambda: settings(eps=0.0), "eps=0.0"),
    (lambda: settings(graft="lion"), "graft='lion'"),
    (lambda: settings(momentum=0.0, nesterov=True), "nesterov=True"),
    (lambda: settings(statistics_bits=8), "statistics_bits=8"),
    (lambda: settings(root_bits=4), "root_bits=4"),
    (
      lambda: settings(
        subtract_noise=True, roots=inverse_roots.RootSettings("newton")
      ),
      "subtract_noise=True",
    ),
    (lambda: shampoo.shampoo(0.0), "learning_rate=0.0"),
    (lambda: shampoo.shampoo(0.1, weight_decay=20.0), "weight_decay=20.0"),
  ],
)
def test_bad_shampoo_settings_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_exponents_that_do_not_serve_a_rank_are_refused():
  blocking = shampoo_blocks.Blocking(merge_up_to=1, exponents={2: 4})
  optimizer = transform(blocking=blocking)
  optimizer.init({"matrix": jnp.zeros((2, 3))})
  with pytest.raises(ValueError, match=r"no entry for 3.*tensor"):
    optimizer.init({"tensor": jnp.zeros((2, 3, 4))})


# --- state --------------------------------------------------------------------


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"refresh": refresh(interval=3, delay=2)},
    {"statistics_bits": 16, "root_bits": 8, "momentum": 0.0},
  ],
  ids=["plain", "late", "packed"],
)
def test_a_saved_state_goes_on_where_it_was(tmp_path, changes):
  grads = gradients({"w": (4, 4), "b": (3,)}, 8)
  optimizer = transform(**changes)
  _, halfway = run(optimizer, grads[:5])
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", halfway)
    checkpointer.wait_until_finished()
    shapes = jax.eval_shape(lambda: halfway)
    restored = checkpointer.restore(tmp_path / "state", shapes)
  assert jax.tree.structure(restored) == jax.tree.structure(halfway)
  update = jax.jit(optimizer.update)
  states = [halfway, restored]
  for g in grads[5:]:
    g = jax.tree.map(jnp.asarray, g)
    pair = [update(g, state) for state in states]
    states = [state for _, state in pair]
    jax.tree.map(np.testing.assert_array_equal, *pair)


def test_frozen_dicts_and_bare_arrays_are_parameters():
  grads = gradients({"w": (4, 4)}, 3)
  plain, _ = run(transform(), grads)
  frozen, _ = run(transform(), [flax.core.freeze(g) for g in grads])
  bare, _ = run(transform(), [g["w"] for g in grads])
  np.testing.assert_array_equal(plain[-1]["w"], frozen[-1]["w"])
  np.testing.assert_array_equal(plain[-1]["w"], bare[-1])


def test_quantised_states_lose_what_was_measured():
  """Of a step's direction; the loss on a model is not measured."""
  grads = gradients({"w": (32, 32)}, 30)
  late = refresh(interval=5, delay=3)
  exact, _ = run(transform(refresh=late), grads)

  def angle(**bits):
    found, state = run(transform(refresh=late, **bits), grads)
    assert state.failed_roots == 0
    x, y = found[-1]["w"], exact[-1]["w"]
    return 1 - np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y))

  assert angle(root_bits=16) < 1e-6
  assert angle(root_bits=8) < 1e-2
  assert angle(statistics_bits=16) < 1e-3


# --- the whole optimizer ------------------------------------------------------


def test_says_at_start_up_what_is_preconditioned(caplog):
  params = {"w": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
  optimizer = shampoo.shampoo(0.1)
  with caplog.at_level(logging.INFO, "dptrain.optimizers"):
    optimizer.init(params)
    optimizer.init(params)
  assert len(caplog.records) == 1
  for line in shampoo.describe(params):
    assert line in caplog.text
  with caplog.at_level(logging.WARNING, "dptrain.optimizers"):
    shampoo.shampoo(0.1).init({"bias": jnp.zeros(3)})
  assert "preconditions nothing" in caplog.text


def test_weights_decay_apart_from_preconditioning():
  params = {"kernel": jnp.full((3, 3), 2.0), "bias": jnp.full((3,), 2.0)}
  optimizer = shampoo.shampoo(optax.constant_schedule(0.1), weight_decay=0.5)
  state = optimizer.init(params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, state, params)
  after = optax.apply_updates(params, updates)
  np.testing.assert_allclose(after["kernel"], 2.0 * 0.95, rtol=1e-6)
  np.testing.assert_array_equal(after["bias"], 2.0)


def test_an_ill_conditioned_problem_is_solved_where_adam_is_not():
  """A quadratic of condition 1e6 in rows and columns."""
  rng = np.random.default_rng(0)
  left, right = (
    np.linalg.qr(rng.normal(size=(8, 8)))[0] * np.logspace(0, -1.5, 8)
    for _ in range(2)
  )
  left, right = jnp.asarray(left.T), jnp.asarray(right)
  target = jnp.asarray(rng.normal(size=(8, 8)))

  def loss(w):
    return jnp.sum((left @ (w - target) @ right) ** 2)

  def after(optimizer):
    w = jnp.zeros((8, 8))
    state = optimizer.init(w)

    @jax.jit
    def step(w, state):
      updates, state = optimizer.update(jax.grad(loss)(w), state, w)
      return optax.apply_updates(w, updates), state

    for _ in range(150):
      w, state = step(w, state)
    return float(loss(w)) / float(loss(jnp.zeros((8, 8))))

  schedule = optax.linear_schedule(0.1, 0.0, 150)
  mine = after(shampoo.shampoo(schedule, settings(beta2=0.95), 0.0))
  assert mine < 0.5 * after(optax.adam(schedule))
