"""The embedded corpus: there, in English, and cleanly divided."""

import textwrap

import pytest

from dptrain.tasks import python_docs


@pytest.fixture(scope="module")
def splits():
  return {
    split: python_docs.documents(split) for split in ("train", "validation")
  }


def test_size_and_division(splits):
  chars = {
    split: sum(len(text) for _, text in pairs)
    for split, pairs in splits.items()
  }
  assert 1_500_000 < sum(chars.values()) < 4_000_000
  assert 0.01 < chars["validation"] / chars["train"] < 0.15


def test_no_document_is_in_both_or_twice(splits):
  pairs = splits["train"] + splits["validation"]
  assert len({source for source, _ in pairs}) == len(pairs)
  assert len({text for _, text in pairs}) == len(pairs)


def test_only_python_itself(splits):
  sources = {source for pairs in splits.values() for source, _ in pairs}
  assert {"argparse", "json", "pydoc_data.topics:with"} <= sources
  for source in sources:
    assert not {"test", "tests", "site-packages", "numpy"} & set(
      source.split(".")
    )


def test_order_does_not_depend_on_the_run(splits):
  python_docs._all_documents.cache_clear()
  for split, pairs in splits.items():
    assert python_docs.documents(split) == pairs


def test_docstrings_of_a_module(tmp_path):
  (tmp_path / "lib").mkdir()
  (tmp_path / "lib" / "__init__.py").write_text('"""A package."""')
  (tmp_path / "lib" / "broken.py").write_text("def (:")
  (tmp_path / "lib" / "module.py").write_text(
    textwrap.dedent(
      '''
      """A module."""
      raise SystemExit("never imported")
      class A:
        """A class.

          Indented.
        Not.
        """
        async def f(self):
          """Twice."""
        def g(self):
          """Twice."""
      '''
    )
  )
  (tmp_path / "tests").mkdir()
  (tmp_path / "tests" / "module.py").write_text('"""A test."""')
  assert list(python_docs._modules(tmp_path, ())) == [
    ("lib", "A package."),
    ("lib.module", "A module.\n\nA class.\n\n  Indented.\nNot.\n\nTwice."),
  ]


def test_a_python_without_sources(tmp_path, monkeypatch):
  monkeypatch.setattr(
    python_docs.sysconfig, "get_path", lambda _: str(tmp_path / "absent")
  )
  python_docs._all_documents.cache_clear()
  with pytest.raises(FileNotFoundError, match="absent"):
    python_docs.documents("train")
