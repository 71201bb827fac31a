"""Says in one sentence what is missing where t5x cannot be used."""

import importlib

# What this wing takes from each module; all of it is there in cc342d4.
_NEEDED = {
  "t5x.checkpoints": ("OrbaxCheckpointManagerInterface",),
  "t5x.metrics": ("StepsPerTime",),
  "t5x.models": ("BaseModel",),
  "t5x.optimizers": ("OptaxWrapper", "OptimizerState"),
  "t5x.partitioning": ("PjitPartitioner",),
  "t5x.trainer": ("BaseTrainer", "MetricsManager", "eval_step"),
  "t5x.utils": ("TrainStateInitializer", "DatasetConfig", "prepare_train_iter"),
  "airio.core": ("AirIODatasetIterator",),
}
TESTED = "t5x cc342d4, airio 69897df, jestimator 326824a"


def check() -> None:
  """Raises ImportError unless t5x is installed and has what is needed."""
  way_out = (
    f"Install the commits that were tested ({TESTED}) without their"
    " dependencies, as docs/t5x.md shows; everything else of dptrain works"
    " without t5x."
  )
  for name, attributes in _NEEDED.items():
    try:
      module = importlib.import_module(name)
    except ImportError as error:
      raise ImportError(
        f"dptrain.t5x_bridge needs {name}, which cannot be imported ({error})."
        f" {way_out}"
      ) from error
    missing = [part for part in attributes if not hasattr(module, part)]
    if missing:
      raise ImportError(
        f"dptrain.t5x_bridge needs {name}.{missing[0]}, which the installed"
        f" one lacks: it is too old, or too new. {way_out}"
      )
