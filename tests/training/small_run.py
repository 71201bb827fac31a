"""A private run that takes seconds: no TensorFlow, records made of numbers.

Also a program: `python small_run.py MODEL_DIR 'OPTIONS AS JSON' [FLAGS]` trains
through the command line's own `main`, so that a test can kill it.
"""

import contextlib
import dataclasses
import json
import pathlib
import resource
import shutil
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from dptrain.data import masking
from dptrain.data import special_tokens
from dptrain.data import store as store_lib
from dptrain.models import bert
from dptrain.models import masked_lm
from dptrain.optimizers import adamw
from dptrain.optimizers import preconditioner_refresh
from dptrain.optimizers import sgd
from dptrain.optimizers import shampoo
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import shampoo_settings
from dptrain.optimizers import sm3
from dptrain.privacy import plan
from dptrain.privacy import schedule
from dptrain.training import checkpoints
from dptrain.training import evaluation
from dptrain.training import loop
from dptrain.training import mesh as mesh_lib
from dptrain.training import records as records_lib
from dptrain.training import run as run_lib

VOCABULARY, LENGTH = 50, 16
OPTIMIZERS = {
  "adamw": lambda rate: adamw.adamw(rate, weight_decay=0.1),
  "sgd": lambda rate: sgd.sgd(rate, momentum=0.9),
  "sm3": lambda rate: sm3.sm3(rate),
  "shampoo": lambda rate: shampoo.shampoo(
    rate,
    shampoo_settings.ShampooSettings(
      refresh=preconditioner_refresh.RefreshSettings(start=1, interval=2),
      blocking=shampoo_blocks.Blocking(8),
    ),
    weight_decay=0.1,
  ),
}


def store(num_examples=200, seed=0, length=LENGTH):
  """Records that end at random, of ordinary tokens at random."""
  draw = np.random.default_rng(seed)
  tokens = draw.integers(5, VOCABULARY, (num_examples, length), np.int32)
  ends = draw.integers(5, length, (num_examples, 1))
  places = np.broadcast_to(np.arange(length), tokens.shape)
  tokens[:, 0] = special_tokens.CLS_ID
  tokens[places == ends] = special_tokens.SEP_ID
  tokens[places > ends] = special_tokens.PAD_ID
  return store_lib.RecordStore(tokens)


def records(num_examples=200, seed=0, validation=True):
  return records_lib.Records(
    train=store(num_examples, seed),
    validation=store(30, seed=99) if validation else None,
    vocabulary_size=VOCABULARY,
    vocabulary_fingerprint="numbers",
  )


def model(width=16, **settings):
  return masked_lm.MaskedLanguageModel(
    bert.Bert(
      vocab_size=settings.pop("vocab_size", VOCABULARY),
      num_layers=1,
      width=width,
      num_heads=2,
      max_length=settings.pop("max_length", LENGTH),
      **settings,
    )
  )


