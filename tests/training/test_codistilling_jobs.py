"""Replicas as jobs of their own: killed, restarted, late, or left with rubbish.

Which weights were there when a job looked is a matter of chance; what it made
of those that it found is not.
"""

import json
import shutil

import pairs
import pytest
import small_run
import together

from dptrain.privacy import ledger as ledger_lib

STEPS = 8
OPTIONS = {
  "steps": STEPS,
  "period": 2,
  "keep": 50,
  "exchanging": {"period": 1, "keep": 50, "wait_seconds": 3.0},
  "distilling": {"burn_in": 1},
  "validation_split": None,
}


def start(folder, numbers, **options):
  return together.start(
    [
      [
        pairs.__file__,
        folder,
        json.dumps({**OPTIONS, **options, "replica": number}),
      ]
      for number in numbers
    ]
  )


def check_repeats(folder, number, **options):
  """A replica made again from its oldest checkpoint, without an exchange.

  Its inputs are its records, keys and the weights that it once found.
  """
  copy = folder / f"again_{number}"
  shutil.copytree(folder / f"r{number}", copy)
  oldest, *rest = sorted((copy / "checkpoints").glob("[0-9]*"), key=_number)
  assert int(oldest.name) == 2
  for path in rest:
    shutil.rmtree(path)
  exchanging = options.get("exchanging", OPTIONS["exchanging"])
  again = {
    **options,
    "model_dir": str(copy),
    "exchanging": {**exchanging, "exchange": str(folder / "empty")},
  }
  # As a job, too: another environment would fork.
  ((status, told),) = together.ended(start(folder, [number], **again))
  assert status == 0, told
  small_run.assert_same(folder / f"r{number}", copy)


def _number(path):
  return int(path.name)


def test_killed_with_rubbish_and_restarted(tmp_path):
  jobs = start(tmp_path, range(2))
  together.wait_for(
    jobs, lambda: together.num_releases(tmp_path / "r1") >= STEPS // 2
  )
  jobs[1].kill()
  newest = max((tmp_path / "exchange" / "replica_1").glob("*.npz"))
  newest.write_bytes(newest.read_bytes()[:-100])
  ((status, told),) = together.ended(jobs[:1])
  assert status == 0, told
  ((status, told),) = together.ended(start(tmp_path, [1]))
  assert status == 0, told
  for number in range(2):
    ledger = ledger_lib.read(tmp_path / f"r{number}")
    (branch,) = ledger.branches
    assert ledger.num_releases(branch.name) == STEPS
    lessons = pairs.lessons(tmp_path / f"r{number}")
    assert any(teachers for _, teachers in lessons)
    own, other = ledger.sources()
    assert own.num_releases == STEPS
    assert (
      other.run == ledger_lib.read(tmp_path / f"r{1 - number}").header["seed"]
    )
  check_repeats(tmp_path, 1)


@pytest.mark.long
def test_four_in_a_ring_of_which_one_is_late_and_one_dies(tmp_path):
  options = {
    "replicas": 4,
    "exchanging": {
      **OPTIONS["exchanging"],
      "topology": "ring",
      "max_staleness": 2,
      "wait_seconds": 2.0,
    },
    "steps": 2 * STEPS,
    "sizes": [6, 10],
  }
  jobs = start(tmp_path, range(3), **options)
  together.wait_for(
    jobs, lambda: together.num_releases(tmp_path / "r1") >= STEPS // 2
  )
  jobs[1].kill()
  jobs += start(tmp_path, [3], **options)
  for status, told in together.ended([jobs[0], *jobs[2:]]):
    assert status == 0, told
  for number in (0, 2, 3):
    ledger = ledger_lib.read(tmp_path / f"r{number}")
    (branch,) = ledger.branches
    assert ledger.num_releases(branch.name) == 2 * STEPS
  # Nobody teaches 2 once 1 is dead for so long.
  lessons = pairs.lessons(tmp_path / "r2")
  assert lessons[-1][1] == []
  assert max(at for _, found in lessons for _, at, _ in found) < 2 * STEPS - 2
  check_repeats(tmp_path, 2, **options)
