"""One private run as every part of a t5x launch knows it.

t5x builds dataset, model, optimizer and trainer one by one and never shows them
each other; this object is what they share, so that sampler, noise, divisor,
ledger and report cannot disagree. In gin it is a singleton.

On several processes all draw the same sample; only process 0 writes the ledger
and the report, and tells the others what it wrote.
"""

from collections.abc import Callable
import contextlib
import hashlib
import json
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from dptrain.privacy import budget
from dptrain.privacy import draws
from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import report as report_lib
from dptrain.training import checkpoints as checkpoints_lib
from dptrain.training import classroom as classroom_lib
from dptrain.training import lineage as lineage_lib
from dptrain.training import preparation as preparation_lib
from dptrain.training import processes
from dptrain.training import progress
from dptrain.training import records as records_lib
from dptrain.training import run as run_lib

Bytes = npt.NDArray[np.uint8]
NO_DIGEST = np.zeros(32, np.uint8)


class Launch:
  """A run with its ledger open.

  Formal guarantee: see `PrivacyPlan` and `PrivateStep`; `record` is called
  before each update, and no process can finish the update before process 0 has
  written it down.

  Attributes:
    run: the user's settings; a thin loop of the same settings trains the same.
    directory: MODEL_DIR.
    prepared: plan, seed, records and step.
    ledger: of MODEL_DIR; read-only except on process 0.
    classroom: who teaches the run, if anybody does.
    limit: updates that plan and budget allow; known once a branch is open.
    on_report: called with the epsilon of each report, on process 0.
  """

  def __init__(
    self,
    run: run_lib.TrainingRun,
    records: records_lib.Records | None = None,
  ):
    """Opens the ledger and prepares the run; refuses bad input.

    Args:
      run: the user's settings.
      records: what to train on instead of the run's task.

    Raises:
      ValueError: bad input, before anything is spent.
    """
    # The noise must not depend on how arrays are sharded.
    jax.config.update("jax_threefry_partitionable", True)
    _check_periods(run)
    if run.privacy.bands > 1:
      raise ValueError(
        f"PrivacySettings.bands={run.privacy.bands}: under t5x the noise of"
        " earlier updates is not at hand; use bands=1, or `dptrain train`."
      )
    if run.public_data.name is not None:
      raise ValueError(
        f"PublicData ({run.public_data.name!r}) takes no part under t5x, but"
        " ledger and report would say that it did: leave it out, or use"
        " `dptrain train`."
      )
    self.run = run
    self.directory = pathlib.Path(run.model_dir).expanduser()
    self.directory.mkdir(parents=True, exist_ok=True)
    processes.check_shared(self.directory)
    processes.check_equal("settings", processes.comparable(run))
    self._stack = contextlib.ExitStack()
    try:
      self.ledger, self.prepared = processes.in_turn(
        lambda: self._opened(records)
      )
      processes.check_equal(
        "vocabulary, model, optimizer, initial weights or code",
        {
          "lineage": self.prepared.lineage,
          "weights": self.prepared.weights_digest(),
        },
      )
    except BaseException:
      self._stack.close()
      raise
    self.classroom = classroom_lib.make_classroom(
      run, self.directory, self.ledger, self.prepared
    )
    self.plan = self.prepared.plan
    self.limit = self.plan.num_steps
    self.on_report: Callable[[float], None] = lambda _: None
    self._branch = self._reported = ""
    self._start = 0

  def close(self) -> None:
    """Writes the last report and lets go of MODEL_DIR."""
    if self._branch:
      self.write_report()
      self._branch = ""
    self._stack.close()

  def open_branch(
    self,
    step: int,
    branch: Bytes,
    ledger_head: Bytes,
    state: dict[str, Any],
    mesh: str = "",
    *,
    intact: bool = True,
  ) -> int:
    """Opens the branch on which training goes on, as the thin loop does.

    Args:
      step: updates that the train state contains.
      branch: uint8 [32], digest of the train state's branch; zeros for a fresh
        state.
      ledger_head: uint8 [32], hash of the ledger's last line when the state was
        made; zeros for a fresh state.
      state: "params", and "opt_state" that `PrivateStep.init` or `finish`
        returned.
      mesh: how devices are arranged, in words; empty for one device.
      intact: whether the arrays are bit for bit those that were saved.

    Returns:
      Updates that may be made in all.

    Raises:
      LedgerError: ledger and checkpoint belong to different runs, or the ledger
        was rolled back.
    """
    fresh = not branch.any()
    if fresh and step:
      raise ledger_lib.LedgerError(
        f"the checkpoint of update {step} in {self.directory} was not written"
        " by a private launch: what it released is unknown. Start in a new"
        " MODEL_DIR."
      )
    digest = checkpoints_lib.state_digest(jax.tree.map(_on_host, state))
    environment = lineage_lib.joint_environment(
      processes.gathered(
        lineage_lib.environment(
          self.run.physical_batch_size, self.run.microbatch_size, mesh
        )
      )
    )

    def opened() -> tuple[str, int, int]:
      if not fresh:
        self._check_line(ledger_head, step)
      found = self.ledger.open_branch(
        checkpoint_branch="" if fresh else branch.tobytes().hex(),
        checkpoint_step=step,
        lineage=self.prepared.lineage,
        environment=environment,
        state=digest,
        intact=fresh or intact,
        repeatable=self.classroom.repeatable(step),
      )
      limit = budget.last_affordable(self.plan, self.ledger, found.name, step)
      return found.name, found.fork_step, limit

    self._branch, self._start, self.limit = processes.first(opened)
    self.classroom.begin(self._branch)
    if not (fresh or intact):
      progress.say(
        f"the checkpoint of update {step} was saved or restored in another"
        " form (a dtype, a transformation): updates that the ledger already has"
        " would not be repeated exactly, and so are made and priced anew"
      )
    if self.limit < self.plan.num_steps:
      progress.say(
        f"the budget, epsilon {self.plan.target_epsilon:g}, allows"
        f" {self.limit} of {self.plan.num_steps} updates"
      )
    chosen = self.prepared.clipping
    progress.say(f"clipping: {chosen.method} ({chosen.reason})")
    return self.limit

  def key(self, purpose: str, step: int) -> npt.NDArray[np.uint32]:
    """Words of the threefry key of one update of the open branch.

    Plain words, because a key array lives on one device.
    """
    branch = self._branch
    if purpose == "noise":
      branch = self.classroom.noise_branch(branch, step)
    key = self.prepared.seed.key(purpose, branch, step)
    return np.asarray(jax.random.key_data(key))

  def drawn(self, step: int) -> npt.NDArray[np.int64]:
    """The records of update `step` of the open branch."""

    def key_of(purpose: str, step: int) -> jax.Array:
      words = jnp.asarray(self.key(purpose, step))
      return jax.random.wrap_key_data(words, impl="threefry2x32")

    number = self.prepared.store.num_examples
    return draws.draw(self.plan, key_of, number, step, self._start)

  def record(self, step: int) -> tuple[Bytes, Bytes]:
    """Writes update `step` into the ledger; call it before the update.

    Returns:
      Digests of the branch and of the ledger's last line, uint8 [32] each: what
      a checkpoint of this update must carry.
    """

    def written() -> str:
      number = self.plan.round_number(step, self._start)
      self.ledger.record(self._branch, step, self.plan.release(step), number)
      return self.ledger.head

    return _bytes(self._branch), _bytes(processes.first(written))

  def write_report(self) -> None:
    """Rewrites the privacy report and tells `on_report` the epsilon in it."""
    self.classroom.forget(self._oldest_checkpoint())
    if not processes.is_first() or self._reported == self.ledger.head:
      return
    if not progress.write_report(self.ledger, self.directory):
      return
    self._reported = self.ledger.head
    told = json.loads((self.directory / report_lib.JSON_FILE).read_bytes())
    self.on_report(float(told["epsilon"]["value"]))

  def _oldest_checkpoint(self) -> int:
    """Updates in the oldest that t5x has kept; 0 if there is none."""
    names = [path.name for path in self.directory.glob("checkpoint_*")]
    steps = [name.removeprefix("checkpoint_") for name in names]
    return min((int(step) for step in steps if step.isdigit()), default=0)

  def _opened(
    self, records: records_lib.Records | None
  ) -> tuple[ledger_lib.Ledger, preparation_lib.Preparation]:
    """The ledger, which only process 0 writes, and all that is read."""
    if processes.is_first():
      ledger = self._stack.enter_context(ledger_lib.opened(self.directory))
      ledger.check_not_lost()
    else:
      ledger = ledger_lib.read(self.directory)
    return ledger, preparation_lib.prepare(
      self.run, self.directory, ledger, records
    )

  def _check_line(self, ledger_head: Bytes, step: int) -> None:
    wanted = ledger_head.tobytes().hex()
    with open(self.ledger.path, "rb") as lines:
      if any(hashlib.sha256(line).hexdigest() == wanted for line in lines):
        return
    raise ledger_lib.LedgerError(
      f"{self.ledger.path} lacks a line that was in it when the checkpoint of"
      f" update {step} was made: the ledger was rolled back. Restore the newest"
      " copy of it; without it the guarantee is lost."
    )


def _check_periods(run: run_lib.TrainingRun) -> None:
  """t5x saves at the end of its periods only: a stop must fall on one."""
  save, evaluate = run.checkpoints.period, run.evaluation.period
  if save < 1:
    raise ValueError(
      f"CheckpointSettings.period={save}: under t5x it must be at least 1."
    )
  if run.validation_split and evaluate % save:
    raise ValueError(
      f"EvaluationSettings.period={evaluate} is not a multiple of"
      f" CheckpointSettings.period={save}: t5x would lose the last updates of a"
      " run that its budget stops. Choose a multiple."
    )


def _on_host(x: Any) -> np.ndarray:
  """A whole array, wherever its parts are."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    if x.is_fully_replicated:
      return np.asarray(x.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(jax.device_get(x))


def _bytes(digest: str) -> Bytes:
  return np.frombuffer(bytes.fromhex(digest), np.uint8)
