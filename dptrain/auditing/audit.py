"""`dptrain audit`: a training run with canaries, and what it betrays.

Shapes: m canaries.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from dptrain.auditing import black_box
from dptrain.auditing import canaries as canaries_lib
from dptrain.auditing import observer as observer_lib
from dptrain.auditing import verdict as verdict_lib
from dptrain.privacy import keys as keys_lib
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import others as others_lib
from dptrain.privacy import plan as plan_lib
from dptrain.reports import curves
from dptrain.training import checkpoints as checkpoints_lib
from dptrain.training import examples as examples_lib
from dptrain.training import loop
from dptrain.training import mesh as mesh_lib
from dptrain.training import ngram_learning
from dptrain.training import preparation as preparation_lib
from dptrain.training import progress
from dptrain.training import records as records_lib
from dptrain.training import run as run_lib
from dptrain.training import settings as settings_lib

MODES = ("white_box", "black_box")
TEXT_FILE = "audit.txt"
JSON_FILE = "audit.json"
_FEWEST_CANARIES = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditSettings:
  """How a run is audited.

  Attributes:
    canaries: m, units of the run (records, documents or users) that are put in
      or left out by a fair coin. More give higher bounds.
    mode: "white_box": gradient canaries, and an attacker who sees every
      update. "black_box": canaries are text, and the attacker sees the final
      model only.
    guesses: how many coins are guessed; None: a tenth of the canaries. To be
      chosen before the audit, never after a look at its result.
    confidence: that the lower bounds hold.
  """

  canaries: int = 1000
  mode: str = "white_box"
  guesses: int | None = None
  confidence: float = 0.95

  def __post_init__(self) -> None:
    name = "AuditSettings.canaries"
    settings_lib.check_whole(name, self.canaries, _FEWEST_CANARIES)
    if self.mode not in MODES:
      raise ValueError(
        f"AuditSettings.mode={self.mode!r} is unknown; use one of"
        f" {', '.join(map(repr, MODES))}."
      )
    if self.guesses is not None:
      settings_lib.check_whole("AuditSettings.guesses", self.guesses, least=1)
      if self.guesses > self.canaries:
        raise ValueError(
          f"AuditSettings.guesses={self.guesses} exceeds the {self.canaries}"
          " canaries; guess fewer."
        )
    if not 0.5 < self.confidence < 1:
      raise ValueError(
        f"AuditSettings.confidence={self.confidence} must be above 0.5 and"
        " below 1."
      )

  @property
  def num_guesses(self) -> int:
    """How many coins are guessed."""
    return self.guesses or self.canaries // 10


def audit(
  run: run_lib.TrainingRun,
  settings: AuditSettings,
  records: records_lib.Records | None = None,
) -> verdict_lib.Verdict:
  """Trains with canaries in a MODEL_DIR of its own, and guesses their coins.

  The run is `loop.train` with the user's settings: sampler, step, noise, ledger
  and accountant are those of any run. Its corpus is the canaries and the user's
  records, its plan that of a corpus of so many units. An audit that is
  interrupted is resumed by the same command; one that is done gives its verdict
  again.

  Formal guarantee: none is made. If the run satisfies its claim, each of the
  two lower bounds exceeds what it is compared with (`Verdict`) with probability
  at most (1 - confidence) / 2, over the coins and the run. That of the f-DP
  form leaves out of account what the claim's trade-off does below delta. What
  is measured refutes a true claim with probability at most 2e-6.

  Args:
    run: the user's settings; MODEL_DIR must be new, or that of this audit.
    settings: of the audit.
    records: what to train on instead of the run's task.

  Returns:
    The verdict, which is also written into MODEL_DIR.

  Raises:
    ValueError: what cannot be audited, or bad input, before anything is spent.
  """
  _check_auditable(run, settings)
  directory = pathlib.Path(run.model_dir).expanduser()
  directory.mkdir(parents=True, exist_ok=True)
  started = _started(directory)
  seed = canaries_lib.load_or_create_seed(directory, run.fixed_seed)
  # Nothing of an audit is worth publishing exactly.
  run = dataclasses.replace(run, validation_split=None, tensorboard=False)
  if records is None:
    records = records_lib.read_records(run, directory, bool(started))
  canaries = canaries_lib.make_canaries(
    seed, settings.canaries, run.sequence_length, records.vocabulary_size
  )
  records_lib.check_records(run, records)
  privacy = run.privacy
  records = canaries_lib.with_canaries(
    records, canaries, privacy.unit, privacy.records_per_unit
  )
  # How many units there are does not depend on the seed.
  units = examples_lib.of_run(run, records.train, None, keys_lib.fixed_seed(0))
  recorded = started.get("plan", {})
  plan = plan_lib.make_plan(
    privacy,
    units.num_examples,
    calibrated_noise=recorded.get("noise_multiplier"),
    noise_coefficients=recorded.get("noise_coefficients"),
    others=records.others(privacy),
  )
  if settings.mode == "white_box":
    run = _observed(run, plan, settings.canaries)
  result = loop.train(run, records)
  prepared, state = _final_state(run, directory, records)
  if prepared.plan != plan:
    raise RuntimeError("the audited run had another plan than its observer.")
  verdict = _judged(settings, canaries, prepared, state, result, directory)
  for name, text in (
    (TEXT_FILE, verdict.as_text()),
    (JSON_FILE, verdict.as_json()),
  ):
    (directory / name).write_text(text, encoding="utf-8")
  return verdict


def _check_auditable(run: run_lib.TrainingRun, settings: AuditSettings) -> None:
  if jax.process_count() > 1:
    raise ValueError(
      f"an audit runs in one process, not in {jax.process_count()}: audit a"
      " smaller run of the same settings."
    )
  if run.privacy.unit_sampling == "records" and run.privacy.unit != "record":
    raise ValueError(
      "PrivacySettings.unit_sampling='records' cannot be audited: a canary is"
      f" one {run.privacy.unit}, sampled as a whole. Audit the same run with"
      " unit_sampling='units'."
    )
  if run.shard.count > 1:
    raise ValueError(
      f"ShardSettings.count={run.shard.count} cannot be audited: canaries would"
      " be dealt out to shards. Audit the same run with count=1, and with"
      " Codistillation.corpora='disjoint' if it is a replica."
    )
  if run.initial_weights.path is not None:
    raise ValueError(
      f"InitialWeights.path={run.initial_weights.path!r} cannot be audited: the"
      " model of an audit has canaries among its parameters. Leave it None;"
      " the mechanism does not depend on where training starts."
    )
  if ngram_learning.unprotected(run.model):
    raise ValueError(
      "NGrammerSettings.learning='unprotected' leaves no claim to audit: its"
      " codebooks are published exactly. Set it to 'private'."
    )
  quantile = run.privacy.adaptive_quantile
  if settings.mode == "white_box" and quantile is not None:
    raise ValueError(
      f"PrivacySettings.adaptive_quantile={quantile} cannot be audited in"
      " white-box mode: an optimizer, which is all that the observer is, does"
      " not see the clip norm. Use adaptive_quantile=None, or --mode=black_box."
    )


def _started(directory: pathlib.Path) -> dict[str, Any]:
  """The header of this audit's ledger, if it has begun.

  Raises:
    ValueError: MODEL_DIR is that of a training run.
  """
  if not (directory / ledger_lib.LEDGER_FILE).exists():
    return {}
  if not (directory / canaries_lib.SEED_FILE).exists():
    raise ValueError(
      f"MODEL_DIR={directory} holds a training run: an audit trains a model of"
      " its own, with canaries; give it a new MODEL_DIR."
    )
  return ledger_lib.Ledger(directory / ledger_lib.LEDGER_FILE).header


def _observed(
  run: run_lib.TrainingRun, plan: plan_lib.PrivacyPlan, num_canaries: int
) -> run_lib.TrainingRun:
  """The run with canaries' parameters beside the model's, and an observer."""
  optimizer = ngram_learning.optimizer_for(
    run.model, run.optimizer, run.codebooks
  )
  observer = observer_lib.Observer(optimizer, plan, num_canaries)
  return dataclasses.replace(
    run,
    model=observer_lib.CanaryModel(
      bert=run.model.bert,
      base=run.model,
      num_canaries=num_canaries,
      gradient_norm=observer.gradient_norm,
    ),
    optimizer=ngram_learning.complete(observer.as_optimizer()),
  )


def _final_state(
  run: run_lib.TrainingRun,
  directory: pathlib.Path,
  records: records_lib.Records,
) -> tuple[preparation_lib.Preparation, Any]:
  """What the run published last, read back from its checkpoint."""
  layout = mesh_lib.make_layout(run.mesh, run.model)
  prepared = preparation_lib.prepare(
    run, directory, ledger_lib.read(directory), records, layout
  )
  with checkpoints_lib.Checkpoints(
    directory, run.checkpoints, progress.say
  ) as checkpoints:
    restored = checkpoints.restore(prepared.state_like())
  if restored is None:
    raise RuntimeError(f"{directory} has no checkpoint after training.")
  return prepared, restored.state


def _judged(
  settings: AuditSettings,
  canaries: canaries_lib.Canaries,
  prepared: preparation_lib.Preparation,
  state: Any,
  result: run_lib.TrainingResult,
  directory: pathlib.Path,
) -> verdict_lib.Verdict:
  plan, measured = prepared.plan, None
  if settings.mode == "white_box":
    seen = jax.device_get(state["opt_state"])
    scores = np.asarray(seen.scores, np.float64)
    # Noise that is correlated over updates is not measured by adding it up.
    measured = (
      None
      if plan.bands > 1
      else verdict_lib.measure(
        np.asarray(seen.totals, np.float64),
        np.asarray(seen.squares, np.float64),
        canaries.included,
        [plan.participation_prob(step) for step in range(result.step)],
        plan.noise_multiplier,
      )
    )
  else:
    scores = black_box.scores(prepared, state["params"], canaries.tokens)
  ledger = ledger_lib.read(directory)
  return verdict_lib.Verdict(
    mode=settings.mode,
    claim=not ledger.fixed_seed,
    epsilon=result.epsilon,
    delta=result.delta,
    gaussian_epsilon=curves.covering_gaussian(
      ledger.releases(),
      result.epsilon,
      result.delta,
      plan.relation,
      failure_prob=others_lib.failure_prob(ledger.others),
    ),
    confidence=settings.confidence,
    updates=result.step,
    noise_multiplier=plan.noise_multiplier,
    # Two bounds, each with half of what may go wrong.
    guesses=verdict_lib.guess(
      scores,
      canaries.included,
      settings.num_guesses,
      (1 - settings.confidence) / 2,
      result.delta,
    ),
    measured=measured,
  )
