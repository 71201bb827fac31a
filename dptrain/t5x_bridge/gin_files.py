"""To be imported first by gin files that t5x reads: finds what they include.

Also where a t5x that lacks something is refused, before anything else fails.
`python -m dptrain.t5x_bridge` prints the folder of those files.
"""

from collections.abc import Callable
import pathlib

from dptrain import configuration
from dptrain.t5x_bridge import installation
import gin


def search_them() -> None:
  """Lets gin include dptrain's own files by their names, from any directory."""
  gin.add_config_file_search_path(str(configuration.gin_folder()))
  gin.config._FILE_READERS = [
    (reader, _without_type_errors(readable))
    for reader, readable in gin.config._FILE_READERS
  ]


def absolute(path: str) -> str:
  """An absolute path, which Orbax asks for; "~" is the home directory."""
  return str(pathlib.Path(path).expanduser().absolute())


def _without_type_errors(
  readable: Callable[[str], bool],
) -> Callable[[str], bool]:
  """Gin's search of packages fails on a folder that is none, as `models` is."""

  def is_readable(path: str) -> bool:
    try:
      return readable(path)
    except TypeError:
      return False

  return is_readable


installation.check()
search_them()
