"""The report as a page: it says what the text says, and asks nobody."""

from page_reader import PageReader
import pytest

from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import report
from dptrain.privacy import report_page
from dptrain.privacy import schedule


def page(folder, *, steps=20, done=None, noise=1.5, fixed_seed=False, named=""):
  settings = plan_lib.PrivacySettings(
    schedule=schedule.constant(50, steps), delta=1e-5, noise_multiplier=noise
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
    if named:
      ledger.declare_unprotected(named)
  ledger = ledger_lib.read(folder)
  reader = PageReader(report_page.make_page(ledger))
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
