"""Models that are trained together, with and without privacy, to be studied.

They teach each other (`dptrain.models.distillation`) by weights that are looked
at now and then, as in arXiv 1804.03235. Noise is of fixed seeds: no privacy is
claimed.

Shapes: B batch, M masked, N records, R models that are trained together, T
length, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
import functools
import time
from typing import Any, NamedTuple

import codistillation_corpora as corpora
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dptrain.clipping import rules
from dptrain.data import masking
from dptrain.models import distillation
from dptrain.optimizers import adamw
from dptrain.optimizers import learning_rate
from dptrain.privacy import draws
from dptrain.privacy import keys as keys_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule as schedule_lib
from dptrain.training import objective as objective_lib
from dptrain.training import step as step_lib

EVERY = 20  # updates between measurements
ROWS = 64  # clipped at once


@dataclasses.dataclass(frozen=True)
class Arm:
  """Models that are trained together.

  Attributes:
    size: of each model.
    batch: of each model; expected, under privacy.
    rate: peak learning rate.
    teaching: how they learn from each other; None: not at all.
    models: R.
    exchange: updates between looks at the others' weights.
    halves: each model has records of its own: the r-th of R parts.
    same_batches: all models see the same records under the same masks.
    entropy: weight of `losses.MinimumEntropy`.
    updates: of the run, if the rate falls to 0 at its end; 0: it stays.
  """

  size: corpora.Size
  batch: int
  rate: float
  teaching: distillation.Distillation | None = None
  models: int = 1
  exchange: int = 1
  halves: bool = False
  same_batches: bool = False
  entropy: float = 0.0
  updates: int = 0

  @property
  def objective(self) -> objective_lib.Objective:
    """What each model is trained on."""
    return self.size.objective(self.entropy)

  @property
  def optimizer(self) -> optax.GradientTransformation:
    """AdamW."""
    rate: Any = optax.linear_schedule(self.rate / 10, self.rate, 10)
    if self.updates:
      warmup = min(10, self.updates // 2)
      rate = learning_rate.warmup_linear_decay(self.rate, warmup, self.updates)
    return adamw.adamw(rate, b2=0.99, weight_decay=0.0)

  def part(self, model: int, records: int) -> tuple[int, int]:
    """The records of a model: the first, and how many."""
    size = records // self.models if self.halves else records
    return (model * size if self.halves else 0), size

  def targets(self, teachers: Any, batch: Any, keys: Any, weight: Any) -> Any:
    """The batch with what teachers predict for it."""
    if self.teaching is None:
      return batch
    seen = self.objective.masked_for_teachers(batch, keys)
    found = [self.objective.model.logits(each, seen) for each in teachers]
    weights = jnp.full(len(batch["tokens"]), weight, jnp.float32)
    return batch | {
      "targets": distillation.Targets(
        self.teaching.averaged(found), weights, self.teaching
      )
    }

  def weights(self, steps: range) -> np.ndarray:
    """Of the teachers' term."""
    taught = self.teaching or distillation.Distillation(weight=0.0)
    return np.array([taught.weight_at(step) for step in steps], np.float32)


def _key(*numbers: int) -> jax.Array:
  key = jax.random.key(0, impl="threefry2x32")
  for number in numbers:
    key = jax.random.fold_in(key, number)
  return key


def predict(params: Any, texts: corpora.Data) -> jax.Array:
  """Probabilities [positions, V] at all masked positions."""
  return _predict(texts.size, params, texts.held_out)


@functools.partial(jax.jit, static_argnums=0)
def _predict(size: corpora.Size, params: Any, held_out: Any) -> jax.Array:
  logits = size.objective().model.logits(params, held_out)
  return jax.nn.softmax(logits.reshape(-1, logits.shape[-1]))


def score(probs: jax.Array, held_out: Any) -> tuple[float, float]:
  """Mean cross-entropy, and share of right first guesses."""
  labels = held_out["labels"].reshape(-1)
  weights = held_out["weights"].reshape(-1) / held_out["weights"].sum()
  picked = jnp.take_along_axis(probs, labels[:, None], axis=-1)[:, 0]
  hits = jnp.argmax(probs, axis=-1) == labels
  return float(-weights @ jnp.log(picked)), float(weights @ hits)


def churn(one: jax.Array, other: jax.Array, held_out: Any) -> dict[str, float]:
  """How much two sets of predictions differ at the same positions."""
  labels = held_out["labels"].reshape(-1)[:, None]
  weights = held_out["weights"].reshape(-1) / held_out["weights"].sum()
  moved = jnp.argmax(one, axis=-1) != jnp.argmax(other, axis=-1)
  gap = jnp.take_along_axis(one - other, labels, axis=-1)[:, 0]
  return {
    "disagree": float(weights @ moved),
    "shift": float(weights @ jnp.abs(gap)),
  }


