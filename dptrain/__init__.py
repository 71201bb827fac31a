"""dptrain: differentially private large-batch pretraining in JAX.

Importing this package imports nothing else: each wing (`dptrain.privacy`,
`dptrain.clipping`, `dptrain.models`, `dptrain.optimizers`, `dptrain.data`,
`dptrain.training`) is imported by those who need it.
"""

__version__ = "0.1.0"
