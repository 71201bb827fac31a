"""Settings of an N-Grammer that cannot be meant, or do not fit the encoder."""

import jax
import jax.numpy as jnp
import pytest

from dptrain.models import bert
from dptrain.models import ngrammer

D, H = 16, 2
ENCODER = {"vocab_size": 11, "num_layers": 2, "width": D, "num_heads": H}


def small(**options):
  given = {"num_clusters": 6, "table_size": 23, "ngram_dim": 3, **options}
  return ngrammer.NGrammerSettings(**given)


@pytest.mark.parametrize(
  ("options", "told"),
  [
    ({"num_clusters": 1}, "num_clusters=1 must be an int between 2 and"),
    ({"num_clusters": 2.0}, r"num_clusters=2\.0 must be an int"),
    ({"table_size": 2**24 + 1}, "table_size=16777217 must be an int"),
    ({"table_size": 37}, "table_size=37 exceeds the 36 n-grams of num_cl"),
    ({"ngram_dim": 1}, "ngram_dim=1 must be"),
    ({"order": 1}, "order=1 must be"),
    ({"before_layer": -1}, "before_layer=-1 must be"),
    ({"weight": 0}, "weight=0 must be positive"),
    ({"deviation_scale": float("inf")}, "deviation_scale=inf must be"),
    ({"row_weight": True}, "row_weight=True must be"),
    ({"commitment": -1.0}, r"commitment=-1\.0 must be"),
    ({"commitment": "x"}, r"commitment='x' must be"),
    ({"weight": "x"}, r"weight='x' must be"),
    ({"initial_scale": "x"}, r"initial_scale='x' must be"),
    ({"initial_scale": 0.0}, r"initial_scale=0\.0 must be"),
    ({"select_rows": 1}, "select_rows=1 must be True or False"),
    ({"sides": "right"}, "sides='right' must be one of 'left', 'both'"),
    ({"pairing": "none"}, "pairing='none' must be one of"),
    ({"combine": "sum"}, "combine='sum' must be one of"),
    ({"learning": "ema"}, "learning='ema' must be one of 'frozen'"),
    ({"pairing": "attention"}, "before_layer=0: no layer before it attends"),
    (
      {"pairing": "attention", "before_layer": 1, "order": 3},
      "order=3 does not go with pairing='attention'",
    ),
    (
      {"pairing": "attention", "before_layer": 1, "sides": "both"},
      "sides='both' does not go with pairing='attention'",
    ),
    ({"causal": True}, "causal=True wants pairing='attention'"),
    ({"straight_through": True}, "straight_through=True wants learning="),
  ],
)
def test_settings_that_cannot_be_meant_are_refused(options, told):
  with pytest.raises(ValueError, match=told):
    small(**options)


@pytest.mark.parametrize(
  ("options", "encoder_options", "told"),
  [
    ({"ngram_dim": 8}, {}, "ngram_dim=8 leaves nothing of a head's 8 dimen"),
    (
      {"ngram_dim": 4, "sides": "both"},
      {},
      "ngram_dim=4 leaves nothing.*lower it below 4",
    ),
    ({"combine": "add"}, {}, "ngram_dim=3 cannot be added to a head's 8"),
    (
      {},
      {"width": 15, "head_size": 8},
      "width=15 is not a multiple of Bert.num_heads=2, between which Bert.ngr",
    ),
    ({"table_size": 3}, {}, "table_size=3 has too few primes .* for 2 heads"),
    ({"before_layer": 2}, {}, "before_layer=2 must be below Bert.num_layers=2"),
    (
      {"before_layer": 1},
      {"scan_layers": True},
      "before_layer=1 stands between layers.*use before_layer=0 or scan_lay",
    ),
  ],
)
def test_settings_that_do_not_fit_the_encoder_are_refused(
  options, encoder_options, told
):
  settings = small(**options)
  with pytest.raises(ValueError, match=told):
    bert.Bert(**{**ENCODER, **encoder_options}, ngrammer=settings)


def test_what_is_no_settings_at_all_is_refused():
  with pytest.raises(ValueError, match="ngrammer=8 must be an NGrammerSett"):
    bert.Bert(**ENCODER, ngrammer=8)


def test_attention_must_be_given_where_it_is_wanted():
  layer = ngrammer.NGrammer(small(pairing="attention", before_layer=1), H)
  with pytest.raises(ValueError, match="needs the attention weights"):
    layer.init(jax.random.key(0), jnp.ones((1, 3, D)), jnp.ones((1, 3), bool))
