"""BERT with a masked-token head, made of stock Flax layers only.

Shapes: B batch, T length, D width, H heads, V vocabulary, M masked.

Source: arXiv 1810.04805 (sections 3 and 3.1), without segment embeddings and
without next-sentence prediction: one record is one sequence (arXiv 2501.18914).
Stock layers keep the model open to anything that intercepts layers, such as
per-example gradient norms computed without per-example gradients.
"""

from collections.abc import Callable
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dptrain.models import encoder_layer
from dptrain.models import ngrammer as ngrammer_lib

PAD_ID = 0


class OutputBias(nn.Module):
  """Adds one learned number per vocabulary entry.

  Attributes:
    size: V.
  """

  size: int

  def setup(self) -> None:
    """Makes the parameter."""
    init = encoder_layer.named_bias("vocab")
    self.bias = self.param("bias", init, (self.size,), jnp.float32)

  def __call__(
    self, logits: jax.Array, ids: jax.Array | None = None
  ) -> jax.Array:
    """Returns logits plus the bias: [..., V], or [..., K] of the ids given."""
    bias = self.bias if ids is None else jnp.asarray(self.bias)[ids]
    return logits + bias


# From hidden states [B, M, D], the token table and the output bias to anything.
ReadOut = Callable[[jax.Array, nn.Embed, OutputBias], Any]


