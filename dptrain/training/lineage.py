"""Digests of what decides a run's gradients: they name its branch.

Two continuations of one checkpoint may share noise only if they make the very
same updates (`dptrain.privacy.keys`). So the branch's name covers the plan, the
data, the compiled programs (model, loss, clipping, optimizer and its learning
rates), and dptrain's own code; all of it read from what will really run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets
from typing import Any

import jax

import dptrain
from dptrain.training import public_data
from dptrain.training import step as step_lib

_NUMERIC_FLAGS = (
  "XLA_FLAGS",
  "NVIDIA_TF32_OVERRIDE",
  "CUBLAS_WORKSPACE_CONFIG",
  "LIBTPU_INIT_ARGS",
)
_CPU_LINES = ("model name", "flags", "Features")


def lineage(
  *,
  plan: Mapping[str, Any],
  corpus: str,
  vocabulary: str,
  programs: str,
  public: Mapping[str, Any] | None = None,
  taught: str = "",
) -> str:
  """Digest of all that decides the updates, apart from their rounding.

  Args:
    plan: the privacy plan as plain data.
    corpus: keyed fingerprint of the training records.
    vocabulary: fingerprint of the vocabulary.
    programs: `program_digest` of the step.
    public: what decides the term of public records; None without.
    taught: digest of how teachers are matched; empty without. Who they are, the
      ledger tells.

  Returns:
    64 hexadecimal digits.
  """
  parts: dict[str, Any] = {
    "plan": plan,
    "corpus": corpus,
    "vocabulary": vocabulary,
    "programs": programs,
    "code": _code_digest(),
    # The stream of its generators is not promised to stay.
    "numpy": importlib.metadata.version("numpy"),
  }
  if public is not None:
    parts["public"] = public
  if taught:
    parts["taught"] = taught
  return _digest(json.dumps(parts, sort_keys=True))


def environment(
  physical_batch_size: int,
  microbatch_size: int | None = None,
  mesh: str = "",
) -> str:
  """Digest of what may change the rounding of an update, but not its meaning.

  Of this process's machine: where several train together, all their digests
  count.

  Args:
    physical_batch_size: rows handed to the devices at once.
    microbatch_size: rows summed at once; None: all of them.
    mesh: how devices are arranged and parameters split, in words; empty for one
      device.
  """
  parts = {
    "physical_batch_size": physical_batch_size,
    "microbatch_size": microbatch_size or physical_batch_size,
    "devices": [device.device_kind for device in jax.devices()],
    "processes": jax.process_count(),
    "mesh": mesh,
    "machine": [platform.machine(), _processors(), _cpu_features()],
    "flags": [os.environ.get(name, "") for name in _NUMERIC_FLAGS],
    "versions": _numeric_packages(),
  }
  if jax.default_backend() == "gpu" and (
    "--xla_gpu_deterministic_ops=true" not in os.environ.get("XLA_FLAGS", "")
  ):
    # Atomics: even the same machine does not repeat itself.
    parts["unrepeatable"] = secrets.token_hex(16)
  return _digest(json.dumps(parts, sort_keys=True))


def joint_environment(environments: Sequence[str]) -> str:
  """Digest of the `environment` of every process; its own if there is one."""
  if len(environments) == 1:
    return environments[0]
  return _digest("\n".join(environments))


def program_digest(
  step: step_lib.PrivateStep, params: Any, opt_state: Any, batch: Any
) -> str:
  """Digest of the step's programs, for one example on one device.

  Args:
    step: the private step.
    params: parameters or their shapes.
    opt_state: what `PrivateStep.init` returns, or its shapes.
    batch: a physical batch or its shapes; only one row of it is used.

  Returns:
    64 hexadecimal digits; equal for equal programs, whatever the mesh or the
    physical batch size.
  """
  step = dataclasses.replace(step, microbatch_size=None)
  with _constants_in_text():
    return _digest("\n".join(_texts(step, params, opt_state, _one(batch))))


def taught_program_digest(
  step: step_lib.PrivateStep,
  params: Any,
  opt_state: Any,
  batch: Any,
  targets: Callable[..., Any],
  teachers: Any,
) -> str:
  """As `program_digest`, of what computes teachers' predictions and uses them.

  Args:
    step: the private step.
    params: parameters or their shapes.
    opt_state: what `PrivateStep.init` returns, or its shapes.
    batch: a physical batch or its shapes, without targets.
    targets: (teachers, batch, examples_key, weight) -> batch with targets.
    teachers: parameters of the teachers, or their shapes.
  """
  step = dataclasses.replace(step, microbatch_size=None)
  rest = _key_shape(), jax.ShapeDtypeStruct((), "float32")
  with _constants_in_text():
    traced = jax.jit(targets).trace(teachers, _one(batch), *rest)
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    taught = jax.eval_shape(targets, teachers, _one(batch), *rest)
    return _digest("\n".join([text, *_texts(step, params, opt_state, taught)]))


def public_program_digest(
  term: public_data.PublicTerm, params: Any, batch: Any
) -> str:
  """As `program_digest`, of the term of public records.

  Their rows lack what names a private example, so that a model may treat them
  in ways which the private step's programs do not show.

  Args:
    term: the term.
    params: parameters or their shapes.
    batch: a physical batch of public records, or its shapes.
  """
  with _constants_in_text():
    traced = jax.jit(term.accumulate).trace(
      params, jax.eval_shape(term.zeros, params), _one(batch), _key_shape()
    )
    return _digest(traced.lower(lowering_platforms=("cpu",)).as_text())


def _one(batch: Any) -> Any:
  """Shapes of one row of a batch."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch
  )


