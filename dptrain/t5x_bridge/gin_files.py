"""To be imported by gin files that t5x reads: finds the files they include.

`python -m dptrain.t5x_bridge` prints the folder of those files.
"""

from collections.abc import Callable

from dptrain import configuration
import gin


def search_them() -> None:
  """Lets gin include dptrain's own files by their names, from any directory."""
  gin.add_config_file_search_path(str(configuration.gin_folder()))
  gin.config._FILE_READERS = [
    (reader, _without_type_errors(readable))
    for reader, readable in gin.config._FILE_READERS
  ]


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


search_them()