class Bert(nn.Module):
  """A bidirectional Transformer encoder that predicts masked tokens.

  Token embeddings are tied to the output. GELU is the exact one (erf), not the
  tanh approximation. Kernels and embeddings start from a normal of deviation
  0.02 truncated at two deviations, biases at 0, scales at 1. Every parameter
  is float32 and carries logical axis names (`dptrain.models.axes`).

  `layer_norm="pre"` is the default: pre-LN trains without post-LN's delicate
  warm-up (arXiv 2002.04745), and the largest privately trained language model
  is pre-norm throughout (arXiv 2510.15001). Clipping bounds one norm over all
  parameters while noise falls on all alike, so it matters who holds that norm.
  Measured at initialisation on 12 layers, the layers together hold 0.87 of a
  per-example gradient's norm in pre-LN, at widths 256 and 768, but 0.25 and
  0.62 in post-LN, where embeddings and head take the rest. No comparison of
  accuracy under noise stands behind the choice. "post" is the original BERT.

  Attributes:
    vocab_size: V, including special tokens; id 0 is padding.
    num_layers: number of encoder blocks.
    width: D.
    num_heads: H.
    head_size: size of a head; None means width // num_heads.
    mlp_width: hidden width of the MLPs; None means 4 * width.
    max_length: number of learned positions, the longest T.
    dropout_rate: on embeddings, attention weights and branch outputs. DP
      training usually wants 0: noise regularises enough.
    layer_norm: "pre" (with a final LayerNorm) or "post" (with a LayerNorm
      after the embeddings).
    layer_norm_epsilon: added to variances. BERT's 1e-12 lets a near-constant
      vector scale its gradient by 1e6, and clipping then spends that example
      on it; 1e-6 caps the factor at 1e3.
    dtype: of activations, "float32" or "bfloat16". Softmax, LayerNorm
      statistics, the tied output product and logits are float32 in both.
    logit_scale: None makes logits of inner products of hidden states and token
      embeddings; a number, of their cosines times this inverse temperature.
      Trained with `sampled_softmax` it is cheap; trained with all logits, every
      example gets a copy of the table, for the table's lengths are a use of it
      that no tap covers.
    scan_layers: stack the layers' parameters and loop over them, which keeps
      compile time flat in depth.
    remat: recompute each layer in the backward pass instead of storing its
      activations.
    ngrammer: of a layer that augments embeddings, or what goes into a later
      encoder layer, by n-grams (`dptrain.models.ngrammer`); None: no such.
  """

  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  head_size: int | None = None
  mlp_width: int | None = None
  max_length: int = 512
  dropout_rate: float = 0.0
  layer_norm: Literal["pre", "post"] = "pre"
  layer_norm_epsilon: float = 1e-6
  dtype: Any = "float32"
  logit_scale: float | None = None
  scan_layers: bool = False
  remat: bool = False
  ngrammer: ngrammer_lib.NGrammerSettings | None = None

  def __post_init__(self) -> None:
    """Validates the settings.

    Raises:
      ValueError: names the setting, its value and the way out.
    """
    _check_sizes(self)
    if not 0.0 <= self.dropout_rate < 1.0:
      raise ValueError(
        f"Bert.dropout_rate={self.dropout_rate} must lie in [0, 1); use 0 to"
        " switch dropout off"
      )
    if self.layer_norm not in ("pre", "post"):
      raise ValueError(
        f"Bert.layer_norm={self.layer_norm!r} must be 'pre' or 'post'"
      )
    if not self.layer_norm_epsilon > 0.0:
      raise ValueError(
        f"Bert.layer_norm_epsilon={self.layer_norm_epsilon} must be positive,"
        " such as 1e-6"
      )
    if _dtype_name(self.dtype) not in ("float32", "bfloat16"):
      raise ValueError(
        f"Bert.dtype={self.dtype!r} must be 'float32' or 'bfloat16'; float16"
        " would need loss scaling"
      )
    scale = self.logit_scale
    if scale is not None and not 0.0 < scale < math.inf:
      raise ValueError(
        f"Bert.logit_scale={scale} must be positive and finite, such as 16, or"
        " None for inner products"
      )
    _check_ngrammer(self)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    inputs: jax.Array,
    positions: jax.Array,
    *,
    deterministic: bool = True,
    read_out: ReadOut | None = None,
    cluster_table: jax.Array | None = None,
  ) -> Any:
    """Scores the vocabulary at the masked positions.

    Args:
      inputs: [B, T] int32 token ids; 0 is padding and is never attended to.
      positions: [B, M] int32 indices into T of the tokens to predict; unused
        slots may hold any valid index.
      deterministic: switches dropout off; otherwise `apply` wants a "dropout"
        key.
      read_out: what is made of the hidden states; None: all logits.
      cluster_table: [V, H] int32 of `ngrammer.cluster_table`, which saves
        looking for the nearest clusters; None: they are looked for.

    Returns:
      [B, M, V] float32 logits, or what `read_out` returns.

    Raises:
      ValueError: if T exceeds `max_length`, or a cluster table has no use.
    """
    length = inputs.shape[-1]
    if length > self.max_length:
      raise ValueError(
        f"inputs have length {length}, over Bert.max_length="
        f"{self.max_length}; shorten them or raise Bert.max_length"
      )
    place, _ = _ngrammer_place(self.ngrammer)
    if cluster_table is not None and (place or self.ngrammer is None):
      raise ValueError(
        "cluster_table is given, but no N-Grammer in front of layer 0 reads it;"
        " leave it out"
      )
    # float32: this table is also the output matrix, which makes the logits.
    tokens = nn.Embed(
      self.vocab_size,
      self.width,
      dtype=jnp.float32,
      embedding_init=encoder_layer.named_kernel("vocab", "embed"),
      name="token_embedding",
    )
    clusters = None if cluster_table is None else cluster_table[inputs]
    x = self._embed(tokens, inputs, deterministic, clusters)
    x = self._encode(x, (inputs != PAD_ID)[:, None, None, :], deterministic)
    x = jnp.take_along_axis(x, positions[..., None], axis=1)
    x = nn.Dense(
      self.width,
      dtype=self.dtype,
      # Not ("embed", "embed"): a name may stand for one dimension only.
      kernel_init=encoder_layer.named_kernel("embed", "mlp"),
      bias_init=encoder_layer.named_bias("mlp"),
      name="head_dense",
    )(x)
    x = nn.gelu(x, approximate=False)
    x = encoder_layer.layer_norm(
      "head_norm", self.layer_norm_epsilon, jnp.float32
    )(x)
    bias = OutputBias(self.vocab_size, name="output_bias")
    if read_out is not None:
      return read_out(x, tokens, bias)
    if self.logit_scale is None:
      return bias(tokens.attend(x))
    cosines = unit(x) @ unit(tokens.embedding).T
    return bias(self.logit_scale * cosines)

  def _ngrammer(self) -> ngrammer_lib.NGrammer:
    settings: Any = self.ngrammer
    return ngrammer_lib.NGrammer(
      settings, self.num_heads, self.layer_norm_epsilon, name="ngrammer"
    )

  def _embed(
    self,
    tokens: nn.Embed,
    inputs: jax.Array,
    deterministic: bool,
    clusters: jax.Array | None,
  ) -> jax.Array:
    """Returns [B, T, D]: token plus position, normalised if post-LN."""
    positions = nn.Embed(
      self.max_length,
      self.width,
      dtype=jnp.float32,
      embedding_init=encoder_layer.named_kernel("positions", "embed"),
      name="position_embedding",
    )
    # One row of ids per example: a shared row would hide the batch dimension
    # from whoever intercepts this layer for per-example gradients.
    ids = jnp.broadcast_to(jnp.arange(inputs.shape[-1]), inputs.shape)
    x = tokens(inputs)
    if self.ngrammer is not None and self.ngrammer.before_layer == 0:
      x = self._ngrammer()(x, inputs != PAD_ID, cluster_ids=clusters)
    x += positions(ids)
    if self.layer_norm == "post":
      x = encoder_layer.layer_norm(
        "embedding_norm", self.layer_norm_epsilon, self.dtype
      )(x)
    x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
    return x.astype(self.dtype)

  def _encode(
    self, x: jax.Array, mask: jax.Array, deterministic: bool
  ) -> jax.Array:
    """Returns [B, T, D] after all layers."""
    settings = {
      "num_heads": self.num_heads,
      "head_size": self.head_size or self.width // self.num_heads,
      "mlp_width": self.mlp_width or 4 * self.width,
      "layer_norm": self.layer_norm,
      "layer_norm_epsilon": self.layer_norm_epsilon,
      "dropout_rate": self.dropout_rate,
      "dtype": self.dtype,
      "deterministic": deterministic,
    }
    layer: Any = encoder_layer.EncoderLayer
    if self.remat:
      # Inside a scan nothing can be merged across the barrier anyway.
      layer = nn.remat(layer, prevent_cse=not self.scan_layers)
    if self.scan_layers:
      x, _ = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=self.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(**settings, name="layers")(x, mask)
    else:
      place, asks = _ngrammer_place(self.ngrammer)
      weights = None
      for i in range(self.num_layers):
        if place and i == place:
          x = self._ngrammer()(x, mask[:, 0, 0], attention=weights)
        settings["hand_out_attention"] = asks and i + 1 == place
        x, weights = layer(**settings, name=f"layer_{i}")(x, mask)
    if self.layer_norm == "pre":
      x = encoder_layer.layer_norm(
        "final_norm", self.layer_norm_epsilon, self.dtype
      )(x)
    return x


