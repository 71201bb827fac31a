"""The networks that are trained, and the loss each example owes.

`bert` is the encoder with its masked-token head, `encoder_layer` the block it
repeats, `masked_lm` the per-example objective that clipping differentiates,
`axes` the logical axis names by which parameters are sharded, `scaled` a model
whose gradients are divided on their way back, `ngrammer` a layer of latent
n-grams (with `ngrammer_checks`, `ngram_ids`, `codebooks`). Nothing here imports
more than JAX and Flax, and nothing here knows of privacy: all this wing
promises is that one example's loss never depends on another example.
"""
