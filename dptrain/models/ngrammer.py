"""N-Grammer: embeddings augmented by latent n-grams (arXiv 2207.06366).

Each head's part of an embedding is assigned to its nearest cluster; the
clusters of neighbouring tokens make an n-gram, which is hashed into a table of
that head; what is found there is normalised and joined to the normalised part.

Shapes: B batch, T length, D width, H heads, S = D / H, K clusters, V rows of a
table, d n-gram dimensions of a head.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dptrain.models import codebooks
from dptrain.models import encoder_layer
from dptrain.models import ngram_ids
from dptrain.models import ngrammer_checks

TERMS = "terms"  # the collection of what trained losses get added
TRAINED, CODEBOOK_TERM = "trained", "codebook_term"

# Rows of a vocabulary that are assigned at once.
_BLOCK = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGrammerSettings:
  """What an N-Grammer layer looks up, and how its codebooks learn.

  Attributes:
    num_clusters: K of each head.
    table_size: V of each head (and side).
    ngram_dim: d.
    order: n: how many tokens make an n-gram.
    sides: "left", or "both" for a second set of tables that look to the right.
    pairing: "adjacent", or "attention": a token pairs with the one to which it
      attends most in the layer before, by head; of order 2, to one side.
    causal: with pairing="attention", only earlier tokens are paired with.
    combine: "concat" keeps the first S - d normalised dimensions of each head
      (S - 2 d with both sides) and appends the n-gram's; "add" wants d = S.
    prenormalize: vectors are divided by their length before they are assigned.
    learning: how codebooks learn. "frozen": not at all. "private": their sums
      and counts stand in the example's gradient, clipped and noised with it
      (`codebooks.sums_and_counts`). "gradient": by
      `codebooks.quantization_loss`, within the clipped gradient, too.
      "unprotected": the same sums and counts, neither clipped nor noised, for
      runs without a privacy claim.
    weight: of what codebooks learn from, beside the loss: of sums and counts in
      "private", of the centres' loss in "gradient".
    deviation_scale: see `codebooks.sums_and_counts`; the typical distance of a
      vector from its centre.
    commitment: in "gradient", the weight of the vectors' loss.
    straight_through: in "gradient", the unigram part is the centre, and its
      gradient goes to the vector.
    select_rows: each table gets a last column whose gradient counts lookups,
      from which rows can be selected privately. The model never reads it.
    row_weight: of these counts.
    before_layer: in front of which encoder layer; 0: applied to token
      embeddings, before positions are added.
    initial_scale: of both LayerNorms. None: in front of layer 0 the deviation
      at which Bert's positions start, so that they count as much beside the
      result as they do beside embeddings; elsewhere 1, the paper's.
  """

  num_clusters: int = 1024
  table_size: int = 768 * 256
  ngram_dim: int = 8
  order: int = 2
  sides: Literal["left", "both"] = "left"
  pairing: Literal["adjacent", "attention"] = "adjacent"
  causal: bool = False
  combine: Literal["concat", "add"] = "concat"
  prenormalize: bool = False
  learning: Literal["frozen", "private", "gradient", "unprotected"] = "private"
  weight: float = 1.0
  deviation_scale: float = 0.2
  commitment: float = 0.25
  straight_through: bool = False
  select_rows: bool = False
  row_weight: float = 1.0
  before_layer: int = 0
  initial_scale: float | None = None

  def __post_init__(self) -> None:
    """Validates the settings.

    Raises:
      ValueError: names the setting, its value and the way out.
    """
    ngrammer_checks.check_settings(self)

  def check(
    self, width: int, num_heads: int, num_layers: int, scan_layers: bool
  ) -> None:
    """Checks that the layer fits its encoder.

    Args:
      width: D.
      num_heads: H.
      num_layers: of the encoder.
      scan_layers: whether they are a loop.

    Raises:
      ValueError: names the setting, its value and the way out.
    """
    ngrammer_checks.check_encoder(
      self, width, num_heads, num_layers, scan_layers
    )


class NGrammer(nn.Module):
  """Augments vectors by their n-grams.

  Tables and codebooks are stock `nn.Embed` layers, whose per-example gradients
  clipping never forms. Terms of the trained loss are sown into the collection
  "terms" if it is mutable: "trained" [B] is to be added to the trained loss as
  `term - stop_gradient(term)`, and "codebook_term" [B], of learning=
  "unprotected", is not.

  Attributes:
    settings: of the layer.
    num_heads: H.
    epsilon: added to LayerNorms' variances.
  """

  settings: NGrammerSettings
  num_heads: int
  epsilon: float = 1e-6

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    is_token: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    attention: jax.Array | None = None,
    cluster_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: [B, T, D].
      is_token: [B, T] bool, False at padding.
      segment_ids: [B, T], equal within each segment of a packed sequence; None
        if there is one.
      attention: [B, H, T, T] weights of queries to keys, for
        pairing="attention".
      cluster_ids: [B, T, H] int32, known already; None: found here.

    Returns:
      [B, T, D] of x's dtype, 0 at padding.

    Raises:
      ValueError: attention is wanted but not given.
    """
    settings = self.settings
    heads = x.reshape(*x.shape[:2], self.num_heads, -1)
    heads = heads.astype(jnp.promote_types(x.dtype, jnp.float32))
    points = _points(heads, settings)
    books = self._codebooks(heads.shape[-1])
    if cluster_ids is None:
      cluster_ids = codebooks.nearest(points, [_centres(b) for b in books])
    # 0 at padding is what its neighbours are to see.
    ids = jnp.where(is_token[..., None], cluster_ids, 0)
    learned = jnp.stack([b(ids[..., h]) for h, b in enumerate(books)], axis=2)
    if settings.straight_through:
      heads += jax.lax.stop_gradient(learned[..., :-1] - heads)
    parts, counted = self._ngrams(ids, is_token, segment_ids, attention)
    unigrams = self._norm("unigram_norm")(heads)
    if settings.combine == "concat":
      kept = heads.shape[-1] - len(parts) * settings.ngram_dim
      found = jnp.concatenate([unigrams[..., :kept], *parts], axis=-1)
    else:
      found = sum(parts, start=unigrams)
    self._sow_terms(points, learned, counted, is_token)
    found = jnp.where(is_token[..., None, None], found, 0.0)
    return found.reshape(x.shape).astype(x.dtype)

  def _ngrams(
    self,
    ids: jax.Array,
    is_token: jax.Array,
    segment_ids: jax.Array | None,
    attention: jax.Array | None,
  ) -> tuple[list[jax.Array], jax.Array]:
    """Normalised n-grams [B, T, H, d] by side; last columns [B, T, L]."""
    settings = self.settings
    parts, counted = [], []
    for prefix, step in (("", 1), ("right_", -1))[: _sides(settings)]:
      if settings.pairing == "attention":
        if attention is None:
          raise ValueError(
            "NGrammerSettings.pairing='attention' needs the attention weights"
            " of the layer before; pass attention"
          )
        places = [
          ids,
          ngram_ids.partners(
            ids, attention, is_token, segment_ids, settings.causal
          ),
        ]
      else:
        places = [ids] + [
          ngram_ids.neighbours(ids, segment_ids, step * far)
          for far in range(1, settings.order)
        ]
      rows = ngram_ids.rows(places, settings.num_clusters, settings.table_size)
      found = jnp.stack(
        [
          self._table(f"{prefix}table_{h}")(rows[..., h])
          for h in range(self.num_heads)
        ],
        axis=2,
      )
      counted.append(found[..., -1])
      vectors = found[..., : settings.ngram_dim]
      parts.append(self._norm(f"{prefix}ngram_norm")(vectors))
    return parts, jnp.concatenate(counted, axis=-1)

  def _sow_terms(
    self,
    points: jax.Array,
    learned: jax.Array,
    counted: jax.Array,
    is_token: jax.Array,
  ) -> None:
    """Hands out what trained losses get added, if anyone asks."""
    settings = self.settings
    if not self.is_mutable_collection(TERMS):
      return
    if settings.learning == "gradient":
      trained = codebooks.quantization_loss(
        points, learned, is_token, settings.weight, settings.commitment
      )
    else:
      told = codebooks.sums_and_counts(
        points, learned, is_token, settings.deviation_scale
      )
      # Behind stop_gradient it teaches nothing, but the codebooks' lookups are
      # used: clipping's taps then stand for them, whatever the mode.
      private = settings.learning == "private"
      trained = settings.weight * (
        told if private else jax.lax.stop_gradient(told)
      )
      if settings.learning == "unprotected":
        self.sow(TERMS, CODEBOOK_TERM, told)
    if settings.select_rows:
      trained += settings.row_weight * codebooks.row_counts(counted, is_token)
    self.sow(TERMS, TRAINED, trained)

  def _codebooks(self, size: int) -> list[nn.Embed]:
    """One of [K, S + 1] for each head."""
    return [
      nn.Embed(
        self.settings.num_clusters,
        size + 1,
        embedding_init=nn.with_logical_partitioning(
          _centres_without_mass(self.settings.prenormalize), ("clusters", "kv")
        ),
        name=f"codebook_{head}",
      )
      for head in range(self.num_heads)
    ]

  def _table(self, name: str) -> nn.Embed:
    """One of [V, d], or [V, d + 1] with row counts' places."""
    settings = self.settings
    return nn.Embed(
      settings.table_size,
      settings.ngram_dim + settings.select_rows,
      embedding_init=nn.with_logical_partitioning(
        _ngrams_without_count(settings.select_rows), ("ngrams", "kv")
      ),
      name=name,
    )

  def _norm(self, name: str) -> nn.LayerNorm:
    """One LayerNorm per head, with scale and bias [H, ...]."""
    scale = self.settings.initial_scale
    if scale is None:
      first = self.settings.before_layer == 0
      scale = encoder_layer.INITIAL_STDDEV if first else 1.0
    return nn.LayerNorm(
      epsilon=self.epsilon,
      use_fast_variance=False,
      reduction_axes=-1,
      feature_axes=(-2, -1),
      scale_init=nn.with_logical_partitioning(
        nn.initializers.constant(scale), ("heads", "kv")
      ),
      bias_init=encoder_layer.named_bias("heads", "kv"),
      name=name,
    )


