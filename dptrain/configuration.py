"""The edge where gin meets dptrain: files and flags in, a `TrainingRun` out.

Gin files name dptrain's classes by `from __gin__ import dynamic_registration`,
as t5x's do; nothing inside dptrain is decorated or reads gin.
"""

from collections.abc import Iterator, Sequence
import contextlib
import pathlib
import re
import tokenize

import dptrain
from dptrain.training import run as run_lib
import gin

_GIN_ERRORS = (
  SyntaxError,
  AttributeError,
  ImportError,
  ValueError,
  TypeError,
  OSError,
  KeyError,
)
_NO_MACRO = re.compile(r"No bindings specified for '(.+)/gin\.macro'")
_NO_VALUE = re.compile(
  r"missing \d+ required .*?arguments?: (.+?)( No values supplied by Gin.*)?$"
)
_INCLUDE = re.compile(r"include\s+['\"](.+?)['\"]")
_CHOICE = re.compile(r"(\w+)\s*=\s*@([\w.]+)\s*\(")
_Binding = tuple[str, str, str]  # scope, configurable, argument
_CALLER = re.compile(r"\n\s*In call to configurable '(\S+)' .*")


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
  files: Sequence[str],
  bindings: Sequence[str],
  search_paths: str = ".",
  defaults: Sequence[str] = (),
) -> run_lib.TrainingRun:
  """Builds the run that gin files and command-line bindings describe.

  Args:
    files: gin files, later ones win; looked for in `search_paths`, then among
      dptrain's own.
    bindings: "NAME = VALUE" texts; they win over all files.
    search_paths: folders, separated by commas.
    defaults: bindings over which all files and bindings win.

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
  folders = _folders(search_paths)
  files = [_found(file, folders) for file in files]
  gin.clear_config()
  try:
    with _searching(folders):
      gin.parse_config(list(defaults))
      gin.parse_config_files_and_bindings(
        list(files), [_quoted(binding) for binding in bindings]
      )
  except _GIN_ERRORS as error:
    raise ValueError(_plain(error)) from error
  except tokenize.TokenError as error:
    raise ValueError(
      f"a gin file or binding does not parse: {error.args[0]}."
    ) from error
  run = _build()
  _check_all_used(_superseded(files, folders))
  return run


def files_read(files: Sequence[str], search_paths: str = ".") -> list[str]:
  """Names of gin files and of all that they include, as they are written.

  Args:
    files: as in `training_run`.
    search_paths: as there.

  Raises:
    FileNotFoundError: one of them is not found.
  """
  folders, names = _folders(search_paths), list(files)
  for name in names:  # grows
    path = pathlib.Path(_found(name, folders))
    for line in path.read_text(encoding="utf-8").splitlines():
      if (found := _INCLUDE.match(line)) and found[1] not in names:
        names.append(found[1])
  return names


def _folders(search_paths: str) -> list[str]:
  """Where gin files are looked for."""
  folders = [folder for folder in search_paths.split(",") if folder]
  return [*folders, str(gin_folder())]


def _build() -> run_lib.TrainingRun:
  try:
    run = gin.get_configurable(run_lib.TrainingRun)()
  except OSError as error:
    raise OSError(_plain(error)) from error
  except (ValueError, TypeError) as error:
    raise ValueError(_plain(error)) from error
  if not isinstance(run, run_lib.TrainingRun):
    raise TypeError(f"gin built {type(run)} instead of a TrainingRun.")
  return run


def _found(file: str, folders: Sequence[str]) -> str:
  """The first of `folders` that has the file, and the file, as one path."""
  places = [pathlib.Path(folder) / file for folder in folders]
  for place in places:
    if place.is_file():
      return str(place.absolute())
  looked = ", ".join(str(pathlib.Path(folder)) for folder in folders)
  raise FileNotFoundError(
    f"--gin_file={file} is in none of {looked}; add its folder to"
    " --gin_search_paths."
  )


def _quoted(binding: str) -> str:
  """Lets what is no gin value stand for a string: MODEL_DIR=runs/a."""
  if binding.startswith(("import ", "from ")):
    return binding
  name, equals, value = binding.partition("=")
  if not equals:
    raise ValueError(
      f"gin binding {binding!r} has no value; write NAME = VALUE."
    )
  value = value.strip()
  try:
    gin.config.parse_value(value)
  except (SyntaxError, ValueError, tokenize.TokenError):
    if value.startswith(("@", "%", "[", "(", "{", "'", '"')):
      return binding  # meant as gin: its own error says what is wrong
    return f"{name.strip()} = {value!r}"
  return binding


def _superseded(files: Sequence[str], folders: Sequence[str]) -> set[str]:
  """What macros were bound to (OPTIMIZER = @adamw.adamw()) until rebound."""
  bound: dict[str, list[str]] = {}

  def read(file: str) -> None:
    for line in pathlib.Path(file).read_text(encoding="utf-8").splitlines():
      if found := _INCLUDE.match(line):
        read(_found(found[1], folders))
      elif found := _CHOICE.match(line):
        bound.setdefault(found[1], []).append(found[2])

  for file in files:
    read(file)
  return {
    target
    for targets in bound.values()
    for target in targets[:-1]
    if target != targets[-1]
  }


def _of_superseded(
  unused: Sequence[_Binding], targets: set[str]
) -> set[_Binding]:
  """Those of the unused bindings that only what was superseded would read."""
  excused = {
    each
    for each in unused
    if any(each[1] == t or each[1].endswith(f".{t}") for t in targets)
  }
  while True:
    values = [
      gin.config._CONFIG[scope, name][arg] for scope, name, arg in excused
    ]
    read = {
      (ref.scoped_selector.rpartition("/")[0], ref.selector)
      for ref in gin.config.iterate_references({"": values})
    }
    more = {each for each in unused if each[:2] in read} - excused
    if not more:
      return excused
    excused |= more


def _check_all_used(superseded: set[str]) -> None:
  """Refuses bindings that nothing read: a misspelt macro changes nothing.

  Args:
    superseded: configurables that another file has replaced; what is bound for
      them may stay unread.
  """
  # What was read is kept under the scope of the reader, macros' names included.
  used: dict[tuple[str, str], set[str]] = {}
  for (scope, selector), arguments in gin.config._OPERATIVE_CONFIG.items():
    parts = scope.split("/") if scope else []
    for length in range(len(parts) + 1):
      key = "/".join(parts[:length]), selector
      used.setdefault(key, set()).update(arguments)
  left = [
    (scope, selector, name)
    for (scope, selector), arguments in gin.config._CONFIG.items()
    for name in set(arguments) - used.get((scope, selector), set())
  ]
  unused = [
    scope
    if selector == "gin.macro"
    else f"{scope}/{selector}.{name}".lstrip("/")
    for scope, selector, name in set(left) - _of_superseded(left, superseded)
  ]
  if unused:
    raise ValueError(
      f"unused gin bindings: {', '.join(sorted(unused))}. Nothing in this"
      " configuration reads them: correct the name, or remove them. A macro of"
      " a gin file is unread where its setting is bound itself: bind the macro."
    )


@contextlib.contextmanager
def _searching(folders: Sequence[str]) -> Iterator[None]:
  """Lets gin look for files in these folders, and nowhere else."""
  # Its own list grows from call to call, and its search of Python packages
  # fails on any folder named `models` that Python's path holds.
  config = gin.config
  before = config._LOCATION_PREFIXES, config._FILE_READERS
  config._LOCATION_PREFIXES = list(folders)
  config._FILE_READERS = before[1][:1]
  try:
    yield
  finally:
    config._LOCATION_PREFIXES, config._FILE_READERS = before


def _plain(error: BaseException) -> str:
  """The error in one sentence, without gin's listings and traces."""
  text = str(error)
  if found := _NO_MACRO.match(text):
    return (
      f"the gin macro %{found[1]} has no value: give --gin.{found[1]}=VALUE, or"
      " bind it in a gin file."
    )
  # Gin appends who was being called, innermost first, to any exception.
  message, *callers = _CALLER.split(text)[:2]
  message = " ".join(message.split())
  if not callers:
    return message
  if not isinstance(error, TypeError):
    # A task's own errors name their settings; `register` says no more.
    told = callers[0] in message or callers[0] == "register"
    return message if told else f"{message} (in {callers[0]})"
  if found := _NO_VALUE.search(message):
    return (
      f"{callers[0]} lacks {found[1]}: bind it in a gin file (demo.gin"
      f" shows how), or with --gin.{callers[0]}.NAME=VALUE."
    )
  return f"a setting of {callers[0]} is of the wrong type: {message}."
