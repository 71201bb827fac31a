"""Training from a prepared store: the same run, and what is refused."""

import dataclasses
import random
import shutil

import numpy as np
import pytest
import small_run

from dptrain.data import corpus
from dptrain.data import prepared
from dptrain.data import private_vocabulary
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.privacy import draws
from dptrain.privacy import keys
from dptrain.training import examples
from dptrain.training import feeding
from dptrain.training import loop
from dptrain.training import preparing
from dptrain.training import records as records_lib


def text(seed, num_words=400):
  """Made-up words of few letters, so that a small vocabulary suffices."""
  draw = random.Random(seed)
  return " ".join(
    "".join(draw.choices("abcdefgh", k=draw.randrange(2, 9)))
    for _ in range(num_words)
  )


def run_of(directory, size=small_run.VOCABULARY, path=None, **options):
  settings = vocabulary_lib.VocabularySettings(size=size, path=path)
  return small_run.make_run(directory, vocabulary=settings, **options)


@pytest.fixture
def unread(monkeypatch):
  """Refuses to read any task."""

  def read(*_):
    raise AssertionError("the task was read")

  return lambda: monkeypatch.setattr(corpus, "read_documents", read)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A prepared store of what the task holds."""
  found = {
    "train": [corpus.Document(f"d{i}", text(i)) for i in range(5)],
    "validation": [corpus.Document("v", text("v", 60))],
  }
  monkeypatch.setattr(
    corpus, "read_documents", lambda _, split, *__: found[split]
  )
  place = tmp_path / "prepared"
  prepare(run_of(tmp_path), place)
  return place


def prepare(run, place, **options):
  options = {"processes": 1, "progress": False, "shard_chars": 900, **options}
  return preparing.prepare(run, str(place), **options)


def read(folder, directory, started=False, **options):
  run = run_of(directory, prepared=str(folder), **options)
  return records_lib.read_records(run, directory, started)


def test_trains_as_from_the_task_and_never_reads_it(folder, tmp_path, unread):
  options = {"sizes": (20, 40), "steps": 4}
  loop.train(run_of(tmp_path / "task", **options))
  unread()
  options["prepared"] = str(folder)
  loop.train(run_of(tmp_path / "store", **options))
  small_run.assert_same(tmp_path / "task", tmp_path / "store")
  same = "vocabulary.model"
  assert (tmp_path / "task" / same).read_bytes() == (
    tmp_path / "store" / same
  ).read_bytes()


def test_a_run_goes_over_to_a_store(folder, tmp_path, unread):
  options = {"sizes": (20, 40), "steps": 4}
  loop.train(run_of(tmp_path / "whole", **options))
  shutil.copytree(tmp_path / "whole", tmp_path / "over")
  small_run.cut(tmp_path / "over", 2)
  unread()
  loop.train(run_of(tmp_path / "over", prepared=str(folder), **options))
  small_run.assert_same(tmp_path / "whole", tmp_path / "over")


@pytest.mark.parametrize("sampling", ["units", "records"])
def test_units_are_those_of_the_task(folder, tmp_path, sampling):
  run = run_of(tmp_path)
  privacy = dataclasses.replace(
    run.privacy, unit="document", records_per_unit=9, unit_sampling=sampling
  )
  run = dataclasses.replace(run, privacy=privacy)
  seed = keys.fixed_seed(1)
  found = []
  for prepared_in in (None, str(folder)):
    given = dataclasses.replace(run, prepared=prepared_in)
    read_in = records_lib.read_records(given, tmp_path, False)
    found.append(examples.of_run(given, read_in.train, None, seed))
  one, other = found
  assert one.num_examples == other.num_examples
  assert one.content_digest() == other.content_digest()
  every = np.arange(one.num_examples)
  np.testing.assert_array_equal(one.gather(every), other.gather(every))


def test_the_price_of_a_private_vocabulary_comes_along(folder, tmp_path):
  given, other = tmp_path / "given.model", tmp_path / "other"
  shutil.copyfile(folder / "vocabulary.model", given)
  release = private_vocabulary.VocabularyRelease(
    words="w",
    unit="document",
    words_per_unit=8,
    noise_multiplier=1.0,
    failure_prob=1e-9,
    threshold=5.0,
    words_kept=30,
    lowercase=False,
    fixed_seed=False,
    fingerprint=vocabulary_lib.load_vocabulary(given).fingerprint,
  )
  private_vocabulary.release_path(given).write_text(release.as_json())
  prepare(run_of(tmp_path, path=str(given)), other)
  model = tmp_path / "model"
  for path in (given, other / "vocabulary.model"):
    model.mkdir()
    found = read(other, model, path=str(path))
    assert found.vocabulary_release == release
    shutil.rmtree(model)
  private_vocabulary.release_path(other / "vocabulary.model").unlink()
  model.mkdir()
  assert read(other, model, path=str(given)).vocabulary_release == release


def test_a_vocabulary_is_learned_once(folder, tmp_path, monkeypatch):
  def learned(*_):
    raise AssertionError("learned again")

  monkeypatch.setattr(vocabulary_lib, "train_vocabulary", learned)
  manifest = prepare(run_of(tmp_path), folder)
  assert manifest["vocabulary_given"] is False
  assert list(manifest["splits"]) == ["train", "validation"]
  with pytest.raises(AssertionError, match="learned again"):
    prepare(run_of(tmp_path), tmp_path / "other")


def test_other_lengths_sizes_and_vocabularies(folder, tmp_path):
  assert read(folder, tmp_path).vocabulary_size == small_run.VOCABULARY
  with pytest.raises(ValueError, match=r"size=45, but .* of 50 tokens"):
    read(folder, tmp_path, size=45)
  given = tmp_path / "given.model"
  settings = vocabulary_lib.VocabularySettings(size=50)
  vocabulary_lib.train_vocabulary([text(99)], settings, given)
  with pytest.raises(
    ValueError, match=r"with another vocabulary than .*given\.model"
  ):
    read(folder, tmp_path, path=str(given))
  given.rename(tmp_path / "vocabulary.model")
  with pytest.raises(ValueError, match=r"not the vocabulary that .* started"):
    read(folder, tmp_path, started=True)
  longer = tmp_path / "longer"
  long = small_run.make_run(tmp_path, max_length=32)
  long = type(long)(**{**vars(run_of(tmp_path)), "model": long.model})
  long = type(long)(**{**vars(long), "sequence_length": 20})
  prepare(long, longer)
  with pytest.raises(ValueError, match=r"of 20 tokens, but sequence_length=16"):
    read(longer, tmp_path)
  (folder / "vocabulary.model").write_bytes(
    (tmp_path / "vocabulary.model").read_bytes()
  )
  with pytest.raises(ValueError, match=r"is not the vocabulary that the rec"):
    read(folder, tmp_path)


def test_a_vocabulary_of_the_private_text_is_not_public(folder, tmp_path):
  settings = vocabulary_lib.VocabularySettings(
    path=str(folder / "vocabulary.model"), declared_public=True
  )
  run = small_run.make_run(tmp_path, vocabulary=settings, prepared=str(folder))
  with pytest.raises(ValueError, match="was learned from its training split"):
    records_lib.read_records(run, tmp_path, started=False)


def test_a_given_vocabulary_is_named_again(folder, tmp_path):
  given, other = tmp_path / "given.model", tmp_path / "other"
  shutil.copyfile(folder / "vocabulary.model", given)
  prepare(run_of(tmp_path, path=str(given)), other)
  with pytest.raises(ValueError, match=r"set VocabularySettings\.path to it"):
    read(other, tmp_path)
  found = read(other, tmp_path, path=str(given))
  np.testing.assert_array_equal(
    found.train.tokens, prepared.PreparedStore(folder, "train").tokens
  )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_flipped_byte_is_named_before_anything_is_spent(
  folder, tmp_path, split
):
  path = folder / f"{split}-000000.tokens.npy"
  data = bytearray(path.read_bytes())
  data[-3] ^= 1
  path.write_bytes(data)
  with pytest.raises(ValueError, match=rf"{path.name} does not hold what was"):
    loop.train(run_of(tmp_path / "model", prepared=str(folder)))
  assert not (tmp_path / "model" / "checkpoints").exists()
  path.unlink()
  with pytest.raises(ValueError, match=f"{path.name} is missing"):
    loop.train(run_of(tmp_path / "model", prepared=str(folder)))


def test_no_store(tmp_path):
  with pytest.raises(ValueError, match=r"no prepared corpus.*dptrain prepare"):
    read(tmp_path / "nothing", tmp_path)


def test_the_feed_gives_each_update_its_own_records_in_order():
  store = small_run.store(50)
  samples = [np.arange(0, 50, 2), np.zeros(0, int), np.arange(50)]

  def draw(step):
    return draws.Whole(samples[step])

  feed = feeding.Feed(draw, store, 8, feeding.Shards(), range(3))
  try:
    for step, sample in enumerate(samples):
      batches = list(feed.update(step))
      assert len(batches) == -(-len(sample) // 8)
      ids = [b["example_ids"][~b["is_padding"]] for b in batches]
      np.testing.assert_array_equal(np.concatenate([[], *ids]), sample)
    with pytest.raises(RuntimeError, match="not at update 3"):
      next(feed.update(3))
  finally:
    feed.close()


def test_what_fails_in_the_feed_ends_the_run_and_the_same_command_goes_on(
  tmp_path, monkeypatch
):
  gather = type(small_run.store()).gather

  def failing(self, indices):
    if len(calls) == 6:
      raise OSError("the disk is gone")
    calls.append(len(indices))
    return gather(self, indices)

  calls = []
  small_run.train(tmp_path / "whole")
  corpus = {"validation": False}
  small_run.train(tmp_path / "plain", corpus)
  monkeypatch.setattr(type(small_run.store()), "gather", failing)
  with pytest.raises(OSError, match="the disk is gone"):
    small_run.train(tmp_path / "failed", corpus)
  monkeypatch.undo()
  small_run.train(tmp_path / "failed", corpus)
  step, state = small_run.newest_state(tmp_path / "plain")
  again, other = small_run.newest_state(tmp_path / "failed")
  assert step == again
  for name, array in state.items():
    np.testing.assert_array_equal(array, other[name])
