"""The equations of arXiv 2207.06366, token by token in float64 numpy."""

import numpy as np

from dptrain.models import ngram_ids


def norm(x, scale, bias, epsilon):
  x = x - x.mean()
  return x / np.sqrt(np.mean(np.square(x)) + epsilon) * scale + bias


def points(params, x, settings):
  """What is assigned [T, H, S], and the clusters [T, H]."""
  heads = len([name for name in params if name.startswith("codebook_")])
  x = np.float64(x).reshape(len(x), heads, -1)
  if settings.prenormalize:
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
  ids = np.zeros((len(x), heads), int)
  for t, h in np.ndindex(*ids.shape):
    centres = np.float64(params[f"codebook_{h}"]["embedding"])[:, :-1]
    ids[t, h] = np.argmin(np.sum(np.square(x[t, h] - centres), axis=1))
  return x, ids


def gram(ids, t, h, step, settings, real, segments, attention):
  """Clusters of the n-gram of token t, itself first, as Python ints."""
  length = len(ids)

  def seen(u):
    there = 0 <= u < length and real[u] and segments[u] == segments[t]
    return int(ids[u, h]) if there else 0

  if settings.pairing == "adjacent":
    return [int(ids[t, h])] + [
      seen(t - step * far) for far in range(1, settings.order)
    ]
  others = [
    u
    for u in range(t if settings.causal else length)
    if u != t and real[u] and segments[u] == segments[t]
  ]
  best = max(others, key=lambda u: attention[h, t, u], default=None)
  return [int(ids[t, h]), 0 if best is None else seen(best)]


def row(clusters, h, settings, heads):
  x = sum(z * settings.num_clusters**j for j, z in enumerate(clusters))
  prime = ngram_ids.primes(settings.table_size, heads)[h]
  return ((x * (h + 1) + (h + 1)) % prime) % settings.table_size


def rows(params, x, settings, real, segments=None, attention=None):
  """Rows that are looked up: by side [T, H]."""
  _, ids = points(params, x, settings)
  segments = np.zeros(len(x)) if segments is None else segments
  sides = (1, -1) if settings.sides == "both" else (1,)
  found = np.zeros((len(sides), *ids.shape), int)
  for side, t, h in np.ndindex(*found.shape):
    clusters = gram(ids, t, h, sides[side], settings, real, segments, attention)
    found[side, t, h] = row(clusters, h, settings, ids.shape[1])
  return found


def layer(
  params, x, settings, real, segments=None, attention=None, epsilon=1e-6
):
  """One example: x [T, D], real [T]; returns [T, D]."""
  assigned, ids = points(params, x, settings)
  heads = np.float64(x).reshape(assigned.shape)
  looked = rows(params, x, settings, real, segments, attention)
  out = np.zeros(heads.shape)
  for t, h in np.ndindex(*ids.shape):
    if not real[t]:
      continue
    unigram = heads[t, h]
    if settings.straight_through:
      unigram = np.float64(params[f"codebook_{h}"]["embedding"])[ids[t, h], :-1]
    p = params["unigram_norm"]
    unigram = norm(unigram, p["scale"][h], p["bias"][h], epsilon)
    grams = []
    for prefix, of_side in zip(("", "right_"), looked, strict=False):
      table = np.float64(params[f"{prefix}table_{h}"]["embedding"])
      p = params[f"{prefix}ngram_norm"]
      vector = table[of_side[t, h], : settings.ngram_dim]
      grams.append(norm(vector, p["scale"][h], p["bias"][h], epsilon))
    if settings.combine == "add":
      out[t, h] = unigram + sum(grams)
    else:
      kept = len(unigram) - settings.ngram_dim * len(grams)
      out[t, h] = np.concatenate([unigram[:kept], *grams])
  return out.reshape(x.shape)


def sums_and_counts(params, x, settings, real):
  """[H, K, S + 1]: an example's sums of deviations, and counts."""
  assigned, ids = points(params, x, settings)
  heads, size = assigned.shape[1:]
  found = np.zeros((heads, settings.num_clusters, size + 1))
  share = 1 / (max(sum(real), 1) * np.sqrt(heads))
  for t, h in np.ndindex(*ids.shape):
    if real[t]:
      z = ids[t, h]
      centre = np.float64(params[f"codebook_{h}"]["embedding"])[z, :-1]
      deviation = (assigned[t, h] - centre) / settings.deviation_scale
      found[h, z] += share * np.append(deviation, 1.0)
  return found