def cluster_table(
  params: Any, settings: NGrammerSettings, num_heads: int
) -> jax.Array:
  """The clusters of every token, where these depend on the token alone.

  Args:
    params: of the encoder: nested dict of arrays, "token_embedding" and
      "ngrammer" among them.
    settings: of the layer; before_layer must be 0.
    num_heads: H.

  Returns:
    [vocabulary, H] int32, to be given to the encoder as `cluster_table` for as
    long as embeddings and codebooks stay as they are. Ids equal those that the
    layer finds, but for ties that rounding decides.

  Raises:
    ValueError: the layer does not see embeddings alone.
  """
  if settings.before_layer:
    raise ValueError(
      f"NGrammerSettings.before_layer={settings.before_layer}: clusters depend"
      " on the whole sequence there, and no table holds them; use before_layer="
      "0, or no table"
    )
  table = jnp.asarray(params["token_embedding"]["embedding"])
  heads = table.reshape(len(table), num_heads, -1)
  centres = [
    params["ngrammer"][f"codebook_{h}"]["embedding"][:, :-1]
    for h in range(num_heads)
  ]

  def found(part: jax.Array) -> jax.Array:
    return codebooks.nearest(_points(part, settings), centres)

  blocks = range(0, len(heads), _BLOCK)
  return jnp.concatenate([found(heads[i : i + _BLOCK]) for i in blocks])