@functools.lru_cache
def plain_updates(arm: Arm, records: int) -> Callable[..., Any]:
  """Jitted: several updates of R models without privacy."""
  optimizer, objective = arm.optimizer, arm.objective

  def gradient(params: Any, teachers: Any, place: Any, weight: Any) -> Any:
    tokens, begin, size, key = place
    rows = begin + jax.random.randint(key, (arm.batch,), 0, size)
    batch = {"tokens": tokens[rows]}
    keys = jax.random.split(jax.random.fold_in(key, 1), arm.batch)
    batch = arm.targets(teachers, batch, keys, weight)

    def loss(params: Any) -> jax.Array:
      return jnp.mean(objective.losses(params, batch, keys)[0])

    return jax.grad(loss)(params)

  def several(
    tokens: Any, carry: Any, numbers: Any, weights: Any, key: Any
  ) -> Any:
    def one(carry: Any, now: Any) -> Any:
      models, states, shown = carry
      number, weight = now
      shown = jax.tree.map(
        lambda new, old: jnp.where(number % arm.exchange == 0, new, old),
        models,
        shown,
      )
      moved = []
      for i, (params, state) in enumerate(zip(models, states, strict=True)):
        own = 0 if arm.same_batches else i
        place = jax.random.fold_in(jax.random.fold_in(key, number), own)
        found = gradient(
          params,
          shown[:i] + shown[i + 1 :],
          (tokens, *arm.part(i, records), place),
          weight,
        )
        updates, state = optax.with_extra_args_support(optimizer).update(
          found, state, params, noise_variance=0.0
        )
        moved.append((optax.apply_updates(params, updates), state))
      models, states = (list(each) for each in zip(*moved, strict=True))
      return (models, states, shown), None

    return jax.lax.scan(one, carry, (numbers, weights))[0]

  return jax.jit(several)


class Run(NamedTuple):
  """What training gave.

  Attributes:
    models: parameters of each.
    curves: held-out losses of each at every `EVERY`-th update.
    seconds: of it all, after the first updates.
  """

  models: list[Any]
  curves: list[list[float]]
  seconds: float


def train(
  arm: Arm, texts: corpora.Data, seed: int, updates: int, target: float = 0.0
) -> Run:
  """Trains R models without privacy, until the first has the target loss."""
  models = _fresh(arm, seed)
  carry = models, [arm.optimizer.init(each) for each in models], models
  several = plain_updates(arm, len(texts.train))
  curves: list[list[float]] = [[] for _ in models]
  begin = time.perf_counter()
  for number in range(0, updates, EVERY):
    numbers = jnp.arange(number, number + EVERY)
    weights = arm.weights(range(number, number + EVERY))
    carry = several(texts.train, carry, numbers, weights, _key(3, seed))
    if arm.updates and number + EVERY < updates:
      continue
    for curve, params in zip(curves, carry[0], strict=True):
      curve.append(score(predict(params, texts), texts.held_out)[0])
    if curves[0][-1] <= target:
      break
  return Run(carry[0], curves, time.perf_counter() - begin)


@functools.partial(jax.jit, static_argnums=0)
def _initial(size: corpora.Size, key: jax.Array) -> Any:
  return size.objective().model.init(key)


def _fresh(arm: Arm, seed: int) -> list[Any]:
  keys = [_key(2, seed, model) for model in range(arm.models)]
  return [_initial(arm.size, key) for key in keys]


@functools.lru_cache
def private_update(arm: Arm) -> Callable[..., Any]:
  """Jitted: one private update of one model."""
  step = step_lib.PrivateStep(
    arm.objective.losses,
    rules.ClippingRule("normalized", 1.0),
    arm.optimizer,
    microbatch_size=ROWS,
  )

  def update(
    params: Any,
    state: Any,
    teachers: Any,
    batch: Any,
    examples_key: Any,
    noise_key: Any,
    public: Any,
  ) -> Any:
    noise_multiplier, expected_batch_size, weight = public
    keys = masking.example_keys(examples_key, batch["example_ids"])
    batch = arm.targets(teachers, batch, keys, weight)
    total = step.zeros(params, batch)
    total = step.accumulate(params, total, batch, examples_key)
    return step.finish(
      params,
      state,
      total,
      noise_key=noise_key,
      noise_multiplier=noise_multiplier,
      expected_batch_size=expected_batch_size,
    )[:2]

  return jax.jit(update)


@functools.lru_cache
def private_plan(
  batch: int, records: int, updates: int
) -> plan_lib.PrivacyPlan:
  """Epsilon 8 at delta 1e-5 for all updates, per record."""
  phase = schedule_lib.Phase(batch, batch, updates)
  settings = plan_lib.PrivacySettings(
    schedule=schedule_lib.BatchSchedule([phase]),
    delta=1e-5,
    target_epsilon=8.0,
  )
  return plan_lib.make_plan(settings, records)


def train_privately(arm: Arm, texts: corpora.Data, seed: int) -> Run:
  """Trains R models, each with a plan for its own records."""
  models = _fresh(arm, seed)
  states = [arm.optimizer.init(each) for each in models]
  shown, update, tokens = list(models), private_update(arm), texts.train
  limit = arm.batch + 6 * int(arm.batch**0.5)
  rows = -(-limit // ROWS) * ROWS
  secret = keys_lib.fixed_seed(seed)
  begin = time.perf_counter()
  for number in range(arm.updates):
    if number % arm.exchange == 0:
      shown = list(models)
    (weight,) = arm.weights(range(number, number + 1))
    for i in range(arm.models):
      first, size = arm.part(i, len(tokens))
      plan = private_plan(arm.batch, size, arm.updates)

      def key_of(purpose: str, step: int, model: int = i) -> jax.Array:
        return secret.key(purpose, f"model {model}", step)

      drawn = draws.draw(plan, key_of, size, number)
      assert len(drawn) <= rows  # six standard deviations
      there = np.arange(rows) < len(drawn)
      ids = np.zeros(rows, np.int32)
      ids[there] = drawn
      batch = {
        "tokens": tokens[first + ids],
        "example_ids": jnp.asarray(ids),
        "is_padding": jnp.asarray(~there),
      }
      public = plan.noise_multiplier, plan.expected_batch_size(number), weight
      models[i], states[i] = update(
        models[i],
        states[i],
        shown[:i] + shown[i + 1 :],
        batch,
        key_of("examples", number),
        key_of("noise", number),
        public,
      )
  jax.block_until_ready(models)
  return Run(models, [], time.perf_counter() - begin)
