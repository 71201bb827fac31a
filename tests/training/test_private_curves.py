"""Private metrics of whole runs: their price, their file, their curves."""

import dataclasses
import shutil
from unittest import mock

import pytest
import small_run

from dptrain import cli
from dptrain.clipping import private_metrics
from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import released_metrics
from dptrain.training import loop
from dptrain.training import private_curves
from dptrain.training import progress


def private_run(directory, share=0.2, **options):
  run = small_run.make_run(directory, clipping="flat", **options)
  private = {"private_metrics_share": share, "private_metrics_max_loss": 5.0}
  privacy = dataclasses.replace(run.privacy, **private)
  return dataclasses.replace(run, privacy=privacy)


def train(directory, **options):
  return loop.train(private_run(directory, **options), small_run.records())


def kept(directory):
  return (directory / released_metrics.METRICS_FILE).read_bytes()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """MODEL_DIR of a whole run with metrics."""
  directory = tmp_path_factory.mktemp("measured")
  train(directory, log_period=1)
  return directory


def test_every_update_is_in_the_file_with_its_noise(measured):
  found = released_metrics.read(measured)
  assert [release.step for release in found] == list(range(6))
  assert [r.expected_batch_size for r in found] == [20] * 3 + [40] * 3
  (branch,) = ledger_lib.read(measured).branches
  assert {release.branch for release in found} == {branch.name}
  for release in found:
    assert list(release.values) == list(private_metrics.NAMES)
    # noise 4, share 0.2, sensitivity 1
    noise_of_shares = 4 / 0.2**0.5 / release.expected_batch_size
    assert release.noise == pytest.approx(
      {
        "loss": 5 * noise_of_shares,
        "accuracy": noise_of_shares,
        "clip_fraction": noise_of_shares,
        "gradient_norm": 10 * noise_of_shares,
      }
    )


def test_the_report_page_draws_the_file(measured, capsys):
  assert cli.main(["report", str(measured), "--format", "html"]) == 0
  assert "Learning curve" in capsys.readouterr().out


def test_metrics_cost_no_epsilon(measured, tmp_path):
  without = small_run.train(tmp_path, clipping="flat")
  resumed = train(measured)  # nothing left to do
  assert resumed.epsilon == without.epsilon
  releases = [
    small_run.ledger_lines(directory, "release")
    for directory in (measured, tmp_path)
  ]
  for line in (*releases[0], *releases[1]):
    del line["previous"], line["branch"]
  assert releases[0] == releases[1]


def test_a_replay_releases_the_same_values_once(measured, tmp_path):
  """Killed after update 6, whose checkpoints since update 2 are lost."""
  copy = shutil.copytree(measured, tmp_path / "copy")
  for step in (4, 6):
    shutil.rmtree(copy / "checkpoints" / str(step))
  with open(copy / released_metrics.METRICS_FILE, "a") as file:
    file.write('{"branch": "cut o')
  train(copy)
  assert kept(copy) == kept(measured)
  small_run.assert_same(measured, copy)


def test_another_continuation_is_kept_beside_the_first(measured, tmp_path):
  copy = shutil.copytree(measured, tmp_path / "copy")
  for step in (4, 6):
    shutil.rmtree(copy / "checkpoints" / str(step))
  train(copy, rate=2e-2)
  assert kept(copy).startswith(kept(measured))
  ledger, found = ledger_lib.read(copy), released_metrics.read(copy)
  assert [r.step for r in found] == [*range(6), *range(2, 6)]
  led_here = released_metrics.of_last_branch(ledger, found)
  assert led_here == found[:2] + found[6:]


def test_a_disk_that_is_full_ends_nothing(tmp_path, capsys):
  def full(*_):
    raise OSError(28, "No space left on device")

  with mock.patch.object(released_metrics, "append", full):
    assert train(tmp_path, steps=2, sizes=(20, 20)).step == 2
  told = capsys.readouterr().err
  assert told.count("private metrics could not be written") == 1


def test_another_share_is_another_plan(measured, tmp_path):
  copy = shutil.copytree(measured, tmp_path / "copy")
  with pytest.raises(
    ledger_lib.LedgerError, match=r"private_metrics_share was 0\.2 and is"
  ):
    train(copy, share=0.3)


# --- Curves. -----------------------------------------------------------------


def test_curves_are_means_over_all_updates_since_the_last():
  step_metrics = private_metrics.PrivateMetrics(names=("loss", "accuracy"))
  plan = mock.Mock(
    noise_coefficients=None,
    expected_batch_size=lambda step: 100 * (step + 1),
    noise_multiplier=0.5,
  )
  curves = private_curves.PrivateCurves(step_metrics, plan)
  assert curves.window() == {}
  curves.add(0, {"private/loss": 3.0, "private/accuracy": -0.5, "loss": 9.0})
  curves.add(1, {"private/loss": 6.0, "private/accuracy": 0.1, "loss": 9.0})
  of_sums = step_metrics.noise_stddev(0.5)  # of either update
  found = curves.window()
  noise_of_shares = of_sums * 2**0.5 / 300
  assert found == pytest.approx(
    {
      "private/loss": (1 * 3 + 2 * 6) / 3,
      "private/accuracy": 0.0,  # cut to its range, after averaging
      "private_noise/loss": 12 * noise_of_shares,
      "private_noise/accuracy": noise_of_shares,
    }
  )
  assert private_curves.in_words(found) == {
    "loss": f"5.00±{12 * noise_of_shares:.2f}",
    "accuracy": f"0.0±{100 * noise_of_shares:.1f}%",
  }
  curves.add(2, {"private/loss": 7.0, "private/accuracy": 0.2})
  assert curves.window()["private/loss"] == 7.0


def test_private_and_unprotected_curves_keep_their_names(tmp_path):
  seen = {}
  with mock.patch.object(
    progress.Progress, "curves", lambda self, step, values: seen.update(values)
  ):
    train(tmp_path, steps=2, sizes=(20, 20), unprotected_training_metrics=True)
  assert {f"private/{name}" for name in private_metrics.NAMES} <= seen.keys()
  assert {"unprotected/loss", "unprotected/gradient_snr"} <= seen.keys()
  assert not any(name.startswith("unprotected/private") for name in seen)


def test_without_metrics_there_are_neither_curves_nor_a_file(finished):
  assert not (finished / released_metrics.METRICS_FILE).exists()
  curves = private_curves.PrivateCurves(None, None)
  curves.add(0, {"loss": 1.0})
  assert curves.window() == private_curves.in_words({}) == {}
