import base64
import dataclasses
import json
import math
import re
import shutil

import jax
import pytest

from dptrain.clipping import private_metrics
from dptrain.privacy import accounting
from dptrain.privacy import keys
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy.accounting import Releases
from dptrain.privacy.plan import PrivacySettings
from dptrain.privacy.plan import make_plan
from dptrain.privacy.schedule import BatchSchedule
from dptrain.privacy.schedule import Phase
from dptrain.reports import report as report_lib

SECRETS = (
  "The vocabulary was learned from the training text without noise: its pieces"
  " may reveal words of the corpus.",
  "w" * 200,
)


def write_ledger(directory, *, seed, updates=40, branches=1, **changes):
  """A run of some updates, forked at update 1 into further branches."""
  fields = {
    "schedule": BatchSchedule([Phase(10, 20, 8), Phase(50, 50, 40)], 4),
    "delta": 1e-6,
    "noise_multiplier": 1.2,
    "target_epsilon": 6.0,
  }
  plan = make_plan(PrivacySettings(**(fields | changes)), 1000)
  with ledger_lib.opened(directory) as ledger:
    ledger.start(
      plan,
      corpus=seed.fingerprint(b"private text"),
      seed=seed.digest("identity").hex(),
      fixed_seed=seed.fixed,
    )
    for text in SECRETS:
      ledger.declare_unprotected(text)
    root = ""
    for number in range(branches):
      branch = ledger.open_branch(
        checkpoint_branch=root,
        checkpoint_step=int(number > 0),
        lineage=f"lineage {number}",
        environment="e",
      ).name
      root = root or branch
      for step in range(int(number > 0), updates):
        ledger.record(branch, step, plan.release(step))
  return ledger_lib.read(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("model_dir")


@pytest.fixture(scope="module")
def seed(directory):
  return keys.load_or_create(directory)


@pytest.fixture(scope="module")
def ledger(directory, seed):
  return write_ledger(directory, seed=seed)


@pytest.fixture(scope="module")
def report(ledger):
  return report_lib.make_report(ledger)


def as_data(report):
  """The JSON, read by rules that know no NaN and no Infinity."""

  def never(constant):
    raise AssertionError(f"{constant} is no JSON")

  return json.loads(report.as_json(), parse_constant=never)


def squeezed(report):
  return re.sub(r"\s+", " ", report.as_text())


def test_the_figures_are_the_accountants(ledger, report):
  releases = [
    Releases(3, 0.01, 1.2),
    Releases(2, 0.015, 1.2),
    Releases(3, 0.02, 1.2),
    Releases(32, 0.05, 1.2),
  ]
  assert ledger.releases() == releases
  expected = accounting.epsilon(releases, 1e-6, "zero_out")
  unamplified = accounting.epsilon_without_amplification(releases, 1e-6)
  assert report.epsilon == expected
  assert report.epsilon_without_amplification == unamplified
  data = as_data(report)
  assert data["claim"] is True
  assert data["delta"] == 1e-6
  assert data["epsilon"]["value"] == expected.value
  assert data["epsilon"]["accountant"] == expected.accountant
  assert data["epsilon"]["settings"] == expected.settings
  assert data["epsilon"]["rdp"] == expected.rdp
  assert data["epsilon"]["pld"] == expected.pld
  assert data["epsilon_without_amplification"] == unamplified
  assert data["num_releases"] == 40
  assert [Releases(**row) for row in data["schedule"]] == releases
  assert data["plan"] == ledger.header["plan"]


def test_the_text_tells_the_whole_statement(report):
  text, eps = squeezed(report), report.epsilon
  for part in (
    "differentially private",
    "every checkpoint of every branch",
    "one record: one fixed-length token sequence",
    "zero-out: two corpora of the same public size",
    "delta 1e-06",
    f"({eps.accountant}, {eps.settings})",
    "without amplification",
    "as if every update had read every record",
    "budget epsilon 6",
    "records 1,000",
    "sampling poisson",
    "clipping flat, l2_clip_norm 1",
    "noise multiplier 1.2",
    "40 updates in all",
    "Not protected",
    "secret seed in MODEL_DIR",
    "The number of records is treated as public",
    SECRETS[0],
    "dp-accounting",
  ):
    assert part in text
  assert "NO PRIVACY CLAIM" not in text


def test_printed_bounds_are_never_below_the_real_ones(report):
  text, eps = squeezed(report), report.epsilon
  (stated,) = re.findall(r"are \(([\d.]+), 1e-06\)-differentially", text)
  (tabled,) = re.findall(r" epsilon ([\d.]+) \(", text)
  (by_rdp, by_pld) = re.findall(r"RDP / PLD ([\d.]+) / ([\d.]+)", text)[0]
  (unamplified,) = re.findall(r"without amplification ([\d.]+)", text)
  for printed, bound in (
    (stated, eps.value),
    (tabled, eps.value),
    (by_rdp, eps.rdp),
    (by_pld, eps.pld),
    (unamplified, report.epsilon_without_amplification),
  ):
    assert bound <= float(printed) <= 1.001 * bound


@pytest.mark.parametrize(
  ("bound", "shown"),
  [
    (5.36401, "5.365"),
    (8, "8"),
    (0, "0"),
    (7.9999, "8"),
    (1e6 + 1, "1.001e+06"),
  ],
)
def test_rounding_goes_up(report, bound, shown):
  epsilon = dataclasses.replace(report.epsilon, value=bound)
  told = dataclasses.replace(report, epsilon=epsilon)
  assert f"are ({shown}, 1e-06)-diff" in squeezed(told)


def test_a_fixed_seed_makes_no_claim(tmp_path):
  ledger = write_ledger(tmp_path, seed=keys.fixed_seed(0), updates=2)
  report = report_lib.make_report(ledger)
  assert "FIXED SEED: NO PRIVACY CLAIM" in report.as_text()
  assert "are (" not in report.as_text()
  assert as_data(report)["claim"] is False


def test_all_branches_are_priced_and_shown(tmp_path, seed):
  ledger = write_ledger(tmp_path, seed=seed, updates=4, branches=3)
  report = report_lib.make_report(ledger)
  assert report.num_releases == 4 + 3 + 3
  assert [row["updates"] for row in report.branches] == [4, 3, 3]
  # The root's updates 0 to 3, and updates 1 to 3 of two forks.
  union = [Releases(7, 0.01, 1.2), Releases(3, 0.015, 1.2)]
  assert ledger.releases() == union
  assert report.epsilon == accounting.epsilon(union, 1e-6)
  text = squeezed(report)
  assert "3 branches, all priced:" in text
  for row in report.branches:
    assert row["name"][:12] in text
  assert_narrow(report)


def test_another_run_of_the_reporter_on_the_file_alone_agrees(
  report, directory, tmp_path
):
  shutil.copy(directory / ledger_lib.LEDGER_FILE, tmp_path)
  again = report_lib.make_report(ledger_lib.read(tmp_path))
  assert again == report
  assert again.as_text() == report.as_text()
  assert again.as_json() == report.as_json()


def test_the_report_is_written_whole(report, ledger, tmp_path):
  for _ in range(2):
    report_lib.write_report(ledger, tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "privacy_report.json",
    "privacy_report.txt",
  ]
  assert (tmp_path / "privacy_report.json").read_text() == report.as_json()
  text = (tmp_path / "privacy_report.txt").read_text()
  assert text.startswith(report.as_text())
  assert re.search(r"\nWritten \d{4}-\d\d-\d\d \d\d:\d\d UTC\n$", text)


def test_nothing_that_may_be_published_holds_secrets(report, directory, seed):
  branch = report.branches[0]["name"]
  secret = [seed.value]
  for purpose in ("noise", "sampling", "examples", "initial parameters"):
    for name in ("", branch):
      secret += [seed.digest(purpose, name, str(s))[:8] for s in range(3)]
  words = jax.random.key_data(seed.key("noise", branch, 0)).tolist()
  shown = [part.hex() for part in secret]
  shown += [base64.b64encode(part).decode()[:10] for part in secret]
  shown += [repr(part)[2:-1] for part in secret]
  shown += [str(word) for word in words] + [f"{word:08x}" for word in words]
  shown += [seed.value.hex()[:16], "private text"]
  published = {
    "text": report.as_text(),
    "json": report.as_json(),
    "repr": repr(report),
    "ledger": (directory / ledger_lib.LEDGER_FILE).read_text(),
  }
  for where, text in published.items():
    for part in shown:
      assert part not in text, where


def assert_narrow(report):
  for line in report.as_text().splitlines():
    assert len(line) <= 80
    assert line == line.rstrip()


def test_lines_are_narrow(report):
  assert_narrow(report)


@pytest.mark.parametrize(
  ("noise", "value"), [(1e-120, "inf"), (1e-3, None)], ids=["none", "little"]
)
def test_hardly_any_noise_is_told_in_narrow_text_and_valid_json(
  tmp_path, seed, noise, value
):
  ledger = write_ledger(
    tmp_path,
    seed=seed,
    updates=9,
    noise_multiplier=noise,
    clipping="automatic",
    relation="zero_out",
    target_epsilon=None,
  )
  report = report_lib.make_report(ledger)
  data = as_data(report)
  assert_narrow(report)
  text = squeezed(report)
  assert "PLD not computed" in text
  assert "budget none" in text
  assert "clipping automatic, gamma 0.01" in text
  assert "zero-out" in text
  assert data["epsilon"]["pld"] is None
  if value:
    assert data["epsilon"]["value"] == value
    assert data["epsilon_without_amplification"] == value
    assert "are (inf, 1e-06)-differentially private" in text
  else:
    assert 1e4 < data["epsilon"]["value"] < math.inf


def test_an_adapting_clip_norm_is_told_as_part_of_the_release(tmp_path, seed):
  ledger = write_ledger(
    tmp_path,
    seed=seed,
    updates=3,
    adaptive_quantile=0.7,
    adaptive_budget_share=0.04,
  )
  report = report_lib.make_report(ledger)
  told = as_data(report)["clip_norm"]
  assert told["adapts"] is told["values_are_released"] is True
  assert (told["target_quantile"], told["budget_share"]) == (0.7, 0.04)
  parts = [told[f"{name}_noise_multiplier"] for name in ("gradient", "count")]
  assert parts == pytest.approx([1.2 / 0.96**0.5, 1.2 / 0.2])
  # The price is that of the plan's multiplier, as without adaptation.
  assert report.epsilon == accounting.epsilon([Releases(3, 0.01, 1.2)], 1e-6)
  text = squeezed(report)
  for part in (
    "flat, l2_clip_norm 1 at first",
    "It adapts to the 0.7 quantile",
    "Its values are part of the release and are priced with it: 4 % of each",
    "own noise multiplier is 1.225",
  ):
    assert part in text
  assert_narrow(report)


def test_a_fixed_clip_norm_is_told_as_such(report, ledger):
  assert as_data(report)["clip_norm"] == {"adapts": False}
  assert "adapts" not in report.as_text()
  # A ledger of before there were adapting norms.
  older = {
    name: value
    for name, value in ledger.header["plan"].items()
    if not name.startswith("adaptive")
  }
  assert report_lib._clip_norm(older) == {"adapts": False}


def test_private_metrics_are_told_as_part_of_the_release(tmp_path, seed):
  ledger = write_ledger(
    tmp_path,
    seed=seed,
    updates=3,
    private_metrics_share=0.05,
    private_metrics_max_loss=7.5,
    adaptive_quantile=0.5,
    adaptive_budget_share=0.03,
  )
  report = report_lib.make_report(ledger)
  told = as_data(report)["private_metrics"]
  assert told["released"] is True
  assert told["ranges"]["loss"] == 7.5
  multipliers = [
    told["gradient_noise_multiplier"],
    told["metrics_noise_multiplier"],
    as_data(report)["clip_norm"]["count_noise_multiplier"],
  ]
  assert multipliers == pytest.approx(
    [1.2 / 0.92**0.5, 1.2 / 0.05**0.5, 1.2 / 0.03**0.5]
  )
  assert sum(m**-2 for m in multipliers) == pytest.approx(1.2**-2)
  # What the step does, told by another formula.
  metrics = private_metrics.PrivateMetrics(budget_share=0.05)
  assert told["sum_noise_stddev"] == pytest.approx(metrics.noise_stddev(1.2))
  assert report.epsilon == accounting.epsilon([Releases(3, 0.01, 1.2)], 1e-6)
  text = squeezed(report)
  for part in (
    "The trained parameters, the private metrics, and every checkpoint",
    "private metrics loss, accuracy, clip fraction, gradient norm: noisy",
    "5 % of each update's budget",
    "own noise multiplier is 1.251",
    "Losses count up to 7.5",
  ):
    assert part in text
  assert_narrow(report)


def test_without_private_metrics_the_report_names_none(report, ledger):
  assert as_data(report)["private_metrics"] == {"released": False}
  assert "metrics" not in report.as_text()
  older = {
    name: value
    for name, value in ledger.header["plan"].items()
    if not name.startswith("private")
  }
  assert report_lib.private_metrics(older) == {"released": False}


def test_before_the_first_update_nothing_is_spent(tmp_path, seed):
  report = report_lib.make_report(write_ledger(tmp_path, seed=seed, updates=0))
  assert report.epsilon.value == report.epsilon_without_amplification == 0
  assert report.num_releases == 0
  assert "0 updates in all" in report.as_text()
  assert_narrow(report)


def test_no_plan_no_report(tmp_path):
  empty = ledger_lib.Ledger(tmp_path / "nothing")
  with pytest.raises(ledger_lib.LedgerError, match="has no plan: nothing to"):
    report_lib.make_report(empty)
