"""Going back: equal continuations replay, others fork and are priced."""

import json
import shutil

import jax
import numpy as np
import pytest
import small_run

from dptrain.privacy import keys as keys_lib
from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import report
from dptrain.training import lineage as lineage_lib
from dptrain.training import preparation


@pytest.fixture
def noise_keys(monkeypatch):
  """(branch, step) of each noise key drawn, with the key's bits."""
  drawn = {}
  key = keys_lib.SecretSeed.key

  def listening(self, purpose, branch, step=0):
    found = key(self, purpose, branch, step)
    if purpose == "noise":
      drawn[branch, step] = tuple(np.asarray(jax.random.key_data(found)))
    return found

  monkeypatch.setattr(keys_lib.SecretSeed, "key", listening)
  return drawn


def go_back(directory, step):
  """Deletes the checkpoints after `step`."""
  for path in (directory / "checkpoints").iterdir():
    if path.name.isdigit() and int(path.name) > step:
      shutil.rmtree(path)


def epsilon(directory):
  return report.make_report(ledger_lib.read(directory)).epsilon.value


def test_going_back_unchanged_replays_the_same(finished, copy, noise_keys):
  go_back(copy, 2)
  result = small_run.train(copy)
  assert {step for _, step in noise_keys} == {2, 3, 4, 5}
  small_run.assert_same(finished, copy)
  assert result.epsilon == epsilon(finished)


def test_going_back_to_the_start_replays_the_same(finished, copy):
  shutil.rmtree(copy / "checkpoints")
  small_run.train(copy)
  small_run.assert_same(finished, copy)


@pytest.mark.parametrize(
  "change",
  [
    {"rate": 2e-2},
    {"physical_batch_size": 8, "rate": 5e-3},
  ],
  ids=["learning rate", "learning rate and physical batch"],
)
def test_going_back_with_a_change_forks(finished, copy, noise_keys, change):
  straight = small_run.ledger_bytes(finished)
  go_back(copy, 2)
  result = small_run.train(copy, **change)
  root, fork = small_run.ledger_lines(copy, "branch")
  assert (fork["parent"], fork["fork_step"]) == (root["name"], 2)
  assert fork["lineage"] != root["lineage"]
  # Everything that any branch released is priced.
  assert small_run.ledger_bytes(copy).startswith(straight)
  assert len(small_run.ledger_lines(copy, "release")) == 6 + 4
  assert result.epsilon == epsilon(copy) > epsilon(finished)
  told = json.loads((copy / "privacy_report.json").read_text())
  assert [row["updates"] for row in told["branches"]] == [6, 4]
  # No noise of the first branch is drawn again.
  assert {branch for branch, _ in noise_keys} == {fork["name"]}
  fresh = set(noise_keys.values())
  assert len(fresh) == 4
  for step in range(6):
    keys_lib.fixed_seed(7).key("noise", root["name"], step)
    assert noise_keys[root["name"], step] not in fresh


def test_a_changed_physical_batch_forks_only_if_it_would_repeat(finished, copy):
  """It changes rounding alone: noise may not be repeated, but can go on."""
  go_back(copy, 4)
  shutil.rmtree(copy / "checkpoints" / "2")
  small_run.train(copy, physical_batch_size=8)
  assert len(small_run.ledger_lines(copy, "branch")) == 2


def test_a_changed_physical_batch_goes_on_where_nothing_is_repeated(tmp_path):
  target = 0.25
  first = small_run.train(tmp_path, target_epsilon=target, sizes=(20, 20))
  assert first.step == 6
  # The interrupted half of a run: cut the ledger and the checkpoints alike.
  lines = small_run.ledger_bytes(tmp_path).splitlines(keepends=True)
  (tmp_path / "privacy_ledger.jsonl").write_bytes(b"".join(lines[:-2]))
  go_back(tmp_path, 4)
  small_run.train(
    tmp_path, target_epsilon=target, sizes=(20, 20), physical_batch_size=8
  )
  assert len(small_run.ledger_lines(tmp_path, "branch")) == 1
  (line,) = small_run.ledger_lines(tmp_path, "environment")
  assert line["step"] == 4
  assert len(small_run.ledger_lines(tmp_path, "release")) == 6


def test_changed_code_forks(copy, monkeypatch):
  go_back(copy, 4)
  monkeypatch.setattr(lineage_lib, "_code_digest", lambda: "changed")
  small_run.train(copy)
  assert len(small_run.ledger_lines(copy, "branch")) == 2


# --- what counts as a change: digests, without training -----------------------


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
  """lineage(options, corpus options) of a fresh MODEL_DIR."""

  def digest(corpus=None, **options):
    directory = tmp_path_factory.mktemp("digest")
    run = small_run.make_run(directory, **options)
    with ledger_lib.opened(directory) as ledger:
      prepared = preparation.prepare(
        run, directory, ledger, small_run.records(**(corpus or {}))
      )
    return prepared.lineage, prepared.environment

  return digest


def test_what_decides_the_gradients_is_in_the_lineage(digests):
  start = digests()
  assert digests() == start
  changes = [
    {"rate": 2e-2},
    {"optimizer": "sgd"},
    {"width": 8},
    {"clipping": "flat"},
    {"noise": 5.0},
    {"corpus": {"seed": 1}},
    {"max_length": 32},
  ]
  found = [digests(**change)[0] for change in changes]
  assert len({start[0], *found}) == 1 + len(changes)


def test_what_only_rounds_is_in_the_environment(digests):
  start = digests()
  lineage, environment = digests(physical_batch_size=8)
  assert lineage == start[0]
  assert environment != start[1]
  for change in ({"period": 1}, {"log_period": 1}, {"keep": 1}):
    assert digests(**change) == start


def test_the_code_of_dptrain_is_in_the_lineage(tmp_path, monkeypatch):
  package = tmp_path / "dptrain"
  package.mkdir()
  (package / "__init__.py").write_text("a = 1\n")
  monkeypatch.setattr(lineage_lib.dptrain, "__file__", f"{package}/__init__.py")
  digest = lineage_lib._code_digest.__wrapped__
  first = digest()
  assert digest() == first
  (package / "__init__.py").write_text("a = 2\n")
  assert digest() != first


def test_another_model_or_optimizer_is_refused_and_nothing_is_moved(copy):
  from dptrain.training import checkpoints

  for change in ({"width": 8}, {"optimizer": "sgd"}, {"max_length": 32}):
    with pytest.raises(
      checkpoints.CheckpointError,
      match=r"update 6 .* of another model or optimizer: .* there and .* here",
    ):
      small_run.train(copy, **change)
  assert {p.name for p in (copy / "checkpoints").iterdir()} >= {"2", "4", "6"}
  assert not (copy / "damaged_checkpoints").exists()
  assert len(small_run.ledger_lines(copy, "branch")) == 1
