"""A second term in every update: public records, neither clipped nor noised.

  gradient = (sum of clipped private gradients + noise) / expected_batch_size
             + weight * mean gradient of a batch of public records

Shapes: P physical batch, T length.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dptrain.clipping import per_example
from dptrain.data import store as store_lib
from dptrain.privacy import sampling
from dptrain.training import objective as objective_lib
from dptrain.training import settings as settings_lib


@dataclasses.dataclass(frozen=True)
class PublicData:
  """Which public records take part, and how much they count.

  Attributes:
    task: seqio task or mixture of public documents (feature "text"), encoded
      with the run's vocabulary.
    prepared: folder that `dptrain prepare` has written with that vocabulary,
      instead of a task. Both None: no public data.
    weight: of the public term, above 0. Under "normalized" clipping the term is
      divided by l2_clip_norm as the private gradients are, so that the weight
      means the same.
    batch_size: public records in each update.
    split: the task's split.
  """

  task: str | None = None
  prepared: str | None = None
  weight: float = 1.0
  batch_size: int = 256
  split: str = "train"

  def __post_init__(self) -> None:
    if self.task is not None and self.prepared is not None:
      raise ValueError(
        f"PublicData.task={self.task!r} and prepared={self.prepared!r} are both"
        " given; name one place of public records."
      )
    if not (math.isfinite(self.weight) and self.weight > 0):
      raise ValueError(
        f"PublicData.weight={self.weight} must be a positive, finite number;"
        " for no public data leave PublicData.task=None."
      )
    settings_lib.check_whole("PublicData.batch_size", self.batch_size, least=1)

  @property
  def name(self) -> str | None:
    """The task, or the folder; None without public data."""
    return self.task or self.prepared

  def check_store(self, store: store_lib.Store) -> None:
    """Raises ValueError unless an update's public batch can be drawn."""
    if store.num_examples < self.batch_size:
      raise ValueError(
        f"PublicData.batch_size={self.batch_size}, but {self.name!r} has"
        f" {store.num_examples} records in split {self.split!r}: lower it."
      )


@dataclasses.dataclass(frozen=True)
class PublicTerm:
  """The public part of one update.

  Formal guarantee: a function of public records, of keys that no private record
  enters, and of the parameters, which are private releases already: adding it
  to a privatised gradient is post-processing and costs nothing. It covers only
  what the declaration is true of: a public record that is also in the private
  corpus, or tells of a unit in it, is not protected.

  Attributes:
    loss_fn: as the private step's.
    weight: of the mean gradient.
    batch_size: records in an update, what their sum is divided by.
  """

  loss_fn: per_example.PerExampleLoss
  weight: float
  batch_size: int

  def zeros(self, params: Any) -> Any:
    """An empty sum of gradients: a float32 tree like `params`."""
    return jax.tree.map(
      lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
      params,
    )

  def accumulate(
    self, params: Any, total: Any, batch: Any, examples_key: jax.Array
  ) -> Any:
    """Adds the weighted gradients of one physical batch of public records.

    Args:
      params: the parameters.
      total: what was gathered so far.
      batch: "tokens" [P, T], "example_ids" [P], "is_padding" [P].
      examples_key: key of this update's masks and dropout.

    Returns:
      The sum, of `weight / batch_size` times each record's gradient.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
      examples_key, batch["example_ids"]
    )
    # A model may know private examples by their numbers; these are others'.
    rows = {k: v for k, v in batch.items() if k != "example_ids"}

    def loss(params: Any) -> jax.Array:
      losses, _ = self.loss_fn(params, rows, keys)
      return jnp.sum(jnp.where(batch["is_padding"], 0.0, losses))

    scale = self.weight / self.batch_size
    return jax.tree.map(
      lambda s, g: s + scale * g.astype(s.dtype), total, jax.grad(loss)(params)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class PublicExamples:
  """The public records of a run, and what they add to its updates.

  Attributes:
    store: the records.
    term: what is computed of them.
  """

  store: store_lib.Store
  term: PublicTerm

  def draw(self, key: jax.Array) -> sampling.Sample:
    """The records of one update: a uniform set of fixed size.

    Args:
      key: of this update and of nothing else.

    Returns:
      The sample, to be made part by part.
    """
    return sampling.fixed_size(
      key, self.store.num_examples, self.term.batch_size
    )

  def described(self) -> dict[str, Any]:
    """All that decides the term, apart from loss and parameters."""
    return {
      "records": self.store.content_digest().hex(),
      "weight": self.term.weight,
      "batch_size": self.term.batch_size,
    }


def examples(
  settings: PublicData,
  store: store_lib.Store | None,
  objective: objective_lib.Objective,
) -> PublicExamples | None:
  """Joins settings and records; None without public records."""
  if store is None:
    return None
  term = PublicTerm(objective.losses, settings.weight, settings.batch_size)
  return PublicExamples(store, term)
