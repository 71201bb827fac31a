"""A term of public records in every update: not clipped, not noised, free."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from dptrain.clipping import rules
from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import report
from dptrain.reports import several_runs
from dptrain.training import loop
from dptrain.training import public_data
from dptrain.training import step as step_lib

PUBLIC = public_data.PublicData(task="given", weight=0.5, batch_size=12)


def train(model_dir, public=PUBLIC, **options):
  records = small_run.records()._replace(public=small_run.store(40, seed=5))
  run = small_run.make_run(model_dir, public_data=public, **options)
  return loop.train(run, records)


def linear_loss(params, batch, keys):
  del keys
  return jnp.sum(batch["x"] * params["w"], axis=-1), {}


@pytest.mark.parametrize("kind", ["flat", "normalized", "automatic"])
def test_the_term_is_the_weighted_mean_gradient_beside_the_noised_sum(kind):
  draw = np.random.default_rng(0)
  private, public = draw.normal(size=(2, 8, 3))
  rule = rules.ClippingRule(kind, 0.25)
  params = {"w": jnp.zeros(3)}
  step = step_lib.PrivateStep(linear_loss, rule, optimizer=_as_it_is())
  term = public_data.PublicTerm(linear_loss, weight=0.5, batch_size=6)

  def batch(x, there):
    ids = np.arange(8, dtype=np.int32)
    return {
      "x": jnp.asarray(x, jnp.float32),
      "example_ids": ids,
      "is_padding": ids >= there,
    }

  key = jax.random.key(0, impl="threefry2x32")
  total = step.zeros(params, batch(private, 8))
  total = step.accumulate(params, total, batch(private, 8), key)
  sums = term.accumulate(params, term.zeros(params), batch(public, 6), key)

  def finished(public_gradient):
    return step.finish(
      params,
      step.init(params),
      total,
      noise_key=key,
      noise_multiplier=1.0,
      expected_batch_size=4.0,
      public_gradient=public_gradient,
    )[0]["w"]

  scale = 4.0 if kind == "normalized" else 1.0
  expected = 0.5 * public[:6].mean(axis=0) * scale
  found = np.asarray(finished(sums)) - np.asarray(finished(None))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def _as_it_is():
  import optax

  return optax.identity()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
  directory = tmp_path_factory.mktemp("mixed")
  return directory, train(directory)


def test_public_records_cost_nothing_and_are_named(mixed, tmp_path):
  directory, result = mixed
  alone = small_run.train(tmp_path)
  assert result.epsilon == alone.epsilon
  (piece,) = ledger_lib.read(directory).public
  assert "40 records of 'given'" in piece.what
  assert "weight 0.5" in piece.what
  assert piece.fingerprint == small_run.store(40, seed=5).content_digest().hex()
  text = report.make_report(ledger_lib.read(directory)).as_text()
  assert "Declared public (taken on trust; fingerprints)" in text
  assert piece.fingerprint[:16] in text
  assert (
    "Declared public"
    not in report.make_report(ledger_lib.read(tmp_path)).as_text()
  )
  joint = several_runs.make_joint_report({"one": ledger_lib.read(directory)})
  assert "40 records of 'given'" in " ".join(joint.as_text().split())


def test_they_change_the_parameters(mixed, tmp_path):
  directory, _ = mixed
  small_run.train(tmp_path)
  (_, one), (_, other) = map(small_run.newest_state, (directory, tmp_path))
  assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_a_run_with_public_records_replays_bit_for_bit(mixed, tmp_path):
  directory, _ = mixed
  copy = tmp_path / "copy"
  shutil.copytree(directory, copy)
  for name in ("4", "6"):
    shutil.rmtree(copy / "checkpoints" / name)
  train(copy)
  small_run.assert_same(directory, copy)
  assert len(ledger_lib.read(copy).branches) == 1


@pytest.mark.parametrize("change", [{"weight": 0.6}, {"batch_size": 13}])
def test_another_term_is_another_branch(mixed, tmp_path, change):
  directory, _ = mixed
  copy = tmp_path / "copy"
  shutil.copytree(directory, copy)
  for name in ("4", "6"):
    shutil.rmtree(copy / "checkpoints" / name)
  train(copy, dataclasses.replace(PUBLIC, **change))
  assert len(ledger_lib.read(copy).branches) == 2


@dataclasses.dataclass(frozen=True)
class PartialModel(small_run.QuickModel):
  """Weighs rows that are not private examples differently."""

  factor: float = 1.0

  def losses(self, params, batch, keys=None):
    losses, aux = super().losses(params, batch, keys)
    return losses if "example_ids" in batch else self.factor * losses, aux


def test_a_model_that_treats_public_rows_otherwise_is_another_branch(tmp_path):
  records = small_run.records(validation=False)
  records = records._replace(public=small_run.store(40, seed=5))
  for factor in (1.0, 2.0):
    run = small_run.make_run(
      tmp_path, public_data=PUBLIC, validation_split=None
    )
    model = PartialModel(run.model.bert, factor=factor)
    loop.train(dataclasses.replace(run, model=model), records)
    for name in ("4", "6"):
      shutil.rmtree(tmp_path / "checkpoints" / name)
  assert len(ledger_lib.read(tmp_path).branches) == 2


def test_updates_are_sampled_and_noised_as_without_public_records(
  mixed, tmp_path
):
  directory, _ = mixed
  small_run.train(tmp_path)
  one, other = map(ledger_lib.read, (directory, tmp_path))
  assert one.releases() == other.releases()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"weight": 0.0}, "PublicData.weight=0.0 must be a positive"),
    ({"weight": float("nan")}, "PublicData.weight=nan must be a positive"),
    ({"batch_size": 0}, "PublicData.batch_size=0 must be a whole number"),
    ({"task": "a", "prepared": "b"}, "are both given; name one place"),
  ],
)
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    public_data.PublicData(**settings)


def test_a_public_corpus_too_small_is_refused_before_anything(tmp_path):
  with pytest.raises(ValueError, match="batch_size=41, but 'given' has 40"):
    train(tmp_path, dataclasses.replace(PUBLIC, batch_size=41))
  assert not (tmp_path / "privacy_ledger.jsonl").read_bytes()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_runs_own_records_are_not_public(tmp_path, split):
  records = small_run.records()
  own = getattr(records, split)
  run = small_run.make_run(tmp_path, public_data=PUBLIC)
  with pytest.raises(ValueError, match=f"very records .* own split '{split}'"):
    loop.train(run, records._replace(public=own))
  assert not (tmp_path / "privacy_ledger.jsonl").read_bytes()
