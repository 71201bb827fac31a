"""Prints where the gin files for t5x are: $(python -m dptrain.t5x_bridge)."""

from dptrain import configuration

if __name__ == "__main__":
  print(configuration.gin_folder() / "t5x")