def _key_shape() -> Any:
  return jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))


def _texts(
  step: step_lib.PrivateStep, params: Any, opt_state: Any, one: Any
) -> list[str]:
  """The step's programs for a batch `one` of one row."""
  key = _key_shape()
  scalar = jax.ShapeDtypeStruct((), "float32")
  accumulator = jax.eval_shape(step.zeros, params, one, opt_state)
  accumulate = jax.jit(step.accumulate).trace(params, accumulator, one, key)
  finish = jax.jit(step.finish).trace(
    params,
    opt_state,
    accumulator,
    noise_key=key,
    noise_multiplier=scalar,
    expected_batch_size=scalar,
  )
  return [
    traced.lower(lowering_platforms=("cpu",)).as_text()
    for traced in (accumulate, finish)
  ]


@contextlib.contextmanager
def _constants_in_text() -> Iterator[None]:
  """Keeps jax from passing large constants to a program beside its text."""
  name = "jax_use_simplified_jaxpr_constants"
  before = jax.config.values.get(name)
  if before:
    jax.config.update(name, False)
  try:
    yield
  finally:
    if before:
      jax.config.update(name, before)


def _processors() -> list[int | None]:
  """How many there are, and how many this process may use: threads follow."""
  if not hasattr(os, "sched_getaffinity"):
    return [os.cpu_count()]
  return [os.cpu_count(), len(os.sched_getaffinity(0))]


@functools.cache
def _cpu_features() -> str:
  """What the processor can do, where the system tells: it decides rounding."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
  except OSError:
    return platform.processor()
  told = {line for line in text.splitlines() if line.startswith(_CPU_LINES)}
  return _digest("\n".join(sorted(told)))


@functools.cache
def _numeric_packages() -> tuple[str, ...]:
  """Versions of what computes: jax, and the libraries and plugins under it."""
  found = {
    (package.metadata["Name"] or "").lower(): package.version
    for package in importlib.metadata.distributions()
  }
  return tuple(
    f"{name} {version}"
    for name, version in sorted(found.items())
    if name.startswith(("jax", "flax", "optax", "libtpu", "nvidia-"))
  )


@functools.cache
def _code_digest() -> str:
  root = pathlib.Path(dptrain.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root)}\n".encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
