"""Times clipping methods against plain training, side by side in one run.

  python tools/bench_clipping.py [--shapes tiny,mini,base,long,ngrammer]
      [--json FILE]

For each shape, programs are compiled first and then run in turn, so that all
see the same machine: "plain" (the gradient of the summed loss, no privacy),
dptrain's methods, one_pass again in microbatches that a loop on the device adds
up (as `PrivateStep.microbatch_size` does; "one_pass/2" is 2 rows at once), and
jax_privacy at several microbatch sizes (where it is installed: `pip install
jax-privacy`). Printed are medians with the spread of
the middle half, ratios to plain of the same round, and the temporary memory of
the compiled program.

Shapes: B batch, T length, D width, M masked, V vocabulary.
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dptrain.clipping import methods
from dptrain.clipping import rules
from dptrain.models import bert
from dptrain.models import masked_lm
from dptrain.models import ngrammer

METHODS = ("one_pass", "two_pass", "vmap")
MICROBATCHES = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Shape:
  """One BERT or N-Grammer and one physical batch."""

  layers: int
  width: int
  length: int
  vocabulary: int
  batch: int
  masked: int
  ngrams: bool = False


SHAPES = {
  "tiny": Shape(2, 128, 32, 8192, 32, 5),
  "mini": Shape(4, 256, 128, 8192, 16, 20),
  "base": Shape(2, 768, 128, 30522, 16, 20),
  "long": Shape(2, 512, 512, 8192, 4, 77),
  # As gin/models/ngrammer_base.gin, of two layers.
  "ngrammer": Shape(2, 768, 128, 30522, 16, 20, ngrams=True),
}


def main() -> None:
  """Runs the benchmark that the command line asks for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shapes", default=",".join(SHAPES))
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--json", metavar="FILE", help="also write data here")
  parser.add_argument("--dtype", default="float32")
  arguments = parser.parse_args()
  print(_machine())
  results = {}
  for name in arguments.shapes.split(","):
    results[name] = _measure(SHAPES[name], arguments.rounds, arguments.dtype)
    _show(name, SHAPES[name], results[name])
  if arguments.json:
    with open(arguments.json, "w", encoding="utf-8") as file:
      json.dump({"machine": _machine(), "results": results}, file, indent=2)


def _measure(shape: Shape, rounds: int, dtype: str) -> dict[str, Any]:
  """Compiles every program, then runs them in turn."""
  model = masked_lm.MaskedLanguageModel(
    bert.Bert(
      vocab_size=shape.vocabulary,
      num_layers=shape.layers,
      width=shape.width,
      num_heads=shape.width // 64,
      max_length=shape.length,
      dtype=dtype,
      ngrammer=ngrammer.NGrammerSettings() if shape.ngrams else None,
    )
  )
  params = model.init(jax.random.key(0))
  batch = _batch(shape)
  keys = jax.random.split(jax.random.key(1), shape.batch)
  compiled = {}
  for name, function in _programs(model, shape).items():
    program = jax.jit(function).lower(params, batch, keys).compile()
    jax.block_until_ready(program(params, batch, keys))
    compiled[name] = program
  seconds: dict[str, list[float]] = {name: [] for name in compiled}
  for _ in range(rounds):
    for name, program in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(program(params, batch, keys))
      seconds[name].append(time.perf_counter() - start)
  figures = {name: _figures(name, seconds, compiled) for name in compiled}
  return {
    "auto": methods.choose(model.losses, params, batch, keys).method,
    "programs": figures,
    "best_jax_privacy": _fastest(figures, "jax_privacy"),
    "best_method": min(METHODS, key=lambda name: figures[name]["seconds"]),
    "best_microbatch": _fastest(figures, "one_pass/"),
  }


def _fastest(figures: dict[str, dict[str, float]], prefix: str) -> str | None:
  """The quickest program whose name begins so; None if there is none."""
  names = [name for name in figures if name.startswith(prefix)]
  return min(names, key=lambda n: figures[n]["seconds"], default=None)


def _figures(
  name: str, seconds: dict[str, list[float]], compiled: dict[str, Any]
) -> dict[str, float]:
  memory = {
    n: program.memory_analysis().temp_size_in_bytes
    for n, program in compiled.items()
  }
  ratios = [
    mine / plain
    for mine, plain in zip(seconds[name], seconds["plain"], strict=True)
  ]
  low, _, high = statistics.quantiles(seconds[name], n=4)
  return {
    "seconds": statistics.median(seconds[name]),
    "seconds_low": low,
    "seconds_high": high,
    "time_ratio": statistics.median(ratios),
    "temp_megabytes": memory[name] / 1e6,
    "memory_ratio": memory[name] / memory["plain"],
  }


