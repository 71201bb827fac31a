"""The file of private metrics: means, damage, and what led to the last one."""

import json
import math

import numpy as np
import pytest

from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.reports import released_metrics
from dptrain.reports.released_metrics import Release

NAMES = plan_lib.METRICS


def release(branch, step, size=10, value=0.5, noise=0.1):
  return Release(
    branch, step, size, dict.fromkeys(NAMES, value), dict.fromkeys(NAMES, noise)
  )


def test_a_mean_weighs_updates_by_their_batches():
  made = [release("a", 0, 10, 1.0, 0.4), release("a", 1, 30, 2.0, 0.1)]
  mean = released_metrics.mean(made)
  assert mean.values == pytest.approx(dict.fromkeys(NAMES, 1.75))
  expected = math.sqrt((0.25 * 0.4) ** 2 + (0.75 * 0.1) ** 2)
  assert mean.noise == pytest.approx(dict.fromkeys(NAMES, expected))


def test_the_noise_of_a_mean_is_what_is_measured():
  draw = np.random.default_rng(0)
  sizes, deviations = (10, 20, 70), (0.5, 0.3, 0.1)
  found = [
    released_metrics.mean(
      [
        release("a", step, size, draw.normal(0, deviation), deviation)
        for step, (size, deviation) in enumerate(
          zip(sizes, deviations, strict=True)
        )
      ]
    )
    for _ in range(4000)
  ]
  measured = np.std([mean.values["loss"] for mean in found])
  assert measured == pytest.approx(found[0].noise["loss"], rel=0.05)


def test_what_is_written_is_read(tmp_path):
  assert released_metrics.read(tmp_path) == []
  made = [release("a", step, value=step / 3) for step in range(4)]
  released_metrics.append(tmp_path, made[:3])
  released_metrics.append(tmp_path, made[3:])
  assert released_metrics.read(tmp_path) == made


def test_a_branch_goes_on_where_it_was(tmp_path):
  released_metrics.resume(tmp_path, "a", 0)  # no file yet
  made = [release(b, s) for b, s in (("a", 0), ("a", 1), ("b", 1), ("a", 2))]
  released_metrics.append(tmp_path, made)
  released_metrics.resume(tmp_path, "a", 1)
  assert released_metrics.read(tmp_path) == [made[0], made[2]]
  assert [path.name for path in tmp_path.iterdir()] == [
    released_metrics.METRICS_FILE
  ]


@pytest.mark.parametrize(
  "line",
  ["", "[]", "7", "nonsense", '{"branch": "a"', '{"branch": "a", "step": 1}'],
)
def test_lines_that_cannot_be_read_are_left_out(tmp_path, line):
  made = [release("a", 0), release("a", 1)]
  for one in made:
    released_metrics.append(tmp_path, [one])
    with open(tmp_path / released_metrics.METRICS_FILE, "a") as file:
      file.write(f"{line}\n")
  assert released_metrics.read(tmp_path) == made
  released_metrics.resume(tmp_path, "a", 2)
  text = (tmp_path / released_metrics.METRICS_FILE).read_text()
  assert [json.loads(one)["step"] for one in text.splitlines()] == [0, 1]


def test_only_what_led_to_the_last_update_is_one_curve(tmp_path):
  """Root a makes 0..5; b forks after 3 and makes 3, 4; c forks of b after 4."""
  settings = plan_lib.PrivacySettings(
    schedule=schedule.constant(50, 9),
    delta=1e-5,
    noise_multiplier=1.5,
    private_metrics_share=0.1,
  )
  with ledger_lib.opened(tmp_path) as ledger:
    plan = plan_lib.make_plan(settings, 1000)
    ledger.start(plan, corpus="c", seed="s", fixed_seed=False)
    names, made = [""], []
    for number, (first, last) in enumerate([(0, 5), (3, 4), (4, 6)]):
      branch = ledger.open_branch(
        checkpoint_branch=names[-1],
        checkpoint_step=first,
        lineage=f"lineage {number}",
        environment="e",
      )
      names.append(branch.name)
      for step in range(first, last + 1):
        ledger.record(branch.name, step, accounting.Releases(1, 0.05, 1.5))
        made.append(release(branch.name, step))
  _, a, b, c = names
  ledger = ledger_lib.read(tmp_path)

  def led(releases):
    found = released_metrics.of_last_branch(ledger, releases)
    return [(r.branch, r.step) for r in found]

  assert led(made) == [
    *((a, step) for step in (0, 1, 2)),
    (b, 3),
    *((c, step) for step in (4, 5, 6)),
  ]
  assert led(made[:6]) == [(a, step) for step in range(6)]
  assert led([]) == []
  # Of another run, or of other metrics: not drawn.
  assert led([release("other", 0), release(a, 8)]) == []
  assert led([made[0]._replace(values={"loss": 1.0})]) == []
