"""Private training under an unpatched t5x: the only wing that imports it.

  installation     refuses a t5x that lacks what is used here
  gin_files        finds the gin files, for gin files
  launch           one run: plan, seed, ledger, branch, report
  poisson_batches  the dataset hook: step-addressed Poisson samples
  trainer          the trainer: the private step under t5x's loop
  initial_state    where a fresh run starts, the same as in the thin loop
  optimizers       any optax state in t5x's train state, sharded
  models           the masked language model as t5x knows models
  features         masked records as model features, never packed
  validation       the validation split under fixed masks

t5x launches, shards, saves, evaluates and stops; what is released, sampled,
clipped, noised and written down is what the thin loop does, by the same code.
"""