def unit(x: jax.Array) -> jax.Array:
  """Vectors [..., D] of length 1; those shorter than 1e-6 stay short."""
  squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def _dtype_name(dtype: Any) -> str:
  """Returns the canonical name, or the repr of what is no dtype at all."""
  try:
    return str(jnp.dtype(dtype))
  except TypeError:
    return repr(dtype)


def _ngrammer_place(
  settings: ngrammer_lib.NGrammerSettings | None,
) -> tuple[int, bool]:
  """In front of which layer, 0 for none; whether it reads attention."""
  if settings is None:
    return 0, False
  return settings.before_layer, settings.pairing == "attention"


def _check_ngrammer(bert: Bert) -> None:
  """Raises ValueError unless the N-Grammer's settings fit the encoder's."""
  settings: Any = bert.ngrammer
  if settings is None:
    return
  if not isinstance(settings, ngrammer_lib.NGrammerSettings):
    raise ValueError(
      f"Bert.ngrammer={settings!r} must be an NGrammerSettings or None; in gin,"
      " @ngrammer.NGrammerSettings()"
    )
  settings.check(bert.width, bert.num_heads, bert.num_layers, bert.scan_layers)


def _check_sizes(bert: Bert) -> None:
  """Raises ValueError unless every size is a positive int that fits."""
  for name in (
    "vocab_size",
    "num_layers",
    "width",
    "num_heads",
    "head_size",
    "mlp_width",
    "max_length",
  ):
    value = getattr(bert, name)
    if value is None and name in ("head_size", "mlp_width"):
      continue
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"Bert.{name}={value!r} must be a positive int")
  if bert.head_size is None and bert.width % bert.num_heads:
    raise ValueError(
      f"Bert.width={bert.width} is not a multiple of Bert.num_heads="
      f"{bert.num_heads}; change either or set Bert.head_size"
    )