def _programs(
  model: masked_lm.MaskedLanguageModel, shape: Shape
) -> dict[str, Callable[..., Any]]:
  """What is compared, by name; each maps (params, batch, keys) to gradients."""

  def plain(params: Any, batch: Any, keys: Any) -> Any:
    return jax.grad(lambda p: jnp.sum(model.losses(p, batch, keys)[0]))(params)

  def clipped(method: str) -> Callable[..., Any]:
    def run(params: Any, batch: Any, keys: Any) -> Any:
      return methods.clipped_sum(
        model.losses,
        params,
        batch,
        keys,
        jnp.zeros(len(keys), bool),
        rules.ClippingRule(),
        method,
      ).gradients

    return run

  def scanned(size: int) -> Callable[..., Any]:
    def run(params: Any, batch: Any, keys: Any) -> Any:
      def add(total: Any, part: Any) -> tuple[Any, None]:
        found = clipped("one_pass")(params, *part)
        return jax.tree.map(jnp.add, total, found), None

      parts = jax.tree.map(
        lambda x: x.reshape(-1, size, *x.shape[1:]), (batch, keys)
      )
      zeros = jax.tree.map(jnp.zeros_like, params)
      return jax.lax.scan(add, zeros, parts)[0]

    return run

  programs = {"plain": plain} | {name: clipped(name) for name in METHODS}
  for size in MICROBATCHES:
    if size < shape.batch:
      programs[f"one_pass/{size}"] = scanned(size)
  for size, run in _jax_privacy(model, shape):
    programs[f"jax_privacy/{size}"] = run
  return programs


def _jax_privacy(
  model: masked_lm.MaskedLanguageModel, shape: Shape
) -> Iterator[tuple[int, Callable[..., Any]]]:
  """jax_privacy's clipped gradient at several microbatch sizes."""
  if importlib.util.find_spec("jax_privacy") is None:
    return
  from jax_privacy import clipping

  def loss(params: Any, batch: Any) -> jax.Array:
    return model.losses(params, batch, None)[0][0]

  for size in (1, 2, 4, 8, 16):
    if size <= shape.batch:
      run = clipping.clipped_grad(
        loss, l2_clip_norm=1.0, batch_argnums=1, microbatch_size=size
      )
      yield size, lambda params, batch, keys, run=run: run(params, batch)


def _batch(shape: Shape) -> dict[str, np.ndarray]:
  generator = np.random.default_rng(0)
  size = (shape.batch, shape.masked)
  return {
    "inputs": generator.integers(
      5, shape.vocabulary, (shape.batch, shape.length), np.int32
    ),
    "positions": np.stack(
      [
        generator.choice(shape.length, shape.masked, replace=False)
        for _ in range(shape.batch)
      ]
    ).astype(np.int32),
    "labels": generator.integers(5, shape.vocabulary, size, np.int32),
    "weights": np.ones(size, np.float32),
  }


def _machine() -> str:
  versions = " ".join(
    f"{name} {importlib.metadata.version(name)}"
    for name in ("jax", "jaxlib", "flax", "jax-privacy")
    if importlib.util.find_spec(name.replace("-", "_"))
  )
  device = jax.devices()[0]
  flags = os.environ.get("XLA_FLAGS", "none")
  return (
    f"{device.device_kind}, {os.cpu_count()} CPU cores, {versions},"
    f" XLA_FLAGS {flags}"
  )


def _show(name: str, shape: Shape, result: dict[str, Any]) -> None:
  sizes = dataclasses.asdict(shape)
  told = ", ".join(f"{key} {value}" for key, value in sizes.items())
  print(f"\n{name}: {told}")
  print("  program            seconds (middle half)     x plain   temp MB  x")
  for program, f in result["programs"].items():
    print(
      f"  {program:16} {f['seconds']:8.4f} ({f['seconds_low']:.4f} to"
      f" {f['seconds_high']:.4f})   {f['time_ratio']:6.2f} "
      f" {f['temp_megabytes']:8.1f}  {f['memory_ratio']:.2f}"
    )
  seconds = {n: f["seconds"] for n, f in result["programs"].items()}
  auto, best = result["auto"], result["best_method"]
  told = f"auto takes {auto}: {seconds[auto] / seconds[best]:.2f} x {best}"
  for other in (result["best_microbatch"], result["best_jax_privacy"]):
    if other:
      told += f", {seconds[auto] / seconds[other]:.2f} x {other}"
  print(f"  {told}")
  sys.stdout.flush()


if __name__ == "__main__":
  main()
