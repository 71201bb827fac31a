"""A private histogram of words: what one unit moves, and what escapes."""

import math
import statistics

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from dptrain.privacy import accounting
from dptrain.privacy import keys
from dptrain.privacy import word_counts
from dptrain.privacy.word_counts import WordRelease

WORDS = st.lists(st.text("abcde", max_size=2), max_size=25)
CORPORA = st.dictionaries(st.sampled_from("uvwxyz"), WORDS, max_size=5)


def counted(corpus, k, seed):
  """Counts of units by word; a unit's words come one by one."""
  counts = word_counts.WordCounts(k, seed)
  for unit, words in corpus.items():
    for word in words:
      counts.add(unit, [word])
  return counts.counts()


def distance(one, other):
  words = {*one, *other}
  return math.sqrt(sum((one.get(w, 0) - other.get(w, 0)) ** 2 for w in words))


@settings(max_examples=200, deadline=None)
@given(CORPORA, WORDS, WORDS, st.integers(1, 6), st.integers(0, 99))
def test_one_unit_moves_the_counts_by_what_is_priced(
  rest, words, others, k, number
):
  seed = keys.fixed_seed(number)
  without = counted(rest, k, seed)
  first = counted({**rest, "one": words}, k, seed)
  second = counted({**rest, "one": others}, k, seed)
  assert distance(without, first) <= math.sqrt(k) + 1e-12
  assert distance(first, second) <= math.sqrt(2 * k) + 1e-12
  # A part of a unit: other words may take its words' places.
  both = counted({**rest, "one": [*words, *others]}, k, seed)
  assert distance(first, both) <= math.sqrt(2 * k) + 1e-12


@settings(max_examples=100, deadline=None)
@given(CORPORA, WORDS, st.randoms(), st.integers(1, 6))
def test_the_choice_is_of_the_unit_alone(corpus, words, draw, k):
  seed = keys.fixed_seed(3)
  alone = counted({"one": words}, k, seed)
  assert len(alone) == min(k, len(set(words)))
  assert set(alone.values()) <= {1}
  # Beside other units, between which it is met again and again.
  counts = word_counts.WordCounts(k, seed)
  pairs = [(u, w) for u, found in corpus.items() for w in found]
  pairs += [("one", word) for word in [*words, *words]]
  draw.shuffle(pairs)
  for unit, word in pairs:
    counts.add(unit, [word])
  expected = counted(corpus, k, seed)
  for word in alone:
    expected[word] = expected.get(word, 0) + 1
  assert counts.counts() == expected


def test_words_are_chosen_evenly():
  words, k, trials = [f"w{i}" for i in range(12)], 3, 4000
  chosen = dict.fromkeys(words, 0)
  counts = word_counts.WordCounts(k, keys.fixed_seed(0))
  for number in range(trials):
    counts.add(f"unit {number}", words)
  chosen |= counts.counts()
  expected, spread = trials * k / 12, math.sqrt(trials * 0.25 * 0.75)
  assert sum(chosen.values()) == trials * k
  assert all(abs(n - expected) < 4.5 * spread for n in chosen.values())


def test_keys_that_were_no_text_are_units_of_their_own():
  counts = word_counts.WordCounts(2, keys.fixed_seed(0))
  for key in (b"a\xff", b"a\xfe", b"a\xff"):
    counts.add(key.decode(errors="surrogateescape"), [" word"])
  assert counts.counts() == {" word": 2}


def test_what_a_unit_uses_most_counts():
  counts = word_counts.WordCounts(3, keys.fixed_seed(0))
  rare = [f"rare{i}" for i in range(40)]
  for number in range(50):
    counts.add(f"unit {number}", ["the", *rare, "of"])
    counts.add(f"unit {number}", ["of", "the"])
  found = counts.counts()
  assert found.pop("the") == found.pop("of") == 50
  assert sum(found.values()) == 50
  assert max(found.values()) < 15


def test_memory_of_a_unit_is_bounded():
  counts = word_counts.WordCounts(2, keys.fixed_seed(0))
  for number in range(500):
    counts.add("loud", ["the", *(f"w{number}.{i}" for i in range(20))])
  (held,) = counts._held.values()
  assert len(held) <= 2 * 64
  assert "the" in counts.counts()
  assert len(counts.counts()) == 2


def test_a_unit_with_most_of_the_text_counts_for_one():
  counts = word_counts.WordCounts(4, keys.fixed_seed(0))
  for number in range(2000):
    counts.add("loud", [f"spam{number}", "spam"])
    counts.add("loud", [])
  counts.add("empty", [])
  found = counts.counts()
  assert sum(found.values()) == 4
  assert max(found.values()) == 1


@pytest.mark.parametrize("k", [1, 7, 64, 1000])
@pytest.mark.parametrize("failure_prob", [0.3, 1e-5, 1e-12])
def test_the_threshold_is_that_of_k_words(k, failure_prob):
  release = WordRelease(
    words_per_unit=k, noise_multiplier=2.0, failure_prob=failure_prob
  )
  z = (release.threshold - 1) / (2.0 * math.sqrt(k))
  escapes = statistics.NormalDist().cdf(-z)
  together = -math.expm1(k * math.log1p(-escapes))
  assert together == pytest.approx(failure_prob / 3, rel=1e-6)


