"""Breaks the guarantee on purpose, in a copy, and sees a test turn red.

Each fault is a change of one place in a copy of the package; the named test is
run against the copy and must fail, for the reason of an assertion. The faults
of the table in docs/audit.md are in test_table_of_faults.py.
"""

import pytest

import broken_copies
from broken_copies import Fault

pytestmark = pytest.mark.faults


FAULTS = {
  "blocks of records that draw alike": Fault(
    "privacy/sampling.py",
    "counter = np.array([0, 0, 0, block], dtype=np.uint64)",
    "counter = np.array([0, 0, 0, 0], dtype=np.uint64)",
    "privacy/test_sampling.py::test_a_large_corpus_by_place_by_block_and_by"
    "_pairs_at_a_distance",
  ),
  "all that exceeds a truncated sample taken from its first block": Fault(
    "privacy/sampling.py",
    "leave = draw.choice(total, total - most, replace=False, shuffle=False)",
    "leave = np.arange(total - most)",
    "privacy/test_sampling.py::test_a_part_kept_across_blocks_is_uniform",
  ),
  "the tally of an adapting clip norm without noise": Fault(
    "training/step.py",
    "adapting.tally + spread * unit_tally,",
    "adapting.tally,",
    "training/test_adaptive_clipping.py::test_both_noises_have_the_stated"
    "_deviation",
  ),
  "the tally's noise for half of its sensitivity": Fault(
    "clipping/adaptation.py",
    "shares.noise_stddev(0.5,",
    "shares.noise_stddev(0.25,",
    "training/test_adaptive_clipping.py::test_the_parts_cost_together_what_the"
    "_plan_prices",
  ),
  "an example counted as one where noise is for a half": Fault(
    "clipping/adaptation.py",
    "jnp.where(norms <= l2_clip_norm, 0.5, -0.5)",
    "jnp.where(norms <= l2_clip_norm, 1.0, -1.0)",
    "clipping/test_adaptation.py::test_the_tally_is_the_naive_count",
  ),
  "the gradients' noise not enlarged for the tally": Fault(
    "training/step.py",
    "stddev = stddev * shares_lib.gradient_noise_factor(shares.values())",
    "stddev = stddev * 1.0",
    "training/test_adaptive_clipping.py::test_both_noises_have_the_stated"
    "_deviation",
  ),
  "noise for the clip norm that an adapting one began with": Fault(
    "training/step.py",
    "self._rule(accumulator).sensitivity",
    "self.rule.sensitivity",
    "training/test_adaptive_clipping.py::test_both_noises_have_the_stated"
    "_deviation",
  ),
  "private metrics without noise": Fault(
    "training/step.py",
    "noisy = accumulator.metrics + spread * unit_metrics",
    "noisy = accumulator.metrics",
    "training/test_private_metrics.py::test_all_noises_have_the_stated"
    "_deviation",
  ),
  "the metrics' noise for half of their sensitivity": Fault(
    "clipping/private_metrics.py",
    "return math.sqrt(len(self.names)) / 2.0",
    "return math.sqrt(len(self.names)) / 4.0",
    "training/test_private_metrics.py::test_one_example_moves_the_whole_release"
    "_by_no_more_than_is_priced",
  ),
  "the gradients' noise not enlarged for the metrics": Fault(
    "training/step.py",
    '      "PrivateMetrics.budget_share": self.metrics,\n',
    "",
    "training/test_private_metrics.py::test_all_noises_have_the_stated"
    "_deviation",
  ),
  "metrics of an example without a bound": Fault(
    "clipping/private_metrics.py",
    "jnp.clip(jnp.nan_to_num(scaled, nan=0.0), 0.0, 1.0) - 0.5",
    "jnp.nan_to_num(scaled, nan=0.0) - 0.5",
    "training/test_private_metrics.py::test_one_example_moves_the_whole_release"
    "_by_no_more_than_is_priced",
  ),
  "metrics of padding rows": Fault(
    "clipping/private_metrics.py",
    "jnp.where(clipped.contributes, bounded, 0.0)",
    "bounded",
    "clipping/test_metric_sums.py::test_the_sums_are_those_of_a_naive_loop",
  ),
  "codebooks not clipped with the rest of the gradient": Fault(
    "clipping/per_example.py",
    "norm = jnp.sqrt(_total([by_path[path] for path in paths]))",
    "norm = jnp.sqrt(_total([by_path[path] for path in paths"
    ' if "codebook_0" not in path]))',
    "training/test_ngram_learning.py::test_one_example_moves_the_whole_sum_by"
    "_no_more_than_is_priced",
  ),
  "padding rows not masked": Fault(
    "clipping/per_example.py",
    "contributes = finite & ~is_padding",
    "contributes = finite",
    "clipping/test_per_example.py::test_padding_contributes_exactly_zero",
  ),
  "the accountant reading another sampling probability": Fault(
    "privacy/draws.py",
    'if kind == "poisson" or (kind == "cyclic_poisson" and plan.bands == 1):\n',
    'if kind == "poisson":\n    prob = min(1.0, 2 * plan.sampling_prob(step))\n'
    "    return sampling.poisson(key, num_examples, prob)\n"
    '  if kind == "cyclic_poisson" and plan.bands == 1:\n',
    "training/test_release_path.py::test_the_sampler_draws_with_the"
    "_probability_that_is_priced",
  ),
  "ledger written after the update only": Fault(
    "training/loop.py",
    "    processes.first(\n"
    "      lambda: self.ledger.record(self.branch.name, step, release,"
    " number)\n"
    "    )\n"
    "    params, opt_state, statistics = self.finish(\n"
    '      state["params"],\n'
    '      state["opt_state"],\n'
    "      accumulator,\n"
    "      noise_key=self._noise_key(step),\n"
    "      noise_multiplier=release.noise_multiplier,\n"
    "      expected_batch_size=float(self.plan.expected_batch_size(step)),\n"
    "      unit_noise=self._correlated(step),\n"
    "      unit_noise_stddev=self._noise_stddev(step),\n"
    "      public_gradient=public_gradient,\n"
    "    )\n",
    "    params, opt_state, statistics = self.finish(\n"
    '      state["params"],\n'
    '      state["opt_state"],\n'
    "      accumulator,\n"
    "      noise_key=self._noise_key(step),\n"
    "      noise_multiplier=release.noise_multiplier,\n"
    "      expected_batch_size=float(self.plan.expected_batch_size(step)),\n"
    "      unit_noise=self._correlated(step),\n"
    "      unit_noise_stddev=self._noise_stddev(step),\n"
    "      public_gradient=public_gradient,\n"
    "    )\n"
    "    self.ledger.record(self.branch.name, step, release)\n",
    "training/test_release_path.py::test_the_ledger_is_written_before_the"
    "_parameters_move",
  ),
  "noise added by each shard of a mesh": Fault(
    "training/sharded_step.py",
    "    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), accumulator)\n",
    "    from dptrain.privacy import noise\n"
    "    sums = accumulator.gradients\n"
    "    drawn = noise.gaussian_like(noise_key, sums, noise_multiplier)\n"
    "    sums = jax.tree.map(jnp.add, sums, drawn)\n"
    "    accumulator = accumulator._replace(gradients=sums)\n"
    "    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), accumulator)\n",
    "training/test_mesh.py::test_sum_and_noise_do_not_know_the_mesh",
  ),
  "the sum of one shard dropped": Fault(
    "training/sharded_step.py",
    "    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), accumulator)\n",
    "    total = jax.tree.map(lambda x: jnp.sum(x[1:], axis=0), accumulator)\n",
    "training/test_mesh.py::test_sum_and_noise_do_not_know_the_mesh",
  ),
  "other processes do not wait for the ledger": Fault(
    "training/processes.py",
    "  outcome = _tried(make) if is_first() else _Outcome(None, None)\n"
    "  value: _T = _shared(outcome, outcome.value)[0]\n"
    "  return value\n",
    "  return make() if is_first() else None\n",
    "training/test_processes.py::test_what_processes_tell_each_other",
  ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_turns_a_test_red(name, tmp_path):
  broken_copies.check_it_is_caught(FAULTS[name], tmp_path)
