"""N-Grammer beside BERT: what it costs, and what it brings with and without DP.

  OPENBLAS_NUM_THREADS=1 python tools/study_ngrammer.py [--only PART ...]
      [--seeds 3] [--updates 300] [--json FILE]

Parts:
  sizes    parameters and FLOPs per token (as XLA counts them) of N-Grammer,
           BERT, and the BERT whose MLPs are widened to N-Grammer's FLOPs
  docs     Python's documentation, without privacy
  bigrams  a generated corpus of which most tokens are a function of the two
           before them, without privacy
  private  Python's documentation under noise, by how codebooks learn

Models are small (2 layers of width 128). Both are trained on the same batches,
update after update in turn, BERT at no fewer FLOPs per token than N-Grammer.
Printed are held-out losses at the end, and the mean gap to BERT with its 95 %
interval (t-distribution over seeds).
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import bench_optimizers
import jax
import jax.numpy as jnp
import numpy as np
import optimizer_problems
from scipy import stats

from dptrain.models import bert
from dptrain.models import masked_lm
from dptrain.models import ngrammer
from dptrain.optimizers import adamw
from dptrain.optimizers import codebook_settings
from dptrain.training import host_memory
from dptrain.training import ngram_learning

PARTS = ("sizes", "docs", "bigrams", "private")
RATES = {"docs": 5e-4, "bigrams": 5e-4, "private": 2e-3}
SYMBOLS, CERTAIN = 64, 0.9  # of the generated corpus
NAMED = {
  "tiny": (2, 128, 2),
  "mini": (4, 256, 4),
  "small": (4, 512, 8),
  "base": (12, 768, 12),
}


def small(**changes: Any) -> bert.Bert:
  """The BERT of the races."""
  return bert.Bert(
    **{
      "vocab_size": optimizer_problems.VOCABULARY,
      "num_layers": 2,
      "width": 128,
      "num_heads": 4,
      "max_length": optimizer_problems.LENGTH,
      **changes,
    }
  )


def with_ngrams(
  encoder: bert.Bert, num_clusters: int, table_size: int, **changes: Any
) -> bert.Bert:
  """The same with latent bigrams in front."""
  settings = ngrammer.NGrammerSettings(
    num_clusters=num_clusters, table_size=table_size, **changes
  )
  return encoder.clone(ngrammer=settings)


def flops_per_token(encoder: bert.Bert, length: int) -> float:
  """Of a forward pass up to the logits of one masked token in six."""
  masked = max(1, length // 6)
  shapes = (
    jax.ShapeDtypeStruct((1, length), jnp.int32),
    jax.ShapeDtypeStruct((1, masked), jnp.int32),
  )
  model = masked_lm.MaskedLanguageModel(encoder)
  params = jax.eval_shape(model.init, jax.random.key(0))
  lowered = jax.jit(
    lambda params, inputs, positions: encoder.apply(
      {"params": params}, inputs, positions
    )
  ).lower(params, *shapes)
  return float(lowered.cost_analysis()["flops"]) / length


def of_equal_flops(encoder: bert.Bert, length: int) -> bert.Bert:
  """BERT without n-grams, its MLPs as wide as N-Grammer's FLOPs allow."""
  plain = encoder.clone(ngrammer=None)
  wanted = flops_per_token(encoder, length)
  step = 8
  width = plain.mlp_width or 4 * plain.width
  while flops_per_token(plain, length) < wanted:
    width += step
    plain = plain.clone(mlp_width=width)
  return plain


def print_sizes() -> dict[str, Any]:
  """The table of parameters and FLOPs."""
  print("sizes: parameters, and M FLOPs per token at T = 128, V = 30,522")
  figures = {}
  for name, (layers, width, heads) in NAMED.items():
    plain = small(
      vocab_size=30522,
      num_layers=layers,
      width=width,
      num_heads=heads,
      max_length=512,
    )
    augmented = with_ngrams(plain, 1024, 768 * 256)
    equal = of_equal_flops(augmented, 128)
    told = {}
    for kind, encoder in (
      ("BERT", plain),
      ("N-Grammer", augmented),
      ("BERT of its FLOPs", equal),
    ):
      model = masked_lm.MaskedLanguageModel(encoder)
      count = masked_lm.num_parameters(
        jax.eval_shape(model.init, jax.random.key(0))
      )
      flops = flops_per_token(encoder, 128) / 1e6
      told[kind] = {"parameters": count, "mflops": flops}
      print(
        f"  {name:6} {kind:18} {count:12,}   {flops:8.2f}   MLP width"
        f" {encoder.mlp_width or 4 * width}",
        flush=True,
      )
    figures[name] = told
  return figures


