"""Advice: the paper's prediction beside a price of dptrain's own."""

import json

from page_reader import PageReader
import pytest

from dptrain.privacy import accounting
from dptrain.privacy.accounting import Releases
from dptrain.reports import advice as advice_lib
from dptrain.reports import advice_page

N = 10**7


@pytest.fixture(scope="module")
def made():
  return advice_lib.advise(N, 4.0, flops=1e20)


def test_the_price_is_dptrains_own_at_the_budget_asked_for(made):
  release = Releases(
    made.steps, made.batch_size / N, made.plan.noise_multiplier
  )
  assert made.epsilon == accounting.epsilon([release], 1e-8)
  assert 3.99 < made.epsilon.value <= 4.0
  assert made.noise_batch_ratio == made.plan.noise_multiplier / made.batch_size
  # Two digits of what was predicted.
  best = made.prediction.advised
  assert made.batch_size == pytest.approx(best.batch_size, rel=0.05)
  assert made.steps == pytest.approx(best.steps, rel=0.05)


def test_text_says_whose_prediction_it_is_and_fits_a_terminal(made):
  text = made.as_text()
  assert text.startswith("What arXiv 2501.18914 predicts")
  assert "dptrain has" in text
  assert "measured none of it" in text
  assert "short of it" in text
  assert "between 2.81 and 3.30" in text
  assert "passes over the same records" in " ".join(text.split())
  assert all(len(line) <= 80 for line in text.splitlines())


def test_json_has_the_same(made):
  told = json.loads(made.as_json())
  assert told["predicted"]["loss_at_least"] == pytest.approx(2.81)
  assert told["predicted"]["saturates"] is False
  assert told["own"]["noise_multiplier"] == made.plan.noise_multiplier
  assert told["source"] == "arXiv 2501.18914, Table 2"
  assert told["warnings"] == made.warnings


def test_the_page_has_the_same_and_asks_nobody(made):
  page = PageReader(advice_page.make_page(made))
  words = page.words()
  assert made.caveat() in words
  for name, value in [*made.asked(), *made.predicted(), *made.own()]:
    assert name in words
    assert value in words
  for warning in made.warnings:
    assert warning in words
  assert page.count("svg") == 2
  assert page.loads() == []


def test_another_delta_is_pointed_out():
  made = advice_lib.advise(10**5, 1.0, delta=1e-6)
  assert any("at 1e-06 the noise" in told for told in made.warnings)
  assert made.plan.delta == 1e-6
  assert "not stated; saturating is 1.3e+16" in made.as_text()


def test_the_papers_delta_is_not_taken_for_too_many_records():
  with pytest.raises(ValueError, match=r"--delta is missing: .* 1,000,000,000"):
    advice_lib.advise(10**9, 4.0)
