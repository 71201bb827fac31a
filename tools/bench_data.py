"""Times sampling, preparation and the wait for data.

  python tools/bench_data.py [--megabytes 2000] [--processes N] [--updates 60]
      [--only sampling|preparation|waiting] [--folder DIR] [--json FILE]

Sampling: a store of 346 million records without payload, about 2 million drawn.
Preparation: generated text files through `dptrain prepare`'s own path, seqio
included. Waiting: the demo from a prepared store; the share of the loop's time
in which it waits for a batch.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import resource
import statistics
import tempfile
import threading
import time
import tracemalloc
from typing import Any

import numpy as np

from dptrain import configuration
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.privacy import keys
from dptrain.privacy import sampling
from dptrain.training import feeding
from dptrain.training import host_memory
from dptrain.training import loop
from dptrain.training import preparing

RECORDS, PROB = 346_000_000, 0.006
WARM = 10  # updates before the wait is measured
PARTS = ("sampling", "preparation", "waiting")


def main() -> None:
  """Runs the parts that are asked for and prints them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--megabytes", type=int, default=2000)
  parser.add_argument("--processes", type=int)
  parser.add_argument("--updates", type=int, default=60)
  parser.add_argument("--only", choices=PARTS)
  parser.add_argument("--folder", help="for the corpus and its store")
  parser.add_argument("--json", metavar="FILE", help="also write data here")
  arguments = parser.parse_args()
  parts = {"sampling": measure_sampling}
  with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
    folder = pathlib.Path(name)
    parts["preparation"] = lambda: measure_preparation(
      folder, arguments.megabytes, arguments.processes
    )
    parts["waiting"] = lambda: measure_waiting(folder, arguments.updates)
    figures = {
      part: parts[part]() for part in PARTS if arguments.only in (None, part)
    }
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=1))