def escapes(k, failure_prob, trials, words=None):
  """In how many of so many releases a word of one unit alone appears."""
  release = WordRelease(
    words_per_unit=k, noise_multiplier=1.5, failure_prob=failure_prob
  )
  many = {f"common{i}": 10_000 for i in range(5)}
  own = {f"rare{i}": 1 for i in range(words or k)}
  found = 0
  for number in range(trials):
    seed = keys.fixed_seed(number)
    kept = word_counts.noisy_counts(many | own, release, seed)
    assert many.keys() <= kept.keys()
    found += not own.keys().isdisjoint(kept)
  return found


@pytest.mark.parametrize("k", [1, 8, 40])
def test_words_of_one_unit_escape_as_rarely_as_is_said(k):
  trials, allowed = 4000, 0.6 / 3
  found = escapes(k, 0.6, trials)
  spread = math.sqrt(trials * allowed * (1 - allowed))
  assert abs(found - trials * allowed) < 4.5 * spread


def test_a_unit_of_fewer_words_escapes_less():
  assert escapes(8, 0.6, 1000, words=2) < escapes(8, 0.6, 1000)


def test_with_a_usual_delta_nothing_escapes():
  assert not escapes(64, 1e-7, 2000)


def test_the_noise_has_the_stated_deviation():
  counts = {f"w{i:05d}": 10**6 for i in range(20_000)}
  release = WordRelease(
    words_per_unit=9, noise_multiplier=20.0, failure_prob=1e-6
  )
  noisy = word_counts.noisy_counts(counts, release, keys.fixed_seed(1))
  noise = np.array([noisy[word] - 10**6 for word in counts])
  assert release.noise_stddev == 60.0
  assert abs(noise.std() / 60.0 - 1) < 0.03
  assert abs(noise.mean()) < 4.5 * 60 / math.sqrt(len(noise))
  # Words share no noise, and neither do seeds.
  again = word_counts.noisy_counts(counts, release, keys.fixed_seed(2))
  other = np.array([again[word] - 10**6 for word in counts])
  assert len(set(noise.tolist())) > 150
  assert abs(np.corrcoef(noise, other)[0, 1]) < 0.04


def test_a_release_is_a_function_of_counts_and_seed():
  counts = {"b": 400, "a": 500, "c": 300}
  turned = dict(reversed(counts.items()))
  release = WordRelease(
    words_per_unit=2, noise_multiplier=3.0, failure_prob=1e-6
  )
  seed = keys.fixed_seed(5)
  first = word_counts.noisy_counts(counts, release, seed)
  second = word_counts.noisy_counts(turned, release, seed)
  assert list(first.items()) == list(second.items())
  assert list(first) == ["a", "b", "c"]
  assert all(type(count) is int and count >= 1 for count in first.values())
  assert word_counts.noisy_counts({}, release, seed) == {}


@pytest.mark.parametrize(
  ("unit", "within", "relation", "distance"),
  [
    ("document", "document", "zero_out", 1),
    ("document", "document", "add_or_remove_one", 1),
    ("document", "document", "replace_one", math.sqrt(2)),
    ("document", "record", "zero_out", math.sqrt(2)),
    ("user", "record", "replace_one", math.sqrt(2)),
    ("user", "document", "add_or_remove_one", math.sqrt(2)),
  ],
)
def test_the_price_is_that_of_the_distance(unit, within, relation, distance):
  z = word_counts.priced(3.0, unit, within, relation)
  told = accounting.epsilon([accounting.Releases(1, 1.0, z)], 1e-6, relation)
  expected = accounting.epsilon_without_amplification(
    [accounting.Releases(1, 1.0, 3.0 / distance)], 1e-6
  )
  assert told.value == pytest.approx(expected, rel=5e-3)
  assert told.value >= expected * (1 - 1e-9)


def test_a_smaller_unit_protects_no_larger_one():
  with pytest.raises(ValueError, match=r"one document as its unit.*--unit=us"):
    word_counts.priced(3.0, "document", "user", "zero_out")


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"words_per_unit": 0}, "words_per_unit=0"),
    ({"words_per_unit": True}, "words_per_unit=True"),
    ({"noise_multiplier": 0.0}, r"noise_multiplier=0\.0"),
    ({"noise_multiplier": math.inf}, "noise_multiplier=inf"),
    ({"failure_prob": 0.0}, r"failure_prob=0\.0"),
    ({"failure_prob": 1.0}, r"failure_prob=1\.0"),
  ],
)
def test_settings_out_of_range(wrong, message):
  good = {"words_per_unit": 3, "noise_multiplier": 2.0, "failure_prob": 1e-6}
  with pytest.raises(ValueError, match=message):
    WordRelease(**(good | wrong))
