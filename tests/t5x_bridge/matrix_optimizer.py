"""A Shampoo-like toy: its state holds matrices of no parameter's shape."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class MatricesState(NamedTuple):
  """Of a Shampoo-like optimizer."""

  count: Any
  left: Any
  right: Any


def matrices(rate):
  """Preconditions matrices from both sides, as Shampoo does; toy roots."""

  def init(params):
    def gram(side):
      return jax.tree.map(
        lambda p: jnp.eye(p.shape[side]) if p.ndim == 2 else jnp.ones((1,)),
        params,
      )

    return MatricesState(jnp.zeros((), jnp.int32), gram(0), gram(1))

  def update(grads, state, params=None):
    del params

    def added(gram, g, side):
      if g.ndim != 2:
        return gram
      return gram + jnp.tensordot(g, g, (1 - side, 1 - side))

    left = jax.tree.map(lambda m, g: added(m, g, 0), state.left, grads)
    right = jax.tree.map(lambda m, g: added(m, g, 1), state.right, grads)
    updates = jax.tree.map(
      lambda g, a, b: -rate * (a @ g @ b if g.ndim == 2 else g),
      grads,
      left,
      right,
    )
    return updates, MatricesState(state.count + 1, left, right)

  return optax.GradientTransformation(init, update)
