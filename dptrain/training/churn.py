"""How far the predictions of two models differ: churn.

What a user sees change when a model is trained again: arXiv 1804.03235, section
3.4 (differences of predicted probabilities), and arXiv 2102.03349 (share of
inputs that are classified otherwise). Here an input is a masked token.

Shapes: B batch, M masked, V vocabulary, n masked tokens in all.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dptrain.data import corpus
from dptrain.data import prepared as prepared_lib
from dptrain.data import store as store_lib
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.models import masked_lm
from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import layout
from dptrain.training import evaluation as evaluation_lib
from dptrain.training import initial_weights
from dptrain.training import objective as objective_lib
from dptrain.training import records as records_lib
from dptrain.training import run as run_lib

NUM_BINS = 10
_EXACT = (
  "These figures are exact, made of the compared records without noise: they"
  " are outside any privacy guarantee. Do not publish them if the records are"
  " private."
)


@dataclasses.dataclass(frozen=True)
class Bin:
  """Masked tokens of like confidence, the mean of both top probabilities.

  Attributes:
    low: least confidence.
    high: all are below, but the last bin holds 1, too.
    num_tokens: how many there are.
    disagreement: as in `Churn`; None without tokens.
    label_difference: as in `Churn`; None without tokens.
  """

  low: float
  high: float
  num_tokens: int
  disagreement: float | None
  label_difference: float | None


@dataclasses.dataclass(frozen=True)
class Churn:
  """Two models on the same masked tokens. Outside the privacy guarantee.

  Attributes:
    a: what the first model is called.
    b: what the second one is called.
    data: where the tokens are from.
    num_tokens: masked tokens that were compared.
    disagreement: share of them at which the first guesses differ.
    label_difference: mean difference, without sign, of the probabilities that
      both give to the true token.
    total_variation: mean over tokens of half the sum over V of the differences
      of the two predictions, without sign: 0 where they are equal, at most 1.
    accuracy_a: share that the first model's first guess gets right.
    accuracy_b: that of the second.
    loss_a: mean cross-entropy of the first model per masked token, in nats.
    loss_b: that of the second.
    one_right: share that exactly one of them gets right.
    bins: the same by confidence, from 0 to 1.
  """

  a: str
  b: str
  data: str
  num_tokens: int
  disagreement: float
  label_difference: float
  total_variation: float
  accuracy_a: float
  accuracy_b: float
  loss_a: float
  loss_b: float
  one_right: float
  bins: tuple[Bin, ...]

  def as_json(self) -> str:
    """The figures as JSON text."""
    data = dataclasses.asdict(self) | {"note": _EXACT}
    return json.dumps(data, indent=2, sort_keys=True) + "\n"

  def as_text(self) -> str:
    """The figures as text for people, lines of at most 80 columns."""
    rows = [
      ("A", self.a),
      ("B", self.b),
      ("data", self.data),
      ("masked tokens", f"{self.num_tokens:,}"),
      ("disagreement", f"{_percent(self.disagreement)} of first guesses"),
      ("mean |dp|", f"{self.label_difference:.4f}, p: of the true token"),
      ("total variation", f"{self.total_variation:.4f} in the mean"),
      ("accuracy", _both(_percent(self.accuracy_a), _percent(self.accuracy_b))),
      ("loss", _both(f"{self.loss_a:.4f}", f"{self.loss_b:.4f}") + " nats"),
      ("exactly one right", _percent(self.one_right)),
    ]
    lines = ["Churn", "=====", "", *layout.table(rows), ""]
    lines += [
      "By confidence, the mean of both models' largest probabilities:",
      "",
      f"{'confidence':12}{'tokens':>12}{'disagreement':>15}{'mean |dp|':>12}",
    ]
    lines += [_line(each, each is self.bins[-1]) for each in self.bins]
    return "\n".join([*lines, "", *layout.paragraph(_EXACT), ""])


def measure(
  model: masked_lm.MaskedLanguageModel,
  evaluator: evaluation_lib.Evaluator,
  params_a: Any,
  params_b: Any,
  names: tuple[str, str, str] = ("A", "B", "the split"),
) -> Churn:
  """Compares the predictions of two models, without dropout.

  Formal guarantee: none. The figures are exact functions of the records that
  the evaluator holds.

  Args:
    model: of both.
    evaluator: holds the masked records; its masks never change.
    params_a: parameters of the first model.
    params_b: parameters of the second.
    names: of the two models and of the data.

  Returns:
    What was found; each figure but the names is symmetric in A and B, or told
    of both.

  Raises:
    ValueError: no token is masked, or a prediction is not finite.
  """

  @jax.jit
  def seen(params_a: Any, params_b: Any, masked: Any) -> dict[str, jax.Array]:
    logits = [model.logits(params, masked) for params in (params_a, params_b)]
    return _seen(logits[0], logits[1], masked["labels"])

  parts: list[dict[str, np.ndarray]] = []
  for masked in evaluator.masked_batches:
    found = jax.device_get(seen(params_a, params_b, masked))
    real = masked["weights"] > 0
    parts.append({name: array[real] for name, array in found.items()})
  joined = {
    name: np.concatenate([np.asarray(part[name], float) for part in parts])
    for name in parts[0]
  }
  if not joined["confidence"].size:
    raise ValueError(f"{names[2]} has no token that is masked: use other data.")
  for each, name in zip("ab", names[:2], strict=True):
    if not np.isfinite(joined[f"loss_{each}"]).all():
      raise ValueError(
        f"{name} makes predictions that are not finite: its weights are of no"
        " use here; compare an earlier checkpoint, as .npz."
      )
  means = {name: float(array.mean()) for name, array in joined.items()}
  del means["confidence"]
  a, b, data = names
  return Churn(
    a=a,
    b=b,
    data=data,
    num_tokens=joined["confidence"].size,
    bins=_bins(joined),
    **means,
  )


def compare(
  run: run_lib.TrainingRun,
  a: str,
  b: str,
  data: str | None = None,
  split: str | None = None,
) -> Churn:
  """Compares two models of a run's kind on a split of its task, or of a folder.

  Args:
    run: names model, masking, task, and what else decides the records; its
      model_dir is not touched.
    a: a MODEL_DIR (its newest checkpoint counts), or an .npz file of weights.
    b: as `a`; may be the same.
    data: folder that `dptrain prepare` has written; None for that of
      `run.prepared`, or else the run's task.
    split: of the data; None for the run's validation split.

  Returns:
    What was found.

  Raises:
    ValueError: bad input; names the setting, its value and the way out.
  """
  split = run.validation_split if split is None else split
  if split is None:
    raise ValueError(
      "TrainingRun.validation_split=None: name the split to compare on by"
      " --split."
    )
  folder, setting = data, "--data"
  if data is None and run.prepared is not None:
    folder, setting = run.prepared, "TrainingRun.prepared"
  vocabulary = _vocabulary(run, {"A": a, "B": b}, folder, setting)
  run.model.check(run.sequence_length, vocabulary.size)
  like = jax.eval_shape(run.model.init, jax.random.key(0, impl="threefry2x32"))
  params = [
    initial_weights.load(path, like, name)
    for name, path in (("A", a), ("B", b))
  ]
  if folder is None:
    documents = corpus.read_documents(run.task, split)
    store: store_lib.Store = store_lib.build_store(
      documents, vocabulary, run.sequence_length
    )
  else:
    store = _prepared_store(run, folder, setting, split, vocabulary)
  objective = objective_lib.Objective(run.model, run.masking)
  evaluator = evaluation_lib.Evaluator(objective, store, run.evaluation)
  told = f"split {split!r} of {run.task if folder is None else folder}"
  if run.evaluation.max_records is not None:
    told += f", of which at most {run.evaluation.max_records:,} records"
  return measure(run.model, evaluator, params[0], params[1], (a, b, told))


def _seen(
  logits_a: jax.Array, logits_b: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
  """What is averaged over tokens, [B, M] each; and their confidence."""
  log_a, log_b = (jax.nn.log_softmax(x, axis=-1) for x in (logits_a, logits_b))
  probs_a, probs_b = jnp.exp(log_a), jnp.exp(log_b)
  guess_a, guess_b = jnp.argmax(logits_a, -1), jnp.argmax(logits_b, -1)
  right_a, right_b = guess_a == labels, guess_b == labels

  def of_label(x: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, labels[..., None], axis=-1)[..., 0]

  return {
    "disagreement": guess_a != guess_b,
    "label_difference": jnp.abs(of_label(probs_a) - of_label(probs_b)),
    "total_variation": jnp.sum(jnp.abs(probs_a - probs_b), axis=-1) / 2,
    "accuracy_a": right_a,
    "accuracy_b": right_b,
    "loss_a": -of_label(log_a),
    "loss_b": -of_label(log_b),
    "one_right": right_a != right_b,
    "confidence": (probs_a.max(axis=-1) + probs_b.max(axis=-1)) / 2,
  }


def _bins(joined: Mapping[str, np.ndarray]) -> tuple[Bin, ...]:
  """Figures by confidence, of arrays [n]."""
  edges = np.arange(NUM_BINS + 1) / NUM_BINS
  places = np.searchsorted(edges[1:-1], joined["confidence"], side="right")
  bins = []
  for place in range(NUM_BINS):
    here = places == place
    means = [
      float(joined[name][here].mean()) if here.any() else None
      for name in ("disagreement", "label_difference")
    ]
    low, high = float(edges[place]), float(edges[place + 1])
    bins.append(Bin(low, high, int(here.sum()), means[0], means[1]))
  return tuple(bins)


def _vocabulary(
  run: run_lib.TrainingRun,
  models: Mapping[str, str],
  folder: str | None,
  setting: str,
) -> vocabulary_lib.Vocabulary:
  """The one vocabulary that both models and the data are written in."""
  places = {}
  for name, path in models.items():
    if initial_weights.is_file(path):
      continue
    places[f"{name}={path!r}"] = kept = (
      pathlib.Path(path).expanduser() / records_lib.VOCABULARY_FILE
    )
    if not kept.is_file():
      raise ValueError(
        f"{name}={path!r} is neither an .npz file nor a MODEL_DIR with a"
        f" {records_lib.VOCABULARY_FILE}.{ledger_lib.runs_below(kept.parent)}"
      )
  if folder is not None:
    place = pathlib.Path(folder).expanduser()
    prepared_lib.read_manifest(place)  # Tells better what is missing.
    places[f"{setting}={folder!r}"] = place / prepared_lib.VOCABULARY
  given = run.vocabulary.path
  if given is not None:
    place = pathlib.Path(given).expanduser()
    places[f"VocabularySettings.path={given!r}"] = place
  if not places:
    raise ValueError(
      "A and B are files of weights, which hold no vocabulary: set"
      " VocabularySettings.path to theirs (--gin.VocabularySettings.path=...),"
      " or give --data."
    )
  found = {
    told: vocabulary_lib.load_vocabulary(place)
    for told, place in places.items()
  }
  (first, vocabulary), *others = found.items()
  for told, other in others:
    if other.fingerprint != vocabulary.fingerprint:
      raise ValueError(
        f"{told} has another vocabulary than {first}: the same tokens would"
        " mean other text, so predictions cannot be compared. Train both with"
        " one VocabularySettings.path, and compare on data in that vocabulary."
      )
  return vocabulary


def _prepared_store(
  run: run_lib.TrainingRun,
  folder: str,
  setting: str,
  split: str,
  vocabulary: vocabulary_lib.Vocabulary,
) -> prepared_lib.PreparedStore:
  """A split of a prepared corpus, whole, of records of the run's length."""
  place = pathlib.Path(folder).expanduser()
  manifest = prepared_lib.read_manifest(place)
  if manifest["sequence_length"] != run.sequence_length:
    raise ValueError(
      f"{setting}={folder!r} holds records of {manifest['sequence_length']}"
      f" tokens, but sequence_length={run.sequence_length}: set that length, or"
      " give data prepared with this one."
    )
  if manifest["vocabulary_sha256"] != vocabulary.fingerprint:
    raise ValueError(
      f"{place / prepared_lib.VOCABULARY} is not the vocabulary that the"
      f" records of {folder} are written in: restore that file, or prepare"
      " again."
    )
  store = prepared_lib.PreparedStore(place, split)
  store.check()
  return store


def _percent(share: float) -> str:
  return f"{100 * share:.2f} %"


def _both(a: str, b: str) -> str:
  return f"A {a}, B {b}"


def _line(each: Bin, last: bool) -> str:
  """One row of the table by confidence."""
  name = f"[{each.low:.1f}, {each.high:.1f}{']' if last else ')'}"
  shown = ("-", "-")
  if each.disagreement is not None and each.label_difference is not None:
    shown = _percent(each.disagreement), f"{each.label_difference:.4f}"
  return f"{name:12}{each.num_tokens:>12,}{shown[0]:>15}{shown[1]:>12}"
