"""Churn of two models: every figure, whose they are, and what is refused."""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest
import small_run

from dptrain import cli
from dptrain import configuration
from dptrain.data import corpus
from dptrain.data import masking
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.training import churn
from dptrain.training import evaluation
from dptrain.training import loop
from dptrain.training import objective as objective_lib
from dptrain.training import preparing

MODEL = small_run.make_run("unused").model


def weights(seed, scale=1.0):
  key = jax.random.key(seed, impl="threefry2x32")
  return jax.tree.map(lambda x: scale * np.asarray(x), MODEL.init(key))


def evaluator(size=64, **settings):
  objective = objective_lib.Objective(MODEL, masking.MaskingSettings())
  return evaluation.Evaluator(
    objective,
    small_run.store(30, seed=99),
    evaluation.EvaluationSettings(physical_batch_size=size, **settings),
  )


def measured(a, b, **options):
  return churn.measure(MODEL, evaluator(**options), a, b)


# --- Reference. --------------------------------------------------------------


def softmax(logits):
  below = np.exp(np.float64(logits) - logits.max())
  return below / below.sum()


def reference(a, b):
  """Token by token in float64, each figure from its definition."""
  tokens = []
  for masked in evaluator().masked_batches:
    both = [MODEL.logits(params, masked) for params in (a, b)]
    for row, slot in np.argwhere(masked["weights"] > 0):
      label = masked["labels"][row, slot]
      p, q = (softmax(np.asarray(x[row, slot])) for x in both)
      tokens.append(
        {
          "disagreement": p.argmax() != q.argmax(),
          "label_difference": abs(p[label] - q[label]),
          "total_variation": abs(p - q).sum() / 2,
          "accuracy_a": p.argmax() == label,
          "accuracy_b": q.argmax() == label,
          "loss_a": -np.log(p[label]),
          "loss_b": -np.log(q[label]),
          "one_right": (p.argmax() == label) != (q.argmax() == label),
          "bin": min(int(10 * (p.max() + q.max()) / 2), 9),
        }
      )
  return {name: np.float64([t[name] for t in tokens]) for name in tokens[0]}


@pytest.mark.parametrize(("scale", "bins"), [(1.0, 1), (3.0, 3), (9.0, 5)])
def test_figures_are_those_of_float64(scale, bins):
  a, b = weights(1, scale), weights(2, scale)
  found, expected = measured(a, b), reference(a, b)
  places = expected.pop("bin")
  for name, each in expected.items():
    told = getattr(found, name)
    assert told == pytest.approx(each.mean(), rel=1e-4, abs=1e-6), name
  assert found.num_tokens == len(places)
  assert len({*places}) >= bins
  for place, each in enumerate(found.bins):
    assert (each.low, each.high) == (place / 10, (place + 1) / 10)
    here = places == place
    assert each.num_tokens == here.sum()
    for name in ("disagreement", "label_difference"):
      told = getattr(each, name)
      if here.any():
        assert told == pytest.approx(expected[name][here].mean(), rel=1e-4)
      else:
        assert told is None


def test_figures_of_each_are_those_of_evaluation():
  a, b = weights(1, 3.0), weights(2, 3.0)
  held, found = evaluator(), measured(a, b)
  for params, accuracy, loss in (
    (a, found.accuracy_a, found.loss_a),
    (b, found.accuracy_b, found.loss_b),
  ):
    told = held.evaluate(params)
    assert accuracy == pytest.approx(told.accuracy)
    assert loss == pytest.approx(told.loss, rel=1e-5)
    assert found.num_tokens == told.num_tokens


def test_a_model_does_not_differ_from_itself():
  a = weights(1, 3.0)
  found = measured(a, a)
  assert found.num_tokens > 30
  assert found.disagreement == found.one_right == 0
  assert found.label_difference == found.total_variation == 0
  assert found.accuracy_a == found.accuracy_b
  assert found.loss_a == found.loss_b
  assert {each.disagreement for each in found.bins} <= {0, None}


