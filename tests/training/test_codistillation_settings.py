"""Settings of replicas that make no sense are refused by name and value."""

import pytest

from dptrain import configuration
from dptrain.training import codistillation


@pytest.mark.parametrize(
  ("setting", "value", "told"),
  [
    ("replicas", 0, "must be a whole number >= 1"),
    ("replica", 1, "must lie below Codistillation.replicas=1"),
    ("exchange", 3, "must be the name of a folder or the address of a bucket"),
    ("topology", "star", "use one of 'all_to_all', 'ring', 'pairs'"),
    ("period", 0, "must be a whole number >= 1"),
    ("period", "soon", "must be a whole number >= 1"),
    ("max_staleness", -1, "must be a whole number >= 0"),
    ("wait_seconds", -1.0, "finite and not negative; 0 never waits"),
    ("wait_seconds", float("inf"), "finite and not negative"),
    ("wait_seconds", float("nan"), "finite and not negative"),
    ("wait_seconds", "5", "must be a number"),
    ("wait_seconds", None, "must be a number"),
    ("wait_seconds", True, "must be a number"),
    ("keep", 1, "must be a whole number >= 2"),
    ("corpora", "shard", "use one of 'shards', 'disjoint', 'overlapping'"),
  ],
)
def test_refuses_settings_out_of_range(setting, value, told):
  with pytest.raises(ValueError) as caught:
    codistillation.Codistillation(**{setting: value})
  message = str(caught.value)
  assert message.startswith(f"Codistillation.{setting}={value!r} ")
  assert told in message


def test_pairs_want_an_even_number():
  with pytest.raises(ValueError, match=r"even number of replicas, not 3"):
    codistillation.Codistillation(replicas=3, topology="pairs")


@pytest.mark.parametrize("file", ["shards", "low_churn"])
def test_files_make_any_run_a_replica(file, tmp_path):
  for base in ("demo.gin", "models/ngrammer_tiny.gin"):
    run = configuration.training_run(
      ["demo.gin", base, f"codistill/{file}.gin"],
      [
        "MODEL_DIR = 'x'",
        "REPLICA = 1",
        "REPLICAS = 2",
        f"EXCHANGE = {str(tmp_path)!r}",
        f"KEY_FOLDER = {str(tmp_path)!r}",
      ],
    )
    assert run.learns
    assert run.codistillation.teachers == (0,)
    assert (run.shard.index, run.shard.count) == (1, 2)
