"""Trains, saves and restores one optimizer on 4 x 2 devices.

A program: `python sharded_optimizers.py DIRECTORY`.
"""

import dataclasses
import os
import sys
from typing import Any, NamedTuple

if __name__ == "__main__":
  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_launch
from t5x import train as t5x_train


class MatricesState(NamedTuple):
  """Of a Shampoo-like optimizer."""

  count: Any
  left: Any
  right: Any


def matrices(rate):
  """Preconditions matrices from both sides, as Shampoo does; toy roots."""

  def init(params):
    def gram(side):
      return jax.tree.map(
        lambda p: jnp.eye(p.shape[side]) if p.ndim == 2 else jnp.ones((1,)),
        params,
      )

    return MatricesState(jnp.zeros((), jnp.int32), gram(0), gram(1))

  def update(grads, state, params=None):
    del params

    def added(gram, g, side):
      if g.ndim != 2:
        return gram
      return gram + jnp.tensordot(g, g, (1 - side, 1 - side))

    left = jax.tree.map(lambda m, g: added(m, g, 0), state.left, grads)
    right = jax.tree.map(lambda m, g: added(m, g, 1), state.right, grads)
    updates = jax.tree.map(
      lambda g, a, b: -rate * (a @ g @ b if g.ndim == 2 else g),
      grads,
      left,
      right,
    )
    return updates, MatricesState(state.count + 1, left, right)

  return optax.GradientTransformation(init, update)


OPTIMIZERS = {
  "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
  "sm3": lambda: optax.sm3(1e-2),
  "matrices": lambda: matrices(1e-2),
}


def main():
  for name in OPTIMIZERS:
    check(sys.argv[1] + "/" + name, name)


def train(directory, name, total_steps):
  """The train states at the beginning and at the end."""
  run = small_launch.make_run(directory, validation_split=None)
  run = dataclasses.replace(run, optimizer=OPTIMIZERS[name]())
  launch = small_launch.launch_lib.Launch(
    run, small_launch.records(validation=False)
  )
  begin = []

  def trainer_cls(**settings):
    begin.append(settings["train_state"])
    return small_launch.trainer.PrivateTrainer(launch=launch, **settings)

  arguments = small_launch.arguments(
    launch, model_parallel=2, total_steps=total_steps, trainer_cls=trainer_cls
  )
  _, end = t5x_train.train(**arguments)
  return begin[0], end


def check(directory, name):
  _, saved = train(directory, name, 2)
  restored, end = train(directory, name, 3)
  for one, other in zip(
    jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True
  ):
    np.testing.assert_array_equal(one, other)
    assert one.dtype == other.dtype
    assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
  split = [
    x
    for x in jax.tree.leaves(end.param_states.step_state)
    if "model" in tuple(x.sharding.spec)
  ]
  assert split, f"no array of the state of {name} is split"
  assert int(end.step) == 3
  print(f"{name}: {len(split)} arrays split over the model axis")


if __name__ == "__main__":
  main()
