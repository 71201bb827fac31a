"""What is raced on and studied: a quadratic, and small language models.

Shapes: B batch, T length.
"""

from collections.abc import Callable
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dptrain.clipping import rules
from dptrain.data import corpus
from dptrain.data import masking
from dptrain.data import store as store_lib
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.models import bert
from dptrain.models import masked_lm
from dptrain.training import objective as objective_lib
from dptrain.training import step as step_lib

BATCH, LENGTH, VOCABULARY = 64, 32, 512
NOISE_BATCH_RATIO = 1e-3  # the demo's: 0.63 / 640
CONVEX_SIZE, CONDITION = 64, 1e3  # of either side


class Texts(NamedTuple):
  """Records [N, T] to train on, and records to measure on."""

  train: np.ndarray
  held_out: np.ndarray


class Problem(NamedTuple):
  """Something to minimise.

  Attributes:
    params: to start from, by seed.
    update: (optimizer) -> jitted (params, state, number, seed) -> both, new.
    loss: jitted loss that counts.
  """

  params: Callable[[int], Any]
  update: Callable[[optax.GradientTransformation], Callable[..., Any]]
  loss: Callable[[Any, int], jax.Array]


def convex() -> Problem:
  """0.5 |A^(1/2) (W - W*) B^(1/2)|^2, A and B of condition `CONDITION`."""
  n = CONVEX_SIZE
  scales = jnp.logspace(0, -np.log10(CONDITION), n)
  draw = np.random.default_rng(7)
  left, right = (np.linalg.qr(draw.normal(size=(n, n)))[0] for _ in range(2))
  a, b = (jnp.asarray(q * scales @ q.T, jnp.float32) for q in (left, right))

  def loss(params: Any, seed: int) -> jax.Array:
    wanted = jax.random.normal(jax.random.key(seed), (n, n))
    error = params["w"] - wanted
    return 0.5 * jnp.sum(error * (a @ error @ b)) / n

  def update(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    def one(params: Any, state: Any, number: int, seed: int) -> Any:
      gradient = jax.grad(loss)(params, seed)
      updates, state = optimizer.update(gradient, state, params)
      return optax.apply_updates(params, updates), state

    return jax.jit(one)

  # Not zero: LAMB's steps are in proportion to the weights.
  start = {"w": jax.random.normal(jax.random.key(8), (n, n))}
  return Problem(lambda seed: start, update, jax.jit(loss))


def language_model(noisy: bool, layers: int, width: int) -> Problem:
  """A small BERT on Python's documentation."""
  encoder = bert.Bert(
    vocab_size=VOCABULARY,
    num_layers=layers,
    width=width,
    num_heads=width // 32,
    max_length=LENGTH,
  )
  return masked(encoder, noisy, python_docs())


def masked(encoder: bert.Bert, noisy: bool, texts: Texts) -> Problem:
  """Masked language modelling; `noisy`: through the private step."""
  model = masked_lm.MaskedLanguageModel(encoder)
  objective = objective_lib.Objective(model, masking.MaskingSettings())
  tokens = jnp.asarray(texts.train)
  fixed = jnp.asarray(texts.held_out)
  fixed_keys = jax.random.split(jax.random.key(1), len(fixed))

  def batch(number: jax.Array, seed: jax.Array) -> tuple[Any, jax.Array]:
    key = jax.random.fold_in(jax.random.key(seed), number)
    rows = jax.random.randint(key, (BATCH,), 0, len(tokens))
    taken = {
      "tokens": tokens[rows],
      "example_ids": jnp.arange(BATCH),
      "is_padding": jnp.zeros(BATCH, bool),
    }
    return taken, jax.random.wrap_key_data(jax.random.key_data(key))

  def mean_loss(params: Any, taken: Any, keys: jax.Array) -> jax.Array:
    return jnp.mean(objective.losses(params, taken, keys)[0])

  def update(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    private = step_lib.PrivateStep(
      objective.losses, rules.ClippingRule("normalized", 1.0), optimizer
    )

    def one(params: Any, state: Any, number: int, seed: int) -> Any:
      taken, key = batch(number, seed)
      if not noisy:
        keys = jax.random.split(key, BATCH)
        gradient = jax.grad(mean_loss)(params, taken, keys)
        updates, state = optax.with_extra_args_support(optimizer).update(
          gradient, state, params, noise_variance=0.0
        )
        return optax.apply_updates(params, updates), state
      total = private.zeros(params, taken, state)
      total = private.accumulate(params, total, taken, key)
      return private.finish(
        params,
        state,
        total,
        noise_key=jax.random.fold_in(key, 1),
        noise_multiplier=NOISE_BATCH_RATIO * BATCH,
        expected_batch_size=BATCH,
      )[:2]

    return jax.jit(one)

  @jax.jit
  def loss(params: Any, seed: int) -> jax.Array:
    del seed
    return mean_loss(params, {"tokens": fixed}, fixed_keys)

  init = jax.jit(lambda seed: model.init(jax.random.key(seed)))
  return Problem(init, update, loss)


def python_docs(every: int = 8) -> Texts:
  """The documentation that Python carries, as in demo.gin.

  Args:
    every: of so many held-out records one is measured on, 512 at most.

  Returns:
    Its records.
  """
  from dptrain.tasks import python_docs as task_lib

  task = task_lib.register()
  with tempfile.TemporaryDirectory() as folder:
    vocabulary = vocabulary_lib.train_vocabulary(
      (each.text for each in corpus.read_documents(task, "train")),
      vocabulary_lib.VocabularySettings(size=VOCABULARY),
      pathlib.Path(folder) / "vocabulary.model",
    )
  train, held_out = (
    store_lib.build_store(
      corpus.read_documents(task, split), vocabulary, LENGTH
    )
    for split in ("train", "validation")
  )
  some = held_out.gather(np.arange(0, held_out.num_examples, every)[:512])
  return Texts(train.tokens, some)
