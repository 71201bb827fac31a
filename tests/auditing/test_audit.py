"""Whole audits: the true code passes, the bound is worth something."""

import json
import os

import numpy as np
import pytest
import small_audit
import small_run

from dptrain.auditing import audit
from dptrain.auditing import canaries
from dptrain.data import store as store_lib
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import noise as noise_lib
from dptrain.training import loop


def found(verdict):
  """What an audit that fails has found: for the message of an assertion."""
  return verdict.as_text()


# Three of the twenty runs of tools/audit_calibration.py.
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_bound_is_below_the_claim_and_above_a_third_of_it(tmp_path, seed):
  verdict = small_audit.audited(tmp_path, fixed_seed=seed)
  assert verdict.passed, found(verdict)
  assert verdict.epsilon >= 4
  assert verdict.epsilon / 3 <= verdict.lower_bound < verdict.epsilon
  assert verdict.measured.noise_multiplier == pytest.approx(2.0, rel=0.08)
  assert verdict.measured.sensitivity == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("clipping", ["normalized", "automatic"])
def test_samples_and_other_clipping_rules(tmp_path, clipping):
  half = small_audit.ALL // 2
  verdict = small_audit.audited(
    tmp_path,
    clipping=clipping,
    sizes=(half, half // 2),
    steps=6,
    noise=1.0,
  )
  assert verdict.passed, found(verdict)
  assert verdict.guesses.correct > 0.6 * verdict.guesses.made
  assert verdict.measured.noise_multiplier == pytest.approx(1.0, rel=0.08)
  assert verdict.measured.sensitivity == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
  "privacy",
  [
    {"sampling": "shuffled"},
    {"sampling": "cyclic_poisson", "bands": 2},
    {"sampling": "balls_in_bins"},
    {"sampling": "without_replacement", "relation": "replace_one"},
    {"private_metrics_share": 0.2},
  ],
  ids=str,
)
def test_other_samplings_and_releases_pass(tmp_path, privacy):
  # Not a half: of balls in bins, all records are in one bin then.
  most = 3 * small_audit.ALL // 5
  size = most // privacy.get("bands", 1)
  verdict = small_audit.audited(
    tmp_path, sizes=(size, size), noise=1.0, privacy=privacy
  )
  assert verdict.passed, found(verdict)
  assert verdict.guesses.correct > 0.6 * verdict.guesses.made
  if "bands" in privacy:
    assert verdict.measured is None
  else:
    assert verdict.measured.sensitivity == pytest.approx(1.0, abs=0.2)


def of_users(num_records, per_user):
  """Records of users, with as many each."""
  made = small_run.records(num_records, validation=False)
  users = np.arange(num_records, dtype=np.uint64) // per_user
  return made._replace(
    train=store_lib.RecordStore(made.train.tokens, users, users)
  )


@pytest.mark.parametrize("unit", ["document", "user"])
def test_units_are_canaries(tmp_path, unit):
  verdict = small_audit.audited(
    tmp_path,
    records=of_users(90, 3),
    canaries=400,
    guesses=100,
    sizes=(430, 430),
    physical_batch_size=215,
    # 92 are right on average; under the noise of the others 85, and below 80
    # too often for a test.
    noise=1.5,
    privacy={"unit": unit, "records_per_unit": 2},
  )
  assert verdict.passed, found(verdict)
  assert verdict.guesses.correct >= 80
  assert verdict.measured.sensitivity == pytest.approx(1.0, abs=0.4)
  plan = ledger_lib.read(tmp_path).header["plan"]
  assert plan["num_examples"] == 430
  text = " ".join((tmp_path / "privacy_report.txt").read_text().split())
  assert f"400 of the {unit}s are canaries" in text


def test_groups_of_sampled_records_are_refused(tmp_path):
  privacy = {
    "unit": "user",
    "records_per_unit": 2,
    "unit_sampling": "records",
  }
  with pytest.raises(ValueError, match=r"unit_sampling='records' cannot be au"):
    small_audit.audited(tmp_path / "new", privacy=privacy)
  assert not (tmp_path / "new").exists()


def test_more_noise_hides_the_coins(tmp_path):
  verdict = small_audit.audited(tmp_path, noise=200.0)
  assert verdict.passed, found(verdict)
  assert verdict.lower_bound < 1.0
  assert verdict.guesses.correct < 140


def test_a_black_box_audit_sees_that_noise_was_forgotten(tmp_path, monkeypatch):
  drawn = noise_lib.gaussian_like
  monkeypatch.setattr(
    noise_lib,
    "gaussian_like",
    lambda key, tree, stddev: drawn(key, tree, stddev / 1000),
  )
  # Many updates on little text: what is in is learned by heart.
  verdict = small_audit.audited(
    tmp_path,
    mode="black_box",
    canaries=100,
    num_records=50,
    guesses=25,
    sizes=(150, 150),
    physical_batch_size=50,
    steps=150,
    noise=40.0,
    rate=0.03,
    clipping="normalized",
    width=32,
  )
  assert 1 < verdict.epsilon < 2
  assert verdict.measured is None
  assert verdict.guesses.made == 25
  assert verdict.guesses.correct >= 24
  assert verdict.lower_bound > verdict.epsilon
  assert not verdict.passed


def test_a_black_box_audit_of_the_true_code_passes(tmp_path):
  verdict = small_audit.audited(tmp_path, mode="black_box")
  assert verdict.passed, found(verdict)
  assert verdict.guesses.made == 200


