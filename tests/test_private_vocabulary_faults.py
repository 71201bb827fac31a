"""Breaks the private vocabulary on purpose, and sees a test turn red."""

import pytest

import broken_copies
from broken_copies import Fault

pytestmark = pytest.mark.faults


COUNTS = "privacy/word_counts.py"
TESTS = "privacy/test_word_counts.py::"

FAULTS = {
  "counts without noise": Fault(
    COUNTS,
    "exact + release.noise_stddev * draw.standard_normal(len(words))",
    "exact",
    TESTS + "test_the_noise_has_the_stated_deviation",
  ),
  "noise for one word of k": Fault(
    COUNTS,
    "return self.noise_multiplier * math.sqrt(self.words_per_unit)",
    "return self.noise_multiplier",
    TESTS + "test_the_noise_has_the_stated_deviation",
  ),
  "a threshold for one word of k": Fault(
    COUNTS,
    "math.log1p(-fails) / self.words_per_unit",
    "math.log1p(-fails)",
    TESTS + "test_words_of_one_unit_escape_as_rarely_as_is_said",
  ),
  "no threshold": Fault(
    COUNTS,
    "np.flatnonzero(noisy > release.threshold)",
    "np.flatnonzero(noisy > 0)",
    TESTS + "test_with_a_usual_delta_nothing_escapes",
  ),
  "units without a bound": Fault(
    COUNTS,
    "_most_used(own, self._uses(own), self._k)",
    "_most_used(own, self._uses(own), 10 * self._k)",
    TESTS + "test_one_unit_moves_the_counts_by_what_is_priced",
  ),
  "a bound for each text of a unit": Fault(
    COUNTS,
    'own = self._seed.digest("words of a unit", unit)',
    'own = self._seed.digest("words of a text", str(len(self._held)))',
    TESTS + "test_a_unit_with_most_of_the_text_counts_for_one",
  ),
  "a part of a unit priced as if no other word took its place": Fault(
    COUNTS,
    "if unit == within and relation",
    "if relation",
    TESTS + "test_the_price_is_that_of_the_distance",
  ),
  "a vocabulary that the budget does not see": Fault(
    "privacy/ledger_record.py",
    "[*others_lib.releases(self._others), *self.update_releases(without)]",
    "self.update_releases(without)",
    "privacy/test_others.py::test_the_budget_stops_earlier",
  ),
  "noise calibrated as if all of delta were left": Fault(
    "privacy/plan.py",
    "    left,\n    settings.relation,",
    "    settings.delta,\n    settings.relation,",
    "privacy/test_others.py::test_the_noise_is_calibrated_to_what_is_left",
  ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_caught(name, tmp_path):
  broken_copies.check_it_is_caught(FAULTS[name], tmp_path)
