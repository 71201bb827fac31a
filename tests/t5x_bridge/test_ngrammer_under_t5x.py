"""An N-Grammer with private codebooks trains under t5x as in the thin loop."""

import numpy as np
import pytest

pytest.importorskip("t5x", reason="t5x is missing")

import small_launch
import small_run

from dptrain.models import ngrammer
from dptrain.training import loop


def test_codebooks_and_tables_are_those_of_the_thin_loop(tmp_path):
  settings = ngrammer.NGrammerSettings(
    num_clusters=6,
    table_size=23,
    ngram_dim=2,
    learning="private",
    select_rows=True,
  )
  options = {
    "bert": {"ngrammer": settings},
    "steps": 4,
    "optimizer": "sgd",
    "validation_split": None,
  }
  small_launch.train(tmp_path / "t5x", {"validation": False}, **options)
  step, state = small_launch.newest_state(tmp_path / "t5x")
  run = small_launch.make_run(tmp_path / "thin", **options)
  loop.train(run, small_launch.records(validation=False))
  thin_step, thin = small_run.newest_state(tmp_path / "thin")
  assert step == thin_step == 4
  found = {
    "t5x": small_launch.params(state),
    "thin": {
      path.removeprefix("/params/"): array
      for path, array in thin.items()
      if path.startswith("/params/")
    },
  }
  assert found["thin"].keys() == found["t5x"].keys()
  codebooks = [path for path in found["thin"] if "codebook" in path]
  assert codebooks
  for path in codebooks:
    assert np.any(found["thin"][path][:, -1])  # masses were learned
  for path, array in found["thin"].items():
    np.testing.assert_allclose(
      found["t5x"][path], array, rtol=0, atol=1e-6, err_msg=path
    )
