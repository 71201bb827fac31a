"""What the second of two passes adds up, and what it leaves as factors."""

import clipped_models
import clipping_cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.clipping import book_keeping
from dptrain.clipping import methods
from dptrain.clipping import parameter_trees
from dptrain.clipping import rules
from dptrain.clipping import two_pass

B, D, T = clipped_models.B, clipped_models.D, clipped_models.T
V = 150


class Vocabulary(nn.Module):
  """A tied table and stacked layers, wide for the few rows that they see."""

  dtype: str = "float32"

  @nn.compact
  def __call__(self, ids):
    wide = "float64" if self.dtype == "float64" else "float32"
    types = {"dtype": self.dtype, "param_dtype": wide}

    class Body(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        y = jnp.tanh(nn.Dense(90, **types)(x.mean(axis=1)))
        return jnp.tanh(x + nn.Dense(D, **types)(y)[:, None]), None

    embed = nn.Embed(V, D, **types)
    x = embed(ids) + embed(ids[:, ::-1] % 2)
    x, _ = clipped_models.scanned(Body, 2)()(x, None)
    return embed.attend(nn.Dense(D, name="small", **types)(x)[:, 0])


def split(loss_fn, params, batch):
  """Paths of weights that are added up, and of those left as factors."""
  keys = clipped_models.keys_of(batch)
  uses = methods.choose(loss_fn, params, batch, keys, "two_pass").uses
  flat = parameter_trees.leaves_by_path(params)
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  return two_pass._split(uses, shapes, len(batch))


def of_vocabulary(dtype="float32"):
  model, ids = Vocabulary(dtype), clipped_models.ids() * 9
  params = clipped_models.initial(model, ids[:1])
  return clipped_models.losses_of(model), params, ids


def test_the_smaller_is_carried():
  summed, factored = split(*of_vocabulary())
  assert {use.weight[-2] for use in summed} == {"small"}
  kinds = {(use.weight[-2], use.kind) for use in factored}
  assert kinds == {
    ("Embed_0", "lookup"),
    ("Embed_0", "attend"),
    ("Dense_0", "product"),
    ("Dense_1", "product"),
  }
  assert [use.stack for use in factored if use.kind == "product"] == [(2,)] * 2


def test_a_shared_input_does_not_cross_the_split():
  loss_fn, params, x = clipping_cases.CASES["bothkindsofsecondpass"]()
  keys = clipped_models.keys_of(x)
  uses = methods.choose(loss_fn, params, x, keys, "two_pass").uses
  of = {use.name: use for use in uses}
  narrow, wide = (("narrow", "kernel"), 0), (("wide", "kernel"), 0)
  assert of[wide].same_inputs == narrow
  summed, factored = split(loss_fn, params, x)
  assert narrow in {use.name for use in summed}
  (found,) = (use for use in factored if use.name == wide)
  assert found.same_inputs is None
  assert {use.weight[0] for use in factored} == {"wide", "twice"}


@pytest.mark.parametrize(
  ("dtype", "tolerance"),
  [("float32", 1e-5), ("float64", 1e-10), ("bfloat16", 0.05)],
)
def test_equals_vmap(dtype, tolerance):
  with jax.enable_x64(dtype == "float64"):
    loss_fn, params, ids = of_vocabulary(dtype)
    rule = rules.ClippingRule("flat", 1e-4)
    run, uses = clipped_models.clipped(
      loss_fn, params, ids, rule, ("vmap", "two_pass")
    )
    assert len(uses) == 6
    found = clipped_models.errors_of(run, params, ids)
    assert found["two_pass"] < tolerance
    # The norms of the first pass bound what the second one adds.
    clipped_models.check_each_contribution(run, params, ids, rule)


def of_all_not_finite():
  """The sum over examples of which none is finite."""
  loss_fn, params, x = clipping_cases.CASES["bothkindsofsecondpass"]()
  run, _ = clipped_models.clipped(loss_fn, params, x, tried=("two_pass",))
  x = np.full_like(x, np.nan)
  return run(params, x, np.zeros(B, bool))["two_pass"].gradients


def without_the_branch(predicate, weighted, zeros, handed_out):
  del predicate, zeros
  return weighted(handed_out)


def test_the_branch_is_what_keeps_factors_of_nothing_finite_out(monkeypatch):
  for leaf in jax.tree.leaves(of_all_not_finite()):
    np.testing.assert_array_equal(leaf, 0)
  monkeypatch.setattr(two_pass.jax.lax, "cond", without_the_branch)
  assert not all(
    np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_all_not_finite())
  )


def check_vocabulary():
  loss_fn, params, ids = of_vocabulary()
  keys = clipped_models.keys_of(ids)
  methods.check_against_vmap(loss_fn, params, ids, keys, method="two_pass")


def factors_unweighted(patch):
  right = two_pass._factored_sums

  def sums(uses, handed_out, clip, shapes):
    ones = {path: jnp.ones_like(s) for path, s in clip.scales.items()}
    return right(uses, handed_out, clip._replace(scales=ones), shapes)

  patch.setattr(two_pass, "_factored_sums", sums)


def one_use_of_the_table(patch):
  right = book_keeping.weighted_sum

  def without_attend(uses, *rest):
    return right(tuple(u for u in uses if u.kind != "attend"), *rest)

  patch.setattr(book_keeping, "weighted_sum", without_attend)


@pytest.mark.parametrize("fault", [factors_unweighted, one_use_of_the_table])
def test_a_fault_in_the_factored_sums_is_seen(fault, monkeypatch):
  fault(monkeypatch)
  with pytest.raises(
    ValueError, match=r"two_pass gets the clipped sum .* wrong"
  ):
    check_vocabulary()


def test_the_factored_sums_are_right():
  check_vocabulary()
