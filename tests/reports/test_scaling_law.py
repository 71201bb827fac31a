"""The paper's table, read between its points and half a step beyond."""

import math

from hypothesis import given
from hypothesis import strategies as st
import pytest

from dptrain.reports import scaling_law

TABLE = scaling_law.table()
examples = st.floats(5, 9).map(lambda x: 10.0**x)
epsilons = st.floats(0, 3).map(lambda x: 4.0**x)


def test_the_table_adds_up():
  # A number mistyped would show: compute is that of the other three, rounded.
  assert len(TABLE) == 20
  for row in TABLE:
    told = scaling_law.flops(row.parameters, row.steps, row.batch_size)
    assert told == pytest.approx(row.flops, rel=0.08)


def test_more_data_and_more_budget_lower_the_loss_and_raise_the_compute():
  for row in TABLE:
    for other in TABLE:
      if (
        other.num_examples >= row.num_examples and other.epsilon >= row.epsilon
      ):
        assert other.loss <= row.loss
        assert other.flops >= row.flops


def test_points_of_the_table_are_kept():
  for row in TABLE:
    found = scaling_law.point(row.num_examples, row.epsilon)
    for name in ("flops", "loss", "parameters", "steps", "batch_size"):
      assert getattr(found, name) == pytest.approx(getattr(row, name))


def test_between_points_it_is_linear_in_logarithms():
  # By hand: half way between 1e6 and 1e7 records and between epsilon 4 and 16.
  found = scaling_law.point(math.sqrt(1e13), 8.0)
  batches = (2.3e4, 4.6e4, 2.2e5, 7.4e5)
  assert found.batch_size == pytest.approx(math.prod(batches) ** 0.25)
  losses = (4.62, 3.61, 2.81, 2.15)
  assert found.loss == pytest.approx(math.prod(losses) ** 0.25)


@given(examples, epsilons)
def test_a_point_stays_between_its_neighbours(num_examples, epsilon):
  found = scaling_law.point(num_examples, epsilon)
  near = [
    row
    for row in TABLE
    if abs(math.log10(row.num_examples / num_examples)) <= 1
    and abs(math.log(row.epsilon / epsilon, 4)) <= 1
  ]
  for name in ("flops", "loss", "parameters", "steps", "batch_size"):
    values = [getattr(row, name) for row in near]
    assert 0.999 * min(values) <= getattr(found, name) <= 1.001 * max(values)


def test_enough_compute_gives_the_saturating_point():
  for compute in (None, 3.9e20, 1e25):
    made = scaling_law.predict(1e7, 4, compute)
    assert made.advised == made.saturating == scaling_law.point(1e7, 4)
    assert made.saturates is (None if compute is None else True)
    assert made.loss_at_least == made.loss_at_most == pytest.approx(2.81)
    assert made.warnings == []


@given(examples, epsilons, st.floats(0, 1))
def test_less_compute_is_spent_as_a_smaller_budget_would(
  num_examples, epsilon, share
):
  most = scaling_law.point(num_examples, epsilon).flops
  compute = 1.4e16 * (most / 1.4e16) ** (0.98 * share)
  if not 1.4e16 < compute < 0.99 * most:
    return
  made = scaling_law.predict(num_examples, epsilon, compute)
  best = made.advised
  assert not made.saturates
  assert best.num_examples <= 1.001 * num_examples
  assert best.epsilon <= 1.001 * epsilon
  assert best.flops == pytest.approx(compute, rel=1e-6)
  spent = scaling_law.flops(best.parameters, best.steps, best.batch_size)
  assert spent == pytest.approx(compute, rel=0.08)
  assert made.loss_at_least <= made.loss_at_most == best.loss
  assert any("no row for compute short" in told for told in made.warnings)


def test_more_compute_is_never_predicted_to_be_worse():
  losses = [
    scaling_law.predict(1e7, 4, compute).loss_at_most
    for compute in (1e17, 1e18, 1e19, 1e20, 1e21)
  ]
  assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
  ("budget", "told"), [((5e4, 4), "records"), ((1e7, 100), "epsilon")]
)
def test_off_the_table_it_says_so(budget, told):
  [warning] = [w for w in scaling_law.predict(*budget).warnings if "EXTRA" in w]
  assert told in warning


@pytest.mark.parametrize(
  ("budget", "message"),
  [
    ((1e4, 4), r"--num_examples=10000 is too far off .* from 100000 to 1e\+09"),
    ((4e9, 4), r"--num_examples=4e\+09 is too far off"),
    ((1e7, 0.1), r"--epsilon=0.1 is too far off .* from 1 to 64"),
    ((1e7, 4, 1e15), r"--flops=1e\+15 is less than any row"),
    ((math.nan, 4), r"--num_examples=nan is too far off"),
  ],
)
def test_far_off_nothing_is_predicted(budget, message):
  with pytest.raises(ValueError, match=message):
    scaling_law.predict(*budget)


def test_the_ends_of_the_papers_fit_are_named():
  [largest] = scaling_law.predict(1e9, 4).warnings
  [smallest] = scaling_law.predict(1e5, 1).warnings
  assert "largest that the paper's fit reaches" in largest
  assert "smallest that the paper trained" in smallest
