"""Per-example clipping of gradients: jax only, reusable on its own.

`rules` says how much of an example's gradient may count and what the
sensitivity of a sum is; `per_example` computes clipped sums.
"""