def test_differences_are_symmetric():
  a, b = weights(1, 3.0), weights(2, 3.0)
  there, back = measured(a, b), measured(b, a)
  assert there.disagreement > 0.1
  turned = dataclasses.replace(
    back,
    accuracy_a=back.accuracy_b,
    accuracy_b=back.accuracy_a,
    loss_a=back.loss_b,
    loss_b=back.loss_a,
  )
  assert turned == there


def test_bins_add_up():
  found = measured(weights(1, 3.0), weights(2, 3.0))
  counts = np.array([each.num_tokens for each in found.bins])
  assert counts.sum() == found.num_tokens
  for name in ("disagreement", "label_difference"):
    means = np.array([getattr(each, name) or 0.0 for each in found.bins])
    total = (means * counts).sum() / counts.sum()
    assert total == pytest.approx(getattr(found, name))


def test_a_confidence_on_an_edge_is_in_the_bin_above():
  confidence = np.array([0.0, 0.0999, 0.1, 0.3, 0.7, 0.9, 0.95, 1.0])
  joined = {"confidence": confidence, "disagreement": confidence > 0.9}
  found = churn._bins(joined | {"label_difference": confidence})
  assert [each.num_tokens for each in found] == [2, 1, 0, 1, 0, 0, 0, 1, 0, 3]
  assert found[9].disagreement == pytest.approx(2 / 3)
  assert found[2].disagreement is found[2].label_difference is None


def test_batches_and_padding_change_nothing():
  a, b = weights(1, 3.0), weights(2, 3.0)
  one = dataclasses.asdict(measured(a, b, size=30))
  for size in (8, 64):
    other = dataclasses.asdict(measured(a, b, size=size))
    for name, value in one.items():
      if isinstance(value, float):
        assert other[name] == pytest.approx(value, rel=1e-5), name
      elif name != "bins":
        assert other[name] == value


def test_refuses_what_has_no_figures():
  broken = weights(2, 1e30)
  with pytest.raises(ValueError, match="B makes predictions that are not fin"):
    measured(weights(1), broken)
  held = evaluator()
  for masked in held.masked_batches:
    masked["weights"] = 0 * masked["weights"]
  with pytest.raises(ValueError, match="no token that is masked"):
    churn.measure(MODEL, held, weights(1), weights(2))


def test_text_and_json_tell_the_same():
  found = measured(weights(1, 3.0), weights(2, 3.0))
  text, told = found.as_text(), json.loads(found.as_json())
  assert max(map(len, text.splitlines())) <= 80
  plain = " ".join(text.split())
  assert "outside any privacy guarantee" in plain
  assert "outside any privacy guarantee" in told.pop("note")
  assert f"disagreement {100 * found.disagreement:.2f} % of" in plain
  assert f"accuracy A {100 * found.accuracy_a:.2f} %, B" in plain
  assert len([x for x in text.splitlines() if x.startswith("[")]) == 10
  told["bins"] = tuple(churn.Bin(**each) for each in told["bins"])
  assert churn.Churn(**told) == found


# --- MODEL_DIRs, files and data. ---------------------------------------------


def words(seed, number=400):
  """Made-up words of few letters, so that a small vocabulary suffices."""
  draw = random.Random(seed)
  return " ".join(
    "".join(draw.choices("abcdefgh", k=draw.randrange(2, 9)))
    for _ in range(number)
  )


TEXT = {
  "train": [corpus.Document(f"d{i}", words(i)) for i in range(4)],
  "validation": [corpus.Document("v", words("v", 200))],
}
OTHER = {
  "train": [corpus.Document(f"d{i}", words(9 + i)) for i in range(4)],
  "validation": [corpus.Document("v", words("w", 200))],
}


def run_of(directory="not used", path=None, **options):
  settings = vocabulary_lib.VocabularySettings(
    size=small_run.VOCABULARY, path=path
  )
  return small_run.make_run(directory, vocabulary=settings, **options)


