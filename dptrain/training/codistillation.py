"""Settings of runs that learn from each other (arXiv 1804.03235)."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from dptrain.privacy import teachers
from dptrain.training import settings

TOPOLOGIES = ("all_to_all", "ring", "pairs")
CORPORA = ("shards", "disjoint", "overlapping")


@dataclasses.dataclass(frozen=True)
class Codistillation:
  """One of several replicas, each of which learns from what others publish.

  Every replica is a run with a MODEL_DIR, a ledger and a plan of its own. What
  crosses between them are weights that its updates have released already.

  Attributes:
    replicas: how many there are; 1 for none but this.
    replica: number of this one, from 0.
    exchange: folder, or address of a bucket, that all replicas share: each
      publishes its weights there. None: replicas share a mesh
      (`together.train_together`).
    topology: who teaches replica i: "all_to_all" (all others), "ring" (the one
      before) or "pairs" (0 and 1 each other, 2 and 3, ...).
    period: updates between publications, and between looks for newer ones;
      counted from the end of the burn-in.
    max_staleness: a teacher that is more than so many updates behind teaches no
      longer, until it publishes again.
    wait_seconds: the longest that a look waits for teachers that are behind;
      one that has been waited for in vain is not waited for again before it
      publishes. 0 never waits; enough of it makes replicas go in step.
    keep: publications of this replica that stay in the exchange.
    corpora: what the replicas train on. "shards": shards of one corpus
      (`ShardSettings`), which share no unit: each unit has the guarantee of the
      run that reads it. "disjoint": corpora that share no unit, which is taken
      on trust. "overlapping": anything else: all that all of them release adds
      up.
  """

  replicas: int = 1
  replica: int = 0
  exchange: str | None = None
  topology: str = "all_to_all"
  period: int = 50
  max_staleness: int = 500
  wait_seconds: float = 0.0
  keep: int = 3
  corpora: str = "shards"

  def __post_init__(self) -> None:
    for name, least in (
      ("replicas", 1),
      ("replica", 0),
      ("period", 1),
      ("max_staleness", 0),
      ("keep", 2),
    ):
      settings.check_whole(f"Codistillation.{name}", getattr(self, name), least)
    if self.replica >= self.replicas:
      raise ValueError(
        f"Codistillation.replica={self.replica} must lie below"
        f" Codistillation.replicas={self.replicas}: they are numbered from 0."
      )
    for name, known in (("topology", TOPOLOGIES), ("corpora", CORPORA)):
      value = getattr(self, name)
      if value not in known:
        raise ValueError(
          f"Codistillation.{name}={value!r} is unknown; use one of"
          f" {', '.join(map(repr, known))}."
        )
    settings.check_not_negative(
      "Codistillation.wait_seconds", self.wait_seconds, "0 never waits"
    )
    if not isinstance(self.exchange, (str, type(None))):
      raise ValueError(
        f"Codistillation.exchange={self.exchange!r} must be the name of a"
        " folder or the address of a bucket that all replicas share."
      )
    if self.topology == "pairs" and self.replicas > 1 and self.replicas % 2:
      raise ValueError(
        f"Codistillation.topology='pairs' needs an even number of replicas, not"
        f" {self.replicas}; use 'ring'."
      )

  @property
  def teachers(self) -> tuple[int, ...]:
    """Numbers of the replicas that teach this one."""
    count, own = self.replicas, self.replica
    if count == 1:
      return ()
    if self.topology == "ring":
      return ((own - 1) % count,)
    if self.topology == "pairs":
      return (own ^ 1,)
    return tuple(other for other in range(count) if other != own)

  def looks_at(self, step: int, burn_in: int) -> bool:
    """Whether replicas exchange weights before update `step`."""
    return step >= burn_in and (step - burn_in) % self.period == 0

  def part(
    self, replica: int, shard: Mapping[str, Any] | None, group: str
  ) -> str:
    """Which part of the corpora a replica reads (`teachers.Source.part`).

    Args:
      replica: its number.
      shard: of its ledger's header.
      group: names the replicas whose corpora this is about.

    Returns:
      Its name; empty: unknown.
    """
    if self.corpora == "shards":
      return teachers.shard_part(shard)
    if self.corpora == "disjoint":
      return teachers.declared_part(f"replicas {group}", replica)
    return ""

  def check_shard(self, index: int, count: int) -> None:
    """Refuses replicas on one corpus that was not divided.

    Args:
      index: of this run's shard.
      count: of shards.

    Raises:
      ValueError: their units may be the same, and nobody has said so.
    """
    if self.replicas == 1 or self.corpora != "shards":
      return
    if count < self.replicas:
      raise ValueError(
        f"Codistillation.replicas={self.replicas} with corpora='shards', but"
        f" ShardSettings.count={count}: replicas would read the same units. Set"
        f" ShardSettings.count={self.replicas} and index to each replica's"
        " number, or declare Codistillation.corpora='overlapping' (all releases"
        " then add up) or 'disjoint'."
      )
    if index != self.replica:
      raise ValueError(
        f"ShardSettings.index={index} is not Codistillation.replica="
        f"{self.replica}: give each replica the shard of its own number."
      )
