"""Several runs under one guarantee."""

import json

import pytest

from dptrain import cli
from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import others
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.privacy.accounting import Releases
from dptrain.reports import several_runs


def run(
  folder,
  *,
  batch=50,
  size=1000,
  steps=10,
  delta=1e-5,
  seed="",
  fixed_seed=False,
):
  folder.mkdir()
  settings = plan_lib.PrivacySettings(
    schedule=schedule.constant(batch, steps), delta=delta, noise_multiplier=1.5
  )
  with ledger_lib.opened(folder) as ledger:
    plan = plan_lib.make_plan(settings, size)
    ledger.start(
      plan,
      corpus=folder.name,
      seed=seed or folder.name,
      fixed_seed=fixed_seed,
    )
    branch = ledger.open_branch(
      checkpoint_branch="", checkpoint_step=0, lineage="l", environment="e"
    )
    for step in range(steps):
      ledger.record(branch.name, step, plan.release(step))
  return ledger_lib.read(folder)


def test_one_corpus_composes_everything(tmp_path):
  ledgers = {"a": run(tmp_path / "a"), "b": run(tmp_path / "b", batch=80)}
  made = several_runs.make_joint_report(ledgers)
  both = [Releases(10, 0.05, 1.5), Releases(10, 0.08, 1.5)]
  assert made.epsilon == accounting.epsilon(both, 1e-5).value
  assert made.epsilon > max(made.runs.values())
  assert "sequential composition" in made.as_text()


def test_disjoint_corpora_cost_what_the_dearest_costs(tmp_path):
  ledgers = {
    "a": run(tmp_path / "a", delta=1e-6),
    "b": run(tmp_path / "b", size=500, delta=1e-5),
  }
  made = several_runs.make_joint_report(ledgers, disjoint=True)
  assert made.delta == 1e-5
  at_that_delta = accounting.epsilon([Releases(10, 0.05, 1.5)], 1e-5).value
  assert made.runs["a"] == at_that_delta
  assert made.epsilon == made.runs["b"] > made.runs["a"]
  assert "parallel composition" in made.as_text()


def test_corpora_of_different_sizes_are_not_one(tmp_path):
  ledgers = {"a": run(tmp_path / "a"), "b": run(tmp_path / "b", size=500)}
  with pytest.raises(
    ledger_lib.LedgerError,
    match=r"b and a cannot be composed: num_examples is 500 .* --disjoint",
  ):
    several_runs.make_joint_report(ledgers)


@pytest.mark.parametrize("disjoint", [True, False])
def test_copies_of_one_model_dir_are_refused(tmp_path, disjoint):
  ledgers = {name: run(tmp_path / name, seed="same") for name in "ab"}
  with pytest.raises(
    ledger_lib.LedgerError, match=r"b and a are copies of one MODEL_DIR"
  ):
    several_runs.make_joint_report(ledgers, disjoint=disjoint)


def test_one_fixed_seed_ends_the_claim(tmp_path):
  ledgers = {
    "a": run(tmp_path / "a"),
    "b": run(tmp_path / "b", fixed_seed=True),
  }
  made = several_runs.make_joint_report(ledgers)
  assert not made.claim
  assert "NO PRIVACY CLAIM" in made.as_text()


def test_on_the_command_line(tmp_path, capsys):
  run(tmp_path / "a")
  run(tmp_path / "b")
  names = [str(tmp_path / name) for name in "ab"]
  assert cli.main(["report", *names, "--format=json"]) == 0
  told = json.loads(capsys.readouterr().out)
  assert list(told["runs"]) == names
  assert cli.main(["report", *names, "--disjoint"]) == 0
  text = capsys.readouterr().out
  assert all(len(line) <= 80 or "/" in line for line in text.splitlines())
  for wrong in ([names[0], names[0]], [*names, "--format=html"]):
    assert cli.main(["report", *wrong]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_one_vocabulary_of_several_runs_is_paid_once(tmp_path):
  vocabulary = others.OtherRelease("the vocabulary", "abc", 3.0, 4e-6)
  ledgers = {}
  for name in ("a", "b"):
    run(tmp_path / name)
    with ledger_lib.opened(tmp_path / name) as ledger:
      ledger.record_other(vocabulary)
      if name == "b":
        ledger.record_other(vocabulary._replace(name="def"))
    ledgers[name] = ledger_lib.read(tmp_path / name)
  updates = Releases(10, 0.05, 1.5)
  made = several_runs.make_joint_report(ledgers)
  everything = [updates, updates, *[Releases(1, 1.0, 3.0)] * 2]
  expected = accounting.epsilon(everything, 1e-5 - 8e-6).value
  assert made.epsilon == pytest.approx(expected, rel=1e-9)
  alone = accounting.epsilon([updates, Releases(1, 1.0, 3.0)], 1e-5 - 4e-6)
  assert made.runs["a"] == pytest.approx(alone.value, rel=1e-9)
