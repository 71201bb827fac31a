"""The table of seeded faults in docs/audit.md, row by row.

Each row breaks one place in a copy of the package; every test that the row
names, an audit among them where one sees the fault, must turn red.
"""

import pathlib
import re
from typing import NamedTuple

import pytest

import broken_copies

pytestmark = pytest.mark.faults


AUDIT = (
  "auditing/test_audit.py::test_the_bound_is_below_the_claim_and_above_a_third"
  "_of_it[1]"
)
DEVIATION = "training/test_step.py::test_the_noise_has_the_stated_deviation"
STDDEV = "stddev = noise_multiplier * self._rule(accumulator).sensitivity"
TABLE = pathlib.Path(__file__).parents[1] / "docs" / "audit.md"


class Row(NamedTuple):
  file: str
  right: str
  wrong: str
  caught_by: tuple[str, ...]


ROWS = {
  "noise off by 2": Row(
    "training/step.py", STDDEV, STDDEV + " / 2", (AUDIT, DEVIATION)
  ),
  "noise off by sqrt(2)": Row(
    "training/step.py", STDDEV, STDDEV + " / 2**0.5", (AUDIT, DEVIATION)
  ),
  "noise per physical batch": Row(
    "training/step.py",
    "    adapting = accumulator.adapting\n    if self",
    "    added = added._replace(gradients=jax.tree.map(jnp.add,"
    " added.gradients, noise.gaussian_like(examples_key, added.gradients,"
    " self.rule.sensitivity)))\n"
    "    adapting = accumulator.adapting\n    if self",
    (
      "training/test_step.py::test_noise_is_added_once_however_many_physical"
      "_batches",
    ),
  ),
  "clipping after summing": Row(
    "clipping/per_example.py",
    "  total = jax.lax.cond(jnp.all(clip.finite), weighted, weighted_finite,"
    " leaves)\n  return ClippedSum(",
    "  ones = jnp.where(clip.contributes, 1.0, 0.0)\n"
    "  total = [contraction(ones, g) for g in leaves]\n"
    "  size = jnp.sqrt(sum(jnp.sum(x**2) for x in total))\n"
    "  total = [x * rule.scales(size) for x in total]\n"
    "  return ClippedSum(",
    (
      "clipping/test_per_example.py::test_one_example_moves_the_sum_by_at_most"
      "_the_sensitivity",
      "clipping/test_per_example.py::test_equals_a_loop_in_float64",
    ),
  ),
  "clipping per leaf": Row(
    "clipping/per_example.py",
    "  for paths in members.values():\n",
    "  for paths in [[path] for path in by_path]:\n",
    (
      AUDIT,
      "clipping/test_per_example.py::test_one_example_moves_the_sum_by_at_most"
      "_the_sensitivity",
    ),
  ),
  "tied weight uncounted": Row(
    "clipping/per_example.py",
    "  clip = clip_factors(by_path, losses, is_padding, rule)\n",
    "  import flax.linen as nn\n"
    "  from unittest import mock\n"
    "  def attend_once(self, query):\n"
    "    return query @ jax.lax.stop_gradient(self.embedding).T\n"
    "  with mock.patch.object(nn.Embed, 'attend', attend_once):\n"
    "    once = jax.vmap(jax.grad(lambda *a: loss_of_one(*a)[0]),"
    " in_axes=(None, 0, 0))(params, batch, keys)\n"
    "  by_path = {path: squares(g) for path, g in zip(paths,"
    " jax.tree.leaves(once), strict=True)}\n"
    "  clip = clip_factors(by_path, losses, is_padding, rule)\n",
    (
      "training/test_step.py::test_the_sum_equals_a_loop_over_examples"
      "[float32-1e-05-flat-vmap]",
    ),
  ),
  "one noise for all updates": Row(
    "training/loop.py",
    "noise_key=self._noise_key(step)",
    'noise_key=self._key("noise", 0)',
    (
      AUDIT,
      "training/test_release_path.py::test_each_update_has_a_noise_of_its_own",
    ),
  ),
  "one noise for all leaves": Row(
    "privacy/noise.py",
    "jax.random.fold_in(key, index)",
    "key",
    (AUDIT, "privacy/test_noise.py::test_leaves_get_independent_noise"),
  ),
  "shuffled batches priced as Poisson": Row(
    "privacy/sampling.py",
    "  sample = poisson(key, num_examples, sampling_prob,"
    " truncated_batch_size)\n",
    "  size = round(num_examples * sampling_prob)\n"
    "  left = poisson_sample.__dict__.setdefault(num_examples, [])\n"
    "  if len(left) < size:\n"
    "    left[:] = generator(words(key)).permutation(num_examples)\n"
    "  return np.sort(np.array([left.pop() for _ in range(size)]))\n",
    (
      "privacy/test_sampling.py::test_sizes_are_binomial",
      "privacy/test_sampling.py::test_samples_of_successive_updates_are"
      "_independent",
    ),
  ),
  "division by the realised batch": Row(
    "training/loop.py",
    "expected_batch_size=float(self.plan.expected_batch_size(step)),",
    "expected_batch_size=float(max(self._drawn(step).size, 1)),",
    (
      "training/test_release_path.py::test_the_sum_is_divided_by_the_public_size"
      "_in_the_loop",
    ),
  ),
  "truncated draw unpriced": Row(
    "privacy/sampling.py",
    "draw.binomial(_length(num_examples, block), sampling_prob)",
    "min(draw.binomial(num_examples, sampling_prob),"
    " round(1.5 * num_examples * sampling_prob))",
    ("privacy/test_sampling.py::test_sizes_are_binomial",),
  ),
  "truncated batch unpriced": Row(
    "training/feeding.py",
    "        size, count = sample.size, shards.num_shards\n",
    "        size, count = min(sample.size, 32), shards.num_shards\n",
    (
      "training/test_release_path.py::test_every_record_that_is_drawn_takes"
      "_part",
    ),
  ),
  "shuffled passes priced with amplification": Row(
    "privacy/rounds.py",
    'UNAMPLIFIED = ("shuffled", "balls_in_bins")',
    'UNAMPLIFIED = ("balls_in_bins",)',
    ("privacy/test_draws.py::test_shuffled_passes_are_permutations",),
  ),
  "a plan that truncates priced as Poisson": Row(
    "privacy/plan.py",
    '    if self.sampling == "truncated_poisson":\n',
    "    if not self.sampling:\n",
    ("privacy/test_draws.py::test_a_plan_that_truncates_is_priced_so",),
  ),
  "correlated noise, and records in every update": Row(
    "privacy/draws.py",
    "group = (step - start) % plan.bands",
    "group = 0",
    ("privacy/test_draws.py::test_nobody_takes_part_twice_within_the_bands",),
  ),
  "NaN not zeroed": Row(
    "clipping/per_example.py",
    "    return weighted([without(g, ~clip.finite) for g in leaves])\n",
    "    return weighted(leaves)\n",
    ("clipping/test_per_example.py::test_non_finite_examples_contribute_zero",),
  ),
  "noise drawn in bfloat16": Row(
    "privacy/noise.py",
    "jnp.promote_types(leaf.dtype, jnp.float32)",
    "jnp.bfloat16",
    (
      "privacy/test_noise.py::test_noise_is_float32_whatever_the_leaves_are",
      "training/test_step.py::test_noise_is_not_rounded_away_beside_a_large"
      "_sum",
    ),
  ),
  "noise rounded away beside the sum": Row(
    "training/step.py",
    "((total + n) / expected_batch_size).astype(p.dtype)",
    "((total.astype(jnp.bfloat16) + n.astype(jnp.bfloat16)) /"
    " expected_batch_size).astype(p.dtype)",
    (
      "training/test_step.py::test_noise_is_not_rounded_away_beside_a_large"
      "_sum",
    ),
  ),
}
CASES = [(name, test) for name, row in ROWS.items() for test in row.caught_by]


@pytest.mark.parametrize(
  ("name", "test"),
  CASES,
  ids=[f"{name}: {test.split('::')[-1]}" for name, test in CASES],
)
def test_a_fault_of_the_table_is_caught(name, test, tmp_path):
  row = ROWS[name]
  fault = broken_copies.Fault(row.file, row.right, row.wrong, test)
  told = broken_copies.check_it_is_caught(fault, tmp_path)
  if test == AUDIT:
    assert "THE CLAIM IS REFUTED" in told


def test_the_table_in_the_docs_tells_the_same():
  """Rows of docs/audit.md: fault, audit, tests."""
  told = {}
  for line in TABLE.read_text(encoding="utf-8").splitlines():
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) == 3 and cells[0] in ROWS:
      told[cells[0]] = (
        cells[1] != "-",
        set(re.findall(r"`(test_\w+)`", cells[2])),
      )
  assert told == {
    name: (
      AUDIT in row.caught_by,
      {
        re.sub(r"\[.*", "", test.split("::")[1])
        for test in row.caught_by
        if test != AUDIT
      },
    )
    for name, row in ROWS.items()
  }
