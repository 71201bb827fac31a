"""The file of private metrics that an update released: publishable.

One JSON line per update in MODEL_DIR. Unlike the ledger it proves nothing and
nothing depends on it: a run without it, or with holes in it, is as good.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
import math
import pathlib
from typing import NamedTuple

from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import plan as plan_lib

METRICS_FILE = "private_metrics.jsonl"


class Release(NamedTuple):
  """Private metrics of one update.

  Attributes:
    branch: of the ledger.
    step: the update, as the ledger counts: the first is 0.
    expected_batch_size: what the noisy sums were divided by.
    values: noisy means, by metric.
    noise: standard deviation of the noise in each of them.
  """

  branch: str
  step: int
  expected_batch_size: int
  values: Mapping[str, float]
  noise: Mapping[str, float]


class Mean(NamedTuple):
  """Private metrics of several updates: post-processing.

  Attributes:
    values: means over the updates' expected examples, by metric.
    noise: standard deviation of the noise in each of them.
  """

  values: dict[str, float]
  noise: dict[str, float]


def mean(releases: Sequence[Release]) -> Mean:
  """The metrics' means over some updates, each weighted by its batch size.

  Formal guarantee: post-processing; the noise of different updates is
  independent, so that its variances add.

  Args:
    releases: at least one.
  """
  total = sum(release.expected_batch_size for release in releases)
  weights = [release.expected_batch_size / total for release in releases]
  names = list(releases[0].values)
  pairs = list(zip(weights, releases, strict=True))
  return Mean(
    {name: math.fsum(w * r.values[name] for w, r in pairs) for name in names},
    {
      name: math.hypot(*(w * r.noise[name] for w, r in pairs)) for name in names
    },
  )


def resume(directory: pathlib.Path, branch: str, step: int) -> None:
  """Forgets what a branch is about to release again, to the same bit.

  Args:
    directory: MODEL_DIR.
    branch: the open branch.
    step: the first update that it will make.

  Raises:
    OSError: the file cannot be written.
  """
  path = directory / METRICS_FILE
  if not path.exists():
    return
  kept = [
    release
    for release in read(directory)
    if release.branch != branch or release.step < step
  ]
  draft = directory / f".{METRICS_FILE}.draft"
  draft.write_text("".join(map(_line, kept)), encoding="utf-8")
  draft.replace(path)


def append(directory: pathlib.Path, releases: Iterable[Release]) -> None:
  """Adds updates to the file.

  Args:
    directory: MODEL_DIR.
    releases: in the order in which they were made.

  Raises:
    OSError: the file cannot be written.
  """
  with open(directory / METRICS_FILE, "a", encoding="utf-8") as file:
    file.write("".join(map(_line, releases)))


def read(directory: pathlib.Path) -> list[Release]:
  """All updates of MODEL_DIR's file, in order; none without a file.

  A line that cannot be read is left out: a crash may have cut it off.
  """
  path = directory / METRICS_FILE
  if not path.exists():
    return []
  text = path.read_text(encoding="utf-8", errors="replace")
  found = [_release(line) for line in text.splitlines()]
  return [release for release in found if release is not None]


def of_last_branch(
  ledger: ledger_lib.Ledger, releases: Iterable[Release]
) -> list[Release]:
  """The updates that led to the last one, and none of other branches.

  Args:
    ledger: of the same MODEL_DIR.
    releases: of any branch, the last one at the end.

  Returns:
    In the order of updates, each once; only what the ledger prices.
  """
  names = set(plan_lib.metric_ranges(ledger.header.get("plan", {})))
  priced = [
    release
    for release in releases
    if ledger.has(release.branch, release.step) and set(release.values) == names
  ]
  branches = {branch.name: branch for branch in ledger.branches}
  chosen: dict[int, Release] = {}
  name, end = priced[-1].branch if priced else "", math.inf
  while name:
    chosen |= {r.step: r for r in priced if r.branch == name and r.step < end}
    end = min(end, branches[name].fork_step)
    name = branches[name].parent
  return [chosen[step] for step in sorted(chosen)]


def _line(release: Release) -> str:
  told = {
    "branch": release.branch,
    "step": release.step,
    "expected_batch_size": release.expected_batch_size,
    "metrics": {
      name: {"value": value, "noise": release.noise[name]}
      for name, value in release.values.items()
    },
  }
  return json.dumps(told) + "\n"


def _release(line: str) -> Release | None:
  try:
    told = json.loads(line)
    metrics = told["metrics"]
    return Release(
      str(told["branch"]),
      int(told["step"]),
      int(told["expected_batch_size"]),
      {name: float(metric["value"]) for name, metric in metrics.items()},
      {name: float(metric["noise"]) for name, metric in metrics.items()},
    )
  except (ValueError, KeyError, TypeError, AttributeError):
    return None