def generated(seed: int = 0) -> optimizer_problems.Texts:
  """Most tokens are a fixed, random function of the two before them."""
  rng = np.random.default_rng(seed)
  first = 5  # behind the special tokens
  rule = rng.integers(0, SYMBOLS, (SYMBOLS, SYMBOLS))
  count, length = 20_000, optimizer_problems.LENGTH
  text = rng.integers(0, SYMBOLS, (count, length))
  for t in range(2, length):
    kept = rng.random(count) < CERTAIN
    text[:, t] = np.where(
      kept, rule[text[:, t - 2], text[:, t - 1]], text[:, t]
    )
  text = (text + first).astype(np.int32)
  return optimizer_problems.Texts(text[512:], text[:512])


def race(
  part: str, encoders: dict[str, bert.Bert], seeds: int, updates: int
) -> dict[str, Any]:
  """Prints and returns held-out losses, and gaps to "BERT"."""
  texts = generated() if part == "bigrams" else optimizer_problems.python_docs()
  noisy = part == "private"
  found: dict[str, list[float]] = {name: [] for name in encoders}
  for seed in range(seeds):
    for name, encoder in encoders.items():
      problem = optimizer_problems.masked(encoder, noisy, texts)
      model = masked_lm.MaskedLanguageModel(encoder)
      optimizer = ngram_learning.optimizer_for(
        model,
        adamw.adamw(
          bench_optimizers.warmed(RATES[part]),
          b2=bench_optimizers.B2,
          weight_decay=0.0,
        ),
        codebook_settings.CodebookSettings(decay=0.99),
      )
      (curve,) = bench_optimizers.runs(
        problem, {name: optimizer}, seed, updates, updates
      ).values()
      found[name].append(curve.losses[-1])
  print(f"{part}: held-out loss after {updates} updates, {seeds} seeds")
  figures = {}
  for name, losses in found.items():
    gaps = np.subtract(losses, found["BERT"])
    half = 0.0
    if seeds > 1:
      half = stats.t.ppf(0.975, seeds - 1) * stats.sem(gaps)
    figures[name] = {"losses": losses, "gap": gaps.mean(), "half": half}
    print(
      f"  {name:22} {np.mean(losses):.3f} ({min(losses):.3f} to"
      f" {max(losses):.3f})   gap {gaps.mean():+.3f} +- {half:.3f}",
      flush=True,
    )
  return figures


def entrants(part: str) -> dict[str, bert.Bert]:
  """BERT of N-Grammer's FLOPs, and N-Grammers."""
  changes = {"table_size": 4096, "ngram_dim": 8}
  encoder = with_ngrams(small(), 256, **changes)
  learning = ("frozen", "private", "gradient") if part == "private" else ()
  found = {"BERT": of_equal_flops(encoder, optimizer_problems.LENGTH)}
  for how in learning or ("private",):
    settings = dataclasses.replace(encoder.ngrammer, learning=how)
    name = f"N-Grammer, {how}" if learning else "N-Grammer"
    found[name] = encoder.clone(ngrammer=settings)
  return found


def main() -> None:
  """Runs the parts that are asked for, and prints them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--updates", type=int, default=300)
  parser.add_argument("--json", metavar="FILE", help="also write data here")
  arguments = parser.parse_args()
  host_memory.keep_freed_memory()
  figures: dict[str, Any] = {}
  for part in arguments.only:
    if part == "sizes":
      figures[part] = print_sizes()
    else:
      figures[part] = race(
        part, entrants(part), arguments.seeds, arguments.updates
      )
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
  main()