@pytest.fixture
def read_task(monkeypatch):
  def read(task, split, *_):
    assert split in TEXT, f"{task} has no split {split}"
    return iter(TEXT[split])

  monkeypatch.setattr(corpus, "read_documents", read)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Two trained MODEL_DIRs, a prepared folder of their data, and another."""
  place = tmp_path_factory.mktemp("churn")
  options = {"processes": 1, "progress": False}
  with pytest.MonkeyPatch.context() as patch:
    for name, text in (("other", OTHER), ("data", TEXT)):
      patch.setattr(
        corpus, "read_documents", lambda _, split, *__, t=text: iter(t[split])
      )
      preparing.prepare(run_of(), str(place / name), **options)
  data = str(place / "data")
  for name, seed, corrected in (("a", 1, data), ("b", 2, data)):
    loop.train(
      run_of(
        place / name,
        fixed_seed=seed,
        prepared=corrected,
        steps=2,
        rate=1.0,
        period=1,
      )
    )
  return place


def params_in(directory):
  _, state = small_run.newest_state(directory)
  return {
    name.removeprefix("/params/"): array
    for name, array in state.items()
    if name.startswith("/params/")
  }


def as_npz(directory, path):
  np.savez(path, **params_in(directory))
  return str(path)


def figures(found):
  """Without what names the models and the data."""
  return dataclasses.replace(found, a="", b="", data="")


def test_compares_the_newest_checkpoints_of_two_model_dirs(made, read_task):
  a, b, data = (str(made / name) for name in ("a", "b", "data"))
  found = churn.compare(run_of(), a, b, data)
  assert (found.a, found.b) == (a, b)
  assert found.data == f"split 'validation' of {data}"
  objective = objective_lib.Objective(MODEL, masking.MaskingSettings())
  store = preparing.prepared_lib.PreparedStore(data, "validation")
  held = evaluation.Evaluator(objective, store, evaluation.EvaluationSettings())
  expected = churn.measure(MODEL, held, params_in(a), params_in(b))
  assert figures(found) == figures(expected)
  assert found.num_tokens > 30
  assert found.total_variation > 1e-3
  # The task's own records are the same ones, and so are those of the run.
  by_task = churn.compare(run_of(), a, b)
  assert by_task.data == "split 'validation' of not read"
  by_run = churn.compare(run_of(prepared=data), a, b)
  assert figures(by_task) == figures(by_run) == figures(found)


def test_compares_files_splits_and_a_model_with_itself(
  made, tmp_path, read_task
):
  a, b, data = (str(made / name) for name in ("a", "b", "data"))
  files = [as_npz(x, tmp_path / f"{i}.npz") for i, x in enumerate((a, b))]
  expected = figures(churn.compare(run_of(), a, b, data))
  vocabulary = str(made / "a" / "vocabulary.model")
  for found in (
    churn.compare(run_of(), a, files[1]),
    churn.compare(run_of(), *files, data),
    churn.compare(run_of(path=vocabulary), *files),
  ):
    assert figures(found) == expected
  assert churn.compare(run_of(), a, a).total_variation == 0
  train = churn.compare(run_of(), a, b, data, "train")
  assert train.num_tokens > expected.num_tokens
  settings = evaluation.EvaluationSettings(max_records=3)
  few = churn.compare(run_of(evaluation=settings), a, b)
  assert few.num_tokens < expected.num_tokens
  assert few.data.endswith("of which at most 3 records")


def test_the_command_leaves_everything_as_it_was(made, monkeypatch, capsys):
  before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
  asked = []

  def training_run(files, bindings, search_paths):
    asked.append((files, bindings, search_paths))
    return run_of()

  monkeypatch.setattr(configuration, "training_run", training_run)
  argv = ["churn", str(made / "a"), str(made / "b"), "--gin_file=run.gin"]
  argv.append(f"--data={made / 'data'}")
  assert cli.main(argv) == 0
  text = capsys.readouterr().out
  assert cli.main([*argv, "--format=json"]) == 0
  told = json.loads(capsys.readouterr().out)
  assert f"masked tokens      {told['num_tokens']:,}" in text
  assert asked[0] == (["run.gin"], ["MODEL_DIR = 'not used'"], ".")
  assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
  missing = [*argv[:2], str(made / "none"), *argv[3:]]
  assert cli.main(missing) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"dptrain: error: B={str(made / 'none')!r} is neither")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"b": "none"}, "B='.*none' is neither an .npz file nor a MODEL_DIR"),
    (
      {"a": "data"},
      "A='.*data' is neither an .npz file nor a MODEL_DIR with a",
    ),
    ({"a": "gone.npz"}, "A='.*gone.npz' cannot be read as .npz"),
    ({"b": "renamed"}, "B='.*renamed' has another vocabulary than A='.*a'"),
    ({"data": "other"}, "--data='.*other' has another vocabulary than A="),
    ({"data": "none"}, "none holds no prepared corpus"),
    ({"a": "0.npz", "b": "0.npz"}, "set VocabularySettings.path to theirs"),
    ({"b": "narrow.npz"}, "B='.*narrow.npz' is of another model: mix is"),
    ({"b": "nan.npz"}, "B='.*nan.npz' holds numbers that are not finite"),
    ({"split": "test", "data": "data"}, "holds no split 'test'"),
    ({"validation_split": None}, "validation_split=None: name .* by --split"),
    ({"prepared": "other"}, "TrainingRun.prepared='.*' has another vocabulary"),
    (
      {"path": "other/vocabulary.model"},
      "VocabularySettings.path='.*' has another vocabulary than A=",
    ),
    ({"vocab_size": 60}, r"vocab_size=50 but Bert.vocab_size=60"),
    ({"length": 8, "data": "data"}, "of 16 tokens, but sequence_length=8: set"),
  ],
)
def test_refuses_bad_input(made, tmp_path, read_task, change, message):
  given = params_in(made / "a")
  np.savez(tmp_path / "0.npz", **given)
  np.savez(tmp_path / "narrow.npz", **given | {"mix": given["mix"][:3]})
  np.savez(tmp_path / "nan.npz", **given | {"mix": np.nan * given["mix"]})
  for name in ("a", "b", "data", "other"):
    (tmp_path / name).symlink_to(made / name)
  shutil.copytree(made / "b", tmp_path / "renamed")
  shutil.copy(made / "other" / "vocabulary.model", tmp_path / "renamed")
  change = {"a": "a", "b": "b", "data": None, "split": None} | change
  if change["a"] == "data":
    (tmp_path / "data").unlink()
    (tmp_path / "data").mkdir()
  a, b = (str(tmp_path / change.pop(name)) for name in "ab")
  data, split = change.pop("data"), change.pop("split")
  length = change.pop("length", small_run.LENGTH)
  for name in ("prepared", "path"):
    if name in change:
      change[name] = str(tmp_path / change[name])
  run = dataclasses.replace(run_of(**change), sequence_length=length)
  with pytest.raises(ValueError, match=message):
    churn.compare(run, a, b, data and str(tmp_path / data), split)


def test_damaged_data_are_not_compared_on(made, tmp_path):
  data = str(shutil.copytree(made / "data", tmp_path / "data"))
  files = [as_npz(made / "a", tmp_path / "a.npz")] * 2
  assert churn.compare(run_of(), *files, data).num_tokens
  (shard,) = (tmp_path / "data").glob("validation*tokens*.npy")
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  with pytest.raises(ValueError, match="the prepared corpus is damaged"):
    churn.compare(run_of(), *files, data)
  shard.write_bytes(whole)
  shutil.copy(made / "other" / "vocabulary.model", data)
  with pytest.raises(ValueError, match="is not the vocabulary that the rec"):
    churn.compare(run_of(), *files, data)
