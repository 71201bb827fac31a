"""A small BERT trained by each clipping method: one curve, one end."""

import dataclasses

import jax
import numpy as np
import optax
import small_run

from dptrain.clipping import methods
from dptrain.clipping import rules
from dptrain.data import batches
from dptrain.data import masking
from dptrain.training import objective as objective_lib
from dptrain.training import step as step_lib

UPDATES, BATCH = 20, 8
# Compiles in half the time.
FAST = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


def key(number):
  return jax.random.key(number, impl="threefry2x32")


def test_the_methods_train_alike():
  objective = objective_lib.Objective(
    small_run.model(), masking.MaskingSettings()
  )
  step = step_lib.PrivateStep(
    objective.losses,
    rules.ClippingRule("flat", l2_clip_norm=2.0),
    optax.sgd(0.5, momentum=0.9),
    collect_statistics=True,
  )
  start = jax.jit(objective.model.init)(key(1))
  (batch,) = batches.physical_batches(
    small_run.store(), np.arange(BATCH - 1), BATCH
  )
  # The store's words are drawn at random: nothing could be learned of them.
  words = 5 + np.arange(small_run.LENGTH) % 3
  batch["tokens"] = np.where(batch["tokens"] >= 5, words, batch["tokens"])
  empty = step.zeros(start, batch)

  @jax.jit
  def finish(params, state, accumulator, noise_key):
    return step.finish(
      params,
      state,
      accumulator,
      noise_key=noise_key,
      noise_multiplier=0.02,
      expected_batch_size=float(BATCH),
    )

  def trained(method):
    """Loss and share of clipped examples at each update; the parameters."""
    with_method = dataclasses.replace(step, clipping_method=method)
    accumulate = jax.jit(with_method.accumulate, compiler_options=FAST)
    params, state = start, step.init(start)
    curve = []
    for update in range(UPDATES):
      accumulator = accumulate(params, empty, batch, key(update))
      params, state, told = finish(
        params, state, accumulator, key(1000 + update)
      )
      curve.append([float(told[name]) for name in ("loss", "clip_fraction")])
    return np.asarray(curve), params

  curve, params = trained("vmap")
  assert curve[-1, 0] < 0.7 * curve[0, 0]  # it does learn
  assert 0 < curve[:, 1].mean() < 1  # and some gradients are clipped
  for method in methods.METHODS[2:]:
    other_curve, other = trained(method)
    np.testing.assert_allclose(other_curve, curve, rtol=3e-5, err_msg=method)
    moved = jax.tree.map(np.subtract, params, start)
    error = jax.tree.map(np.subtract, params, other)
    assert optax.tree.norm(error) < 1e-5 * optax.tree.norm(moved), method
