"""An audit that takes seconds: a claim near 4 that is easy to look behind."""

import small_run

from dptrain.auditing import audit

CANARIES, RECORDS = 1000, 200
ALL = CANARIES + RECORDS


def make_run(model_dir, **options):
  """4 updates on all records: one Gaussian mechanism, epsilon 4.38 at 1e-5."""
  options = {
    "steps": 4,
    "sizes": (ALL, ALL),
    "noise": 2.0,
    "clipping": "flat",
    "physical_batch_size": 300,
    "period": 0,
    **options,
  }
  return small_run.make_run(model_dir, **options)


def audited(model_dir, canaries=CANARIES, mode="white_box", **options):
  return audit.audit(
    make_run(model_dir, **options),
    audit.AuditSettings(canaries=canaries, mode=mode),
    small_run.records(RECORDS),
  )
