"""Twenty white-box audits of the true code: below the claim, and how far.

  PYTHONPATH=.:tests/training python tools/audit_calibration.py [--runs 20]

Each run trains the small model of tests/training/small_run.py under a secret
seed of its own, with canaries, in two settings whose claim is above 4 at delta
1e-5: every record in every update, and Poisson samples of half of them. Printed
are the claim, the range of the lower bounds, and in how many runs the bound was
below the claim and at least a third of it. docs/audit.md quotes the output. A
run takes some seconds.
"""

import argparse
from collections.abc import Iterator
import tempfile
import warnings

import numpy as np
import small_run

from dptrain.auditing import audit
from dptrain.auditing import verdict
from dptrain.training import host_memory

RECORDS = 200
# Name, canaries, sampling probability, noise multiplier, updates.
SETTINGS = (
  ("all records", 2000, 1.0, 2.0, 4),
  ("half of them", 4000, 0.5, 2.0, 11),
)


def verdicts(
  canaries: int, prob: float, noise: float, steps: int, runs: int
) -> Iterator[verdict.Verdict]:
  """Audits, one after another."""
  size = round(prob * (canaries + RECORDS))
  for _ in range(runs):
    with tempfile.TemporaryDirectory() as folder:
      run = small_run.make_run(
        folder,
        steps=steps,
        sizes=(size, size),
        noise=noise,
        clipping="flat",
        physical_batch_size=200,
        period=0,
        fixed_seed=None,
      )
      settings = audit.AuditSettings(canaries=canaries)
      yield audit.audit(run, settings, small_run.records(RECORDS))


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--runs", type=int, default=20)
  runs = parser.parse_args().runs
  warnings.simplefilter("ignore")
  host_memory.keep_freed_memory()
  print(
    "sampled       canaries  updates  claim  bound, f-DP: least median most "
    " below  a third"
  )
  for name, canaries, prob, noise, steps in SETTINGS:
    found = list(verdicts(canaries, prob, noise, steps, runs))
    claim = found[0].epsilon
    bounds = np.array([one.lower_bound for one in found])
    passed = sum(one.passed for one in found)
    print(
      f"{name:12}  {canaries:8}  {steps:7}  {claim:5.2f}"
      f"  {bounds.min():18.2f} {np.median(bounds):6.2f} {bounds.max():4.2f}"
      f"  {passed:2}/{runs}  {int((bounds >= claim / 3).sum()):2}/{runs}",
      flush=True,
    )


if __name__ == "__main__":
  main()
