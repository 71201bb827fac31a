"""Prints the numbers of docs/scaling.md.

  python tools/scaling_table.py [--json] [--microbatch_size 16] ...

The programs are those that the loop runs: gin's `large_scale_dp_bert.gin`, laid
out on 8 virtual devices, each with the rows of one core of the pod. They are
lowered and compiled for their sizes (nothing is computed): XLA tells memory and
collectives of one device. Data parallelism gives every core the same program,
however many there are.

XLA's count of operations takes a loop's body once, so arithmetic is counted on
the same model without loops, at one and at two layers, and drawn out to all.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys

DEVICES = 8
GB = 1e9


def main() -> None:
  """Measures, estimates, prints."""
  arguments = parsed()
  os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={DEVICES}"
    # Time of compiling only; sizes of buffers are decided before.
    " --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
  )
  os.environ["JAX_PLATFORMS"] = "cpu"
  found = measured(arguments.microbatch_size, arguments.microbatches)
  rows = [estimated(found, arguments, batch) for batch in arguments.batches]
  if arguments.json:
    told = {"assumed": vars(arguments), "measured": found, "estimated": rows}
    print(json.dumps(told, indent=2))
    return
  print_tables(found, arguments, rows)


def parsed() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true")
  parser.add_argument("--cores", type=int, default=4096)
  parser.add_argument("--batches", type=int, nargs="+", default=[2**20, 2**21])
  parser.add_argument(
    "--microbatch_size",
    type=int,
    default=16,
    help="examples a core clips at once",
  )
  parser.add_argument(
    "--microbatches", type=int, default=4, help="in a core's physical batch"
  )
  parser.add_argument("--peak_tflops", type=float, default=61.5)
  parser.add_argument("--utilisation", type=float, default=0.4)
  parser.add_argument("--memory_gb_per_s", type=float, default=450.0)
  parser.add_argument("--link_gb_per_s", type=float, default=50.0)
  return parser.parse_args()


# --- what XLA tells -----------------------------------------------------------


def measured(microbatch_size: int, microbatches: int) -> dict:
  """Sizes of the real programs, per core."""
  import jax

  from dptrain import configuration
  from dptrain.training import mesh
  from dptrain.training import programs as programs_lib

  jax.config.update("jax_threefry_partitionable", True)
  run = configuration.training_run(
    ["large_scale_dp_bert.gin"], ["TASK=none", "MODEL_DIR=none"]
  )
  step, params = private_step(run, microbatch_size)
  layout = mesh.make_layout(mesh.MeshSettings(), run.model)
  rows = batch_shapes(run, DEVICES * microbatch_size * microbatches)
  programs = programs_lib.make_programs(step, params, rows, layout)
  opt_state = jax.eval_shape(step.init, params)
  total = jax.eval_shape(programs.zeros, params, opt_state)
  key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
  placed = place(params, layout.params)
  state = place(opt_state, layout.opt_state(params, opt_state))
  total = place(total, programs_lib.accumulator_shardings(layout, total))
  rows = place(rows, jax.tree.map(lambda _: layout.rows, rows))
  say("compiling accumulate")
  accumulate = programs.accumulate.lower(placed, total, rows, key).compile()
  say("compiling finish")
  scalar = jax.ShapeDtypeStruct((), "float32")
  finish = programs.finish.lower(
    placed,
    state,
    total,
    noise_key=key,
    noise_multiplier=scalar,
    expected_batch_size=scalar,
  ).compile()
  say("compiling a step without privacy")
  plain = plain_step(run, params, microbatch_size)
  say("counting operations")
  private, ordinary = operations(run, microbatch_size)
  return {
    "clipping": step.clipping_method.method,
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "bytes": {
      "parameters": nbytes(params),
      "optimizer state": nbytes(opt_state),
      "accumulator": nbytes(total.gradients) // DEVICES,
      "physical batch": nbytes(rows) // DEVICES,
      "accumulate, temporary": memory(accumulate)[1],
      "finish, temporary": memory(finish)[1],
      "finish, results": memory(finish)[2],
      "plain gradient, temporary and result": sum(memory(plain)[1:]),
    },
    "collective bytes": {
      "accumulate": collective_bytes(accumulate),
      "finish": collective_bytes(finish),
    },
    "memory traffic of finish, bytes": finish.cost_analysis()["bytes accessed"],
    "flops per example": {"private": private, "plain": ordinary},
  }


def private_step(run, microbatch_size):
  """The run's step, and the shapes of its parameters."""
  import jax

  from dptrain.clipping import methods
  from dptrain.clipping import rules
  from dptrain.training import objective as objective_lib
  from dptrain.training import step as step_lib

  objective = objective_lib.Objective(run.model, run.masking)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  params = jax.eval_shape(lambda keys: run.model.init(keys[0]), keys)
  choice = methods.choose(
    objective.losses, params, batch_shapes(run, 1), keys, run.clipping_method
  )
  step = step_lib.PrivateStep(
    objective.losses,
    rules.ClippingRule(run.privacy.clipping, run.privacy.l2_clip_norm),
    run.optimizer,
    clipping_method=choice,
    microbatch_size=microbatch_size,
  )
  return step, params


def plain_step(run, params, size):
  """The gradient of the mean loss of a microbatch, compiled for one core."""
  import jax

  from dptrain.training import objective as objective_lib

  objective = objective_lib.Objective(run.model, run.masking)

  def loss(params, batch, keys):
    return objective.losses(params, batch, keys)[0].mean()

  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
  lowered = jax.jit(jax.grad(loss)).lower(params, batch_shapes(run, size), keys)
  return lowered.compile()


