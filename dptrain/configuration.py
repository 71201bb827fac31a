"""The edge where gin meets dptrain: files and flags in, a `TrainingRun` out.

Gin files name dptrain's classes by `from __gin__ import dynamic_registration`,
as t5x's do; nothing inside dptrain is decorated or reads gin.
"""

from collections.abc import Iterator, Sequence
import contextlib
import logging
import pathlib
import re

import dptrain
from dptrain.training import run as run_lib
import gin

_TOP = "TrainingRun"


def gin_folder() -> pathlib.Path:
  """Where dptrain's own gin files are: in a checkout, or in an installed wheel.

  Raises:
    FileNotFoundError: the installation lacks them.
  """
  package = pathlib.Path(dptrain.__file__).parent
  for folder in (package / "configs", package.parent / "gin"):
    if (folder / "demo.gin").exists():
      return folder
  raise FileNotFoundError(
    f"dptrain's gin files are neither in {package / 'configs'} nor in"
    f" {package.parent / 'gin'}: install dptrain again."
  )


def training_run(
  files: Sequence[str], bindings: Sequence[str], search_paths: str = "."
) -> run_lib.TrainingRun:
  """Builds the run that gin files and command-line bindings describe.

  Args:
    files: gin files, later ones win; looked for in `search_paths`, then among
      dptrain's own.
    bindings: "NAME = VALUE" texts; they win over all files.
    search_paths: folders, separated by commas.

  Returns:
    The run, fully built.

  Raises:
    ValueError: a binding is unknown, unused or wrong, or a setting is missing.
    FileNotFoundError: a gin file is not found.
  """
  if not files:
    raise ValueError(
      "--gin_file is missing: name a gin file, for example --gin_file=demo.gin"
      f" (dptrain's own are in {gin_folder()})."
    )
  folders = [folder for folder in search_paths.split(",") if folder]
  folders.append(str(gin_folder()))
  _check_files(files, folders)
  gin.clear_config()
  for folder in folders:
    gin.add_config_file_search_path(folder)
  try:
    with _without_search_messages():
      gin.parse_config_files_and_bindings(
        list(files), [_quoted(binding) for binding in bindings]
      )
  except (SyntaxError, AttributeError, ImportError, OSError) as error:
    raise ValueError(_plain(error)) from error
  run = _build()
  _check_all_used()
  return run


def _build() -> run_lib.TrainingRun:
  try:
    build = gin.get_configurable(run_lib.TrainingRun)
  except ValueError as error:
    raise ValueError(
      f"no gin file binds {_TOP}: include one that does, such as demo.gin."
    ) from error
  try:
    run = build()
  except TypeError as error:
    raise ValueError(_plain(error)) from error
  if not isinstance(run, run_lib.TrainingRun):
    raise TypeError(f"gin built {type(run)} instead of a {_TOP}.")
  return run


def _check_files(files: Sequence[str], folders: Sequence[str]) -> None:
  for file in files:
    places = [pathlib.Path(folder) / file for folder in folders]
    if not any(place.is_file() for place in places):
      looked = ", ".join(str(pathlib.Path(folder)) for folder in folders)
      raise FileNotFoundError(
        f"--gin_file={file} is in none of {looked}; add its folder to"
        " --gin_search_paths."
      )


def _quoted(binding: str) -> str:
  """Lets a plain word stand for a string: MODEL_DIR=runs/a needs no quotes."""
  name, _, value = binding.partition("=")
  value = value.strip()
  if re.fullmatch(r"[~./A-Za-z_][\w./~:*{}?\[\],@+ -]*", value) and (
    value not in ("True", "False", "None")
  ):
    return f"{name.strip()} = {value!r}"
  return binding


def _check_all_used() -> None:
  """Refuses bindings that nothing read: a misspelt macro changes nothing."""
  # What was read is kept under the scope of the reader, macros' names included.
  used: dict[tuple[str, str], set[str]] = {}
  for (scope, selector), arguments in gin.config._OPERATIVE_CONFIG.items():
    parts = scope.split("/") if scope else []
    for length in range(len(parts) + 1):
      key = "/".join(parts[:length]), selector
      used.setdefault(key, set()).update(arguments)
  unused = []
  for (scope, selector), arguments in gin.config._CONFIG.items():
    left = sorted(set(arguments) - used.get((scope, selector), set()))
    if selector == "gin.macro":
      unused += [scope] if left else []
    else:
      unused += [f"{scope}/{selector}.{name}".lstrip("/") for name in left]
  if unused:
    raise ValueError(
      f"unused gin bindings: {', '.join(sorted(unused))}. Nothing in this"
      " configuration reads them: correct the name, or remove them."
    )


@contextlib.contextmanager
def _without_search_messages() -> Iterator[None]:
  """Hides gin's error line for each folder in which a file is not."""

  def keep(record: logging.LogRecord) -> bool:
    return "Path not found" not in record.getMessage()

  logging.getLogger().addFilter(keep)
  try:
    yield
  finally:
    logging.getLogger().removeFilter(keep)


def _plain(error: BaseException) -> str:
  """Gin's message without its indented traces of where it came from."""
  return " ".join(str(error).split())
