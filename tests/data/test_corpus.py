"""From seqio's registry to documents; the tests that import TensorFlow."""

import subprocess
import sys

import pytest

from dptrain.data.corpus import Document
from dptrain.data.corpus import read_documents
from dptrain.data.seqio_import import import_seqio
from dptrain.data.seqio_import import import_tensorflow
from dptrain.data.store import build_store
from dptrain.data.vocabulary import VocabularySettings
from dptrain.data.vocabulary import train_vocabulary
from dptrain.tasks import python_docs
from dptrain.tasks import raw_text
from dptrain.tasks import text_files


def add_features_task(name, features):
  """Registers a user's task of given tensors, without output features."""
  seqio, tensorflow = import_seqio(), import_tensorflow()
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files: tensorflow.data.Dataset.from_tensor_slices(
        features
      ),
      splits=["train"],
    ),
    output_features={},
  )
  return name


def test_text_files_end_to_end(tmp_path):
  words = {"a": "alpha beta", "b": "gamma delta", "c": "epsilon zeta"}
  for name, text in words.items():
    (tmp_path / f"{name}.txt").write_text(f"{text}\n" * 40)
  task = text_files.register(str(tmp_path / "*.txt"), passage_chars=100)
  assert text_files.register(str(tmp_path / "*.txt"), passage_chars=100) == task

  validation = list(read_documents(task, "validation"))
  every = list(read_documents(task, "train")) + validation
  assert validation
  assert len(set(every)) == len(every)
  for name, text in words.items():
    read = "".join(d.text for d in sorted(every) if d.source.startswith(name))
    assert read.count(text) == 40

  vocabulary = train_vocabulary(
    (each.text for each in every), VocabularySettings(size=22), tmp_path / "v"
  )
  store = build_store(every, vocabulary, 16)
  for row in store.tokens:
    letters = set(vocabulary.decode(row).replace(" ", ""))
    assert any(letters <= set(text) for text in words.values())


def test_python_docs_through_seqio():
  task = python_docs.register()
  assert task == python_docs.register() == "dptrain_python_docs"
  read = [each[:2] for each in read_documents(task, "validation")]
  assert read == python_docs.documents("validation")


def test_surrogates_survive_as_question_marks():
  name = raw_text.add_task("surrogates", lambda _: [("s", "a\ud800b")])
  assert list(read_documents(name, "train")) == [Document("s", "a?b")]


def test_what_documents_raises_reaches_the_reader():
  def documents(split):
    raise FileNotFoundError(f"no {split} today")

  name = raw_text.add_task("raises", documents)
  with pytest.raises(FileNotFoundError, match="no train today"):
    read_documents(name, "train")


def test_a_users_task_needs_only_text():
  name = add_features_task("only_text", {"text": ["one", "two"]})
  assert list(read_documents(name, "train")) == [
    Document("only_text:train:0", "one"),
    Document("only_text:train:1", "two"),
  ]


def test_a_users_task_may_tell_units():
  texts, units = ["one", "two", "three"], [b"ann", b"bob", b"\xff"]
  name = add_features_task("with_units", {"text": texts, "unit": units})
  found = [each.unit for each in read_documents(name, "train")]
  assert found == ["ann", "bob", "\udcff"]


def test_a_mixture_is_the_union_of_its_tasks():
  raw_text.add_task("mixed_a", lambda _: [("a", "a")] * 2)
  raw_text.add_task("mixed_b", lambda _: [("b", "b")] * 5, ["train"])
  seqio = import_seqio()
  seqio.MixtureRegistry.remove("mixed")
  seqio.MixtureRegistry.add("mixed", [("mixed_a", 9.0), ("mixed_b", 1.0)])
  assert [d.text for d in read_documents("mixed", "train")] == [*"aabbbbb"]
  assert [d.text for d in read_documents("mixed", "validation")] == [*"aa"]


def test_errors_name_the_way_out():
  raw_text.add_task("nothing_here", lambda _: [])
  add_features_task("tokens_only", {"ids": [[1], [2]]})
  add_features_task("list_of_texts", {"text": [["a", "b"]]})
  add_features_task("latin_1", {"text": [b"caf\xe9"]})
  with pytest.raises(ValueError, match=r"'nothing_her'.*near.*'nothing_here'"):
    read_documents("nothing_her", "train")
  with pytest.raises(ValueError, match="no split 'test'; it has 'train', 'val"):
    read_documents("nothing_here", "test")
  with pytest.raises(ValueError, match=r"no feature 'text'.*'ids'"):
    read_documents("tokens_only", "train")
  with pytest.raises(ValueError, match="must be one string, but is string"):
    read_documents("list_of_texts", "train")
  with pytest.raises(ValueError, match=r"'latin_1:train:0'.*UTF-8 at byte 3"):
    list(read_documents("latin_1", "train"))
  (replaced,) = read_documents("latin_1", "train", "replace")
  assert replaced.text == "caf\ufffd"
  with pytest.raises(ValueError, match="encoding_errors='ignore' must be"):
    read_documents("latin_1", "train", "ignore")
  with pytest.raises(ValueError, match="'nothing_here' holds no document"):
    list(read_documents("nothing_here", "train"))


def test_importing_is_light_and_the_first_read_quiet():
  code = """
import sys
import dptrain.data.corpus, dptrain.data.store, dptrain.data.masking
from dptrain.tasks import python_docs, text_files, raw_text
assert not {"tensorflow", "seqio", "sentencepiece"} & set(sys.modules)
task = raw_text.add_task("t", lambda _: [("s", "text")])
assert len(list(dptrain.data.corpus.read_documents(task, "train"))) == 1
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
