"""The guarantee, in one wing.

`schedule` says how large each update's expected batch is, `plan` joins it with
corpus size, clipping, noise and delta into the one object that sampler, noise
and accountant read, `keys` and `sampling` and `noise` draw what the plan asks
for, `accounting` prices it, `ledger` remembers what was released, `report`
tells. Nothing here imports TensorFlow, seqio, gin or flax.
"""
