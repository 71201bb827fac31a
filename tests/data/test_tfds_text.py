"""TFDS datasets on disk: small copies of wikipedia's and c4's format."""

import re
import sys

import pytest
import tfds_writer
import units_of_tasks

from dptrain.data import corpus
from dptrain.data import seqio_import
from dptrain.tasks import raw_text
from dptrain.tasks import tfds_text
import gin

WIKIPEDIA = "wikipedia/20230601.en:1.0.0"
C4 = "c4/en:3.1.0"


@pytest.fixture(autouse=True)
def _clean_gin():
  yield
  gin.clear_config()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
  """Whoever asks for an address fails the test."""

  def asked(event, arguments):
    if event in ("socket.getaddrinfo", "socket.connect") and listening:
      pytest.fail(f"{event}: {arguments}")

  listening = [True]
  sys.addaudithook(asked)
  yield
  listening.clear()


def page(n, sites=12):
  return {
    "text": units_of_tasks.words(n, 30),
    "url": f"https://site{n % sites}.org/{n}",
    "timestamp": "2019-04-25T12:57:54Z",
    "content-type": "text/html",
    "content-length": "7",
  }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Both datasets; never to be changed."""
  folder = tmp_path_factory.mktemp("tfds")
  articles = [
    {"title": f"Title {n}", "text": units_of_tasks.words(n, 30)}
    for n in range(120)
  ]
  tfds_writer.write(folder, WIKIPEDIA, {"train": articles}, None, 50)
  tfds_writer.write(
    folder,
    C4,
    {
      "train": [page(n) for n in range(60)],
      "validation": [page(n) for n in range(60, 70)],
    },
  )
  return folder


def read(task, split):
  return list(corpus.read_documents(task, split))


def test_the_copies_are_what_tfds_reads(data_dir):
  seqio_import.import_seqio()
  import tensorflow_datasets as tfds

  dataset = tfds.load(
    WIKIPEDIA, data_dir=str(data_dir), split="train", download=False
  )
  titles = {each["title"].decode() for each in dataset.as_numpy_iterator()}
  assert titles == {f"Title {n}" for n in range(120)}


def test_wikipedia_is_divided_by_its_titles(data_dir):
  arguments = {
    "document_feature": "title",
    "split_by": "document",
    "validation_fraction": 0.25,
  }
  task = tfds_text.register(WIKIPEDIA, data_dir=str(data_dir), **arguments)
  assert re.fullmatch(r"dptrain_tfds_[0-9a-f]{10}", task)
  # The newest version is found.
  assert task == tfds_text.register(
    WIKIPEDIA.partition(":")[0], data_dir=str(data_dir), **arguments
  )
  train, validation = read(task, "train"), read(task, "validation")
  assert len(train) + len(validation) == 120
  assert {each.document for each in validation} == {
    title
    for title in (f"Title {n}" for n in range(120))
    if raw_text.stable_fraction(title) <= 0.25
  }
  for each in train + validation:
    number = int(each.document.split()[1])
    assert each.text == units_of_tasks.words(number, 30)
    assert each.unit == ""
  assert len({each.source for each in train + validation}) == 120
  assert read(task, "train") == train


def test_c4_has_its_own_validation(data_dir):
  task = tfds_text.register(
    "c4/en", data_dir=str(data_dir), document_feature="url"
  )
  numbers = {
    split: [int(each.document.rpartition("/")[2]) for each in read(task, split)]
    for split in ("train", "validation")
  }
  assert sorted(numbers["train"]) == list(range(60))
  assert sorted(numbers["validation"]) == list(range(60, 70))


def test_without_a_feature_each_example_is_a_document(data_dir):
  for fraction, count in ((None, 60), (0.0, 60)):
    task = tfds_text.register(
      "c4/en", data_dir=str(data_dir), validation_fraction=fraction
    )
    found = read(task, "train")
    assert {each.document for each in found} == {
      f"c4/en/3.1.0:train:{n}" for n in range(count)
    }
  with pytest.raises(ValueError, match="no split 'validation'"):
    read(task, "validation")


def test_sites_are_users(data_dir):
  task = tfds_text.register(
    "c4/en",
    data_dir=str(data_dir),
    unit_feature="url",
    unit_pattern="https?://([^/]+)",
    split_by="user",
    validation_fraction=0.4,
  )
  train, validation = (
    {each.unit for each in read(task, split)}
    for split in ("train", "validation")
  )
  assert train
  assert validation
  assert not train & validation
  assert train | validation == {f"site{n}.org" for n in range(12)}


def test_users_that_are_missing_stop_the_reading(data_dir):
  arguments = {"data_dir": str(data_dir), "unit_feature": "url"}
  task = tfds_text.register("c4/en", unit_pattern="(site1)", **arguments)
  with pytest.raises(
    ValueError, match=r"beyond 0 document\(s\): unit_pattern=.* finds no user"
  ) as caught:
    read(task, "train")
  assert "Traceback" not in str(caught.value)


def test_keys_that_are_numbers_or_empty(tmp_path):
  seqio_import.import_seqio()
  tensorflow = seqio_import.import_tensorflow()
  import tensorflow_datasets as tfds

  examples = [
    {"text": f"t{n}", "who": n % 3, "name": "" if n < 2 else "x"}
    for n in range(6)
  ]
  features = {
    "text": tfds.features.Text(),
    "who": tensorflow.int64,
    "name": tfds.features.Text(),
  }
  tfds_writer.write(tmp_path, "mine/a:1.0.0", {"train": examples}, features)
  arguments = {"data_dir": str(tmp_path), "validation_fraction": 0.0}
  task = tfds_text.register(
    "mine/a", unit_feature="who", document_feature="name", **arguments
  )
  found = read(task, "train")
  assert [each.unit for each in found] == [*"012012"]
  # An empty key is nobody's: the two are documents of their own.
  assert len({each.document for each in found}) == 3
  task = tfds_text.register("mine/a", unit_feature="name", **arguments)
  with pytest.raises(ValueError, match=r"'name' of mine/a/1.* is empty"):
    read(task, "train")
  with pytest.raises(ValueError, match=r"feature 'who' of TFDS .* not one str"):
    tfds_text.register("mine/a", text_feature="who", **arguments)


@pytest.mark.parametrize(
  ("name", "arguments", "message"),
  [
    ("c4/de", {}, r"no TFDS dataset 'c4/de' in data_dir=.*'c4/en:3\.1\.0', 'w"),
    ("c4/en:2.0.0", {}, r"downloads nothing: .*tfds build c4/en --data_dir="),
    ("no such name", {}, "no TFDS dataset 'no such name' in data_dir"),
    ("lm1b", {}, "no TFDS dataset 'lm1b' in data_dir"),
    ("huggingface:c4", {}, "no TFDS dataset 'huggingface:c4' in data_dir"),
    (WIKIPEDIA, {}, r"no split 'validation' \(it has 'train'\).*VALIDATION_FR"),
    (
      WIKIPEDIA,
      {"train_split": "all"},
      "no split 'all' .*register.train_split",
    ),
    (
      "c4/en",
      {"text_feature": "body"},
      r"no feature 'body' \(it has '.*TEXT_F",
    ),
    ("c4/en", {"unit_feature": "who"}, r"no feature 'who' .*--gin\.UNIT_FEAT"),
    ("c4/en", {"split_by": "user"}, "needs unit_feature, the feature that na"),
    (
      "c4/en",
      {"split_by": "x"},
      "split_by='x' must be 'record', 'document' or 'user'",
    ),
    ("c4/en", {"unit_pattern": "(x)"}, r"unit_pattern='\(x\)' needs unit_fe"),
    ("c4/en", {"validation_fraction": 1.0}, "validation_fraction=1.0 must be"),
  ],
)
def test_what_is_wrong_is_named(data_dir, name, arguments, message):
  with pytest.raises(ValueError, match=message) as caught:
    tfds_text.register(name, data_dir=str(data_dir), **arguments)
  assert "\n" not in str(caught.value)


def test_an_empty_folder_and_a_missing_file(tmp_path):
  with pytest.raises(ValueError, match=r"data_dir=.* \(it holds none\)"):
    tfds_text.register("c4/en", data_dir=str(tmp_path / "nowhere"))
  folder = tfds_writer.write(
    tmp_path, C4, {"train": [page(0)], "validation": [page(1)]}
  )
  (file,) = folder.glob("*train*")
  task = tfds_text.register("c4/en", data_dir=str(tmp_path))
  data = bytearray(file.read_bytes())
  data[20] ^= 1
  file.write_bytes(data)
  with pytest.raises(ValueError, match=r"cannot be read beyond 0 .*corrupted"):
    read(task, "train")
  file.unlink()
  with pytest.raises(FileNotFoundError, match=r"train.* is missing, a file of"):
    tfds_text.register("c4/en", data_dir=str(tmp_path))


def test_prepared_by_document_and_by_user(data_dir, tmp_path):
  common = [f"--gin.TFDS_DATA_DIR={str(data_dir)!r}"]
  articles = [
    *common,
    "--gin.UNIT=document",
    "--gin.RECORDS_PER_UNIT=4",
    "--gin.VALIDATION_FRACTION=0.2",
  ]
  store = tmp_path / "wikipedia"
  counted = units_of_tasks.prepare(store, "tfds_wikipedia.gin", articles)
  assert counted["train"]["documents"] + counted["validation"]["documents"] == (
    120
  )
  examples = units_of_tasks.num_examples(store, "tfds_wikipedia.gin", articles)
  assert examples == counted["train"]["documents"]

  sites = [
    *common,
    "--gin.UNIT=user",
    "--gin.SPLIT_BY=user",
    "--gin.RECORDS_PER_UNIT=4",
    "--gin.UNIT_FEATURE=url",
    "--gin.UNIT_PATTERN='https?://([^/]+)'",
    "--gin.VALIDATION_FRACTION=0.4",
  ]
  store = tmp_path / "c4"
  counted = units_of_tasks.prepare(store, "tfds_c4.gin", sites)
  assert counted["train"]["users"] + counted["validation"]["users"] == 12
  examples = units_of_tasks.num_examples(store, "tfds_c4.gin", sites)
  assert examples == counted["train"]["users"]
