"""One Transformer encoder block: self-attention, then an MLP.

Shapes: B batch, T length, D width, H heads, K head size, F MLP width.

Source: arXiv 1706.03762 (section 3) for the block, arXiv 1810.04805 for GELU,
learned biases and the initialiser, arXiv 2002.04745 for the pre-LN variant.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

INITIAL_STDDEV = 0.02  # of the normal before truncation at two deviations


def named_kernel(*names: str) -> Any:
  """Returns BERT's truncated normal, its dimensions named for sharding."""
  init = nn.initializers.truncated_normal(INITIAL_STDDEV)
  return nn.with_logical_partitioning(init, names)


def named_bias(*names: str) -> Any:
  """Returns an initialiser of zeros, its dimensions named for sharding."""
  return nn.with_logical_partitioning(nn.initializers.zeros, names)


def layer_norm(name: str, epsilon: float, dtype: Any) -> nn.LayerNorm:
  """Returns a LayerNorm over D; its statistics are float32 in any dtype.

  Args:
    name: the submodule's name.
    epsilon: added to the variance.
    dtype: of the output.
  """
  scale = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
  return nn.LayerNorm(
    epsilon=epsilon,
    dtype=dtype,
    # E[(x - mean)^2], since E[x^2] - mean^2 cancels badly in float32.
    use_fast_variance=False,
    scale_init=scale,
    bias_init=named_bias("embed"),
    name=name,
  )


def _noting(seen: list[jax.Array]) -> Any:
  """Stock attention that leaves its weights, by head, in a list."""

  # Flax reads off the signature what it may pass.
  @functools.wraps(nn.dot_product_attention)
  def attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
    fixed = jax.lax.stop_gradient((query, key))
    seen.append(
      nn.dot_product_attention_weights(
        *fixed,
        mask=options["mask"],
        deterministic=True,
        dtype=options["dtype"],
        force_fp32_for_softmax=True,
      )
    )
    return nn.dot_product_attention(query, key, value, **options)

  return attend


class EncoderLayer(nn.Module):
  """Self-attention and a two-layer GELU MLP, each on a residual branch.

  Attributes:
    num_heads: H.
    head_size: K; H * K need not equal D.
    mlp_width: F.
    layer_norm: "pre" normalises each branch's input, "post" the sum of branch
      and residual.
    layer_norm_epsilon: added to the variance.
    dropout_rate: on attention weights and on both branches' outputs.
    dtype: of the computation; parameters are float32.
    deterministic: switches dropout off.
    hand_out_attention: also returns the attention weights.
  """

  num_heads: int
  head_size: int
  mlp_width: int
  layer_norm: Literal["pre", "post"]
  layer_norm_epsilon: float
  dropout_rate: float
  dtype: Any
  deterministic: bool
  hand_out_attention: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Applies the block.

    Args:
      x: [B, T, D] of the compute dtype.
      mask: [B, 1, 1, T] bool, True at tokens that may be attended to.

    Returns:
      [B, T, D] and None, the pair that `nn.scan` wants of its body; in place
      of None the attention weights [B, H, T, T] if they are handed out, before
      dropout and without a gradient.
    """
    pre = self.layer_norm == "pre"
    attention_norm = self._norm("attention_norm")
    mlp_norm = self._norm("mlp_norm")

    branch, weights = self._attention(attention_norm(x) if pre else x, mask)
    x = x + branch if pre else attention_norm(x + branch)
    branch = self._mlp(mlp_norm(x) if pre else x)
    x = x + branch if pre else mlp_norm(x + branch)
    return x, weights

  def _norm(self, name: str) -> nn.LayerNorm:
    return layer_norm(name, self.layer_norm_epsilon, self.dtype)

  def _attention(
    self, x: jax.Array, mask: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    seen: list[jax.Array] = []
    # Left alone where nobody asks, so that the program stays what it was.
    options = {"attention_fn": _noting(seen)} if self.hand_out_attention else {}
    y: jax.Array = nn.MultiHeadDotProductAttention(
      num_heads=self.num_heads,
      qkv_features=self.num_heads * self.head_size,
      out_features=x.shape[-1],
      dtype=self.dtype,
      dropout_rate=self.dropout_rate,
      # The default would draw one mask for all heads and all examples.
      broadcast_dropout=False,
      deterministic=self.deterministic,
      force_fp32_for_softmax=True,
      kernel_init=named_kernel("embed", "heads", "kv"),
      bias_init=named_bias("heads", "kv"),
      out_kernel_init=named_kernel("heads", "kv", "embed"),
      out_bias_init=named_bias("embed"),
      name="attention",
      **options,
    )(x, mask=mask)
    return self._dropout(y), seen[0] if seen else None

  def _mlp(self, x: jax.Array) -> jax.Array:
    y = nn.Dense(
      self.mlp_width,
      dtype=self.dtype,
      kernel_init=named_kernel("embed", "mlp"),
      bias_init=named_bias("mlp"),
      name="mlp_in",
    )(x)
    y = jnp.asarray(nn.gelu(y, approximate=False))
    y = nn.Dense(
      x.shape[-1],
      dtype=self.dtype,
      kernel_init=named_kernel("mlp", "embed"),
      bias_init=named_bias("embed"),
      name="mlp_out",
    )(y)
    return self._dropout(y)

  def _dropout(self, x: jax.Array) -> jax.Array:
    y: jax.Array = nn.Dropout(self.dropout_rate)(
      x, deterministic=self.deterministic
    )
    return y
