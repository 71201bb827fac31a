"""Updates as the ledger writes them, and as checkpoints copy them."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any, NamedTuple

from dptrain.privacy import accounting

_RELEASE_FIELDS = {
  field.name for field in dataclasses.fields(accounting.Releases)
} - {"count"}
_RUN_FIELDS = ("branch", "first_step", "last_step")


class Update(NamedTuple):
  """One update of one branch.

  Attributes:
    release: what it would cost alone.
    round: number of the first update of its round (`rounds`).
  """

  release: accounting.Releases
  round: int

  def as_dict(self, step: int) -> dict[str, Any]:
    """Plain data; a round of its own (Poisson sampling) goes unsaid."""
    told = self.release.as_dict()
    return told if self.round == step else {**told, "round": self.round}


def from_dict(told: Mapping[str, Any], step: int) -> Update:
  """What `as_dict` told, among other things."""
  fields = {name: told[name] for name in _RELEASE_FIELDS if name in told}
  return Update(accounting.Releases(1, **fields), told.get("round", step))


def priced(by_step: Mapping[int, Update]) -> list[accounting.Releases]:
  """One release per round of a branch: the dearest of its updates."""
  dearest: dict[int, accounting.Releases] = {}
  for update in by_step.values():
    some = dearest.setdefault(update.round, update.release)
    if update.release.sampling_prob > some.sampling_prob:
      dearest[update.round] = update.release
  return list(dearest.values())


def runs(
  releases: Mapping[str, Mapping[int, Update]],
) -> list[dict[str, Any]]:
  """Runs of equal consecutive updates, by branch, as plain data."""
  found: list[dict[str, Any]] = []
  for branch, by_step in releases.items():
    for step, update in sorted(by_step.items()):
      key = {"branch": branch, **update.as_dict(step)}
      last = found[-1] if found else {}
      if last.get("last_step") == step - 1 and key == {
        name: last[name] for name in last.keys() - _RUN_FIELDS[1:]
      }:
        last["last_step"] = step
      else:
        found.append({**key, "first_step": step, "last_step": step})
  return found


def unrolled(
  told: list[dict[str, Any]],
) -> Iterator[tuple[str, int, Update]]:
  """The updates that `runs` told of: branch, step, update."""
  for run in told:
    for step in range(run["first_step"], run["last_step"] + 1):
      yield run["branch"], step, from_dict(run, step)
