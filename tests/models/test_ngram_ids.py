"""Ids of n-grams and their rows, against Python's own integers."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptrain.models import ngram_ids


def naive_primes(table_size, count):
  found = [
    n
    for n in range(table_size + 1, 2 * table_size)
    if n > 1 and all(n % d for d in range(2, n))
  ]
  return found[:count]


def naive_row(ids, head, prime, num_clusters, table_size):
  """ids: nearest first; Python ints do not overflow."""
  x = sum(int(z) * num_clusters**j for j, z in enumerate(ids))
  return ((x * (head + 1) + (head + 1)) % prime) % table_size


@pytest.mark.parametrize("size", [2, 3, 10, 97, 128])
def test_primes_are_those_between_the_size_and_its_double(size):
  for count in (1, 3, 100):
    expected = tuple(naive_primes(size, count))
    assert ngram_ids.primes(size, count) == expected


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_rows_are_those_of_python_ints(data):
  heads = data.draw(st.integers(1, 5))
  clusters = data.draw(st.integers(1, 2**24))
  size = data.draw(st.integers(50, 2**30))
  order = data.draw(st.integers(1, 4))
  draw = np.random.default_rng(data.draw(st.integers(0, 99)))
  ids = draw.integers(0, clusters, (order, 2, 3, heads)).astype(np.int32)
  ids[:, 0, 0] = clusters - 1
  found = np.asarray(ngram_ids.rows(list(jnp.asarray(ids)), clusters, size))
  assert found.dtype == np.int32
  primes = ngram_ids.primes(size, heads)
  for b, t, h in np.ndindex(2, 3, heads):
    args = h, primes[h], clusters, size
    assert found[b, t, h] == naive_row(ids[:, b, t, h], *args)


@pytest.mark.parametrize(
  ("heads", "clusters", "size", "order"),
  [
    (16, 1024, 768 * 256, 2),  # the paper's
    (16, 8192, 768 * 256, 3),
    (64, 2**16, 2**24, 3),
    (64, 250_112, 2**20, 2),  # raw word ids: x times i needs 2^42
    (3, 2**31 - 1, ngram_ids.MOST_ROWS, 4),
  ],
)
def test_the_largest_sizes_do_not_overflow(heads, clusters, size, order):
  draw = np.random.default_rng(0)
  ids = draw.integers(0, clusters, (order, 1, 9, heads)).astype(np.int32)
  ids[:, :, 0] = clusters - 1
  rows = jax.jit(ngram_ids.rows, static_argnums=(1, 2))
  found = np.asarray(rows(list(ids), clusters, size))
  primes = ngram_ids.primes(size, heads)
  assert size < min(primes)
  assert max(primes) < 2 * size
  for t, h in np.ndindex(9, heads):
    expected = naive_row(ids[:, 0, t, h], h, primes[h], clusters, size)
    assert found[0, t, h] == expected


def test_rows_are_spread_and_differ_from_head_to_head():
  clusters, size, heads = 64, 1024, 4
  pairs = np.stack(np.divmod(np.arange(clusters**2), clusters))
  places = [np.repeat(p[None, :, None], heads, 2) for p in pairs]
  found = np.asarray(ngram_ids.rows(list(map(jnp.asarray, places)), 64, size))
  for h in range(heads):
    counts = np.bincount(found[0, :, h], minlength=size)
    assert counts.max() <= 4 * clusters**2 / size
  assert np.mean(found[..., 0] == found[..., 1]) < 0.01


@pytest.mark.parametrize(("size", "heads"), [(4, 3), (2**30 + 1, 1)])
def test_a_table_without_enough_primes_is_refused(size, heads):
  ids = [jnp.zeros((1, 1, heads), jnp.int32)]
  with pytest.raises(ValueError, match=f"table_size={size} has no {heads} pr"):
    ngram_ids.rows(ids, 2, size)


@settings(max_examples=12, deadline=None)
@given(
  st.integers(1, 3),
  st.integers(1, 7),
  st.integers(1, 2),
  st.sampled_from([1, 2, 3, 9, -1, -2]),
  st.booleans(),
  st.integers(0, 99),
)
def test_neighbours_stay_within_their_segment(
  batch, length, heads, distance, segmented, seed
):
  draw = np.random.default_rng(seed)
  ids = draw.integers(1, 9, (batch, length, heads))
  segments = np.sort(draw.integers(0, 3, (batch, length)), axis=1)
  found = ngram_ids.neighbours(
    jnp.asarray(ids), jnp.asarray(segments) if segmented else None, distance
  )
  for b, t, h in np.ndindex(batch, length, heads):
    other = t - distance
    there = 0 <= other < length and (
      not segmented or segments[b, other] == segments[b, t]
    )
    assert found[b, t, h] == (ids[b, other, h] if there else 0)


@settings(max_examples=12, deadline=None)
@given(
  st.integers(1, 3),
  st.integers(1, 6),
  st.integers(1, 2),
  st.booleans(),
  st.booleans(),
  st.integers(0, 99),
)
def test_partners_are_the_most_attended_tokens(
  batch, length, heads, segmented, causal, seed
):
  draw = np.random.default_rng(seed)
  ids = draw.integers(1, 9, (batch, length, heads))
  attention = draw.random((batch, heads, length, length))
  segments = np.sort(draw.integers(0, 2, (batch, length)), axis=1)
  real = draw.random((batch, length)) < 0.7
  found = ngram_ids.partners(
    *map(jnp.asarray, (ids, attention, real)),
    jnp.asarray(segments) if segmented else None,
    causal,
  )
  for b, t, h in np.ndindex(batch, length, heads):
    others = [
      u
      for u in range(t if causal else length)
      if u != t
      and real[b, u]
      and (not segmented or segments[b, u] == segments[b, t])
    ]
    best = max(others, key=lambda u: attention[b, h, t, u], default=None)
    assert found[b, t, h] == (0 if best is None else ids[b, best, h])