@dataclasses.dataclass(frozen=True)
class QuickModel(masked_lm.MaskedLanguageModel):
  """Guesses from the mean of the record: compiles in a tenth of Bert's time.

  Of `bert` only the sizes are used.
  """

  def init(self, key):
    shapes = {
      "tokens": (self.bert.vocab_size, self.bert.width),
      "positions": (self.bert.max_length, self.bert.width),
      "mix": (self.bert.width, self.bert.width),
    }
    keys = jax.random.split(key, len(shapes))
    return {
      name: 0.3 * jax.random.normal(key, shape)
      for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  def logical_axes(self):
    return {
      "tokens": ("vocab", "embed"),
      "positions": ("positions", "embed"),
      "mix": ("embed", "mlp"),
    }

  def _logits(self, params, batch, keys):
    del keys
    inputs = batch["inputs"]
    x = params["tokens"][inputs] + params["positions"][: inputs.shape[1]]
    x = jnp.tanh(x + x.mean(1, keepdims=True) @ params["mix"])
    x = jnp.take_along_axis(x, batch["positions"][..., None], axis=1)
    return x @ params["tokens"].T, {}


def make_run(
  model_dir,
  *,
  steps=6,
  sizes=(20, 40),
  noise=4.0,
  target_epsilon=None,
  clipping="normalized",
  l2_clip_norm=0.1,
  delta=1e-5,
  period=2,
  keep=3,
  optimizer="adamw",
  rate=1e-2,
  width=16,
  max_length=LENGTH,
  vocab_size=VOCABULARY,
  fixed_seed=7,
  mesh=None,
  **settings,
):
  """A whole run.

  `sizes`: expected batch of the first and of the second half; `mesh`: options
  of its settings, one device by default.
  """
  return run_lib.TrainingRun(
    model_dir=str(model_dir),
    task="not read",
    model=QuickModel(
      model(width, max_length=max_length, vocab_size=vocab_size).bert
    ),
    privacy=plan.PrivacySettings(
      schedule=schedule.BatchSchedule(
        [
          schedule.Phase(size, size, until)
          for size, until in zip(sizes, (steps // 2, steps), strict=True)
        ]
      ),
      delta=delta,
      noise_multiplier=noise,
      target_epsilon=target_epsilon,
      l2_clip_norm=l2_clip_norm,
      clipping=clipping,
    ),
    optimizer=OPTIMIZERS[optimizer](rate),
    sequence_length=LENGTH,
    physical_batch_size=settings.pop("physical_batch_size", 16),
    masking=masking.MaskingSettings(),
    checkpoints=checkpoints.CheckpointSettings(period=period, keep=keep),
    evaluation=settings.pop("evaluation", evaluation.EvaluationSettings()),
    tensorboard=settings.pop("tensorboard", False),
    fixed_seed=fixed_seed,
    mesh=mesh_lib.MeshSettings(**({"data": 1} if mesh is None else mesh)),
    **settings,
  )


def train(model_dir, corpus=None, **options):
  """Trains; `corpus`: options of `records`."""
  return loop.train(make_run(model_dir, **options), records(**(corpus or {})))


def newest_state(model_dir):
  """(step, every array by name) of the newest checkpoint, without its help."""
  import orbax.checkpoint as ocp

  folder = pathlib.Path(model_dir) / "checkpoints"
  step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
  with ocp.PyTreeCheckpointer() as reader:
    path = (folder / str(step) / "state").absolute()
    # As they are, wherever they were when they were saved.
    plain = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      reader.metadata(path).item_metadata.tree,
    )
    tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
  return step, dict(_flat("", tree))


def _flat(prefix, tree):
  if isinstance(tree, dict | list | tuple):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, part in items:
      yield from _flat(f"{prefix}/{name}", part)
  elif tree is not None:
    yield prefix, np.asarray(tree)


def ledger_bytes(model_dir):
  return (pathlib.Path(model_dir) / "privacy_ledger.jsonl").read_bytes()


def ledger_lines(model_dir, kind=None):
  lines = [json.loads(line) for line in ledger_bytes(model_dir).splitlines()]
  return [line for line in lines if kind in (None, line["kind"])]


def assert_same(one, other):
  """The final states and the ledgers of two MODEL_DIRs are bitwise equal."""
  (step, state), (other_step, other_state) = map(newest_state, (one, other))
  assert step == other_step
  assert state.keys() == other_state.keys()
  assert all(array.any() for array in state.values())  # not both of them lost
  for name, array in state.items():
    np.testing.assert_array_equal(array, other_state[name], err_msg=name)
  assert ledger_bytes(one) == ledger_bytes(other)


def assert_close(one, other):
  """As `assert_same` up to rounding; the ledgers tell of the same updates."""
  (step, state), (other_step, other_state) = map(newest_state, (one, other))
  assert step == other_step
  assert state.keys() == other_state.keys()
  assert all(array.any() for array in state.values())
  for name, array in state.items():
    np.testing.assert_allclose(
      array, other_state[name], rtol=0, atol=1e-5, err_msg=name
    )
  for kind in ("plan", "branch", "release"):
    told = [ledger_lines(directory, kind) for directory in (one, other)]
    for line in (*told[0], *told[1]):
      del line["previous"]
    assert told[0] == told[1]


def cut(model_dir, step):
  """Makes of a whole run what it was after `step` updates, cleanly stopped."""
  for path in (pathlib.Path(model_dir) / "checkpoints").iterdir():
    if path.name.isdigit() and int(path.name) > step:
      shutil.rmtree(path)
  lines = ledger_bytes(model_dir).splitlines(keepends=True)
  kept, released = [], 0
  for line in lines:
    told = json.loads(line)
    released += told["kind"] == "release"
    if released <= step and told["kind"] != "environment":
      kept.append(line)
  path = pathlib.Path(model_dir) / "privacy_ledger.jsonl"
  path.write_bytes(b"".join(kept))


@contextlib.contextmanager
def full_disk(limit):
  """Lets no file grow beyond `limit` bytes until a save has failed of it."""
  save, failed = checkpoints.Checkpoints.save, checkpoints.Checkpoints._failed
  unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

  def limited_save(self, step, *rest):
    if not failures:
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    save(self, step, *rest)

  def told(self, error):
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    failures.append(error)
    failed(self, error)

  failures = []
  with (
    mock.patch.object(checkpoints.Checkpoints, "save", limited_save),
    mock.patch.object(checkpoints.Checkpoints, "_failed", told),
  ):
    yield


def main():
  from dptrain import cli
  from dptrain import configuration

  options = json.loads(sys.argv[2])
  corpus = options.pop("corpus", {})
  limit = options.pop("file_size_limit", None)
  run = make_run(sys.argv[1], **options)
  with (
    mock.patch.object(configuration, "training_run", return_value=run),
    mock.patch.object(
      records_lib, "read_records", return_value=records(**corpus)
    ),
    full_disk(limit) if limit else contextlib.nullcontext(),
  ):
    status = cli.main(["train", *sys.argv[3:]])
  print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
  return status


if __name__ == "__main__":
  sys.exit(main())
