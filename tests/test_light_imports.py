"""What importing parts of dptrain may import with it."""

import re
import subprocess
import sys

LIGHT = (
  "dptrain.privacy.plan, dptrain.privacy.ledger, dptrain.reports.report,"
  " dptrain.clipping.per_example, dptrain.optimizers.adamw"
)


def run(*arguments):
  return subprocess.run(
    [sys.executable, *arguments], capture_output=True, text=True, check=True
  )


def test_private_wings_import_no_framework_of_data_or_settings():
  done = run("-X", "importtime", "-c", f"import {LIGHT}")
  imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
  assert {name.strip() for name in LIGHT.split(",")} <= imported
  roots = {name.partition(".")[0] for name in imported}
  assert "jax" in roots
  assert not roots & {"tensorflow", "seqio", "gin", "clu", "orbax", "flax"}


def test_clipping_any_flax_model_needs_flax_alone():
  modules = "dptrain.clipping.methods, dptrain.clipping.private_metrics"
  code = f"import sys, {modules}; print(*sys.modules)"
  names = run("-c", code).stdout.split()
  roots = {name.partition(".")[0] for name in names}
  assert {"dptrain", "flax", "jax"} <= roots
  assert not roots & {"tensorflow", "seqio", "gin", "clu"}
  wings = {n.split(".")[1] for n in names if n.startswith("dptrain.")}
  assert wings == {"clipping"}


def test_the_package_alone_imports_only_the_standard_library():
  code = (
    "import sys; before = set(sys.modules); import dptrain;"
    " print(*sorted(set(sys.modules) - before))"
  )
  roots = {name.partition(".")[0] for name in run("-c", code).stdout.split()}
  assert "dptrain" in roots
  assert roots - {"dptrain"} <= set(sys.stdlib_module_names)
