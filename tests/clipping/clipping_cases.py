"""All models and losses that could fool a tap, from all rooms, by name.

Each case is a function that returns (loss_fn, params, batch). `USES` says how
many uses are tapped: 0 where only per-example copies are right.
"""

from clipped_models import CASES
from clipped_models import USES
import losses_used_otherwise
import models_as_meant
import models_of_products
import models_used_otherwise

ROOMS = (
  models_as_meant,
  models_of_products,
  models_used_otherwise,
  losses_used_otherwise,
)
__all__ = ("CASES", "USES")
