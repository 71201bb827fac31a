"""The one private step, shared by every loop: jax and optax only.

  opt_state = step.init(params)
  ...
  accumulator = step.zeros(params, batch, opt_state)
  for batch in physical_batches:
    accumulator = step.accumulate(params, accumulator, batch, examples_key)
  params, opt_state, _ = step.finish(params, opt_state, accumulator, ...)

Shapes: B physical batch, K microbatches of it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.clipping import adaptation as adaptation_lib
from dptrain.clipping import methods
from dptrain.clipping import per_example
from dptrain.clipping import private_metrics
from dptrain.clipping import rules
from dptrain.clipping import shares as shares_lib
from dptrain.privacy import noise
from dptrain.training import unprotected
from dptrain.training import unprotected_codebooks as codebooks_lib

Params = Any
Batch = Any


class Accumulator(NamedTuple):
  """What an update has gathered so far. PRIVATE until `finish`.

  Attributes:
    gradients: float32 tree: the sum of clipped gradients.
    statistics: None unless the step collects them.
    adapting: None if the clip norm is fixed.
    metrics: `PrivateMetrics.sums` so far, [K]; None without.
    codebooks: `UnprotectedCodebooks.added` so far; None without.
  """

  gradients: Any
  statistics: unprotected.Statistics | None
  adapting: "Adapting | None" = None
  metrics: jax.Array | None = None
  codebooks: Any = None


class Adapting(NamedTuple):
  """What an update with an adapting clip norm gathers beside the gradients.

  Attributes:
    l2_clip_norm: what this update clips to.
    tally: `NormAdaptation.tally` so far.
  """

  l2_clip_norm: jax.Array
  tally: jax.Array


class AdaptiveState(NamedTuple):
  """The optimizer's state beside a clip norm that moves; publishable as such.

  Attributes:
    opt_state: of the optax transformation.
    l2_clip_norm: float32 scalar: what the next update clips to.
  """

  opt_state: optax.OptState
  l2_clip_norm: jax.Array


def noised(accumulator: Accumulator) -> tuple[Any, Any, Any]:
  """What of an accumulator gets noise, as one vector: sum, tally, metrics."""
  adapting = accumulator.adapting
  tally = None if adapting is None else adapting.tally
  return accumulator.gradients, tally, accumulator.metrics


@dataclasses.dataclass(frozen=True)
class PrivateStep:
  """From physical batches to one differentially private update.

  Formal guarantee (none with `unprotected_codebooks`): unit: one example,
  neighbouring by zero-out or add/remove (`ClippingRule`). `accumulate` sums
  clipped gradients, whose sensitivity is `rule.sensitivity` however the
  examples are dealt out to physical batches.
  `finish` is one Gaussian mechanism on that sum: noise of standard deviation
  `noise_multiplier * rule.sensitivity`, once per update. All that follows,
  division by the public constant `expected_batch_size`, the term of public
  records and the optimizer, is post-processing. An update without examples is
  pure noise. Public: the rule, the noise multiplier, the expected batch size,
  the optimizer.

  With `adaptation` that mechanism releases a noisy tally beside the sum, and
  with `metrics` their noisy sums, at the same price: the noise on all parts
  grows to match (`clipping.shares`).

  Attributes:
    loss_fn: `per_example.PerExampleLoss`.
    rule: the clipping rule; its norm is the first one if it adapts.
    optimizer: any optax transformation.
    collect_statistics: also sum `unprotected.Statistics`.
    clipping_method: how clipped sums are computed, one of `methods.METHODS`,
      or what `methods.choose` returned; changes speed and memory, not the
      result.
    microbatch_size: rows of a physical batch that are clipped at once, in a
      loop on the device; it divides B. None: all B.
    adaptation: how the clip norm moves; None: it is fixed.
    metrics: what is released of losses and norms; None: nothing.
    unprotected_codebooks: exact gradients for codebooks, instead of privatised
      ones: whoever sets it has no guarantee.
  """

  loss_fn: per_example.PerExampleLoss
  rule: rules.ClippingRule
  optimizer: optax.GradientTransformation
  collect_statistics: bool = False
  clipping_method: str | methods.Choice = "auto"
  microbatch_size: int | None = None
  adaptation: adaptation_lib.NormAdaptation | None = None
  metrics: private_metrics.PrivateMetrics | None = None
  unprotected_codebooks: codebooks_lib.UnprotectedCodebooks | None = None

  def __post_init__(self) -> None:
    if self.adaptation is not None and self.rule.kind == "automatic":
      raise ValueError(
        "automatic clipping has no clip norm that could adapt: use the rule"
        " 'flat' or 'normalized', or no NormAdaptation."
      )
    shares_lib.check(self._shares())
    if self.microbatch_size is not None and self.microbatch_size < 1:
      raise ValueError(
        f"PrivateStep.microbatch_size={self.microbatch_size} must be a positive"
        " number of rows, or None for the whole physical batch."
      )

  def init(self, params: Params) -> Any:
    """The state before the first update: `finish` takes and returns it.

    Args:
      params: the parameters.

    Returns:
      The optimizer's state; an `AdaptiveState` around it if the norm adapts.
    """
    opt_state = self.optimizer.init(params)
    if self.adaptation is None:
      return opt_state
    norm = jnp.asarray(self.rule.l2_clip_norm, jnp.float32)
    return AdaptiveState(opt_state, norm)

  def zeros(
    self, params: Params, batch: Batch, opt_state: Any = None
  ) -> Accumulator:
    """An empty accumulator.

    Args:
      params: the parameters, or their shapes.
      batch: a physical batch, or its shapes: decides the statistics' shapes.
      opt_state: what `init` or `finish` returned; read only if the clip norm
        adapts.

    Raises:
      ValueError: the clip norm adapts, and `opt_state` does not hold it.
    """
    gradients = jax.tree.map(
      lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
      params,
    )
    accumulator = Accumulator(gradients, None)
    if self.adaptation is not None:
      if not isinstance(opt_state, AdaptiveState):
        raise ValueError(
          "with PrivateStep.adaptation, zeros() needs the opt_state that init()"
          f" or finish() returned, not {type(opt_state).__name__}: it holds the"
          " clip norm."
        )
      adapting = Adapting(opt_state.l2_clip_norm, jnp.zeros((), jnp.float32))
      accumulator = accumulator._replace(adapting=adapting)
    if self.metrics is not None:
      accumulator = accumulator._replace(metrics=self.metrics.zeros())
    if self.unprotected_codebooks is not None:
      sums = self.unprotected_codebooks.zeros(params)
      accumulator = accumulator._replace(codebooks=sums)
    if not self.collect_statistics:
      return accumulator
    key = jax.random.key(0, impl="threefry2x32")
    sums = jax.eval_shape(self._statistics, params, batch, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
    return accumulator._replace(statistics=zeros)

  def accumulate(
    self,
    params: Params,
    accumulator: Accumulator,
    batch: Batch,
    examples_key: jax.Array,
  ) -> Accumulator:
    """Adds the clipped gradients of one physical batch.

    Args:
      params: the parameters.
      accumulator: what was gathered so far.
      batch: arrays [B, ...]; "is_padding" [B] bool marks rows that are not
        examples and "example_ids" [B] int32 numbers the others.
      examples_key: key of this update; an example's own key (masking, dropout)
        is a function of it and of the example's number alone.

    Returns:
      The accumulator with this batch added.

    Raises:
      ValueError: `microbatch_size` does not divide B.
    """
    rows = batch["is_padding"].shape[0]
    size = self.microbatch_size or rows
    if rows % size:
      raise ValueError(
        f"microbatch_size={size} does not divide the physical batch of {rows}"
        " rows; choose one that does."
      )
    if size == rows:
      return self._added(params, accumulator, batch, examples_key)
    parts = jax.tree.map(
      lambda x: x.reshape(rows // size, size, *x.shape[1:]), batch
    )

    def add(accumulator: Accumulator, part: Batch) -> tuple[Accumulator, None]:
      # An update's last physical batch may be padding for the most part.
      added = jax.lax.cond(
        jnp.all(part["is_padding"]),
        lambda accumulator, _: accumulator,
        lambda accumulator, part: self._added(
          params, accumulator, part, examples_key
        ),
        accumulator,
        part,
      )
      return added, None

    return jax.lax.scan(add, accumulator, parts)[0]

  def finish(
    self,
    params: Params,
    opt_state: Any,
    accumulator: Accumulator,
    *,
    noise_key: jax.Array,
    noise_multiplier: jax.Array | float,
    expected_batch_size: jax.Array | float,
    unit_noise: Any = None,
    unit_noise_stddev: jax.Array | float = 1.0,
    public_gradient: Any = None,
  ) -> tuple[Params, Any, dict[str, jax.Array]]:
    """Makes the sum private and updates the parameters, once per update.

    Args:
      params: the parameters.
      opt_state: what `init` or the last `finish` returned.
      accumulator: the sum over all examples of this update.
      noise_key: key of this update, used for nothing else.
      noise_multiplier: noise standard deviation over sensitivity.
      expected_batch_size: the public constant to divide by.
      unit_noise: noise for what is `noised`, of a strategy whose columns have
        norm 1 (`correlated_noise.BandedNoise`); None: independent standard
        normal noise, drawn from `noise_key`.
      unit_noise_stddev: of each coordinate of `unit_noise`.
      public_gradient: a term of public records (`public_data.PublicTerm`), to
        be added to the private gradient; None: there is none.

    Returns:
      New parameters, new `opt_state`, and figures: released metrics under
      "private/..." names; all others (none unless collected) are unprotected:
      per-example means and the ratio of the norms of the clipped sum and of the
      noise (gradient SNR, arXiv 2108.01624).
    """
    adaptation, adapting = self.adaptation, accumulator.adapting
    stddev = noise_multiplier * self._rule(accumulator).sensitivity
    if shares := self._shares():
      stddev = stddev * shares_lib.gradient_noise_factor(shares.values())
    # One Gaussian mechanism on one vector: the sum and, if there are any, the
    # tally and the metrics.
    if unit_noise is None:
      unit_noise = noise.gaussian_like(noise_key, noised(accumulator), 1.0)
    unit, unit_tally, unit_metrics = unit_noise
    drawn = jax.tree.map(lambda n: stddev * n, unit)
    gradient = jax.tree.map(
      lambda total, n, p: ((total + n) / expected_batch_size).astype(p.dtype),
      accumulator.gradients,
      drawn,
      params,
    )
    if public_gradient is not None:
      gradient = self._with_public(gradient, public_gradient, accumulator)
    if (exact := self.unprotected_codebooks) is not None:
      sums = accumulator.codebooks
      gradient = exact.in_place(gradient, sums, expected_batch_size)
    inner = opt_state if adaptation is None else opt_state.opt_state
    # What noise does to second moments, an optimizer may want to take out.
    spread = stddev * unit_noise_stddev / expected_batch_size
    updates, inner = optax.with_extra_args_support(self.optimizer).update(
      gradient, inner, params, noise_variance=spread**2
    )
    if adaptation is None or adapting is None:
      opt_state = inner
    else:
      spread = adaptation.tally_noise_stddev(noise_multiplier)
      norm = adaptation.moved(
        adapting.l2_clip_norm,
        adapting.tally + spread * unit_tally,
        expected_batch_size,
      )
      opt_state = AdaptiveState(inner, norm)
    params = optax.apply_updates(params, updates)
    told: dict[str, jax.Array] = {}
    if self.metrics is not None and accumulator.metrics is not None:
      spread = self.metrics.noise_stddev(noise_multiplier)
      noisy = accumulator.metrics + spread * unit_metrics
      told |= self.metrics.released(noisy, expected_batch_size)
    if accumulator.statistics is not None:
      signal = optax.tree.norm(accumulator.gradients) / optax.tree.norm(drawn)
      told |= unprotected.means(accumulator.statistics)
      told["gradient_snr"] = signal
    return params, opt_state, told

  def _with_public(
    self, gradient: Any, public_gradient: Any, accumulator: Accumulator
  ) -> Any:
    """The private gradient plus the public term, in the same units."""
    rule = self._rule(accumulator)
    scale = 1.0 / rule.l2_clip_norm if rule.kind == "normalized" else 1.0
    return jax.tree.map(
      lambda own, public: own + (scale * public).astype(own.dtype),
      gradient,
      public_gradient,
    )

  def _shares(self) -> dict[str, float]:
    """What of an update's budget is not the gradients', by whose it is."""
    parts = {
      "NormAdaptation.budget_share": self.adaptation,
      "PrivateMetrics.budget_share": self.metrics,
    }
    return {
      name: part.budget_share
      for name, part in parts.items()
      if part is not None
    }

  def _rule(self, accumulator: Accumulator) -> rules.ClippingRule:
    if accumulator.adapting is None:
      return self.rule
    norm = accumulator.adapting.l2_clip_norm
    return dataclasses.replace(self.rule, l2_clip_norm=norm)

  def _added(
    self,
    params: Params,
    accumulator: Accumulator,
    batch: Batch,
    examples_key: jax.Array,
  ) -> Accumulator:
    """The accumulator with rows added that are clipped at once."""
    rule = self._rule(accumulator)
    clipped = self._clipped_sum(params, batch, examples_key, rule)
    added = accumulator._replace(
      gradients=jax.tree.map(jnp.add, accumulator.gradients, clipped.gradients)
    )
    adapting = accumulator.adapting
    if self.adaptation is not None and adapting is not None:
      tally = self.adaptation.tally(
        clipped.norms, clipped.contributes, adapting.l2_clip_norm
      )
      adapting = adapting._replace(tally=adapting.tally + tally)
      added = added._replace(adapting=adapting)
    if self.metrics is not None and accumulator.metrics is not None:
      metrics = self.metrics.sums(clipped, rule.l2_clip_norm)
      added = added._replace(metrics=accumulator.metrics + metrics)
    if (exact := self.unprotected_codebooks) is not None:
      keys, sums = example_keys(batch, examples_key), accumulator.codebooks
      sums = exact.added(sums, self.loss_fn, params, batch, keys)
      added = added._replace(codebooks=sums)
    if accumulator.statistics is None:
      return added
    statistics = unprotected.sums(
      clipped, batch["is_padding"], rule.l2_clip_norm
    )
    return added._replace(
      statistics=jax.tree.map(jnp.add, accumulator.statistics, statistics)
    )

  def _clipped_sum(
    self,
    params: Params,
    batch: Batch,
    examples_key: jax.Array,
    rule: rules.ClippingRule,
  ) -> per_example.ClippedSum:
    return methods.clipped_sum(
      self.loss_fn,
      params,
      batch,
      example_keys(batch, examples_key),
      batch["is_padding"],
      rule,
      self.clipping_method,
    )

  def _statistics(
    self, params: Params, batch: Batch, examples_key: jax.Array
  ) -> unprotected.Statistics:
    clipped = self._clipped_sum(params, batch, examples_key, self.rule)
    return unprotected.sums(
      clipped, batch["is_padding"], self.rule.l2_clip_norm
    )


def example_keys(batch: Batch, examples_key: jax.Array) -> jax.Array:
  """A key [B] for each example of an update, of its number alone.

  Args:
    batch: a physical batch.
    examples_key: of the update.
  """
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
    examples_key, batch["example_ids"]
  )
