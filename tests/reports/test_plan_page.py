"""The forecast as a page: it says what the text says, and asks nobody."""

from page_reader import PageReader
import pytest

from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.reports import forecast as forecast_lib
from dptrain.reports import plan_page

COMMAND = ["dptrain", "plan", "--gin.NAME='<a b>'", *["--phase=100:20"] * 9]


def forecast(*, phases=((100, 400, 20), (400, 400, 60)), compare=(), **changes):
  settings = {
    "schedule": schedule.BatchSchedule([schedule.Phase(*p) for p in phases]),
    "delta": 1e-6,
    "noise_multiplier": 1.5,
  }
  plan = plan_lib.make_plan(
    plan_lib.PrivacySettings(**settings | changes), 10_000
  )
  model = forecast_lib.ModelCost(
    num_parameters=335_000_000, sequence_length=512, memory={"x": 2**30}
  )
  return forecast_lib.forecast(plan, model=model, constant_batches=compare)


def read(made):
  return PageReader(plan_page.make_page(made, command=COMMAND))


def test_says_what_the_text_says_and_asks_nobody():
  made = forecast(compare=[100, 10_000])
  page = read(made)
  words = page.words()
  for name, value in made.facts():
    assert name in words
    assert value in words
  for phase in made.phases:
    assert f"{phase.first_step:,} {phase.num_steps:,}" in words
    assert f"{phase.noise_batch_ratio:.4g}" in words
  for row in made.alternatives:
    assert f"{row.name} {row.noise_multiplier:.4f}" in words
  assert page.count("svg") == 6
  assert page.loads() == []


def test_tells_how_to_make_it_again():
  page = read(forecast())
  # As a shell reads it: quoted, and its lines joined.
  assert "'--gin.NAME='\"'\"'<a b>'\"'\"''" in page.words()
  assert page.words().count("--phase=100:20") == 9
  typed = page.page.partition("<pre>")[2].partition("</pre>")[0]
  lines = typed.split("\n")
  assert len(lines) > 1
  assert all(line.endswith(" \\") for line in lines[:-1])


def test_a_budget_that_ends_early_is_said_first():
  made = forecast(target_epsilon=0.5)
  page = read(made)
  assert made.affordable_steps < 60
  assert f"ends after update {made.affordable_steps}:" in page.words()


def test_a_long_schedule_stands_in_two_columns():
  long = read(forecast(phases=[(100, 900, 30)]))
  assert long.count("thead") == read(forecast()).count("thead") + 1
  assert long.count("tr") > 30


@pytest.mark.parametrize(
  "changes", [{"noise_multiplier": 0.1}, {"delta": 1e-15}]
)
def test_without_pld_there_is_no_curve_of_it(changes):
  made = forecast(phases=[(400, 400, 20)], **changes)
  assert made.epsilon.pld is None
  page = read(made)
  assert page.count("svg") == 2
  assert "PLD not computed" in page.words()


def test_passes_in_random_order_are_priced_by_rounds():
  made = forecast(
    phases=[(2500, 2500, 12)], sampling="shuffled", noise_multiplier=8.0
  )
  page = read(made)
  assert ">rounds<" in page.page
  assert "PoissonSampledDpEvent" not in page.words()
  assert "passes over all records" in page.words()


def test_a_schedule_that_no_noise_fits_is_left_out_of_the_plot():
  made = forecast(compare=[100])
  lost = forecast_lib.Alternative("constant 7", None, None, 420, 0.042, None)
  made.alternatives.append(lost)
  assert "constant 7 none fits" in read(made).words()
