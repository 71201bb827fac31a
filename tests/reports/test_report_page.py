"""The report as a page: it says what the text says, and asks nobody."""

from page_reader import PageReader
import pytest

from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import others
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.reports import released_metrics
from dptrain.reports import report
from dptrain.reports import report_page


def page(
  folder,
  *,
  steps=20,
  done=None,
  noise=1.5,
  fixed_seed=False,
  named="",
  share=None,
  metrics=(),
  beside=(),
):
  settings = plan_lib.PrivacySettings(
    schedule=schedule.constant(50, steps),
    delta=1e-5,
    noise_multiplier=noise,
    private_metrics_share=share,
  )
  with ledger_lib.opened(folder) as ledger:
    ledger.start(
      plan_lib.make_plan(settings, 1000),
      corpus="c",
      seed="s",
      fixed_seed=fixed_seed,
    )
    branch = ledger.open_branch(
      checkpoint_branch="", checkpoint_step=0, lineage="l", environment="e"
    )
    for step in range(steps if done is None else done):
      ledger.record(branch.name, step, accounting.Releases(1, 0.05, noise))
    for other in beside:
      ledger.record_other(other)
    if named:
      ledger.declare_unprotected(named)
  ledger = ledger_lib.read(folder)
  metrics = [r._replace(branch=branch.name) for r in metrics]
  reader = PageReader(report_page.make_page(ledger, metrics))
  return reader, report.make_report(ledger)


def test_says_what_the_text_report_says(tmp_path):
  reader, made = page(tmp_path, named="<b>x</b> & co")
  words = reader.words()
  assert made.statement() in words
  for name, value in made.facts():
    assert name in words
    assert value in words
  assert "<b>x</b> & co" in words  # escaped, not a tag
  assert reader.count("svg") == 5
  for size in (2, 4, 8, 16):
    assert f"{size} records" in words


def test_a_private_vocabulary_is_in_the_figures(tmp_path):
  other = others.OtherRelease("the vocabulary was learned", "abc", 4.0, 6e-6)
  reader, made = page(tmp_path, beside=[other])
  words = reader.words()
  assert "the vocabulary was learned: its price is part of epsilon" in words
  assert "GaussianDpEvent(4)" in words
  assert "all at delta 1e-05 less 6e-06" in words
  assert reader.count("svg") == 5
  assert "2 records" not in words  # no bound for groups
  assert made.epsilon == accounting.epsilon(
    [accounting.Releases(1, 1.0, 4.0), accounting.Releases(20, 0.05, 1.5)],
    4e-6,
  )


def test_asks_nobody(tmp_path):
  reader, _ = page(tmp_path)
  assert reader.loads() == []


def test_a_fixed_seed_claims_nothing(tmp_path):
  reader, _ = page(tmp_path, fixed_seed=True)
  assert "NO PRIVACY CLAIM" in reader.words()


@pytest.mark.parametrize("settings", [{"done": 0}, {"noise": 0.01}])
def test_without_curves_where_there_are_none(tmp_path, settings):
  reader, made = page(tmp_path, **{"steps": 3, **settings})
  assert reader.count("svg") == 0
  assert made.statement() in reader.words()


def made_metrics(steps):
  values = dict.fromkeys(plan_lib.METRICS, 0.5)
  return [
    released_metrics.Release("", step, 50, values, dict.fromkeys(values, 0.1))
    for step in steps
  ]


def test_draws_a_learning_curve_of_private_metrics(tmp_path):
  reader, _ = page(tmp_path, share=0.1, metrics=made_metrics(range(20)))
  assert reader.count("svg") == 5 + 4
  words = reader.words()
  assert "Learning curve" in words
  assert "A point is one update" in words
  assert "gradient norm / clip norm" in words


def test_a_long_learning_curve_is_one_of_means(tmp_path):
  metrics = made_metrics(range(100))
  reader, _ = page(tmp_path, share=0.1, steps=100, metrics=metrics)
  assert "A point is the mean of 3 updates" in reader.words()


@pytest.mark.parametrize(
  ("share", "steps"), [(None, range(20)), (0.1, range(20, 40)), (0.1, [])]
)
def test_draws_nothing_that_the_ledger_does_not_price(tmp_path, share, steps):
  reader, _ = page(tmp_path, share=share, metrics=made_metrics(steps))
  assert "Learning curve" not in reader.words()
  assert reader.count("svg") == 5