def measure_sampling() -> dict[str, float]:
  """Seconds and memory of one draw; of a host's part of it."""
  seed = keys.fixed_seed(0)

  def drawn(step: int, hosts: int = 1) -> np.ndarray:
    key = seed.key("sampling", "bench", step)
    sample = sampling.poisson(key, RECORDS, PROB)
    return sample.part(0, sample.size // hosts)

  def seconds(hosts: int = 1) -> float:
    times = []
    for step in range(7):
      begin = time.perf_counter()
      drawn(step, hosts)
      times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])

  figures = {
    "drawn": len(drawn(0)),
    "seconds": seconds(),
    "seconds_of_one_host_in_eight": seconds(hosts=8),
  }
  tracemalloc.start()
  drawn(1)
  figures["peak_bytes"] = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  sample = sampling.poisson(seed.key("sampling", "bench", 2), RECORDS, PROB)
  edges = [sample.size * host // 7 for host in range(8)]
  shares = [sample.part(a, b) for a, b in itertools.pairwise(edges)]
  assert np.array_equal(np.concatenate(shares), drawn(2))
  print(
    f"sampling, {RECORDS:,} records at q = {PROB}: {figures['drawn']:,} drawn"
    f" in {figures['seconds']:.3f} s,"
    f" {figures['peak_bytes'] / 2**20:.0f} MiB at the most;\n  one host of"
    f" eight, its part: {figures['seconds_of_one_host_in_eight']:.3f} s"
  )
  return figures


def measure_preparation(
  folder: pathlib.Path, megabytes: int, processes: int | None
) -> dict[str, float]:
  """Text per second and core, and memory."""
  text = folder / "text"
  text.mkdir()
  sample = generate(text, megabytes)
  model = folder / "bench.model"
  vocabulary_lib.train_vocabulary(
    sample.splitlines(), vocabulary_lib.VocabularySettings(size=8192), model
  )
  begin = time.perf_counter()
  run = configuration.training_run(
    ["text_files.gin"],
    [
      f"TEXT_FILES = '{text}/*.txt'",
      f"MODEL_DIR = '{folder}'",
      "VOCABULARY_SIZE = 8192",
      "SEQUENCE_LENGTH = 128",
      f"VocabularySettings.path = '{model}'",
    ],
  )
  surveyed = time.perf_counter() - begin
  before = cpu_seconds()
  peaks = PeakMemory()
  begin = time.perf_counter()
  manifest = preparing.prepare(run, str(folder / "s"), processes=processes)
  wall = time.perf_counter() - begin
  size = sum(split["text_bytes"] for split in manifest["splits"].values())
  cores = processes or len(os.sched_getaffinity(0))
  own, workers = peaks.stop()
  figures = {
    "text_bytes": size,
    "survey_seconds": surveyed,
    "seconds": wall,
    "processes": cores,
    "megabytes_per_second_and_core": size / 1e6 / wall / cores,
    "megabytes_per_cpu_second": size / 1e6 / (cpu_seconds() - before),
    "peak_mebibytes": own,
    "worker_peak_mebibytes": workers,
  }
  records = {k: split["records"] for k, split in manifest["splits"].items()}
  print(
    f"preparation, {size / 1e6:,.0f} MB of text on {cores} core(s): {wall:.0f}"
    f" s, {figures['megabytes_per_second_and_core']:.1f} MB a second and core"
    f" ({figures['megabytes_per_cpu_second']:.1f} MB a CPU second), after"
    f" {surveyed:.0f} s in which the task looked its files through;\n  peak"
    f" memory {own:.0f} MiB (TensorFlow included), a worker's {workers:.0f}"
    f" MiB; records {records}"
  )
  return figures


class PeakMemory:
  """The most memory that this process and each of its children has held."""

  def __init__(self) -> None:
    self._peaks: dict[int, float] = {}
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()

  def stop(self) -> tuple[float, float]:
    """MiB: this process, the largest child."""
    self._stopped.set()
    self._thread.join()
    own = self._peaks.pop(os.getpid())
    return own, max(self._peaks.values(), default=0.0)

  def _watch(self) -> None:
    # `ru_maxrss` of a child counts what its parent held when it was started.
    while not self._stopped.wait(0.2):
      children = multiprocessing.active_children()
      for number in [os.getpid(), *(each.pid or 0 for each in children)]:
        try:
          status = pathlib.Path(f"/proc/{number}/status").read_text()
        except OSError:
          continue
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
          self._peaks[number] = int(found[1]) / 2**10


def generate(folder: pathlib.Path, megabytes: int) -> str:
  """Writes files of 50 MB of made-up words, some often; a part of the text."""
  draw = np.random.default_rng(0)
  letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
  common = 1 / np.arange(1, 27) / (1 / np.arange(1, 27)).sum()
  words = np.array(
    [
      "".join(draw.choice(letters, draw.integers(2, 11), p=common))
      for _ in range(50_000)
    ]
  )
  chances = 1 / np.arange(10, 50_010)
  chances /= chances.sum()
  sample = ""
  for number in range(-(-megabytes // 50)):
    with (folder / f"{number:04d}.txt").open("w") as file:
      left = min(50, megabytes - 50 * number) * 1_000_000
      while left > 0:
        lines = draw.choice(words, (10_000, 12), p=chances)
        block = "\n".join(" ".join(line) for line in lines) + "\n"
        sample = sample or block
        left -= file.write(block)
  return sample


def cpu_seconds() -> float:
  """Of this process and of the children that have ended."""
  used = (
    resource.getrusage(who)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  )
  return sum(each.ru_utime + each.ru_stime for each in used)


def measure_waiting(folder: pathlib.Path, updates: int) -> dict[str, float]:
  """Share of the demo's time, once warm, in which the loop waits for data."""
  host_memory.keep_freed_memory()  # as `dptrain train` does
  store = folder / "demo"

  def run_with(*bindings: str) -> Any:
    return configuration.training_run(
      ["demo.gin"], [f"MODEL_DIR = '{folder / 'model'}'", *bindings]
    )

  preparing.prepare(run_with(), str(store))
  seen: list[tuple[float, float]] = []
  update = feeding.Feed.update

  def spied(self: feeding.Feed, step: int) -> Any:
    seen.append((time.perf_counter(), self.waited))
    return update(self, step)

  feeding.Feed.update = spied  # type: ignore[method-assign]
  try:
    loop.train(
      run_with(
        f"TrainingRun.prepared = '{store}'",
        "START_BATCH = 640",
        f"TOTAL_STEPS = {updates}",
        "RAMP_STEPS = 1",
        "EVALUATION_PERIOD = 0",
        "CHECKPOINT_PERIOD = 1000000",
        "TrainingRun.tensorboard = False",
        "TrainingRun.fixed_seed = 0",
        "TARGET_EPSILON = None",
        "PrivacySettings.noise_multiplier = 1.0",
      )
    )
  finally:
    feeding.Feed.update = update  # type: ignore[method-assign]
  (begin, waited), (end, waited_then) = seen[WARM], seen[-1]
  share = (waited_then - waited) / (end - begin)
  per_update = (end - begin) / (len(seen) - 1 - WARM)
  print(
    f"waiting, the demo's model, 640 records an update: {100 * share:.2f} % of"
    f" {per_update:.3f} s an update"
  )
  return {"share": share, "seconds_per_update": per_update}


if __name__ == "__main__":
  main()
