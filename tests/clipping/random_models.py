"""Models of random layers, wrapped in random ways, for hypothesis to draw."""

import clipped_models
from clipped_models import D
from clipped_models import T
from clipped_models import V
import flax.linen as nn
from hypothesis import strategies as st
import jax.numpy as jnp


class Passed(nn.Module):
  """Calls a module that another has made."""

  layer: nn.Module

  @nn.compact
  def __call__(self, x):
    return jnp.tanh(self.layer(x))


class Block(nn.Module):
  """One of many layers; [1, T, D] in and out."""

  kind: str
  dtype: str

  @nn.compact
  def __call__(self, x, _=None):
    types = {"dtype": self.dtype, "param_dtype": self._param_dtype()}
    match self.kind:
      case "dense":
        y = nn.Dense(D, **types)(x)
      case "twice":
        layer = nn.Dense(D, **types)
        y = layer(jnp.tanh(layer(x)))
      case "one_input":
        y = nn.Dense(D, **types)(x) * nn.Dense(D, use_bias=False, **types)(x)
      case "heads":
        y = nn.DenseGeneral((2, 2), **types)(x)
        y = nn.DenseGeneral(D, axis=(-2, -1), **types)(y)
      case "over_tokens":
        y = nn.DenseGeneral(T, axis=1, **types)(x).swapaxes(1, 2)
      case "attention":
        y = nn.MultiHeadDotProductAttention(2, **types)(x, jnp.sin(x))
      case "self_attention":
        y = nn.SelfAttention(2, **types)(x)
      case "convolution":
        y = nn.Conv(D, (2,), padding="CAUSAL", **types)(x)
      case "plane":
        y = nn.Conv(4, (3, 2), **types)(x.reshape(1, T, 3, 2))
        y = nn.Conv(2, (2, 2), padding="CIRCULAR", **types)(y).reshape(x.shape)
      case "grouped":
        y = nn.Conv(D, (2,), feature_group_count=2, **types)(x)
      case "einsum":
        y = nn.Einsum((2, D, 3), "...d,hde->...he", **types)(x)
        y = nn.Einsum((D, 2, 3), "bthe,dhe->dbt", **types)(y)
        y = jnp.moveaxis(y, 0, -1)
      case "norms":
        y = nn.RMSNorm(**types)(nn.GroupNorm(2, **types)(x))
      case "positions":
        y = nn.Embed(T, D, **types)(jnp.arange(T))[None]
      case "learned":
        shape, dtype = (T, D), types["param_dtype"]
        start = nn.initializers.normal()
        y = x * self.param("positions", start, shape, dtype)
        y += self.param("scale", start, (1,), dtype)
      case "passed_on":
        shared = nn.Dense(D, **types)
        y = Passed(shared)(x) + Passed(shared)(2 * x)
    y = x + jnp.tanh(nn.LayerNorm(**types)(y)).astype(x.dtype)
    return y if _ is None else (y, None)

  def _param_dtype(self):
    return "float64" if self.dtype == "float64" else "float32"


KINDS = (
  "dense",
  "twice",
  "one_input",
  "heads",
  "over_tokens",
  "attention",
  "self_attention",
  "convolution",
  "plane",
  "grouped",
  "einsum",
  "norms",
  "positions",
  "learned",
  "passed_on",
)
WRAPS = ("plain", "remat", "scan", "scan of remat", "remat of scan")


class Model(nn.Module):
  """An embedding, blocks, and a head that may be tied to the embedding.

  Attributes:
    blocks: kind of each, and how it is wrapped.
    tied: whether the embedding is the head.
    dtype: of the computation.
  """

  blocks: tuple[tuple[str, str], ...]
  tied: bool
  dtype: str

  @nn.compact
  def __call__(self, ids):
    wide = "float64" if self.dtype == "float64" else "float32"
    types = {"dtype": self.dtype, "param_dtype": wide}
    embed = nn.Embed(V, D, **types)
    x = embed(ids)
    for kind, wrap in self.blocks:
      block = nn.remat(Block) if "remat" in wrap else Block
      if "scan" in wrap:
        block = Block if wrap == "remat of scan" else block
        block = clipped_models.scanned(block, 2, in_axes=nn.broadcast)
        block = nn.remat(block) if wrap == "remat of scan" else block
        x, _ = block(kind, self.dtype)(x, 0)
      else:
        x = block(kind, self.dtype)(x)
    if self.tied:
      return embed.attend(jnp.tanh(embed(ids[:, ::-1]) + x))
    return nn.Dense(V, **types)(x)


models = st.builds(
  Model,
  blocks=st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from(WRAPS)),
    min_size=1,
    max_size=2,
  ).map(tuple),
  tied=st.booleans(),
  dtype=st.just("float32"),
)


def of_random(model):
  ids = clipped_models.ids()
  params = clipped_models.initial(model, ids[:1])
  return clipped_models.losses_of(model), params, ids
