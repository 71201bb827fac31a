"""Logical axis names of parameters: what each dimension means for sharding.

The modules of this wing put a name on every dimension of every parameter
('vocab', 'positions', 'embed', 'mlp', 'heads', 'kv', an N-Grammer's 'clusters'
and 'ngrams', and 'layers' in front where layers are stacked) through Flax's
partitioning metadata. Training works on plain arrays; the names are read once,
from shapes alone.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dptrain.models import bert as bert_lib


def unboxed(variables: Any) -> Any:
  """Strips the axis-name boxes, leaving plain arrays.

  Args:
    variables: any pytree that may hold Flax partitioning boxes, such as what
      `Bert.init` returns.

  Returns:
    The same tree with every box replaced by the array inside it.
  """
  return nn.meta.unbox(variables)


def logical_axes(model: bert_lib.Bert) -> dict[str, Any]:
  """Names every dimension of every parameter, without allocating any.

  Args:
    model: the encoder whose parameters are asked about.

  Returns:
    A nested dict of the parameters' structure whose leaves are tuples of axis
    names, one per dimension. Tuples are pytree nodes: map over the result with
    ``is_leaf=lambda x: isinstance(x, tuple)``.

  >>> model = bert_lib.Bert(
  ...   vocab_size=100, num_layers=1, width=8, num_heads=2, scan_layers=True
  ... )
  >>> axes = logical_axes(model)
  >>> axes["token_embedding"]["embedding"]
  ('vocab', 'embed')
  >>> axes["layers"]["mlp_in"]["kernel"]
  ('layers', 'embed', 'mlp')
  """
  tokens = jnp.zeros((1, 1), jnp.int32)
  # One fixed generator: the process-wide default may be any implementation.
  key = jax.random.key(0, impl="threefry2x32")
  boxed = jax.eval_shape(model.init, key, tokens, tokens)["params"]
  axes: dict[str, Any] = jax.tree.map(
    lambda box: tuple(box.names),
    boxed,
    is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
  )
  return axes
