"""Prefetching: the same items in the same order, errors at their place."""

import threading
import time

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest

from dptrain.data.prefetch import Prefetcher


@given(items=st.lists(st.integers() | st.none()), depth=st.integers(1, 9))
@settings(deadline=None)
def test_the_same_items_in_order(items, depth):
  assert list(Prefetcher(iter(items), depth)) == items


def test_no_more_than_depth_wait():
  taken = []

  def items():
    for number in range(20):
      taken.append(number)
      yield number

  made = Prefetcher(items(), 3)
  for number in range(20):
    time.sleep(0.005)
    # Three wait, and one more was made that has no place yet.
    assert len(taken) <= number + 4
    assert next(made) == number
  assert list(made) == []


def test_items_are_made_ahead():
  second = threading.Event()

  def items():
    yield 1
    second.set()
    yield 2

  made = Prefetcher(items(), 2)
  assert second.wait(10)
  assert [*made] == [1, 2]
  assert made.waited < 5


def test_an_error_comes_where_it_arose_and_stays():
  def items():
    yield 1
    raise ValueError("no second item")

  made = Prefetcher(items(), 4)
  assert next(made) == 1
  for _ in range(2):
    with pytest.raises(ValueError, match="no second item"):
      next(made)


@pytest.mark.parametrize("taken", [0, 5])
def test_closing_ends_the_thread(taken):
  def endless():
    number = 0
    while True:
      yield number
      number += 1

  before = threading.active_count()
  made = Prefetcher(endless(), 2)
  assert [next(made) for _ in range(taken)] == list(range(taken))
  made.close()
  made.close()
  assert threading.active_count() == before
  assert list(made) == []


def test_a_depth_of_none():
  with pytest.raises(ValueError, match="depth=0"):
    Prefetcher([], 0)
