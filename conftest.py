"""The whole test run: what is left out without t5x, and that it is said."""

import importlib.util
import pathlib
import re

import pytest

HERE = pathlib.Path(__file__).parent
T5X_TESTS = HERE / "tests" / "t5x_bridge"
T5X_IS_MISSING = importlib.util.find_spec("t5x") is None


def pytest_ignore_collect(collection_path):
  """Without t5x, what cannot even be imported has no doctests either."""
  if not T5X_IS_MISSING:
    return None
  if collection_path.parent == T5X_TESTS:
    return not collection_path.name.startswith(("test_", "conftest")) or None
  return HERE / "dptrain" / "t5x_bridge" in collection_path.parents or None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
  """Tells at last how many tests could not run because t5x is missing."""
  yield
  places = {
    pathlib.Path(report.longrepr[0]).resolve()
    for report in terminalreporter.stats.get("skipped", [])
    if "t5x is missing" in str(report.longrepr)
  }
  files = sorted(path for path in places if path.parent == T5X_TESTS)
  tests = sum(
    len(re.findall(r"^def test_", path.read_text(), re.MULTILINE))
    for path in files
  )
  if tests:
    terminalreporter.write_line(
      f"{tests} tests in {len(files)} files were skipped because t5x is"
      " missing: docs/t5x.md says how to install it.",
      yellow=True,
    )
