"""What turns a privatised gradient into new parameters.

  adamw  sgd  nesterov  adagrad  rmsprop    the usual optimizers
  sm3             second moments per row and per column
  shampoo  soap   preconditioned along each dimension; docs/optimizers.md has
    their rooms: *_settings, *_transform, shampoo_blocks, inverse_roots,
    eigenbases, preconditioner_*, root_sharing, quantized_matrices, magnitudes,
    momentum
  lamb  lars      steps as long as their layer's weights
  grafting        the length of one optimizer's step, the direction of another's
  step_size_adaptation  steps that learn how long to be, around any optimizer
  scale_then_privatise  noise shared out as the gradients are (models.scaled)
  codebook_learning  an N-Grammer's codebooks and tables, around any optimizer;
    codebook_settings, codebook_means, ngram_parameters are its rooms
  second_moments  what privacy noise adds to squares, and how to take it off
  learning_rate   schedules
  weight_decay    which parameters decay
  layers          what is one layer where a scan stacks them
  finite_gradients  what is not finite, kept from a state
  settings        refusals

All are plain Optax, so any `optax.GradientTransformation` fits where they do.
Nothing here imports dptrain's other wings.

Formal guarantee: an optimizer sees the privatised gradient and its own past
outputs, never an example, so whatever it does is post-processing and costs no
privacy; its settings change utility only (choosing them by looking at results
on private data is not covered).
"""
