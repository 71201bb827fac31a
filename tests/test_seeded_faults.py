"""Breaks the guarantee on purpose, in a copy, and sees a test turn red.

Each fault is a change of one place in a copy of the package; the named test is
run against the copy and must fail, for the reason of an assertion.
"""

import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

import dptrain

PACKAGE = pathlib.Path(dptrain.__file__).parent
TESTS = pathlib.Path(__file__).parent


class Fault(NamedTuple):
  file: str
  right: str
  wrong: str
  caught_by: str


FAULTS = {
  "noise added per physical batch": Fault(
    "training/step.py",
    "    adapting = accumulator.adapting\n    if self",
    "    added = added._replace(gradients=jax.tree.map(jnp.add,"
    " added.gradients, noise.gaussian_like(examples_key, added.gradients,"
    " self.rule.sensitivity)))\n"
    "    adapting = accumulator.adapting\n    if self",
    "training/test_step.py::test_noise_is_added_once_however_many_physical"
    "_batches",
  ),
  "sum divided by the realised batch": Fault(
    "training/loop.py",
    "expected_batch_size=float(self.plan.expected_batch_size(step)),",
    "expected_batch_size=float(max(len(indices), 1)),",
    "training/test_release_path.py::test_the_sum_is_divided_by_the_public_size"
    "_in_the_loop",
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
  "padding rows not masked": Fault(
    "clipping/per_example.py",
    "contributes = finite & ~is_padding",
    "contributes = finite",
    "clipping/test_per_example.py::test_padding_contributes_exactly_zero",
  ),
  "tied embedding counted once in the norm": Fault(
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
    "training/test_step.py::test_the_sum_equals_a_loop_over_examples"
    "[float32-1e-05-flat-vmap]",
  ),
  "one key used for all leaves": Fault(
    "privacy/noise.py",
    "jax.random.fold_in(key, index)",
    "key",
    "privacy/test_noise.py::test_leaves_get_independent_noise",
  ),
  "the accountant reading another sampling probability": Fault(
    "training/loop.py",
    "      release.sampling_prob,\n",
    "      min(1.0, 2 * release.sampling_prob),\n",
    "training/test_release_path.py::test_the_sampler_draws_with_the"
    "_probability_that_is_priced",
  ),
  "ledger written after the update only": Fault(
    "training/loop.py",
    "    processes.first(lambda: self.ledger.record(self.branch.name, step,"
    " release))\n"
    "    params, opt_state, statistics = self.finish(\n"
    '      state["params"],\n'
    '      state["opt_state"],\n'
    "      accumulator,\n"
    '      noise_key=self._key("noise", step),\n'
    "      noise_multiplier=release.noise_multiplier,\n"
    "      expected_batch_size=float(self.plan.expected_batch_size(step)),\n"
    "    )\n",
    "    params, opt_state, statistics = self.finish(\n"
    '      state["params"],\n'
    '      state["opt_state"],\n'
    "      accumulator,\n"
    '      noise_key=self._key("noise", step),\n'
    "      noise_multiplier=release.noise_multiplier,\n"
    "      expected_batch_size=float(self.plan.expected_batch_size(step)),\n"
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


def run_in(folder: pathlib.Path, *command: str) -> subprocess.CompletedProcess:
  environment = dict(os.environ, PYTHONPATH=str(folder))
  for name in list(environment):
    if name.startswith(("PYTEST", "JAX_")):
      del environment[name]
  return subprocess.run(
    [sys.executable, *command],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_turns_a_test_red(name, tmp_path):
  fault = FAULTS[name]
  ignore = shutil.ignore_patterns("__pycache__")
  shutil.copytree(PACKAGE, tmp_path / "dptrain", ignore=ignore)
  shutil.copytree(TESTS, tmp_path / "tests", ignore=ignore)
  broken = tmp_path / "dptrain" / fault.file
  text = broken.read_text()
  assert text.count(fault.right) == 1, "the fault no longer fits the code"
  broken.write_text(text.replace(fault.right, fault.wrong))
  where = run_in(tmp_path, "-c", "import dptrain; print(dptrain.__file__)")
  assert where.stdout.startswith(str(tmp_path)), "not the copy would be tested"
  options = ["-q", "-x", "-p", "no:cacheprovider", "-c", os.devnull]
  test = str(tmp_path / "tests" / fault.caught_by)
  ran = run_in(
    tmp_path, "-m", "pytest", *options, "--rootdir", str(tmp_path), test
  )
  assert ran.returncode == 1, ran.stdout + ran.stderr
  assert "AssertionError" in ran.stdout, ran.stdout + ran.stderr
