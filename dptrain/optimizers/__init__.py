"""What turns a privatised gradient into new parameters.

`adamw` and `sgd` are the optimizers, `learning_rate` the schedules they take,
`weight_decay` the rule for which parameters decay. All are plain Optax, so any
`optax.GradientTransformation` fits where they do. Nothing here imports
dptrain's other wings.

Formal guarantee: an optimizer sees the privatised gradient and its own past
outputs, never an example, so whatever it does is post-processing and costs no
privacy; its settings change utility only (choosing them by looking at results
on private data is not covered).
"""
