"""Training: the one private step and the loop around it.

`step` is the only place where private examples become an update; `objective`
joins masking and model, `run` holds a user's settings, `loop` is the whole
training in one sitting, `checkpoints`, `evaluation`, `progress`, `lineage` and
`numerics` serve it.
"""
