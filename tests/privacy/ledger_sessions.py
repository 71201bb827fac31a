"""Sessions at a ledger, for its tests."""

import json

from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy.plan import PrivacySettings
from dptrain.privacy.plan import make_plan
from dptrain.privacy.schedule import BatchSchedule
from dptrain.privacy.schedule import Phase

PLAN = make_plan(
  PrivacySettings(
    schedule=BatchSchedule([Phase(10, 10, 6), Phase(20, 20, 40)]),
    delta=1e-6,
    noise_multiplier=1.1,
  ),
  1000,
)


def start(ledger, plan=PLAN, *, corpus="c", seed="s", fixed_seed=False):
  ledger.start(plan, corpus=corpus, seed=seed, fixed_seed=fixed_seed)


def go_on(ledger, branch="", step=0, *, lineage="l", environment="e"):
  return ledger.open_branch(
    checkpoint_branch=branch,
    checkpoint_step=step,
    lineage=lineage,
    environment=environment,
  ).name


def record(ledger, branch, first, end):
  for step in range(first, end):
    ledger.record(branch, step, PLAN.release(step))


def train(directory, end=8):
  """A session from the start, whatever is written down already."""
  with ledger_lib.opened(directory) as ledger:
    start(ledger)
    ledger.declare_unprotected("the vocabulary")
    branch = go_on(ledger)
    record(ledger, branch, 0, end)
    return branch


def file_of(directory):
  return directory / ledger_lib.LEDGER_FILE


def entries(directory):
  return [json.loads(x) for x in file_of(directory).read_bytes().splitlines()]


def state(ledger):
  """All that a ledger knows."""
  lines = vars(ledger._lines)
  return {
    name: value
    for name, value in {**vars(ledger), **lines}.items()
    if name not in ("_file", "path", "_lines", "_take")
  }