def test_an_audit_says_what_it_is_and_is_repeated_for_nothing(
  tmp_path, monkeypatch
):
  options = {
    "canaries": 200,
    "sizes": (400, 400),
    "physical_batch_size": 200,
    "fixed_seed": None,
  }
  verdict = small_audit.audited(tmp_path, **options)
  assert verdict.claim
  for name in ("privacy_report.txt", "privacy_ledger.jsonl"):
    text = " ".join((tmp_path / name).read_text().split())
    assert "AN AUDIT, NOT A MODEL TO PUBLISH: 200 of the records" in text
  written = [(tmp_path / n).read_text() for n in ("audit.txt", "audit.json")]
  assert written == [verdict.as_text(), verdict.as_json()]
  before = small_run.ledger_bytes(tmp_path)
  # An interrupted audit goes on, a finished one has nothing left to do.
  monkeypatch.setattr(loop._Loop, "_update", None)
  assert small_audit.audited(tmp_path, **options) == verdict
  assert small_run.ledger_bytes(tmp_path) == before
  # Nor is it a run that training would go on with.
  with pytest.raises(ledger_lib.LedgerError, match="belongs to another plan"):
    loop.train(
      small_audit.make_run(
        tmp_path, sizes=(200, 200), fixed_seed=None, physical_batch_size=200
      ),
      small_run.records(small_audit.RECORDS),
    )


def test_the_observer_changes_nothing_of_what_is_trained(tmp_path):
  # The same records and seed, with and without the canaries' own losses: what
  # is in the model differs, what the optimizer is and sees does not.
  small_audit.audited(
    tmp_path / "a", canaries=200, sizes=(400, 400), physical_batch_size=200
  )
  _, seen = small_run.newest_state(tmp_path / "a")
  small_run.train(tmp_path / "t", steps=2, validation_split=None)
  _, plain = small_run.newest_state(tmp_path / "t")
  ours = {
    name.replace("/model", "", 1): array.shape
    for name, array in seen.items()
    if name.startswith("/params/model")
  }
  assert ours == {n: a.shape for n, a in plain.items() if "/params" in n}
  inner = [a.shape for n, a in seen.items() if n.startswith("/opt_state/inner")]
  assert inner == [a.shape for n, a in plain.items() if "/opt_state" in n]
  leaves = [a for n, a in seen.items() if n.startswith("/params/canaries")]
  assert len(leaves) == 4
  for leaf in leaves:
    np.testing.assert_array_equal(leaf, np.ones(200))  # turned round 4 times


# --- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"canaries": 99}, "canaries=99 must be a whole number >= 100"),
    ({"mode": "grey"}, "mode='grey' is unknown; use one of 'white_box'"),
    ({"guesses": 0}, "guesses=0 must be a whole number >= 1"),
    ({"guesses": 1001}, "guesses=1001 exceeds the 1000 canaries"),
    ({"confidence": 0.5}, "confidence=0.5 must be above 0.5"),
    ({"confidence": 1.0}, "confidence=1.0 must be above 0.5 and below 1"),
  ],
)
def test_settings_that_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    audit.AuditSettings(**settings)


def test_a_clip_norm_that_adapts_is_refused_in_white_box_mode(tmp_path):
  run = small_audit.make_run(tmp_path / "new")
  object.__setattr__(run.privacy, "adaptive_quantile", 0.5)
  with pytest.raises(ValueError, match=r"adaptive_quantile=0\.5 cannot be"):
    audit.audit(run, audit.AuditSettings(), small_run.records())
  assert not (tmp_path / "new").exists()


def test_a_training_run_is_not_audited_in_its_own_folder(tmp_path):
  (tmp_path / ledger_lib.LEDGER_FILE).touch()
  with pytest.raises(ValueError, match="holds a training run"):
    small_audit.audited(tmp_path)
  assert not (tmp_path / canaries.SEED_FILE).exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(audit.jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="runs in one process, not in 2"):
    small_audit.audited(tmp_path)


# --- the command --------------------------------------------------------------


@pytest.mark.parametrize("noise", [2.0, 1.0])
def test_the_command_exits_with_1_if_the_claim_is_refuted(
  tmp_path, monkeypatch, capsys, noise
):
  from dptrain import cli
  from dptrain import configuration
  from dptrain.training import records as records_lib

  drawn = noise_lib.gaussian_like
  monkeypatch.setattr(
    noise_lib,
    "gaussian_like",
    lambda key, tree, stddev: drawn(key, tree, stddev * noise / 2.0),
  )
  run = small_audit.make_run(tmp_path)
  monkeypatch.setattr(configuration, "training_run", lambda *_: run)
  monkeypatch.setattr(
    records_lib,
    "read_records",
    lambda *_: small_run.records(small_audit.RECORDS),
  )
  status = cli.main(
    ["audit", "--gin_file=x", "--canaries=2000", "--format=json"]
  )
  told = json.loads(capsys.readouterr().out)
  assert status == (0 if noise == 2.0 else 1)
  assert told["passed"] is (noise == 2.0)
  assert told["guesses"]["canaries"] == 2000
  assert told["guesses"]["made"] == 200
  if noise == 1.0:
    assert "The noise multiplier is at most 1.0" in told["statement"]


def test_the_canaries_seed_is_of_the_operating_system(tmp_path):
  folders = [tmp_path / name for name in "ab"]
  for folder in folders:
    os.mkdir(folder)
  drawn = [canaries.load_or_create_seed(folder, None) for folder in folders]
  assert drawn[0] != drawn[1]
  assert canaries.load_or_create_seed(folders[0], None) == drawn[0]
  (folders[0] / canaries.SEED_FILE).write_text("no seed")
  with pytest.raises(ValueError, match="must hold 64 hexadecimal digits"):
    canaries.load_or_create_seed(folders[0], None)
