"""What needs 8 devices, in one program: importing t5x takes longer than this.

`python virtual_devices.py BEGUN OUT`: goes on from MODEL_DIR `BEGUN` on meshes
of 8 x 1 and 4 x 2, is refused a batch that 8 does not divide, and trains, saves
and restores optimizer states of many shapes on 4 x 2.
"""

import dataclasses
import os
import pathlib
import shutil
import sys

if __name__ == "__main__":
  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import matrix_optimizer
import numpy as np
import optax
import small_launch
from t5x import train as t5x_train

from dptrain.optimizers import preconditioner_refresh
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import shampoo_settings
from dptrain.optimizers import shampoo_transform
from dptrain.optimizers import sm3

# One after the other: their states are what matters.
OPTIMIZER = optax.chain(
  optax.scale_by_factored_rms(min_dim_size_to_factor=4),
  optax.scale_by_sm3(),
  matrix_optimizer.matrices(1e-2),
  sm3.scale_by_sm3(),
  shampoo_transform.scale_by_shampoo(
    shampoo_settings.ShampooSettings(
      refresh=preconditioner_refresh.RefreshSettings(start=1, interval=1),
      blocking=shampoo_blocks.Blocking(8),
    )
  ),
)


def go_on(begun, directory, model_parallel):
  shutil.copytree(begun, directory)
  small_launch.train(directory, mesh=model_parallel)


def refuse_a_batch(directory):
  try:
    small_launch.train(directory, physical_batch_size=20)
  except ValueError as error:
    print(f"refused: {error}")


def train(directory, total_steps):
  """The train states at the beginning and at the end."""
  run = small_launch.make_run(directory, validation_split=None)
  run = dataclasses.replace(run, optimizer=OPTIMIZER)
  launch = small_launch.launch_lib.Launch(
    run, small_launch.records(validation=False)
  )
  begin = []

  def trainer_cls(**settings):
    begin.append(settings["train_state"])
    return small_launch.trainer.PrivateTrainer(launch=launch, **settings)

  _, end = t5x_train.train(
    **small_launch.arguments(
      launch, model_parallel=2, total_steps=total_steps, trainer_cls=trainer_cls
    )
  )
  return begin[0], end


def keep_states(directory):
  _, saved = train(directory, 1)
  restored, end = train(directory, 2)
  for one, other in zip(
    jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True
  ):
    np.testing.assert_array_equal(one, other)
    assert one.dtype == other.dtype
    assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
  assert int(end.step) == 2
  for number, state in enumerate(end.param_states.step_state):
    split = sum(
      "model" in tuple(x.sharding.spec) for x in jax.tree.leaves(state)
    )
    print(f"state {number}: {split} arrays split along the model axis")


def main():
  begun, out = map(pathlib.Path, sys.argv[1:])
  small_launch.trainer.PrivateTrainer = small_launch.CountingTrainer
  for model_parallel in (1, 2):
    go_on(begun, out / f"model_{model_parallel}", model_parallel)
  refuse_a_batch(out / "refused")
  keep_states(out / "states")


if __name__ == "__main__":
  main()
