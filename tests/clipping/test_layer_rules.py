"""Rules of stock layers: the promised product is what Flax computes."""

import flax.linen as nn
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.clipping import einsum_layers
from dptrain.clipping import layer_rules

quick = settings(deadline=None, max_examples=15, database=None)


def reals(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def check_promise(module, x, kernel):
  """The output is the product of what the rule makes of input and kernel."""
  rule = layer_rules.RULES[type(module), "__call__"]
  y = module.apply({"params": {"kernel": kernel}}, x)
  rows = rule.output_rows(module, y)
  order = rule.weight_order(module)
  weight = kernel if order is None else np.transpose(kernel, order)
  flat = rule.flatten(module, jnp.asarray(x))
  expected = flat @ weight.reshape(flat.shape[-1], -1)
  assert rows.shape == expected.shape
  np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(rule.output_of(module, rows, y.shape), y)


@st.composite
def convolutions(draw):
  rank = draw(st.integers(1, 2))

  def each(most, least=1):
    return tuple(draw(st.integers(least, most)) for _ in range(rank))

  names = ["SAME", "SAME_LOWER", "VALID", "CIRCULAR"]
  pairs = list(zip(each(2, -1), each(2, -1), strict=True))
  padding = draw(st.sampled_from([*names, "CAUSAL", 1, pairs]))
  if padding == "CAUSAL" and rank > 1:
    padding = "REFLECT"
  kernel = each(3)
  # Flax wants explicit padding around what it dilates.
  dilated = not isinstance(padding, str) and draw(st.booleans())
  module = nn.Conv(
    2,
    kernel,
    strides=draw(st.sampled_from([None, 2, each(3)])),
    padding=padding,
    input_dilation=each(2) if dilated else 1,
    kernel_dilation=draw(st.sampled_from([1, each(2)])),
    use_bias=False,
  )
  lead = draw(st.sampled_from([(), (1,), (2, 2)]))
  x = reals((*lead, *(size + 6 for size in each(3)), 2))
  return module, x, reals((*kernel, 2, 2), 1)


@quick
@given(convolutions())
def test_convolutions_are_products_with_patches(drawn):
  check_promise(*drawn)


@st.composite
def equations(draw):
  """Letters by role, in any order, with or without an ellipsis."""
  roles = {"rows": "abc", "contracted": "xy", "features": "ef"}
  rows, contracted, features = (
    draw(st.sets(st.sampled_from(letters))) for letters in roles.values()
  )
  inputs, kernel, output = (
    "".join(draw(st.permutations(sorted(letters))))
    for letters in (rows | contracted, contracted | features, rows | features)
  )
  sizes = dict(zip("abcxyef", (2, 1, 3, 2, 3, 2, 1), strict=True))
  shape = [sizes[a] for a in inputs]
  extra = draw(st.sampled_from([None, (), (2,), (2, 3)]))
  if extra is not None:
    at = draw(st.integers(0, len(inputs)))
    inputs = f"{inputs[:at]}...{inputs[at:]}"
    shape[at:at] = extra
    at = draw(st.integers(0, len(output)))
    output = f"{output[:at]}...{output[at:]}"
  weight = [sizes[a] for a in kernel]
  equation = f"{inputs}, {kernel}->{output}"
  start = nn.initializers.normal()
  module = nn.Einsum(weight, equation, use_bias=False, kernel_init=start)
  return module, reals(shape), reals(weight, 1)


@quick
@given(equations())
def test_einsums_are_products(drawn):
  check_promise(*drawn)


@pytest.mark.parametrize(
  "equation",
  [
    "btd,tde->bte",  # t is everywhere
    "btd,de->be",  # t is summed on its own
    "btd,def->bte",  # f is
    "bdd,de->be",  # a diagonal
    "btd,dde->bte",
    "btd,de->btee",
    "...d,...de->...e",
    "...d,de->e",
    "td,de->...e",
    "btd,de",
    "btd->btd",
    "btd,de,ef->btf",
    "",
    None,
  ],
)
def test_equations_that_are_no_product(equation):
  assert einsum_layers.product(equation, ellipsis=1) is None


def test_roles_of_letters():
  found = einsum_layers.product("b...xy, eyfx -> f...be", ellipsis=2)
  assert found.rows == "01b"
  assert found.contracted == "yx"
  assert found.features == "fe"
