"""Which split a text is in: by its own key, however far one has read."""

from hypothesis import given
from hypothesis import strategies as st
import pytest

from dptrain.tasks import dividing

FRACTIONS = st.lists(
  st.integers(0, 2**20 - 1).map(lambda n: n / 2**20), min_size=1, max_size=30
)


def surveyed(fractions, validation_fraction, read_through=True):
  return dividing.survey(
    iter(fractions),
    validation_fraction,
    where="the files",
    what="document(s)",
    way_out="bring more",
    read_through=read_through,
  )


@given(fractions=FRACTIONS, validation_fraction=st.sampled_from([0, 0.01, 0.4]))
def test_a_reading_that_stops_early_divides_alike(
  fractions, validation_fraction
):
  def told(read_through):
    try:
      division = surveyed(fractions, validation_fraction, read_through)
    except ValueError as error:
      return str(error)
    return [division.is_validation(each) for each in fractions]

  whole = told(True)
  assert told(False) == whole
  if isinstance(whole, str):
    assert "leave the train split empty" in whole
  else:
    assert any(whole) == (validation_fraction > 0)
    assert not all(whole)


@given(fractions=FRACTIONS, change=st.integers(0, 29))
def test_one_key_moves_at_most_one_other(fractions, change):
  """Even in the smallest corpora: what training reads differs in one key."""
  before = sorted({*fractions, 0.9995})
  after = sorted({*before} - {before[change % len(before)]})
  train = [
    {each for each in keys if not surveyed(keys, 0.1).is_validation(each)}
    for keys in (before, after)
    if len(keys) > 1 and max(keys) > 0.1
  ]
  if len(train) == 2:
    assert len(train[0] ^ train[1]) <= 1


def test_reading_stops_once_both_splits_hold_something():
  def fractions():
    yield from (0.5, 0.7, 0.05)
    pytest.fail("it reads on")

  assert surveyed(fractions(), 0.1, read_through=False).is_validation(0.1)


def test_no_text():
  with pytest.raises(ValueError, match="the files hold no text"):
    surveyed([], 0.1)
