"""What an N-Grammer's settings may be, by themselves and beside an encoder.

The settings are `dptrain.models.ngrammer.NGrammerSettings`.

Shapes: D width, H heads, S = D / H, K clusters, V rows of a table, d n-gram
dimensions of a head.
"""

import math
from typing import Any

from dptrain.models import ngram_ids

# Ids travel through taps as float32 (`clipping.dense_layers`).
_MOST_ROWS = 2**24


def check_settings(settings: Any) -> None:
  """Checks each setting, and that they go together.

  Args:
    settings: an `NGrammerSettings`.

  Raises:
    ValueError: names the setting, its value and the way out.
  """
  _check_values(settings)
  most = settings.num_clusters**settings.order
  if settings.table_size > most:
    raise ValueError(
      f"NGrammerSettings.table_size={settings.table_size} exceeds the {most}"
      f" n-grams of num_clusters={settings.num_clusters} and order="
      f"{settings.order}; choose a smaller table or more clusters"
    )
  if settings.pairing == "attention":
    for name, wanted in (("order", 2), ("sides", "left")):
      if getattr(settings, name) != wanted:
        raise ValueError(
          f"NGrammerSettings.{name}={getattr(settings, name)!r} does not go"
          " with pairing='attention', where a token has one partner; use"
          f" {name}={wanted!r}"
        )
    if settings.before_layer == 0:
      raise ValueError(
        "NGrammerSettings.pairing='attention' with before_layer=0: no layer"
        " before it attends; use before_layer >= 1 or pairing='adjacent'"
      )
  elif settings.causal:
    raise ValueError(
      "NGrammerSettings.causal=True wants pairing='attention'; adjacent"
      " n-grams look to the left by sides='left'"
    )
  if settings.straight_through and settings.learning != "gradient":
    raise ValueError(
      f"NGrammerSettings.straight_through=True wants learning='gradient', not"
      f" {settings.learning!r}"
    )


def check_encoder(
  settings: Any, width: int, num_heads: int, num_layers: int, scan_layers: bool
) -> None:
  """Checks that the layer fits its encoder.

  Args:
    settings: an `NGrammerSettings`.
    width: D.
    num_heads: H.
    num_layers: of the encoder.
    scan_layers: whether they are a loop.

  Raises:
    ValueError: names the setting, its value and the way out.
  """
  if width % num_heads:
    raise ValueError(
      f"Bert.width={width} is not a multiple of Bert.num_heads={num_heads},"
      " between which Bert.ngrammer divides it; change either"
    )
  size, sides = width // num_heads, 1 + (settings.sides == "both")
  if settings.combine == "concat" and sides * settings.ngram_dim >= size:
    raise ValueError(
      f"NGrammerSettings.ngram_dim={settings.ngram_dim} leaves nothing of a"
      f" head's {size} dimensions with sides={settings.sides!r}; lower it below"
      f" {-(-size // sides)}, or use combine='add'"
    )
  if settings.combine == "add" and settings.ngram_dim != size:
    raise ValueError(
      f"NGrammerSettings.ngram_dim={settings.ngram_dim} cannot be added to a"
      f" head's {size} dimensions; use ngram_dim={size} or combine='concat'"
    )
  if len(ngram_ids.primes(settings.table_size, num_heads)) < num_heads:
    raise ValueError(
      f"NGrammerSettings.table_size={settings.table_size} has too few primes"
      f" between itself and its double for {num_heads} heads; raise it"
    )
  if settings.before_layer >= num_layers:
    raise ValueError(
      f"NGrammerSettings.before_layer={settings.before_layer} must be below"
      f" Bert.num_layers={num_layers}"
    )
  if settings.before_layer and scan_layers:
    raise ValueError(
      f"NGrammerSettings.before_layer={settings.before_layer} stands between"
      " layers, which Bert.scan_layers=True makes one loop; use before_layer="
      "0 or scan_layers=False"
    )


def _check_values(settings: Any) -> None:
  """Raises ValueError unless each setting by itself can be meant."""
  for name, least, most in (
    ("num_clusters", 2, _MOST_ROWS),
    ("table_size", 2, _MOST_ROWS),
    ("ngram_dim", 2, _MOST_ROWS),
    ("order", 2, 64),
    ("before_layer", 0, 2**31),
  ):
    value = getattr(settings, name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
      raise ValueError(
        f"NGrammerSettings.{name}={value!r} must be an int between {least} and"
        f" {most}"
      )
  for name in ("weight", "deviation_scale", "row_weight"):
    value = getattr(settings, name)
    if not _is_number(value) or not 0.0 < value < math.inf:
      raise ValueError(
        f"NGrammerSettings.{name}={value!r} must be positive and finite"
      )
  commitment = settings.commitment
  if not _is_number(commitment) or not 0.0 <= commitment < math.inf:
    raise ValueError(
      f"NGrammerSettings.commitment={commitment!r} must be finite and"
      " not negative; use 0 to switch it off"
    )
  scale = settings.initial_scale
  if scale is not None and (
    not _is_number(scale) or not 0.0 < scale < math.inf
  ):
    raise ValueError(
      f"NGrammerSettings.initial_scale={scale!r} must be positive and finite,"
      " or None"
    )
  for name in ("causal", "prenormalize", "straight_through", "select_rows"):
    value = getattr(settings, name)
    if not isinstance(value, bool):
      raise ValueError(
        f"NGrammerSettings.{name}={value!r} must be True or False"
      )
  for name, choices in (
    ("sides", ("left", "both")),
    ("pairing", ("adjacent", "attention")),
    ("combine", ("concat", "add")),
    ("learning", ("frozen", "private", "gradient", "unprotected")),
  ):
    if getattr(settings, name) not in choices:
      raise ValueError(
        f"NGrammerSettings.{name}={getattr(settings, name)!r} must be one of"
        f" {', '.join(map(repr, choices))}"
      )


def _is_number(value: Any) -> bool:
  """Whether a value can be compared with numbers, and is meant as one."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)
