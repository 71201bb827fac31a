"""Masked language modelling as one loss per example.

Shapes: B batch, T length, V vocabulary, M masked.

DP-SGD clips each example's gradient, so the objective must fall apart into
terms that each depend on one example: no statistic of the batch may enter, and
each loss is normalised by its own example's masks (the per-example mean that
the replication of arXiv 2108.01624 in arXiv 2211.02956 uses).
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dptrain.models import axes
from dptrain.models import bert as bert_lib
from dptrain.models import distillation
from dptrain.models import losses as losses_lib
from dptrain.models import ngrammer
from dptrain.models import sampled_softmax

Params = dict[str, Any]
Batch = Mapping[str, Any]
Terms = dict[str, jax.Array]  # [B] each, by the names of `ngrammer`


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModel:
  """A `Bert` with the objective it is trained on.

  Attributes:
    bert: the encoder and its masked-token head.
    loss: of one masked token, see `dptrain.models.losses`. What evaluation
      reads is plain cross-entropy and accuracy, whatever the loss.
    sampling: None trains on the whole vocabulary; else on classes drawn from
      it, which wants `Bert.logit_scale` and a loss that takes samples.
  """

  bert: bert_lib.Bert
  loss: losses_lib.PositionLoss = dataclasses.field(
    default_factory=losses_lib.CrossEntropy
  )
  sampling: sampled_softmax.SampledSoftmax | None = None

  def __post_init__(self) -> None:
    if not callable(self.loss):
      raise ValueError(
        f"MaskedLanguageModel.loss={self.loss!r} must be a loss, such as"
        " losses.CrossEntropy(); in gin, @losses.CrossEntropy()"
      )
    if self.sampling is None:
      return
    if self.bert.logit_scale is None:
      raise ValueError(
        "MaskedLanguageModel.sampling is set but Bert.logit_scale=None: classes"
        " are drawn by the cosines of hidden states and embeddings, so the"
        " logits must be made of them; set Bert.logit_scale, such as 16"
      )
    if not self.loss.takes_samples:
      raise ValueError(
        f"MaskedLanguageModel.loss={self.loss!r} needs all classes, but"
        " MaskedLanguageModel.sampling draws some; use CrossEntropy without"
        " label_smoothing, or sampling=None"
      )

  def init(self, key: jax.Array) -> Params:
    """Draws fresh parameters.

    Args:
      key: one typed PRNG key.

    Returns:
      A nested dict of float32 arrays. Under `jax.eval_shape` it allocates
      nothing.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    params: Params = axes.unboxed(self.bert.init(key, tokens, tokens))["params"]
    return params

  def logical_axes(self) -> dict[str, Any]:
    """Names of every parameter's dimensions: see `axes.logical_axes`."""
    return axes.logical_axes(self.bert)

  def losses(
    self, params: Params, batch: Batch, keys: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes each example's mean loss over its masked tokens.

    Entry i of every result depends on `params`, row i of `batch` and
    ``keys[i]`` only.

    Args:
      params: what `init` returned.
      batch: `inputs` [B, T] int32 token ids, `positions` [B, M] int32 indices
        into T, `labels` [B, M] int32 token ids in [0, V), `weights` [B, M],
        1.0 at real predictions and 0.0 at unused slots. With `targets`
        (`distillation.Targets`), what teachers predict there, the losses also
        have the mean distance to them.
      keys: typed PRNG keys [B], one per example, for dropout and sampled
        classes; without either they are not read. None switches both off, as
        evaluation wants it. Use threefry keys: draws of "unsafe_rbg" change
        under vmap.

    Returns:
      [B] float32 losses, 0 where an example has no masked token, and a dict of
      [B] float32 arrays: `loss_sum` (cross-entropy summed over masked tokens),
      `correct` (right predictions) and `masked` (sum of weights). Under
      sampling, cross-entropy is estimated, and a prediction is right if the
      label beats all classes that were drawn. What an N-Grammer's codebooks
      learn from adds its gradient to that of the losses, and 0 to their value.
      With learning="unprotected" it does not, but is there as
      `codebook_term`, whose value means nothing: its gradient by codebooks is
      an example's sums and counts.
    """
    labels, log_weights = batch["labels"], None
    if self.sampling is None or keys is None:
      logits, terms = self._logits(params, batch, keys)
      log_probs = jax.nn.log_softmax(logits, axis=-1)
    else:
      (logits, log_weights), terms = self._sampled(
        params, batch, keys, self.sampling
      )
      log_probs = jax.nn.log_softmax(logits + log_weights, axis=-1)
      labels = jnp.zeros_like(labels)
    picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    weights = batch["weights"].astype(jnp.float32)
    hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)

    loss_sum = -jnp.sum(weights * picked, axis=-1)
    trained_sum = loss_sum
    if self.loss != losses_lib.CrossEntropy():
      found = self.loss(logits, labels, log_weights)
      trained_sum = jnp.sum(weights * found, axis=-1)
    targets: distillation.Targets | None = batch.get("targets")
    if targets is not None:
      self.check_takes_targets()
      trained_sum = trained_sum + targets.sums(logits, weights)
    masked = jnp.sum(weights, axis=-1)
    # The inner where keeps 0 / 0 out of the gradient too.
    losses = jnp.where(
      masked > 0, trained_sum / jnp.where(masked > 0, masked, 1.0), 0.0
    )
    if ngrammer.TRAINED in terms:
      term = terms.pop(ngrammer.TRAINED)
      losses += term - jax.lax.stop_gradient(term)
    aux = {
      "loss_sum": loss_sum,
      "correct": jnp.sum(weights * hits, axis=-1),
      "masked": masked,
      **terms,
    }
    return losses, aux

  @property
  def bare(self) -> "MaskedLanguageModel":
    """The model without what a run may keep beside its parameters."""
    return self

  def bare_params(self, params: Params) -> Params:
    """Those of `bare`, of parameters of this model."""
    return params

  def logits(self, params: Params, batch: Batch) -> jax.Array:
    """Predicts masked tokens, without dropout.

    Args:
      params: what `init` returned.
      batch: `inputs` [B, T] and `positions` [B, M].

    Returns:
      [B, M, V] float32.
    """
    return self.bare._logits(self.bare_params(params), batch, None)[0]

  def check_takes_targets(self) -> None:
    """Raises ValueError if the model cannot learn from teachers."""
    if self.sampling is not None:
      raise ValueError(
        "MaskedLanguageModel.sampling draws classes, but teachers predict the"
        " whole vocabulary; use sampling=None, or no Distillation."
      )

  def check(self, sequence_length: int, vocab_size: int) -> None:
    """Checks that the data fits the model before anything is compiled.

    Args:
      sequence_length: T of the data.
      vocab_size: V of the data's tokenizer.

    Raises:
      ValueError: if either does not fit.
    """
    if sequence_length > self.bert.max_length:
      raise ValueError(
        f"sequence_length={sequence_length} exceeds the model's max_length="
        f"{self.bert.max_length}; lower sequence_length or raise"
        " Bert.max_length"
      )
    if vocab_size != self.bert.vocab_size:
      raise ValueError(
        f"the tokenizer has vocab_size={vocab_size} but Bert.vocab_size="
        f"{self.bert.vocab_size}; set Bert.vocab_size={vocab_size}"
        f" (--gin.VOCABULARY_SIZE={vocab_size})"
      )

  def _logits(
    self, params: Params, batch: Batch, keys: jax.Array | None
  ) -> tuple[jax.Array, Terms]:
    """Returns [B, M, V] logits and terms, each example under its own key."""
    inputs, positions = batch["inputs"], batch["positions"]
    if keys is None or self.bert.dropout_rate == 0.0:
      return self._applied(params, inputs, positions)

    # One dropout mask drawn for the whole batch would tie an example's loss to
    # its row and to the batch's size.
    def one(inputs: jax.Array, positions: jax.Array, key: jax.Array) -> Any:
      found = self._applied(
        params,
        inputs[None],
        positions[None],
        deterministic=False,
        rngs={"dropout": key},
      )
      return jax.tree.map(lambda x: x[0], found)

    logits, terms = _each(one, inputs, positions, keys)
    return logits, terms

  def _sampled(
    self,
    params: Params,
    batch: Batch,
    keys: jax.Array,
    sampling: sampled_softmax.SampledSoftmax,
  ) -> tuple[tuple[jax.Array, jax.Array], Terms]:
    """Returns logits and log weights [B, M, 1 + K], label first; and terms."""

    def one(
      inputs: jax.Array, positions: jax.Array, labels: jax.Array, key: jax.Array
    ) -> Any:
      dropout, draws = jax.random.split(key)
      found = self._applied(
        params,
        inputs[None],
        positions[None],
        deterministic=self.bert.dropout_rate == 0.0,
        rngs={"dropout": dropout},
        read_out=sampling.read_out(
          labels[None], draws, self.bert.logit_scale or 1.0
        ),
      )
      return jax.tree.map(lambda x: x[0], found)

    rows = batch["inputs"], batch["positions"], batch["labels"]
    scores, terms = _each(one, *rows, keys)
    return scores, terms

  def _applied(
    self,
    params: Params,
    inputs: jax.Array,
    positions: jax.Array,
    **options: Any,
  ) -> tuple[Any, Terms]:
    """Returns what the encoder does, and terms of an N-Grammer."""
    variables = {"params": params}
    # An encoder of one's own may know nothing of N-Grammers.
    if getattr(self.bert, "ngrammer", None) is None:
      return self.bert.apply(variables, inputs, positions, **options), {}
    found, state = self.bert.apply(
      variables, inputs, positions, mutable=[ngrammer.TERMS], **options
    )
    sown = state[ngrammer.TERMS]["ngrammer"]
    return found, {name: values[0] for name, values in sown.items()}


def _each(one: Any, *rows: jax.Array) -> Any:
  """Results of `one` for each of B rows, in front of each a dimension B."""
  if rows[0].shape[0] == 1:
    # Not under vmap, which would hide the layers from per-example clipping.
    return jax.tree.map(lambda x: x[None], one(*(row[0] for row in rows)))
  return jax.vmap(one)(*rows)


def num_parameters(params: Any) -> int:
  """Counts scalars.

  Args:
    params: a pytree of anything with a `shape`, such as arrays or what
      `jax.eval_shape` returns.

  Returns:
    The number of scalars in the tree.
  """
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
