"""Ledgers that contradict themselves, though their hashes chain, are named."""

import hashlib
import json

import pytest

from dptrain import cli
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.reports import report


def make(directory, steps=4):
  plan = plan_lib.make_plan(
    plan_lib.PrivacySettings(
      schedule=schedule.constant(10, 20), delta=1e-6, noise_multiplier=2.0
    ),
    100,
  )
  with ledger_lib.opened(directory) as ledger:
    ledger.start(plan, corpus="c", seed="s", fixed_seed=False)
    branch = ledger.open_branch(
      checkpoint_branch="", checkpoint_step=0, lineage="l", environment="e"
    )
    for step in range(steps):
      ledger.record(branch.name, step, plan.release(step))
  return directory / ledger_lib.LEDGER_FILE


def rechained(path, change):
  """Rewrites the lines, as `change` makes them of the old, with true hashes."""
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  previous, text = "0" * 64, ""
  for line in change(lines):
    line = json.dumps({**line, "previous": previous}, sort_keys=True) + "\n"
    previous = hashlib.sha256(line.encode()).hexdigest()
    text += line
  path.write_text(text)


def test_what_was_not_changed_is_read(tmp_path):
  path = make(tmp_path)
  rechained(path, lambda lines: lines)
  assert ledger_lib.read(tmp_path).num_releases


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (lambda x: [*x, x[0]], "a second plan"),
    (lambda x: x[1:], "a ledger begins with its plan"),
    (
      lambda x: [*x, {**x[-1], "noise_multiplier": 50.0}],
      "stands where 4 must",
    ),
    (lambda x: [*x[:3], *x[4:]], "update 2 stands where 1 must"),
    (lambda x: [*x[:-1], {**x[-1], "round": 0}], "a round of its own"),
    (lambda x: [*x[:-1], {**x[-1], "branch": "b" * 64}], "was never opened"),
    (lambda x: [*x, x[1]], "is opened again"),
    (lambda x: [*x, {"kind": "note"}], "unknown kind 'note'"),
  ],
)
def test_a_contradiction_is_named_by_its_line(tmp_path, change, told):
  path = make(tmp_path)
  rechained(path, change)
  with pytest.raises(ledger_lib.LedgerError, match=rf"line \d+ is .*{told}"):
    ledger_lib.read(tmp_path)


def test_a_report_refuses_a_ledger_that_ends_before_a_checkpoint(
  tmp_path, capsys
):
  path = make(tmp_path)
  ledger = ledger_lib.read(tmp_path)
  metadata = tmp_path / "checkpoints" / "4" / "metadata"
  metadata.mkdir(parents=True)
  told = json.dumps({"ledger": ledger.segments()})
  (metadata / "metadata").write_text(told)
  assert cli.main(["report", str(tmp_path)]) == 0
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join(lines[:-1]))
  assert cli.main(["report", str(tmp_path)]) == 2
  assert "lacks update 3 of branch" in capsys.readouterr().err


def test_a_ledger_of_before_there_were_other_samplings_is_read(tmp_path):
  path = make(tmp_path)
  later = ("sampling", "bands", "truncation_deviations", "unit_sampling")
  later += ("public_num_examples", "records_per_unit", "unit_name")
  later += ("private_metrics_share", "noise_coefficients")

  def older(lines):
    plan = {k: v for k, v in lines[0]["plan"].items() if k not in later}
    return [{**lines[0], "plan": plan}, *lines[1:]]

  before = report.make_report(ledger_lib.read(tmp_path))
  rechained(path, older)
  after = report.make_report(ledger_lib.read(tmp_path))
  assert after.epsilon == before.epsilon
  assert after.as_text() == before.as_text()
  make(tmp_path, steps=0)  # and is gone on with
