from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.models import bert
from dptrain.models import masked_lm
from dptrain.optimizers import shampoo_blocks


def plan_of(shape, path=("w",), **settings):
  tree = jax.ShapeDtypeStruct(shape, jnp.float32)
  for name in reversed(path):
    tree = {name: tree}
  (found,) = shampoo_blocks.plan(tree, shampoo_blocks.Blocking(**settings))
  return found


@hypothesis_settings(max_examples=25, deadline=None)
@given(
  shape=st.lists(st.integers(1, 7), min_size=2, max_size=4),
  block_size=st.integers(1, 8),
  merge=st.integers(1, 20),
  max_dim=st.integers(2, 40),
  stacked=st.booleans(),
  sides=st.sampled_from(["all", "input", "smallest"]),
)
def test_blocks_hold_every_number_once(
  shape, block_size, merge, max_dim, stacked, sides
):
  path = ("layers", "w") if stacked else ("w",)
  plan = plan_of(
    tuple(shape),
    path,
    block_size=block_size,
    merge_up_to=merge,
    max_dim=max_dim,
    sides=sides,
    exponents=2,
  )
  if not plan.factors:
    assert plan.reason
    return
  x = 1.0 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  blocks = plan.blocked(jnp.asarray(x))
  assert blocks.shape == (plan.num_blocks, *plan.block)
  np.testing.assert_array_equal(np.sort(blocks[blocks > 0]), x.ravel())
  np.testing.assert_array_equal(plan.unblocked(blocks), x)
  for factor in plan.factors:
    assert plan.block[factor.dim] == factor.size <= block_size
  # What is not padding lies in the corner that `true_sizes` says.
  for block, sizes in zip(np.asarray(blocks), plan.true_sizes(), strict=True):
    corner = block[tuple(slice(0, size) for size in sizes)]
    assert (corner > 0).all()
    assert (block > 0).sum() == corner.size


def test_a_block_is_a_part_of_the_matrix():
  plan = plan_of((6, 4), block_size=3)
  x = jnp.arange(24.0).reshape(6, 4)
  blocks = plan.blocked(x)
  np.testing.assert_array_equal(blocks[0], x[:3, :2])
  np.testing.assert_array_equal(blocks[3], x[3:, 2:])


@pytest.mark.parametrize(
  ("shape", "up_to", "merged"),
  [
    ((768, 12, 64), 4096, (768, 768)),
    ((12, 64, 768), 4096, (768, 768)),
    ((256, 4, 64), 1024, (256, 256)),
    ((1, 2, 512, 1, 2048, 1, 3, 4), 1024, (1024, 2048, 12)),
    ((8, 8), 4096, (8, 8)),
    ((30522, 768), 4096, (30522, 768)),
    ((5, 1, 1), 4096, (5,)),
    ((2, 3, 4), 1, (2, 3, 4)),
    ((), 4096, ()),
  ],
)
def test_merges_small_dimensions(shape, up_to, merged):
  assert shampoo_blocks.merged_dims(shape, up_to) == merged


@pytest.mark.parametrize(
  ("shape", "settings", "reason"),
  [
    ((), {}, "0 dimensions, fewer than min_rank=2"),
    ((), {"min_rank": 1}, "0 dimensions, fewer than min_rank=1"),
    ((5,), {}, "1 dimension, fewer than min_rank=2"),
    ((5, 1), {}, "1 dimension, fewer than min_rank=2"),
    ((0, 5), {}, "empty"),
    ((5, 6), {"max_dim": 4}, "5 exceeds max_dim=4"),
    ((3, 6), {"max_dim": 4, "long_dims": "skip"}, "6 exceeds max_dim=4"),
    ((6, 3), {"max_dim": 4, "sides": "input"}, "no dimension is left"),
    ((5, 6), {"skip_names": ["w"]}, "'w' is among skip_names"),
  ],
)
def test_says_why_a_parameter_is_skipped(shape, settings, reason):
  plan = plan_of(shape, **settings)
  assert not plan.factors
  assert f"not preconditioned: {reason}" in plan.described()


@pytest.mark.parametrize(
  ("shape", "settings", "orders"),
  [
    ((5, 6), {}, {5: 4, 6: 4}),
    ((5,), {"min_rank": 1}, {5: 2}),
    ((5, 6, 7), {"merge_up_to": 1}, {5: 6, 6: 6, 7: 6}),
    ((5, 6), {"sides": "input"}, {5: 2}),
    ((6, 5), {"sides": "smallest"}, {5: 2}),
    ((9, 5), {"max_dim": 8}, {5: 2}),
    ((5, 6), {"exponents": 2}, {5: 2, 6: 2}),
    ((5, 6), {"exponents": {1: 2, 2: 3}}, {5: 3, 6: 3}),
  ],
)
def test_which_roots_a_parameter_gets(shape, settings, orders):
  plan = plan_of(shape, **settings)
  assert {f.size: f.order for f in plan.factors} == orders


@pytest.mark.parametrize("scan", [False, True])
def test_of_bert_all_matrices_are_preconditioned_and_nothing_else(scan):
  model = masked_lm.MaskedLanguageModel(
    bert.Bert(
      vocab_size=50, num_layers=2, width=8, num_heads=2, scan_layers=scan
    )
  )
  params = jax.eval_shape(model.init, jax.random.key(0, impl="threefry2x32"))
  blocking = shampoo_blocks.Blocking(max_dim=40)
  lines = shampoo_blocks.describe(params, blocking)
  assert len(lines) == len(jax.tree.leaves(params)) + 1
  for plan in shampoo_blocks.plan(params, blocking):
    wanted = plan.path.endswith(("kernel", "embedding"))
    assert bool(plan.factors) == wanted
    if "attention" in plan.path and wanted:
      assert [f.size for f in plan.factors] == [8, 8]
      assert plan.num_blocks == (2 if scan else 1)
    if plan.path == "token_embedding/embedding":
      assert [f.size for f in plan.factors] == [8]


def test_batch_dims_that_exceed_the_rank_are_refused():
  with pytest.raises(ValueError, match="batch_dims gives 3"):
    plan_of((2, 2), batch_dims=lambda path, shape: 3)


def test_too_many_factors_for_a_root_are_refused():
  with pytest.raises(ValueError, match="9 dimensions"):
    plan_of((2,) * 9, merge_up_to=1)
