"""Two replicas that learn from each other, against one program that holds both.

Shapes: B examples of an update, M masked, V vocabulary.
"""

import contextlib
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pairs
import pytest
from scipy import special
import small_run

from dptrain.data import disjoint_shards
from dptrain.data import masking
from dptrain.models import distillation
from dptrain.privacy import draws
from dptrain.privacy import noise
from dptrain.training import checkpoints
from dptrain.training import codistillation
from dptrain.training import loop
from dptrain.training import objective
from dptrain.training import programs
from dptrain.training import step

STEPS, PERIOD = 6, 2
DISTILLING = {"burn_in": 1, "ramp": 2, "weight": 0.7, "temperature": 2.0}
EACH_UPDATE = {"period": 1, "keep": 50}


def records():
  return small_run.records(validation=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """A folder with two replicas that exchanged weights before each update."""
  folder = tmp_path_factory.mktemp("pair")
  runs = [replica(folder, number) for number in range(2)]
  pairs.train_in_step(runs, [records()] * 2)
  return folder


def replica(folder, number, **options):
  return pairs.make_run(
    folder,
    number,
    **{
      "steps": STEPS,
      "exchanging": EACH_UPDATE,
      "distilling": DISTILLING,
      "validation_split": None,
      **options,
    },
  )


class Reference:
  """One replica, written out: no part of dptrain's step, clipping or teaching.

  Plan, records, keys and masks are those of the run.
  """

  def __init__(self, stack, folder, number):
    run = replica(folder, number)
    copy = shutil.copytree(folder / f"r{number}", folder / f"as_r{number}")
    options = {"exchanging": {**EACH_UPDATE, "exchange": str(folder / "no")}}
    same = replica(folder, number, model_dir=copy, **options)
    self.prepared = loop.begin(stack, same, records()).prepared
    self.model, self.optimizer = run.model, run.optimizer
    (branch,) = small_run.ledger_lines(copy, "branch")
    self.branch = branch["name"]
    self.lessons = dict(pairs.lessons(copy))
    self.params = self.prepared.initial_state()["params"]
    self.opt_state = run.optimizer.init(self.params)

  def key(self, purpose, step):
    return self.prepared.seed.key(purpose, self.branch, step)

  def updated(self, step, teacher):
    """Parameters after update `step` with these parameters of the teacher."""
    plan, store = self.prepared.plan, self.prepared.store
    members = draws.draw(plan, self.key, store.num_examples, step)
    gradients = jax.tree.map(jnp.zeros_like, self.params)
    settings = masking.MaskingSettings()
    past = step - DISTILLING["burn_in"] + 1
    weight = DISTILLING["weight"] * np.clip(past / 3, 0.0, 1.0)
    for member in members:
      key = jax.random.fold_in(self.key("examples", step), int(member))
      tokens = jnp.asarray(store.gather(np.array([member])))
      mask_key = jax.random.split(key)[:1]
      row = masking.mask_batch(mask_key, tokens, settings, small_run.VOCABULARY)
      gradient = self.gradient(self.params, teacher, row, weight)
      norm = optax.tree.norm(gradient)
      scale = jnp.minimum(1.0, plan.l2_clip_norm / norm) / plan.l2_clip_norm
      gradients = jax.tree.map(
        lambda total, g, scale=scale: total + scale * g, gradients, gradient
      )
    # Other teachers, other noise.
    taught_by = [name for _, _, name in self.lessons.get(step, [])]
    told = "\x1f".join([self.branch, *taught_by]).encode()
    branch = hashlib.sha256(told).hexdigest() if taught_by else self.branch
    drawn = noise.gaussian_like(
      self.prepared.seed.key("noise", branch, step),
      gradients,
      plan.noise_multiplier,
    )
    size = plan.expected_batch_size(step)
    mean = jax.tree.map(lambda g, n: (g + n) / size, gradients, drawn)
    updates, self.opt_state = self.optimizer.update(
      mean, self.opt_state, self.params
    )
    return optax.apply_updates(self.params, updates)

  def gradient(self, params, teacher, row, weight):
    if not hasattr(self, "_gradient"):

      def loss(params, teacher, row, weight):
        temperature = DISTILLING["temperature"]
        logits = self.model._logits(params, row, None)[0][0]  # [M, V]
        taught = self.model._logits(teacher, row, None)[0][0]
        hard = -jax.nn.log_softmax(logits)[
          jnp.arange(len(logits)), row["labels"][0]
        ]
        soft = -jnp.sum(
          jax.nn.softmax(taught / temperature)
          * jax.nn.log_softmax(logits / temperature),
          axis=-1,
        )
        terms = hard + weight * temperature**2 * soft
        there = row["weights"][0]
        return jnp.sum(there * terms) / jnp.maximum(jnp.sum(there), 1.0)

      self._gradient = jax.jit(jax.grad(loss))
    return self._gradient(params, teacher, row, weight)


def test_a_pair_is_what_one_program_with_both_models_computes(pair):
  with contextlib.ExitStack() as stack:
    both = [Reference(stack, pair, number) for number in range(2)]
    for step in range(STEPS):
      after = [
        one.updated(step, other.params) for one, other in (both, reversed(both))
      ]
      for one, params in zip(both, after, strict=True):
        one.params = params
  for number, one in enumerate(both):
    _, state = small_run.newest_state(pair / f"r{number}")
    for name, array in one.params.items():
      np.testing.assert_allclose(
        state[f"/params/{name}"], array, rtol=0, atol=2e-5, err_msg=name
      )


def test_lessons_name_what_was_published(pair):
  """Before update s a replica learns of what the other was after s updates."""
  for number in range(2):
    published = {}
    folder = pair / "exchange" / f"replica_{1 - number}"
    for path in folder.glob("*.npz"):
      with np.load(path) as file:
        told = json.loads(file["told.json"].tobytes())
        weights = {
          name.removeprefix("weight/"): file[name]
          for name in file.files
          if name.startswith("weight/")
        }
      assert checkpoints.state_digest(weights) == told["fingerprint"]
      published[told["step"]] = told["fingerprint"]
    assert pairs.lessons(pair / f"r{number}") == [
      (step, [(f"replica {1 - number}", step, published[step])])
      for step in range(DISTILLING["burn_in"], STEPS)
    ]


def test_no_weight_is_plain_training(pair, tmp_path):
  shutil.copytree(pair / "key", tmp_path / "key")
  plain = replica(tmp_path, 0, model_dir=tmp_path / "plain")
  alone = small_run.make_run(
    tmp_path / "plain",
    steps=STEPS,
    sizes=(10, 20),
    shard=plain.shard,
    fixed_seed=100,
    validation_split=None,
  )
  loop.train(alone, records())
  weightless = replica(tmp_path, 0, distilling={"weight": 0.0})
  loop.train(weightless, records())
  small_run.assert_same(tmp_path / "plain", tmp_path / "r0")
  # With teachers it was another run.
  _, taught = small_run.newest_state(pair / "r0")
  _, state = small_run.newest_state(tmp_path / "r0")
  assert any(np.any(state[name] != taught[name]) for name in state)


def test_a_burn_in_that_outlasts_the_run_is_told(tmp_path, capfd):
  for burn_in in (STEPS - 1, STEPS):
    run = replica(tmp_path, 0, distilling={"burn_in": burn_in})
    with contextlib.ExitStack() as stack:
      loop.begin(stack, run, records())
    told = f"Distillation.burn_in={STEPS} outlasts the run's {STEPS} updates"
    assert (told in capfd.readouterr().err) == (burn_in == STEPS)


def test_a_late_teacher_serves_until_the_limit(pair, tmp_path, capfd):
  """Replica 1 went no further than 2 updates; replica 0 makes 6."""
  shutil.copytree(pair / "exchange", tmp_path / "exchange")
  shutil.rmtree(tmp_path / "exchange" / "replica_0")
  for path in (tmp_path / "exchange" / "replica_1").glob("*.npz"):
    if int(path.name[9:17]) > 2:
      path.unlink()
  exchanging = {**EACH_UPDATE, "max_staleness": 2}
  run = replica(tmp_path, 0, exchanging=exchanging)
  loop.train(run, records())
  told = [
    (step, [(name, at) for name, at, _ in teachers])
    for step, teachers in pairs.lessons(tmp_path / "r0")
  ]
  # 3 and 4 go on with what was published after 2, which 5 finds too old.
  assert told == [
    (1, [("replica 1", 1)]),
    (2, [("replica 1", 2)]),
    (5, []),
  ]
  assert (
    "replica 1 published last after update 2, 3 updates behind"
    in capfd.readouterr().err
  )


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_several_teachers_count_alike(average):
  model = small_run.QuickModel(small_run.model().bert)
  own = objective.Objective(model, masking.MaskingSettings())
  teachers = [model.init(jax.random.key(seed)) for seed in range(3)]
  batch = {
    "tokens": jnp.asarray(small_run.store(4).tokens),
    "example_ids": jnp.arange(4),
    "is_padding": jnp.zeros(4, bool),
  }
  key = jax.random.key(5, impl="threefry2x32")
  settings = distillation.Distillation(average=average, temperature=2.0)
  taught = programs.make_targets(own, settings, (model,) * 3)(
    teachers, batch, key, np.float32(0.5)
  )
  masked = own.masked_for_teachers(batch, step.example_keys(batch, key))
  each = np.stack(
    [np.asarray(model.logits(t, masked), np.float64) for t in teachers]
  )
  if average == "logits":
    expected = special.softmax(each.mean(axis=0) / 2.0, axis=-1)
  else:
    expected = special.softmax(each / 2.0, axis=-1).mean(axis=0)
  found = np.asarray(taught["targets"].logits, np.float64)
  np.testing.assert_allclose(
    special.softmax(found / 2.0, axis=-1), expected, atol=1e-6
  )
  np.testing.assert_array_equal(taught["targets"].weight, [0.5] * 4)


@pytest.mark.parametrize(
  ("topology", "count", "expected"),
  [
    ("all_to_all", 1, [()]),
    ("all_to_all", 3, [(1, 2), (0, 2), (0, 1)]),
    ("ring", 4, [(3,), (0,), (1,), (2,)]),
    ("pairs", 4, [(1,), (0,), (3,), (2,)]),
  ],
)
def test_who_teaches_whom(topology, count, expected):
  found = [
    codistillation.Codistillation(
      replicas=count, replica=number, topology=topology
    ).teachers
    for number in range(count)
  ]
  assert found == expected


@pytest.mark.parametrize(
  ("settings", "told"),
  [
    ({"replicas": 0}, "Codistillation.replicas=0"),
    ({"replicas": 2, "replica": 2}, "Codistillation.replica=2 must lie below"),
    ({"topology": "star"}, "topology='star' is unknown"),
    ({"replicas": 3, "topology": "pairs"}, "even number of replicas, not 3"),
    ({"corpora": "same"}, "corpora='same' is unknown"),
    ({"period": 0}, "Codistillation.period=0"),
    ({"max_staleness": -1}, "Codistillation.max_staleness=-1"),
    ({"keep": 1}, "Codistillation.keep=1"),
    (
      {"wait_seconds": float("nan")},
      "wait_seconds=nan must be a number",
    ),
  ],
)
def test_settings_that_are_refused(settings, told):
  with pytest.raises(ValueError, match=told):
    codistillation.Codistillation(**settings)


def test_one_corpus_that_nobody_divided(tmp_path):
  whole = disjoint_shards.ShardSettings()
  with pytest.raises(ValueError, match="replicas would read the same units"):
    replica(tmp_path, 0, shard=whole)
  other = disjoint_shards.ShardSettings(1, 2, str(tmp_path))
  with pytest.raises(ValueError, match="the shard of its own number"):
    replica(tmp_path, 0, shard=other)
  declared = replica(tmp_path, 0, shard=whole, corpora="overlapping")
  assert declared.learns
