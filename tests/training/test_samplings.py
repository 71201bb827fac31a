"""Runs under every sampling: what the ledger says is what was drawn."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
import small_run

from dptrain.privacy import accounting
from dptrain.privacy import draws
from dptrain.privacy import keys
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import noise
from dptrain.reports import report as report_lib
from dptrain.reports import wording
from dptrain.training import lineage
from dptrain.training import loop
from dptrain.training import step as step_lib

KINDS = {
  "truncated_poisson": ("zero_out", {}),
  "without_replacement": ("replace_one", {}),
  "shuffled": ("zero_out", {}),
  "balls_in_bins": ("add_or_remove_one", {"public_num_examples": 210}),
  "cyclic_poisson": ("zero_out", {"bands": 1}),
}


def run_with(model_dir, kind, steps=6, sizes=(20, 40), **options):
  relation, settings = KINDS[kind]
  if kind == "balls_in_bins":
    sizes = (40, 40)
  run = small_run.make_run(model_dir, steps=steps, sizes=sizes, **options)
  return dataclasses.replace(
    run,
    privacy=dataclasses.replace(
      run.privacy, sampling=kind, relation=relation, **settings
    ),
  )


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_prices_what_the_loop_drew(kind, tmp_path, monkeypatch):
  drawn = []
  draw = draws.drawn

  def watched(*arguments):
    sample = draw(*arguments)
    drawn.append(sample.part(0, sample.size))
    return sample

  monkeypatch.setattr(draws, "drawn", watched)
  run = run_with(tmp_path, kind)
  result = loop.train(run, small_run.records())
  ledger = ledger_lib.read(tmp_path)
  plan = ledger.header["plan"]
  assert plan["sampling"] == kind
  assert len(drawn) == 6
  if kind == "without_replacement":
    assert [len(indices) for indices in drawn] == [20] * 3 + [40] * 3
  if kind == "shuffled":
    # 200 records: all six batches lie in one pass.
    assert len(np.unique(np.concatenate(drawn))) == 180
    assert ledger.releases() == [accounting.Releases(1, 1.0, 4.0)]
  if kind == "balls_in_bins":
    # The sixth update is the first bin's second turn.
    assert ledger.releases() == [accounting.Releases(2, 1.0, 4.0)]
  if kind == "truncated_poisson":
    caps = {line["truncated_batch_size"] for line in releases(tmp_path)}
    assert caps == {
      int(np.ceil(b + 6 * (b * (1 - b / 200)) ** 0.5)) for b in (20, 40)
    }
  bound = accounting.epsilon(ledger.releases(), 1e-5, plan["relation"])
  assert result.epsilon == bound.value
  told = report_lib.make_report(ledger)
  assert told.num_releases == 6
  assert told.num_rounds == sum(r.count for r in ledger.releases())
  text = told.as_text()
  assert wording.SAMPLING_TEXT[kind].split(":")[0] in text
  assert ("number of records is treated as public" in text) == (
    kind != "balls_in_bins"
  )
  json.loads(told.as_json())


def releases(model_dir):
  return small_run.ledger_lines(model_dir, "release")


@pytest.mark.parametrize("kind", ["shuffled", "truncated_poisson"])
def test_a_run_goes_on_as_if_it_had_not_stopped(kind, tmp_path):
  whole, halves = tmp_path / "whole", tmp_path / "halves"
  loop.train(run_with(whole, kind), small_run.records())
  loop.train(run_with(halves, kind), small_run.records())
  small_run.cut(halves, 4)
  loop.train(run_with(halves, kind), small_run.records())
  small_run.assert_same(whole, halves)


def test_one_band_trains_bit_for_bit_as_poisson(tmp_path, monkeypatch):
  # Another plan is another branch, whose keys differ: here, the same keys.
  monkeypatch.setattr(lineage, "lineage", lambda **_: "same")
  one, other = tmp_path / "one", tmp_path / "other"
  loop.train(small_run.make_run(one), small_run.records())
  loop.train(run_with(other, "cyclic_poisson"), small_run.records())
  (_, state), (_, same) = map(small_run.newest_state, (one, other))
  for name, array in state.items():
    np.testing.assert_array_equal(array, same[name], err_msg=name)
  costs = [ledger_lib.read(folder).releases() for folder in (one, other)]
  assert costs[0] == costs[1]


def test_a_budget_stops_between_rounds_only(tmp_path):
  run = run_with(tmp_path, "shuffled", steps=20, sizes=(40, 40))
  three = accounting.epsilon([accounting.Releases(3, 1.0, 4.0)], 1e-5).value
  run = dataclasses.replace(
    run, privacy=dataclasses.replace(run.privacy, target_epsilon=three + 1e-6)
  )
  result = loop.train(run, small_run.records())
  # Five batches of 40 are a pass over 200 records, and three passes fit.
  assert result.step == 15
  assert result.epsilon <= three + 1e-6


def banded(model_dir, bands=3, **options):
  run = small_run.make_run(model_dir, **options)
  privacy = dataclasses.replace(
    run.privacy, sampling="cyclic_poisson", bands=bands
  )
  return dataclasses.replace(run, privacy=privacy)


def test_correlated_noise_is_what_the_strategy_says(tmp_path, monkeypatch):
  # Nobody takes part and the optimizer adds up: what moves is the noise.
  nobody = draws.Whole(np.array([], np.int64))
  monkeypatch.setattr(draws, "drawn", lambda *_: nobody)
  run = banded(tmp_path, optimizer="sgd", rate=1.0, clipping="flat")
  run = dataclasses.replace(run, optimizer=optax.sgd(1.0))
  seen = []
  finish = step_lib.PrivateStep.finish

  def watched(self, params, opt_state, accumulator, **rest):
    new = finish(self, params, opt_state, accumulator, **rest)
    moved = jax.tree.map(
      lambda a, b: (a - b) * rest["expected_batch_size"], params, new[0]
    )
    jax.debug.callback(lambda tree: seen.append(tree), moved)
    return new

  monkeypatch.setattr(step_lib.PrivateStep, "finish", watched)
  loop.train(run, small_run.records())
  header = small_run.ledger_lines(tmp_path, "plan")[0]["plan"]
  coefficients = header["noise_coefficients"]
  assert len(coefficients) == 3
  seed = keys.fixed_seed(7)
  branch = small_run.ledger_lines(tmp_path, "branch")[0]["name"]
  z = [
    noise.gaussian_like(
      seed.key("noise", branch, s), (seen[0], None, None), 1.0
    )
    for s in range(6)
  ]
  strategy = sum(
    np.diag(np.full(6 - k, c), -k) for k, c in enumerate(coefficients)
  )
  for name in seen[0]:
    rows = np.stack([np.asarray(x[0][name]).ravel() for x in z])
    expected = 4.0 * 0.1 * np.linalg.solve(strategy, rows.astype(float))
    found = np.stack([np.asarray(x[name]).ravel() for x in seen])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_correlated_noise_goes_on_after_a_stop_and_is_never_saved(tmp_path):
  whole, halves = tmp_path / "whole", tmp_path / "halves"
  loop.train(banded(whole), small_run.records())
  loop.train(banded(halves), small_run.records())
  small_run.cut(halves, 4)
  loop.train(banded(halves), small_run.records())
  small_run.assert_same(whole, halves)
  plain = tmp_path / "plain"
  loop.train(small_run.make_run(plain), small_run.records())
  saved = [
    small_run.newest_state(folder)[1].keys() for folder in (plain, whole)
  ]
  assert saved[0] == saved[1]


def test_rounds_of_correlated_noise_cost_one_update_each(tmp_path):
  result = loop.train(banded(tmp_path), small_run.records())
  # Groups of 66; a round costs what its larger probability does.
  prices = [accounting.Releases(1, b / 66, 4.0) for b in (20, 40)]
  assert result.epsilon == accounting.epsilon(prices, 1e-5).value
  text = report_lib.make_report(ledger_lib.read(tmp_path)).as_text()
  assert "noise of 3 updates in a row is correlated (BandMF)" in text


def test_no_error_tells_how_many_records_there_are(tmp_path):
  """Fewer than a physical batch, where their number is private."""
  run = small_run.make_run(tmp_path, steps=2, sizes=(4, 4))
  privacy = dataclasses.replace(
    run.privacy, relation="add_or_remove_one", public_num_examples=100
  )
  run = dataclasses.replace(run, privacy=privacy)
  assert loop.train(run, small_run.records(10)).step == 2
  told = [path.read_text() for path in tmp_path.glob("privacy_*")]
  assert all('"num_examples": 10,' not in text for text in told)
  assert any("100 (a public estimate)" in text for text in told)
