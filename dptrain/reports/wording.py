"""What reports call units, neighbours and samplings.

One wording for the report, the plan and the advice, so that a user who compares
them compares figures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dptrain.reports import layout

# A run of which this is said has no guarantee, whatever its seed.
EXACT_CODEBOOKS = (
  "The N-Grammer's codebooks are not protected: their centres follow the exact"
  " means of each batch, neither clipped nor noised, because"
  " NGrammerSettings.learning is 'unprotected'."
)
UNITS = {
  "record": "one record: one fixed-length token sequence of the corpus",
  "document": "one document",
  "user": "one user: everything of theirs in the corpus",
}
RELATION_TEXT = {
  "zero_out": (
    "zero-out: two corpora of the same public size that differ in one unit,"
    " which one of them replaces by a unit that contributes nothing"
  ),
  "replace_one": (
    "replace-one: two corpora of the same public size that differ in one unit"
  ),
  "add_or_remove_one": (
    "add-or-remove-one: two corpora, one of which has one unit more; how many"
    " there are is private"
  ),
}
SAMPLING_TEXT = {
  "poisson": "poisson: each record independently, at each update",
  "truncated_poisson": (
    "truncated poisson: each record independently, at each update; a sample"
    " beyond the limit is cut to it at random, which is priced"
  ),
  "without_replacement": (
    "without replacement: a uniformly random set of a fixed size, at each"
    " update"
  ),
  "shuffled": (
    "shuffled: passes over all records in random order, priced without"
    " amplification: a record takes part once in each round (pass)"
  ),
  "balls_in_bins": (
    "balls in bins: each record in one of several bins, at random, which take"
    " turns; priced without amplification: a record takes part once in each"
    " round"
  ),
  "cyclic_poisson": (
    "cyclic poisson: groups of records take turns, at random within the group;"
    " a record takes part at most once in each round"
  ),
}


def declared_public(pieces: Sequence[Mapping[str, str]]) -> list[str]:
  """Lines about what entered a run as public; none if there is nothing."""
  if not pieces:
    return []
  told = [f"{piece['what']}: {piece['fingerprint'][:16]}" for piece in pieces]
  return [
    "Declared public (taken on trust; fingerprints)",
    *layout.bullets(told),
    "",
  ]


def sampled(plan: Mapping[str, Any]) -> str:
  """What an update samples, and counts, in a word."""
  by_record = plan.get("unit_sampling", "units") == "records"
  return "record" if by_record else str(plan["unit"])


def unit(plan: dict[str, Any]) -> str:
  """The privacy unit in words."""
  named = plan.get("unit_name") or UNITS[plan["unit"]]
  if plan["unit"] == "record":
    return named
  k = plan["records_per_unit"]
  told = f"{named} (of which at most {k} records of fixed length take part"
  if plan["unit_sampling"] == "units":
    return f"{told}, as one example)"
  return f"{told}, each sampled on its own; groups of {k} are priced)"