def operations(run, size):
  """Floating-point operations per example: private, and plain."""
  import jax

  from dptrain.training import objective as objective_lib

  counts = []
  for layers in (1, 2):
    bert = run.model.bert.clone(num_layers=layers, scan_layers=False)
    small = dataclasses.replace(
      run, model=dataclasses.replace(run.model, bert=bert)
    )
    step, params = private_step(small, None)
    batch = batch_shapes(small, size)
    total = jax.eval_shape(step.zeros, params, batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    private = jax.jit(step.accumulate).lower(params, total, batch, key)
    losses = objective_lib.Objective(small.model, small.masking).losses
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    plain = jax.jit(
      jax.grad(lambda p, b, k, losses=losses: losses(p, b, k)[0].mean())
    ).lower(params, batch, keys)
    counts.append([x.cost_analysis()["flops"] / size for x in (private, plain)])
  depth = run.model.bert.num_layers
  return [
    one + (depth - 1) * (two - one) for one, two in zip(*counts, strict=True)
  ]


def batch_shapes(run, size):
  """Shapes of a physical batch."""
  import jax

  return {
    "tokens": jax.ShapeDtypeStruct((size, run.sequence_length), "int32"),
    "example_ids": jax.ShapeDtypeStruct((size,), "int32"),
    "is_padding": jax.ShapeDtypeStruct((size,), "bool"),
  }


def place(shapes, places):
  """Shapes with the places of their arrays."""
  import jax

  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    places,
  )


def nbytes(tree) -> int:
  """Bytes of a tree, over all devices."""
  import jax

  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory(compiled) -> tuple[int, int, int]:
  """Bytes per device of arguments, temporaries and new results."""
  told = compiled.memory_analysis()
  results = told.output_size_in_bytes - told.alias_size_in_bytes
  return told.argument_size_in_bytes, told.temp_size_in_bytes, results


def collective_bytes(compiled) -> int:
  """Bytes that enter the collectives of a program, per device."""
  size = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
  total = 0
  for line in compiled.as_text().splitlines():
    found = re.search(
      r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter)"
      r"(-start)?\(",
      line,
    )
    for kind, dims in re.findall(
      r"(\w+)\[([\d,]*)\]", found[1] if found else ""
    ):
      count = 1
      for length in filter(None, dims.split(",")):
        count *= int(length)
      total += size.get(kind, 4) * count
  return total


def say(text: str) -> None:
  """Tells how far it is."""
  print(f"{text} ...", file=sys.stderr, flush=True)


# --- what follows from it, under assumptions ----------------------------------


def estimated(found: dict, arguments: argparse.Namespace, batch: int) -> dict:
  """Time of an update of so many examples on the pod."""
  per_core = arguments.microbatch_size * arguments.microbatches
  physical = per_core * arguments.cores
  # The realised batch is drawn: nearly all draws lie within four deviations.
  # What is padding for all of a core's microbatch is skipped.
  at_once = arguments.microbatch_size * arguments.cores
  microbatches = math.ceil((batch + 4 * math.sqrt(batch)) / at_once)
  examples = microbatches * arguments.microbatch_size
  flops = found["flops per example"]["private"] * examples
  arithmetic = flops / (arguments.peak_tflops * 1e12 * arguments.utilisation)
  moved = found["collective bytes"]["finish"]
  # A ring passes each byte on twice: while summing, while handing out.
  reduction = 2 * moved / (arguments.link_gb_per_s * GB)
  update = found["memory traffic of finish, bytes"]
  update /= arguments.memory_gb_per_s * GB
  seconds = arithmetic + reduction + update
  rows = found["bytes"]["physical batch"] / per_core
  return {
    "expected batch": batch,
    "physical batch": physical,
    "microbatches of a core, at most": microbatches,
    "seconds of accumulate": arithmetic,
    "seconds of the reduction": reduction,
    "seconds of noise and optimizer": update,
    "seconds": seconds,
    "updates per hour": 3600 / seconds,
    "GB each core sends per update": 2 * moved / GB,
    "GB between cores per physical batch": found["collective bytes"][
      "accumulate"
    ]
    / GB,
    "MB from hosts per physical batch, in all": rows * physical / 1e6,
  }


def print_tables(found, arguments, rows) -> None:
  """For people."""
  held = found["bytes"]
  one = held["parameters"]
  plain = held["plain gradient, temporary and result"] - one
  print(f"clipping method: {found['clipping']}")
  print(f"parameters: {found['parameters']:,}")
  for name, flops in found["flops per example"].items():
    print(f"{name}: {flops / 1e9:,.1f} GFLOP per example")
  print(f"\nmemory of one core, GB (microbatch {arguments.microbatch_size})")
  items = {
    "parameters": one,
    "optimizer state": held["optimizer state"],
    "accumulator": held["accumulator"],
    "clipped sum of a microbatch": one,
    "activations, as in a plain step": plain,
    "one-pass buffers": held["accumulate, temporary"] - one - plain,
    "physical batch": held["physical batch"],
  }
  for name, size in items.items():
    print(f"  {name:42}{size / GB:8.3f}")
  print(f"  {'peak of accumulate':42}{sum(items.values()) / GB:8.3f}")
  at_finish = sum(list(items.values())[:3]) + held["finish, temporary"]
  at_finish += held["finish, results"]
  print(f"  {'peak of finish':42}{at_finish / GB:8.3f}")
  print("\nbytes that enter collectives, per core, GB")
  for name, size in found["collective bytes"].items():
    print(f"  {name:42}{size / GB:8.3f}")
  for row in rows:
    print()
    for name, value in row.items():
      print(f"  {name:42}{value:14,.2f}")


if __name__ == "__main__":
  main()