def _points(heads: jax.Array, settings: NGrammerSettings) -> jax.Array:
  """What is assigned: vectors [..., S], of length 1 if so set."""
  if not settings.prenormalize:
    return heads
  squares = jnp.sum(jnp.square(heads), axis=-1, keepdims=True)
  return heads * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def _centres(book: nn.Embed) -> jax.Array:
  """[K, S], for comparison only: a use that clipping need not count."""
  table: jax.Array = jax.lax.stop_gradient(book.embedding)
  return table[:, :-1]


def _sides(settings: NGrammerSettings) -> int:
  return 2 if settings.sides == "both" else 1


def _centres_without_mass(unit: bool) -> Callable[..., jax.Array]:
  """Centres as wide as what is assigned at first; masses of 0."""

  def init(key: Any, shape: tuple[int, int], dtype: Any) -> jax.Array:
    size = shape[1] - 1
    deviation = 1 / math.sqrt(size) if unit else encoder_layer.INITIAL_STDDEV
    draw = deviation * jax.random.normal(key, (shape[0], size), dtype)
    return jnp.pad(draw, [(0, 0), (0, 1)])

  return init


def _ngrams_without_count(counts: bool) -> Callable[..., jax.Array]:
  """N-grams' vectors, and zeros where rows are counted."""

  def init(key: Any, shape: tuple[int, int], dtype: Any) -> jax.Array:
    normal = nn.initializers.truncated_normal(encoder_layer.INITIAL_STDDEV)
    draw = normal(key, (shape[0], shape[1] - counts), dtype)
    return jnp.pad(draw, [(0, 0), (0, int(counts))])

  return init
