"""Codebooks by running means, tables by larger steps, around any optimizer.

An N-Grammer (arXiv 2207.06366) keeps its clusters' centres and its n-gram
tables among the parameters (`ngram_parameters`), and its model writes what each
example contributes to a cluster into the gradient: sums of deviations and
counts. So they are clipped with the rest of the example's gradient, noised with
it, and come here as rows of one privatised gradient.

Formal guarantee: post-processing. The unit, the neighbouring relation, the
sensitivity and the noise are those of the gradient's one Gaussian mechanism
(`dptrain.training.step`); codebooks, masses, row counts and tables are
coordinates of it. Here, privatised gradients, own state and parameters are
read, and public constants (settings, the variance of the noise); nothing is
asked of an example. That holds for learning="unprotected", too, but there the
gradient of codebooks is not privatised, so that no claim is left to keep.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.optimizers import codebook_means
from dptrain.optimizers import codebook_settings
from dptrain.optimizers import ngram_parameters
from dptrain.optimizers import settings as settings_lib

LEARNING = ("frozen", "private", "gradient", "unprotected")
_BY_MEANS = ("private", "unprotected")


class CodebookState(NamedTuple):
  """State of `learn_codebooks`; made of releases alone.

  Attributes:
    inner: of the optimizer within.
    steps: int32 scalar, updates so far.
    mass_noise: float32 scalar, V of `codebook_means`.
    empty_for: [K] int32 for each codebook: updates in a row for which a cluster
      was empty; an `optax.EmptyState` unless codebooks learn by means.
  """

  inner: Any
  steps: jax.Array
  mass_noise: jax.Array
  empty_for: Any


class CodebookOptimizer(optax.GradientTransformationExtraArgs):
  """An optimizer within which codebooks are seen to."""


def learn_codebooks(
  inner: optax.GradientTransformation,
  settings: codebook_settings.CodebookSettings | None = None,
  *,
  learning: str = "private",
  deviation_scale: float = 1.0,
  select_rows: bool = False,
) -> CodebookOptimizer:
  """An optimizer for models with codebooks and n-gram tables.

  - learning="private", "unprotected": codebooks follow the rule of
    `codebook_means`; `inner` sees neither them nor their gradient.
    "unprotected" takes that gradient for exact.
  - "frozen": codebooks stay, and `inner` does not see them.
  - "gradient": `inner` moves the centres; masses stay.
  - Tables: `inner`'s steps times `table_rate`.
  - select_rows: of the tables, only rows move whose noisy count, the last
    column of the gradient, exceeds `row_threshold` standard deviations of the
    noise (without noise: that were looked up at all); that column itself never
    moves. `inner` gets a gradient of 0 for all other rows, so that their
    moments decay as if nothing had come (Adam's at every update, although the
    row stands still; what `correct_noise` takes off them is then too much, and
    its floor holds). All rows have noise: which of them moved is read off the
    release.

  Args:
    inner: any Optax transformation; extra arguments reach it.
    settings: rates, decays and thresholds.
    learning: as the model's setting says, one of `LEARNING`.
    deviation_scale: what the model divides deviations by.
    select_rows: whether tables have a last column of counts.

  Returns:
    An Optax transformation. Its `update` needs `params`, and `noise_variance`
    (0.0 without noise) for "private" and for `select_rows`.

  Raises:
    ValueError: names the setting that is out of range.
  """
  if learning not in LEARNING:
    raise ValueError(f"learning={learning!r} is unknown; use one of {LEARNING}")
  settings_lib.check_positive("deviation_scale", deviation_scale)
  rules = _Rules(
    optax.with_extra_args_support(inner),
    settings or codebook_settings.CodebookSettings(),
    learning,
    deviation_scale,
    select_rows,
  )
  return CodebookOptimizer(rules.init, rules.update)


class _Rules(NamedTuple):
  """What `learn_codebooks` was given, and the two functions it returns."""

  inner: optax.GradientTransformationExtraArgs
  settings: codebook_settings.CodebookSettings
  learning: str
  deviation_scale: float
  select_rows: bool

  def init(self, params: Any) -> CodebookState:
    """The state before the first update."""
    rest, codebooks = ngram_parameters.divided(
      params, ngram_parameters.is_codebook
    )
    _check_codebooks(codebooks)
    counts: Any = optax.EmptyState()
    if self.learning in _BY_MEANS:
      counts = jax.tree.map(
        lambda x: jnp.zeros(x.shape[0], jnp.int32), codebooks
      )
    seen = params if self.learning == "gradient" else rest
    return CodebookState(
      self.inner.init(self._weights(seen)),
      jnp.zeros((), jnp.int32),
      jnp.zeros((), jnp.float32),
      counts,
    )

  def update(
    self,
    gradients: Any,
    state: CodebookState,
    params: Any = None,
    **extra: Any,
  ) -> tuple[Any, CodebookState]:
    """The updates of all parameters."""
    settings_lib.check_params(params)
    steps = optax.safe_increment(state.steps)
    if self.learning == "gradient":
      updates, inner = self._others(gradients, state.inner, params, extra)
      return updates, state._replace(inner=inner, steps=steps)
    (own, sums), (weights, codebooks) = (
      ngram_parameters.divided(tree, ngram_parameters.is_codebook)
      for tree in (gradients, params)
    )
    updates, inner = self._others(own, state.inner, weights, extra)
    state = state._replace(inner=inner, steps=steps)
    if self.learning == "frozen":
      moves = jax.tree.map(jnp.zeros_like, codebooks)
    else:
      moves, state = self._means(sums, state, codebooks, extra)
    return ngram_parameters.joined(updates, moves), state

  def _means(
    self, sums: Any, state: CodebookState, codebooks: Any, extra: Any
  ) -> tuple[Any, CodebookState]:
    """Updates of the codebooks; `state.steps` counts this update."""
    settings, exact = self.settings, self.learning == "unprotected"
    decay = settings.mass_decay
    if decay is None:
      decay = 0.0 if exact else settings.decay
    weights, noise = codebook_means.mass_weights(
      settings,
      decay,
      state.steps - 1,
      state.mass_noise,
      0.0 if exact else _variance(extra),
    )
    key = jax.random.key(settings.seed, impl="threefry2x32")
    key = jax.random.fold_in(key, state.steps)
    leaves, treedef = jax.tree.flatten(codebooks)

    def learned(
      number: Any, codebook: Any, gradient: Any, empty_for: Any
    ) -> Any:
      new, live = codebook_means.moved(
        codebook, gradient, weights, settings, self.deviation_scale
      )
      own_key = jax.random.fold_in(key, number)
      new, empty_for = codebook_means.restarted(
        new, live, empty_for, own_key, settings
      )
      return (new - codebook).astype(codebook.dtype), empty_for

    # All heads at once: a program of its own for each takes long to compile.
    moves, counts = jax.vmap(learned)(
      jnp.arange(len(leaves)),
      jnp.stack(leaves),
      jnp.stack(jax.tree.leaves(sums)),
      jnp.stack(jax.tree.leaves(state.empty_for)),
    )
    return jax.tree.unflatten(treedef, list(moves)), state._replace(
      mass_noise=noise, empty_for=jax.tree.unflatten(treedef, list(counts))
    )

  def _others(
    self, gradients: Any, state: Any, params: Any, extra: Any
  ) -> tuple[Any, Any]:
    """What `inner` makes of all that is not learned by means."""
    may_move = jax.tree_util.tree_map_with_path(
      lambda path, g: self._may_move(ngram_parameters.names(path), g, extra),
      gradients,
    )
    masked = jax.tree.map(
      lambda g, m: jnp.where(m, g, 0.0).astype(g.dtype), gradients, may_move
    )
    updates, state = self.inner.update(
      masked, state, self._weights(params), **extra
    )

    def scaled(path: Any, update: jax.Array, may_move: Any) -> jax.Array:
      own = ngram_parameters.names(path)
      if ngram_parameters.is_table(own):
        update = self.settings.table_rate * update
      elif ngram_parameters.is_codebook(own):
        update = self.settings.centre_rate * update
      return jnp.where(may_move, update, 0.0).astype(update.dtype)

    return jax.tree_util.tree_map_with_path(scaled, updates, may_move), state

  def _may_move(
    self, path: ngram_parameters.Path, gradient: jax.Array, extra: Any
  ) -> Any:
    """Which entries of a parameter move: broadcasts to it."""
    if ngram_parameters.is_codebook(path):
      return jnp.arange(gradient.shape[-1]) < gradient.shape[-1] - 1
    if not (self.select_rows and ngram_parameters.is_table(path)):
      return True
    least = self.settings.row_threshold * jnp.sqrt(_variance(extra))
    touched = gradient[:, -1:].astype(least.dtype) > least
    return touched & (jnp.arange(gradient.shape[-1]) < gradient.shape[-1] - 1)

  def _weights(self, params: Any) -> Any:
    """The parameters as `inner` sees them: what must not decay is 0."""
    if self.settings.weight_decay:
      return params

    def shown(path: Any, leaf: jax.Array) -> jax.Array:
      own = ngram_parameters.names(path)
      looked_up = ngram_parameters.is_table(own)
      looked_up |= ngram_parameters.is_codebook(own)
      return jnp.zeros_like(leaf) if looked_up else leaf

    return jax.tree_util.tree_map_with_path(shown, params)


def _variance(extra: Any) -> jax.Array:
  """The variance of the noise on each coordinate, as a float32 scalar."""
  variance = extra.get("noise_variance")
  if variance is None:
    raise ValueError(
      "learn_codebooks was given no noise_variance, which says what of a count"
      " is noise: call update(gradients, state, params, noise_variance=...),"
      " with 0.0 if there is no noise"
    )
  return jnp.asarray(variance, jnp.float32)


def _check_codebooks(codebooks: Any) -> None:
  leaves = jax.tree.leaves(codebooks)
  if not leaves:
    raise ValueError(
      "learn_codebooks found no ngrammer/codebook_0/embedding among the"
      " parameters: train an N-Grammer with it (Bert.ngrammer), or use the"
      " optimizer within by itself"
    )
  for leaf in leaves:
    if leaf.ndim != 2 or leaf.shape[1] < 2:
      raise ValueError(
        f"learn_codebooks found a codebook of shape {leaf.shape}; it must be"
        " [clusters, head size + 1], the last column being masses"
      )
  if len({(leaf.shape, str(leaf.dtype)) for leaf in leaves}) > 1:
    shapes = ", ".join(str(leaf.shape) for leaf in leaves)
    raise ValueError(
      f"learn_codebooks found codebooks of several shapes ({shapes}) or types;"
      " all heads must have the same"
    )
