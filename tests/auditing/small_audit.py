"""An audit that takes seconds: a claim near 4 that is easy to look behind.

A run's noise changes with dptrain's code, whatever its seed: what a test asks
of an audit must be true of all but one in ten thousand.
"""

import dataclasses

import small_run

from dptrain.auditing import audit

CANARIES, RECORDS = 2000, 200
ALL = CANARIES + RECORDS


def make_run(model_dir, **options):
  """4 updates on all records: one Gaussian mechanism, epsilon 4.38 at 1e-5."""
  options = {
    "steps": 4,
    "sizes": (ALL, ALL),
    "noise": 2.0,
    "clipping": "flat",
    "physical_batch_size": 550,
    "period": 0,
    **options,
  }
  return small_run.make_run(model_dir, **options)


def audited(
  model_dir,
  canaries=CANARIES,
  mode="white_box",
  guesses=None,
  num_records=RECORDS,
  privacy=None,
  records=None,
  **options,
):
  """`privacy`: settings that `small_run.make_run` has no option for."""
  run = make_run(model_dir, **options)
  changed = dataclasses.replace(run.privacy, **(privacy or {}))
  return audit.audit(
    dataclasses.replace(run, privacy=changed),
    audit.AuditSettings(canaries=canaries, mode=mode, guesses=guesses),
    records or small_run.records(num_records),
  )
