"""Per-example clipping of gradients: jax and flax only, reusable on its own.

`methods` is the door: one function, three ways. `rules` says how much of an
example's gradient may count; `per_example` is the reference by vmap.

`taps` reads layers' inputs and output gradients off an unchanged Flax model
where `survey` has found, by the `marks` that it left in traced programs, that
nothing is missed. `layer_rules` knows how layers meet their weights
(`dense_layers`, `einsum_layers`, `convolutions`), `backward_rules` hand out
what flows back. `products` has the algebra of the
gradients that the taps stand for; `book_keeping` (one pass) and `two_pass` put
them together, over `parameter_trees`; `checking` measures their error.
`adaptation` lets the clip norm follow a quantile, privately.
"""
