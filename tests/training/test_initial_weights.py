"""Weights that a run starts from: read, checked, and told of."""

import jax
import numpy as np
import pytest
import small_run

from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import report
from dptrain.training import initial_weights
from dptrain.training import loop
from dptrain.training import processes


def weights(seed=1):
  model = small_run.make_run("unused").model
  return jax.tree.map(np.asarray, model.init(jax.random.key(seed)))


def written(path, tree):
  names = {
    jax.tree_util.keystr(key, simple=True, separator="/"): leaf
    for key, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  np.savez(path, **names)
  return str(path)


def train(model_dir, **settings):
  given = initial_weights.InitialWeights(**settings)
  run = small_run.make_run(model_dir, initial_weights=given, rate=1e-12)
  return loop.train(run, small_run.records())


def test_training_starts_from_an_npz(tmp_path):
  given = weights()
  path = written(tmp_path / "w.npz", given)
  train(tmp_path / "run", path=path, declared_public=True)
  _, state = small_run.newest_state(tmp_path / "run")
  for name, array in given.items():
    np.testing.assert_allclose(state[f"/params/{name}"], array, atol=1e-6)
  (piece,) = ledger_lib.read(tmp_path / "run").public
  assert piece.what == "the initial weights"
  assert len(piece.fingerprint) == 64


def test_training_starts_from_another_run_and_says_so(tmp_path):
  small_run.train(tmp_path / "first", steps=2, sizes=(20, 20), fixed_seed=None)
  train(tmp_path / "second", path=str(tmp_path / "first"))
  _, first = small_run.newest_state(tmp_path / "first")
  _, second = small_run.newest_state(tmp_path / "second")
  for name in first:
    if name.startswith("/params"):
      np.testing.assert_allclose(first[name], second[name], atol=1e-6)
  ledger = ledger_lib.read(tmp_path / "second")
  assert not ledger.public
  told = " ".join(report.make_report(ledger).as_text().split())
  assert "the run that made them costs what its own ledger says" in told


def test_weights_of_a_run_without_a_claim_are_told_as_such(tmp_path):
  small_run.train(tmp_path, steps=2, sizes=(20, 20), fixed_seed=7)
  told = initial_weights.InitialWeights(path=str(tmp_path)).unprotected()
  assert "the run that made them makes no privacy claim" in told


def test_undeclared_weights_are_reported_as_unprotected(tmp_path):
  path = written(tmp_path / "w.npz", weights())
  train(tmp_path / "run", path=path)
  told = ledger_lib.read(tmp_path / "run").unprotected
  assert any("initial weights were given" in text for text in told)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda w: {**w, "mix": w["mix"][:3]}, r"mix is \(3, 16\) there and"),
    (lambda w: {**w, "other": w["mix"]}, "other is .* there and absent here"),
    (
      lambda w: {"mix": w["mix"], "tokens": w["tokens"]},
      "positions is absent there",
    ),
    (lambda w: {**w, "mix": np.nan * w["mix"]}, "not finite, in mix"),
  ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
  path = written(tmp_path / "w.npz", change(weights()))
  with pytest.raises(ValueError, match=message):
    train(tmp_path / "run", path=path)
  assert not (tmp_path / "run" / "privacy_ledger.jsonl").read_bytes()


def test_what_is_no_weights_is_refused(tmp_path):
  with pytest.raises(
    ValueError, match=r"neither an \.npz file nor a MODEL_DIR"
  ):
    train(tmp_path / "run", path=str(tmp_path))
  broken = tmp_path / "broken.npz"
  broken.write_bytes(b"no zip")
  with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
    train(tmp_path / "run", path=str(broken))
  with pytest.raises(ValueError, match="fresh parameters need no declaration"):
    initial_weights.InitialWeights(declared_public=True)


def test_processes_compare_the_weights(tmp_path, monkeypatch):
  told = []
  monkeypatch.setattr(
    processes, "check_equal", lambda _, parts: told.append(parts)
  )
  for seed in (1, 2):
    path = written(tmp_path / f"{seed}.npz", weights(seed))
    train(tmp_path / f"run_{seed}", path=path)
  train(tmp_path / "fresh")
  one, other, fresh = (t["weights"] for t in told if "weights" in t)
  assert len({one, other, fresh}) == 3
  assert not fresh
