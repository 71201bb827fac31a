"""What may teach a run: weights that fit it, under a ledger that does, too.

Each refusal is a ValueError whose text follows "replica 1 does not teach: ".
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import wording
from dptrain.training import checkpoints as checkpoints_lib
from dptrain.training import exchange as exchange_lib
from dptrain.training import kept_weights


def check_own_ledger(
  own: ledger_lib.Ledger, published: exchange_lib.Publication | None
) -> None:
  """Refuses to go on from a MODEL_DIR that is older than what it published.

  With other teachers an update is another one: whoever makes it again without
  its lesson adds the same noise to another sum.

  Args:
    own: the ledger of the run.
    published: what the exchange has of it; None for nothing.

  Raises:
    LedgerError: updates were published that the ledger does not have.
  """
  if published is None or own.fixed_seed:  # no claim: experiments start anew
    return
  if not _of_one_run(published.ledger, own.path):
    return
  if not own.path.read_bytes().startswith(published.ledger):
    raise ledger_lib.LedgerError(
      f"{own.path} lacks lines that it had when update {published.step} was"
      " published for the other replicas: this MODEL_DIR is an older copy, or"
      " one of two that went on, and its noise would enter other sums again."
      " Restore its newest copy, or start in a new MODEL_DIR."
    )


def newest_ledger(published: bytes, known: pathlib.Path) -> bytes:
  """Of a teacher's ledger as it was published and as it was read before.

  Args:
    published: its bytes.
    known: where what was read before is kept, which may be nothing.

  Returns:
    The longer of the two: a ledger only grows. What was published, if the other
    is of another run.

  Raises:
    ValueError: each has lines that the other lacks.
  """
  if not _of_one_run(published, known):
    return published
  before = known.read_bytes()
  if before.startswith(published):
    return before
  if not published.startswith(before):
    raise ValueError(
      "its ledger lacks lines that it had before: its MODEL_DIR is an older"
      " copy, or one of two that went on"
    )
  return published


def _of_one_run(ledger: bytes, path: pathlib.Path) -> bool:
  """Whether two ledgers begin with the same line."""
  if not path.exists():
    return False
  with open(path, "rb") as file:
    return file.readline() == ledger.partition(b"\n")[0] + b"\n"


def check_weights(publication: exchange_lib.Publication, like: Any) -> None:
  """Refuses weights of another model, or that are not numbers.

  Args:
    publication: whose weights they are.
    like: tree of shapes that they must have.

  Raises:
    ValueError: names the first parameter that is wrong.
  """
  wanted, found = kept_weights.named(like), publication.weights
  for name in sorted({*wanted, *found}):
    here = wanted[name].shape if name in wanted else "absent"
    there = found[name].shape if name in found else "absent"
    if here != there:
      raise ValueError(
        f"it is another model: {name} is {there} there and {here} here"
      )
    if not np.isfinite(found[name]).all():
      raise ValueError(f"{name} holds numbers that are not finite")
  if checkpoints_lib.state_digest(dict(found)) != publication.fingerprint:
    raise ValueError("its weights do not match their fingerprint")


def check_ledger(
  found: ledger_lib.Ledger, own: ledger_lib.Ledger, *, claim: bool
) -> None:
  """Refuses a teacher whose releases cannot be composed with one's own.

  Args:
    found: the teacher's ledger, which was read whole.
    own: the learner's.
    claim: whether the learner makes a privacy claim.

  Raises:
    ValueError: it has no plan, protects another unit, or claims nothing.
  """
  if not found.header:
    raise ValueError("its ledger has no plan")
  if found.header["seed"] == own.header["seed"]:
    raise ValueError("its run has this run's own seed")
  if claim and (
    found.fixed_seed or wording.EXACT_CODEBOOKS in found.unprotected
  ):
    raise ValueError(
      "its run makes no privacy claim, but this one does (give both secret"
      " seeds, or declare the teacher public)"
    )
  here, there = own.header["plan"], found.header["plan"]
  for name, one, other in (
    # Its name is the user's own, and may hide what it is.
    ("unit", here["unit"], there["unit"]),
    ("unit", wording.unit(here), wording.unit(there)),
    ("relation", here["relation"], there["relation"]),
  ):
    if one != other:
      raise ValueError(f"its {name} is {other!r}, and this run's is {one!r}")
  if (
    here["relation"] == "replace_one"
    and here["sampling"] != (there["sampling"])
  ):
    # dp-accounting prices each alone, but not both together.
    raise ValueError(
      f"its sampling is {there['sampling']!r}, and this run's is"
      f" {here['sampling']!r}: under 'replace_one' they have no joint price"
    )


def check_covers(ledger: ledger_lib.Ledger, branch: str, step: int) -> None:
  """Refuses a ledger that does not know of all updates in a teacher's weights.

  Args:
    ledger: the teacher's.
    branch: on which the weights were made.
    step: updates that they contain.

  Raises:
    ValueError: some of them are not priced.
  """
  made = {each.name: each.fork_step for each in ledger.branches}
  if branch not in made or step > max(
    made[branch], ledger.last_step(branch) + 1
  ):
    raise ValueError(f"its ledger does not know of all its {step} updates")


def check_apart(
  found: Mapping[str, Any] | None, own: Mapping[str, Any] | None
) -> None:
  """Refuses corpora that are declared disjoint where the ledgers know better.

  Args:
    found: the teacher's shard, by its ledger.
    own: this run's.

  Raises:
    ValueError: both are of one corpus, and not two shards of one division.
  """
  if found is None or own is None or found["corpus"] != own["corpus"]:
    return
  if {**found, "index": 0} != {**own, "index": 0} or (
    found["index"] == own["index"]
  ):
    raise ValueError(
      "its corpus was declared to be disjoint, but is the one that this run's"
      " shard is of: declare 'overlapping'"
    )


def check_shard(
  found: Mapping[str, Any] | None,
  own: Mapping[str, Any] | None,
  replica: int,
) -> None:
  """Refuses a teacher that may have read this run's units.

  Args:
    found: the teacher's shard, by its ledger.
    own: this run's.
    replica: number of the teacher.

  Raises:
    ValueError: it is not another shard of the same corpus.
  """
  if own is None or found != {**own, "index": replica}:
    raise ValueError(
      f"it does not train on shard {replica} of this run's corpus (if that is"
      " meant, declare Codistillation.corpora='overlapping')"
    )
