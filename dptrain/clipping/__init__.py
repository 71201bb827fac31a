"""Per-example clipping of gradients: jax and flax only, reusable on its own.

`methods` is the door: one function, three ways. `rules` says how much of an
example's gradient may count; `per_example` is the reference by vmap; `taps`
reads layers' inputs and output gradients off an unchanged Flax model,
`products` has the algebra of the gradients that they stand for, `book_keeping`
(one pass) and `two_pass` put them together.
"""
