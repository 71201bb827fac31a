"""Random models, sharing, scan and remat included: the methods agree."""

import clipped_models
from hypothesis import Phase
from hypothesis import given
from hypothesis import settings
import jax
import numpy as np
from random_models import models
from random_models import of_random

from dptrain.clipping import rules

# Each example is compiled anew: few, but others each time.
few = settings(
  max_examples=2,
  deadline=None,
  database=None,
  phases=(Phase.explicit, Phase.generate),
)


@settings(few, max_examples=3)
@given(models)
def test_random_models(model):
  found, uses = clipped_models.errors(*of_random(model))
  assert uses
  assert max(found.values()) < 1e-5, found


@few
@given(models)
def test_random_models_in_float64(model):
  with jax.enable_x64(True):
    model = model.clone(dtype="float64")
    loss_fn, params, ids = of_random(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float64")}
    found, uses = clipped_models.errors(loss_fn, params, ids)
  assert uses
  assert max(found.values()) < 1e-10, found


@few
@given(models)
def test_random_models_in_bfloat16(model):
  """As near as bfloat16 is; and the bound holds as in float32."""
  loss_fn, params, ids = of_random(model.clone(dtype="bfloat16"))
  rule = rules.ClippingRule("flat", 1e-4)
  run, uses = clipped_models.clipped(loss_fn, params, ids, rule)
  assert uses
  found = clipped_models.errors_of(run, params, ids)
  assert max(found.values()) < 0.05, found
  clipped_models.check_each_contribution(run, params, ids, rule)
