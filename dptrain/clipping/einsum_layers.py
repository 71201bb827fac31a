"""How `flax.linen.Einsum` meets its weight, where it is a matrix product.

Shapes: d and p the weight's input and output width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dptrain.clipping import dense_layers

# No letters of an equation: they stand for the axes of an ellipsis.
_DIGITS = "0123456789"


class Product(NamedTuple):
  """An equation whose every letter is a row, a feature or summed over.

  Attributes:
    inputs: letters of the input, in their order.
    kernel: of the kernel.
    output: of the output.
  """

  inputs: str
  kernel: str
  output: str

  @property
  def rows(self) -> str:
    """Letters of input and output, as the output has them."""
    return "".join(a for a in self.output if a in self.inputs)

  @property
  def contracted(self) -> str:
    """Letters of input and kernel, as the kernel has them."""
    return "".join(a for a in self.kernel if a in self.inputs)

  @property
  def features(self) -> str:
    """Letters of kernel and output, as the output has them."""
    return "".join(a for a in self.output if a in self.kernel)


def product(equation: str | None, ellipsis: int) -> Product | None:
  """Reads an equation.

  Args:
    equation: as given to `Einsum`.
    ellipsis: how many axes "..." stands for.

  Returns:
    The letters; None unless each is in exactly two of input, kernel and output,
    once: then the output is not the product of two matrices.
  """
  operands, arrow, output = (equation or "").replace(" ", "").partition("->")
  if not arrow or operands.count(",") != 1 or not 0 <= ellipsis < len(_DIGITS):
    return None
  inputs, kernel = operands.split(",")
  dots = _DIGITS[:ellipsis]
  inputs, output = (s.replace("...", dots) for s in (inputs, output))
  places = inputs, kernel, output
  for letter in set("".join(places)):
    counts = sorted(place.count(letter) for place in places)
    if counts != [0, 1, 1] or letter == ".":
      return None
  return Product(*places)


def inputs(module: Any, x: jax.Array) -> jax.Array | None:
  """The input with its summed axes joined into the last: [..., d]."""
  found = _of(module, x.ndim, 0)
  if found is None or not dense_layers.is_plain(module):
    return None
  sizes = dict(zip(found.kernel, module.shape, strict=True))
  shape = dict(zip(found.inputs, x.shape, strict=True))
  # An axis of length 1 may be broadcast against the kernel's.
  if any(shape[a] != sizes[a] for a in found.contracted):
    return None
  met = dense_layers.as_met(module, x)
  if met is None:
    return None
  order = [found.inputs.index(a) for a in found.rows + found.contracted]
  moved = jnp.transpose(met, order)
  return moved.reshape(*moved.shape[: len(found.rows)], -1)


def num_features(module: Any) -> int:
  """How many axes of the output are features."""
  return len(_of(module).features)


def output_order(module: Any, rank: int) -> tuple[int, ...]:
  """The output's axes, rows before features."""
  found = _of(module, rank, 2)
  return tuple(found.output.index(a) for a in found.rows + found.features)


def weight_order(module: Any) -> tuple[int, ...]:
  """The kernel's axes, summed ones before features."""
  found = _of(module)
  return tuple(found.kernel.index(a) for a in found.contracted + found.features)


def _of(module: Any, rank: int | None = None, place: int = 0) -> Any:
  """The layer's product; `rank` is that of its input (0) or output (2)."""
  equation = (module.einsum_str or "").replace(" ", "")
  ellipsis = 0
  if rank is not None:
    letters = equation.replace("->", ",").split(",")[place]
    if "..." in letters:
      ellipsis = rank - len(letters.replace("...", ""))
  return product(equation, ellipsis)
