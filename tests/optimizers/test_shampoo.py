import jax
import numpy as np
import numpy_shampoo
import optax
import pytest

from dptrain.optimizers import inverse_roots
from dptrain.optimizers import magnitudes
from dptrain.optimizers import shampoo_blocks

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
  grads = numpy_shampoo.gradients(shapes, 50)
  plain = dict(start=1, interval=1, momentum=0.9, moving_average=True)
  chosen = {"nesterov": False, **plain, **CASES[case]}
  ours = {k: v for k, v in chosen.items() if k not in ("start", "interval")}
  with jax.enable_x64(True):
    found, state = numpy_shampoo.run(
      numpy_shampoo.transform(
        refresh=numpy_shampoo.refresh(
          start=chosen["start"], interval=chosen["interval"]
        ),
        roots=inverse_roots.RootSettings(method, ridge=numpy_shampoo.RIDGE),
        blocking=shampoo_blocks.Blocking(merge_up_to=1),
        **ours,
      ),
      grads,
    )
  assert state.failed_roots == 0
  for name in shapes:
    expected = numpy_shampoo.shampoo([g[name] for g in grads], **chosen)
    for mine, its in zip(found, expected, strict=True):
      gap = np.linalg.norm(mine[name] - its) / np.linalg.norm(its)
      assert gap <= 1e-6


def test_float32_follows_the_reference_too():
  grads = numpy_shampoo.gradients({"w": (6, 4)}, 50)
  chosen = dict(beta2=0.99, momentum=0.9, moving_average=True, nesterov=False)
  found, _ = numpy_shampoo.run(
    numpy_shampoo.transform(graft="adam", **{k: chosen[k] for k in ("beta2",)}),
    grads,
  )
  expected = numpy_shampoo.shampoo(
    [g["w"] for g in grads], **chosen, graft="adam", start=1, interval=1
  )
  for mine, its in zip(found[2:], expected[2:], strict=True):
    np.testing.assert_allclose(mine["w"], its, atol=2e-3 * np.abs(its).max())


def test_parameters_that_are_skipped_follow_the_magnitude():
  grads = numpy_shampoo.gradients({"kernel": (4, 4), "bias": (4,)}, 5)
  found, _ = numpy_shampoo.run(
    numpy_shampoo.transform(graft="adam", momentum=0.0, beta2=0.9), grads
  )
  expected = numpy_shampoo.Magnitude("adam", 0.9, 1e-8)
  for mine, g in zip(found, grads, strict=True):
    np.testing.assert_allclose(mine["bias"], expected(g["bias"]), rtol=1e-4)


# --- blocks -------------------------------------------------------------------


def test_blocks_no_smaller_than_the_dimensions_change_nothing():
  grads = numpy_shampoo.gradients({"w": (6, 4)}, 4)
  with jax.enable_x64(True):
    whole, _ = numpy_shampoo.run(
      numpy_shampoo.transform(blocking=shampoo_blocks.Blocking(6)), grads
    )
    wider, _ = numpy_shampoo.run(
      numpy_shampoo.transform(blocking=shampoo_blocks.Blocking(99)), grads
    )
  for one, other in zip(whole, wider, strict=True):
    np.testing.assert_array_equal(one["w"], other["w"])


def test_each_block_is_a_parameter_of_its_own():
  """Also where blocks are padded: 7 rows make blocks of 4 and 3."""
  grads = numpy_shampoo.gradients({"w": (7, 4)}, 5)
  parts = [{"a": g["w"][:4], "b": g["w"][4:]} for g in grads]
  with jax.enable_x64(True):
    found, _ = numpy_shampoo.run(
      numpy_shampoo.transform(blocking=shampoo_blocks.Blocking(4), graft=None),
      grads,
    )
    apart, _ = numpy_shampoo.run(numpy_shampoo.transform(graft=None), parts)
  for mine, its in zip(found, apart, strict=True):
    whole = np.concatenate([its["a"], its["b"]])
    np.testing.assert_allclose(mine["w"], whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("graft", ["adam", "rmsprop_normalized", "sqrt_n"])
def test_stacked_layers_are_parameters_of_their_own(graft):
  grads = numpy_shampoo.gradients({"a": (5, 3), "b": (5, 3)}, 6)
  for g in grads:
    g["b"] *= 100.0  # a layer of another scale
  stacked = [{"layers": {"kernel": np.stack([g["a"], g["b"]])}} for g in grads]
  with jax.enable_x64(True):
    found, _ = numpy_shampoo.run(numpy_shampoo.transform(graft=graft), stacked)
    apart, _ = numpy_shampoo.run(numpy_shampoo.transform(graft=graft), grads)
  for mine, its in zip(found, apart, strict=True):
    kernel = mine["layers"]["kernel"]
    np.testing.assert_allclose(kernel[0], its["a"], rtol=1e-9)
    np.testing.assert_allclose(kernel[1], its["b"], rtol=1e-9)


# --- grafting -----------------------------------------------------------------


GRAFTED = numpy_shampoo.gradients({"a": (4, 4), "b": (4, 4), "w": (4, 4)}, 3)
GRAFTED = [
  {"w": g["w"], "layers": {"w": np.stack([g["a"], 9 * g["b"]])}}
  for g in GRAFTED
]


@pytest.fixture(scope="module")
def directions():
  with jax.enable_x64(True):
    return numpy_shampoo.run(
      numpy_shampoo.transform(graft=None, momentum=0.0), GRAFTED
    )[0]


@pytest.mark.parametrize("graft", [*magnitudes.NAMES, optax.scale_by_adam()])
def test_length_of_one_direction_of_the_other(graft, directions):
  never = numpy_shampoo.refresh(start=99)
  with jax.enable_x64(True):
    both, _ = numpy_shampoo.run(
      numpy_shampoo.transform(graft=graft, momentum=0.0), GRAFTED
    )
    length, _ = numpy_shampoo.run(
      numpy_shampoo.transform(graft=graft, refresh=never, momentum=0.0),
      GRAFTED,
      jit=False,
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
  grads = [
    {"w": 1e-25 * g["w"]} for g in numpy_shampoo.gradients({"w": (4, 4)}, 3)
  ]
  found, _ = numpy_shampoo.run(
    numpy_shampoo.transform(graft="sgd", momentum=0.0), grads
  )
  for mine, g in zip(found, grads, strict=True):
    assert np.linalg.norm(mine["w"] * 1e25) == pytest.approx(
      np.linalg.norm(g["w"] * 1e25), rel=1e-5
    )
