"""Who may teach a run, and what is written down before anybody does.

No model is trained: parameters are arrays of numbers, updates are lines of a
ledger.
"""

import dataclasses
import errno
import hashlib
import json
import re
import types

from etils import epath
import numpy as np
import pytest
import small_run

from dptrain.models import distillation
from dptrain.privacy import accounting
from dptrain.privacy import keys
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import others as others_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.privacy import teachers as teachers_lib
from dptrain.reports import wording
from dptrain.training import checkpoints
from dptrain.training import codistillation
from dptrain.training import exchange as exchange_lib
from dptrain.training import frozen_teacher
from dptrain.training import kept_weights
from dptrain.training import teacher_checks
from dptrain.training import teaching as teaching_lib


def plan_of(**changes):
  settings = {
    "schedule": schedule.constant(10, 40),
    "delta": 1e-6,
    "noise_multiplier": 2.0,
    **changes,
  }
  return plan_lib.make_plan(plan_lib.PrivacySettings(**settings), 1000)


def shard_of(index, count=2, **changes):
  told = {"index": index, "count": count, "corpus": "c", "key": "k"}
  return {**told, "by": "record's number", **changes}


def ledger_of(folder, seed, *, fixed_seed=False, shard=None, **changes):
  """An open ledger of a new run."""
  folder.mkdir()
  manager = ledger_lib.opened(folder)
  ledger = manager.__enter__()
  ledger.kept_open = manager  # or its file would be closed
  ledger.start(
    plan_of(**changes),
    corpus=seed,
    seed=seed,
    fixed_seed=fixed_seed,
    shard=shard,
  )
  return ledger


class Replica:
  """A run that updates nothing but its ledger."""

  def __init__(
    self, root, number, seed=None, shard="own", vocabulary="v", **settings
  ):
    changes = settings.pop("plan", {})
    fixed = settings.pop("fixed_seed", False)
    self.params = {"a": np.full((2, 3), number, np.float32)}
    self.params |= settings.pop("params", {})
    settings = {"replicas": 2, "period": 2, "keep": 9, **settings}
    if shard == "own":
      shard = shard_of(number, settings["replicas"])
    if settings.get("corpora", "shards") != "shards":
      shard = None
    name = f"run_{number}" if seed is None else seed
    self.ledger = ledger_of(
      root / name, name, fixed_seed=fixed, shard=shard, **changes
    )
    self.said = []
    run = types.SimpleNamespace(
      codistillation=codistillation.Codistillation(
        replica=number, exchange=str(root / "exchange"), **settings
      ),
      distillation=distillation.Distillation(),
      learns=True,
      sequence_length=16,
      teacher=frozen_teacher.FrozenTeacher(),
    )
    model = small_run.QuickModel(small_run.model().bert)
    self.plan = plan_of(**changes)
    prepared = types.SimpleNamespace(
      objective=types.SimpleNamespace(model=model),
      params=self.params,
      plan=self.plan,
      seed=keys.SecretSeed(bytes(32), fixed=fixed),
      shard=shard,
      teacher=None,
      vocabulary=vocabulary,
    )
    self.teaching = teaching_lib.Teaching(
      run, root / name, self.ledger, prepared, None, self.said.append
    )
    self.branch = self.ledger.open_branch(
      checkpoint_branch="", checkpoint_step=0, lineage="l", environment="e"
    ).name
    self.teaching.begin(self.branch)
    self.step = 0

  def look(self):
    self.teaching.offer(self.step, self.params)
    return self.teaching.before_update(self.step)

  def update(self, count=1):
    """Updates; who taught in the last of them."""
    for _ in range(count):
      taught = self.look()
      self.ledger.record(self.branch, self.step, self.plan.release(self.step))
      self.params = {name: x + 1 for name, x in self.params.items()}
      self.step += 1
    return taught

  def lessons(self):
    return ledger_lib.read(self.ledger.path.parent).lessons


def both(root, **settings):
  return [Replica(root, number, **settings) for number in range(2)]


def names(taught):
  return [] if taught is None else list(taught.names)


# --- in turn -----------------------------------------------------------------


def test_a_teacher_is_in_the_ledger_and_on_disk_before_it_teaches(tmp_path):
  one, two = both(tmp_path)
  assert names(one.update()) == []  # nobody has published yet
  assert names(two.update()) == ["replica 0 (0)"]
  one.update(3)
  (teacher,) = one.lessons().at(one.branch, 2).teachers
  assert (teacher.name, teacher.step, teacher.run) == ("replica 1", 0, "run_1")
  found = one.update()  # in step 4
  assert names(found) == ["replica 1 (0)"]
  np.testing.assert_array_equal(found.params[0]["a"], np.full((2, 3), 1.0))
  two.update(2)  # publishes after update 2
  assert names(two.update()) == ["replica 0 (2)"]
  assert names(one.update()) == ["replica 1 (0)"]  # until the next look
  assert names(one.update()) == ["replica 1 (2)"]
  path = one.ledger.path.parent / "teachers" / f"{teacher.fingerprint}.npz"
  assert path.exists()


def test_a_ledger_that_cannot_be_written_lets_nobody_teach(
  tmp_path, monkeypatch
):
  one, two = both(tmp_path)
  one.update()

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(two.ledger, "_append", full)
  with pytest.raises(OSError, match="No space"):
    two.look()
  assert not two.ledger.lessons.all()


def test_a_replay_has_the_same_teachers(tmp_path):
  one, two = both(tmp_path)
  one.update()
  two.update(3)
  fingerprint = two.lessons().at(two.branch, 1).teachers[0].fingerprint
  one.update(5)
  # It crashed and goes on from update 1: newer weights are there by now.
  two.step, two.teaching._loaded = 1, {}
  assert two.look().fingerprints == (fingerprint,)
  assert two.teaching.repeatable(two.branch, 0)
  two.teaching.forget(3)
  assert two.teaching.repeatable(two.branch, 3)
  kept = kept_weights.KeptWeights(tmp_path / "run_1" / "teachers")
  kept.forget(())
  assert not two.teaching.repeatable(two.branch, 0)


def test_a_full_exchange_is_told_and_training_goes_on(tmp_path, monkeypatch):
  one, two = both(tmp_path)
  one.update(2)
  kind = epath.Path(tmp_path).__class__

  def write_bytes(path, data):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))

  with monkeypatch.context() as patch:
    patch.setattr(kind, "write_bytes", write_bytes)
    one.update(2)
  assert any("update 2 could not be published" in each for each in one.said)
  assert names(two.look()) == ["replica 0 (0)"]
  one.update(1)
  two.update(2)
  assert names(two.look()) == ["replica 0 (0)"]  # 4 is ahead of it
  assert len(list((tmp_path / "exchange" / "replica_0").glob(".*"))) == 0


def test_one_that_falls_behind_teaches_no_longer(tmp_path):
  one, two = both(tmp_path, max_staleness=2)
  one.update()
  assert names(two.update(3)) == ["replica 0 (0)"]
  assert names(two.update(2)) == []  # 4 updates behind
  two.update(2)
  stale = [told for told in two.said if "updates behind" in told]
  assert len(stale) == 1
  one.update(6)
  assert names(two.update(3)) == ["replica 0 (6)"]


@pytest.mark.parametrize("corpora", codistillation.CORPORA)
def test_what_all_of_them_cost(tmp_path, corpora):
  replicas = [
    Replica(tmp_path, number, replicas=3, topology="ring", corpora=corpora)
    for number in range(3)
  ]
  for _ in range(5):
    for each in replicas:
      each.update()
  assert all(each.lessons().all()[-1].teachers for each in replicas)
  sources = replicas[0].ledger.sources()
  # Nobody told it of replica 1 but replica 2, which it learns from.
  assert {each.run for each in sources} == {"run_0", "run_1", "run_2"}
  found = teachers_lib.composed_epsilon(sources, 1e-6, "zero_out", quick=True)
  count = 5
  if corpora == "overlapping":
    count = sum(each.num_releases for each in sources)
    assert count > 5
  alone = accounting.epsilon(
    [accounting.Releases(count, 0.01, 2.0)], 1e-6, quick=True
  )
  assert found.value == pytest.approx(alone.value)
  parts = {each.part for each in sources}
  assert len(parts) == (1 if corpora == "overlapping" else 3)


def test_two_groups_that_were_declared_disjoint_are_two_declarations(tmp_path):
  sources = []
  for group in ("one", "two"):
    (tmp_path / group).mkdir()
    replicas = [
      Replica(tmp_path / group, i, seed=f"{group} {i}", corpora="disjoint")
      for i in range(2)
    ]
    for _ in range(3):
      for each in replicas:
        each.update()
    sources += replicas[0].ledger.sources()
  assert len(sources) == 4
  assert len(teachers_lib.by_part(sources[:2])) == 2
  assert list(teachers_lib.by_part(sources)) == [""]


def test_what_is_said_of_the_corpora_may_be_corrected(tmp_path):
  one, two = both(tmp_path, corpora="disjoint")
  one.update()
  two.update(2)
  before = two.lessons().at(two.branch, 1)
  assert before.part
  changed = dataclasses.replace(two.teaching._settings, corpora="overlapping")
  two.teaching._settings = changed
  # It looks again and finds the same weights; what they cost is another thing.
  two.update(1)
  after = two.lessons().at(two.branch, 2)
  assert (after.teachers, after.part) == (before.teachers, "")
  assert list(teachers_lib.by_part(two.ledger.sources())) == [""]


# --- copies and older copies -------------------------------------------------


def older(ledger, lines):
  """The file as it was after so many lines."""
  whole = ledger.path.read_bytes()
  ledger.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:lines]))
  return whole


def started_again(replica):
  replica.ledger.kept_open.__exit__(None, None, None)
  with ledger_lib.opened(replica.ledger.path.parent) as ledger:
    prepared = replica.teaching._prepared
    teaching_lib.Teaching(
      replica.teaching._run,
      ledger.path.parent,
      ledger,
      prepared,
      None,
      replica.said.append,
    )


def test_an_older_copy_of_a_model_dir_is_not_gone_on_with(tmp_path):
  one, two = both(tmp_path)
  one.update(5)
  started_again(one)
  whole = older(one.ledger, 4)
  with pytest.raises(ledger_lib.LedgerError, match="update 4 was published"):
    started_again(one)
  one.ledger.path.write_bytes(whole)
  started_again(one)
  started_again(two)  # it has published nothing


def test_a_run_without_a_claim_may_start_anew(tmp_path):
  one = Replica(tmp_path, 0, fixed_seed=True)
  one.update(5)
  older(one.ledger, 2)
  started_again(one)


def test_a_teacher_whose_ledger_forgets_teaches_no_longer(tmp_path):
  one, two = both(tmp_path)
  one.update(4)
  two.update(4)
  assert names(two.look()) == ["replica 0 (2)"]
  whole = older(one.ledger, 3)
  # What an older copy of its MODEL_DIR makes of the same update.
  forged = one.ledger.path.read_bytes()
  line = {"kind": "unprotected", "what": "x"}
  line["previous"] = hashlib.sha256(forged.splitlines(True)[-1]).hexdigest()
  forged += json.dumps(line).encode() + b"\n"
  one.ledger.path.write_bytes(whole)
  meddled(two, ledger=forged)
  two.teaching._said.clear()
  two.step += 2
  for step in (4, 5):
    two.ledger.record(two.branch, step, two.plan.release(step))
  assert names(two.look()) == []
  assert "its ledger lacks lines that it had before" in two.said[-1]


def test_an_earlier_publication_does_not_make_a_teacher_cheaper(tmp_path):
  one, two = both(tmp_path)
  one.update(7)
  two.update(7)
  known = tmp_path / "run_1" / "teachers" / "replica_0.ledger.jsonl"
  before = known.read_bytes()
  part = b"".join(before.splitlines(keepends=True)[:3])
  assert teacher_checks.newest_ledger(part, known) == before
  assert teacher_checks.newest_ledger(before + b"{}\n", known) != before
  assert teacher_checks.newest_ledger(b"another\n", known) == b"another\n"
  assert teacher_checks.newest_ledger(part, known.with_name("no")) == part


# --- who does not teach ------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"vocabulary": "w"}, "does not fit: vocabulary is 'v' there"),
    ({"params": {"b": np.zeros(2)}}, "does not fit: parameters is"),
    ({"params": {"a": np.zeros((9, 3))}}, "does not fit: parameters is"),
    ({"shard": shard_of(1, corpus="d")}, "does not fit: shards is"),
    ({"shard": shard_of(1, by="user")}, "does not fit: shards is"),
    ({"plan": {"unit": "user", "records_per_unit": 2}}, "fit: unit is"),
    ({"plan": {"relation": "replace_one"}}, "does not fit: relation is"),
    ({"fixed_seed": True}, "does not fit: claim is True there"),
    ({"seed": "run_0 again"}, None),
  ],
)
def test_a_replica_that_does_not_fit_is_refused_at_once(
  tmp_path, changes, told
):
  Replica(tmp_path, 0)
  if told is None:
    Replica(tmp_path, 1, **changes)
    return
  with pytest.raises(ValueError, match=told):
    Replica(tmp_path, 1, **changes)


def meddled(two, **changes):
  """What replica 0 publishes next is not what it says."""
  exchange = two.teaching._exchange
  read = exchange.read
  exchange.read = lambda *where: read(*where)._replace(**changes)


def array_of(value, shape=(2, 3), name="a"):
  weights = {name: np.full(shape, value, np.float32)}
  return {
    "weights": weights,
    "fingerprint": checkpoints.state_digest(weights),
  }


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    (array_of(1, shape=(3, 2)), r"another model: a is \(3, 2\) there"),
    (array_of(1, name="b"), "another model: a is absent there"),
    (array_of(np.nan), "a holds numbers that are not finite"),
    (array_of(np.inf), "a holds numbers that are not finite"),
    ({**array_of(1), "fingerprint": "f"}, "do not match their fingerprint"),
    ({"step": 3}, "does not know of all its 3 updates"),
    ({"branch": "b"}, "does not know of all its 0 updates"),
    ({"ledger": b""}, "its ledger has no plan"),
    ({"ledger": b"{}\n"}, "line 1 is damaged"),
  ],
)
def test_a_teacher_that_cannot_be_trusted_is_left_out(tmp_path, changes, told):
  one, two = both(tmp_path)
  one.update(2)
  meddled(two, **changes)
  two.step = 4
  for step in range(4):
    two.ledger.record(two.branch, step, two.plan.release(step))
  assert names(two.look()) == []
  assert len(two.said) == 1
  assert two.said[0].startswith("replica 0 does not teach from update 4 on: ")
  assert re.search(told, two.said[0])
  assert not list((tmp_path / "run_1" / "teachers").glob("*.npz"))


def test_the_seed_of_a_teachers_ledger_is_not_ones_own(tmp_path):
  one, two = both(tmp_path)
  one.update()
  meddled(two, ledger=two.ledger.path.read_bytes())
  assert names(two.look()) == []
  assert "its run has this run's own seed" in two.said[0]


@pytest.mark.parametrize(
  ("changes", "claim", "told"),
  [
    ({"fixed_seed": True}, True, "makes no privacy claim"),
    ({"fixed_seed": True}, False, None),
    ({"relation": "replace_one"}, True, "its relation is 'replace_one'"),
    ({"unit": "user", "records_per_unit": 2}, True, "its unit is 'user'"),
    ({"unit_name": "one patient"}, True, "its unit is 'one patient'"),
    ({"noise_multiplier": 9.0}, True, None),
  ],
)
def test_ledgers_that_compose(tmp_path, changes, claim, told):
  own = ledger_of(tmp_path / "own", "own")
  found = ledger_of(tmp_path / "found", "found", **changes)
  if told is None:
    teacher_checks.check_ledger(found, own, claim=claim)
    return
  with pytest.raises(ValueError, match=told):
    teacher_checks.check_ledger(found, own, claim=claim)


def test_a_name_that_units_share_does_not_make_them_one(tmp_path):
  shared = {"unit_name": "one patient", "records_per_unit": 2}
  own = ledger_of(tmp_path / "own", "own", unit="user", **shared)
  found = ledger_of(tmp_path / "found", "found", unit="document", **shared)
  with pytest.raises(ValueError, match="its unit is 'document', and this run"):
    teacher_checks.check_ledger(found, own, claim=True)


def test_exact_codebooks_teach_no_run_with_a_claim(tmp_path):
  own = ledger_of(tmp_path / "own", "own")
  found = ledger_of(tmp_path / "found", "found")
  found.declare_unprotected(wording.EXACT_CODEBOOKS)
  with pytest.raises(ValueError, match="makes no privacy claim"):
    teacher_checks.check_ledger(found, own, claim=True)
  teacher_checks.check_ledger(found, own, claim=False)


def test_a_ledger_covers_the_updates_of_a_branch(tmp_path):
  ledger = ledger_of(tmp_path / "a", "a")

  def branch(parent, step, lineage):
    return ledger.open_branch(
      checkpoint_branch=parent,
      checkpoint_step=step,
      lineage=lineage,
      environment="e",
    ).name

  root = branch("", 0, "l")
  for step in range(4):
    ledger.record(root, step, plan_of().release(step))
  fork = branch(root, 3, "m")
  for name, steps in ((root, range(5)), (fork, range(4))):
    for step in steps:
      teacher_checks.check_covers(ledger, name, step)
  for name, step in ((root, 5), (fork, 4), ("b", 0)):
    with pytest.raises(ValueError, match=f"know of all its {step} updates"):
      teacher_checks.check_covers(ledger, name, step)


@pytest.mark.parametrize(
  "found",
  [
    None,
    shard_of(0),
    shard_of(1, count=3),
    shard_of(1, corpus="d"),
    shard_of(1, key="l"),
    shard_of(1, by="user"),
  ],
)
def test_only_the_other_shards_of_ones_corpus(found):
  own = shard_of(0)
  teacher_checks.check_shard(shard_of(1), own, 1)
  for learner in (own, None):
    with pytest.raises(ValueError, match="does not train on shard 1"):
      teacher_checks.check_shard(found, learner, 1)


# --- a frozen teacher --------------------------------------------------------

VOCABULARY_FILE = "vocabulary.model"


def npz_of(path, model, **changes):
  params = kept_weights.named(model.init(keys.fixed_seed(0).key("p", "", 0)))
  np.savez(path, **{**{k: np.asarray(v) for k, v in params.items()}, **changes})
  return str(path)


def load(path, model, *, fixed=False, **settings):
  made = frozen_teacher.FrozenTeacher(path=str(path), **settings)
  seed = keys.SecretSeed(b"s" * 32, fixed=fixed)
  return made.load(model, small_run.LENGTH, "v", seed)


@pytest.fixture
def model():
  return small_run.QuickModel(small_run.model().bert)


def test_weights_without_a_ledger_teach_no_run_with_a_claim(tmp_path, model):
  path = npz_of(tmp_path / "teacher.npz", model)
  with pytest.raises(
    ValueError, match=r"has no ledger, .* FrozenTeacher\.declared_public=True"
  ):
    load(path, model)
  for options in ({"declared_public": True}, {"fixed": True}):
    found = load(path, model, **options)
    assert found.ledger is None
    assert found.sources == ()
    assert found.teacher.run == ""


def test_weights_of_other_shapes_are_named(tmp_path, model):
  path = npz_of(tmp_path / "one.npz", model, mix=np.zeros((3, 3)))
  with pytest.raises(
    ValueError, match=r"FrozenTeacher\.path=.* another model: mix is \(3, 3\)"
  ):
    load(path, model, declared_public=True)
  path = npz_of(tmp_path / "two.npz", model, more=np.zeros(3))
  with pytest.raises(ValueError, match=r"more is .* there and absent here"):
    load(path, model, declared_public=True)
  path = npz_of(tmp_path / "three.npz", model, mix=np.full((16, 16), np.nan))
  with pytest.raises(ValueError, match="not finite, in mix"):
    load(path, model, declared_public=True)


@pytest.mark.parametrize("name", ["nothing.npz", "nothing"])
def test_there_is_no_teacher(tmp_path, model, name):
  with pytest.raises(ValueError, match=r"FrozenTeacher\.path=.*"):
    load(tmp_path / name, model, declared_public=True)


def test_a_model_of_another_length_is_refused(tmp_path):
  short = small_run.QuickModel(small_run.model(max_length=8).bert)
  path = npz_of(tmp_path / "teacher.npz", short)
  with pytest.raises(ValueError, match="max_length"):
    load(path, short, declared_public=True)


@pytest.fixture
def finished(tmp_path, model, monkeypatch):
  """A MODEL_DIR whose weights are read from elsewhere."""
  place = tmp_path / "teacher"
  own = keys.SecretSeed(b"t" * 32)
  ledger = ledger_of(place, own.digest("identity").hex())
  (place / "checkpoints" / "4").mkdir(parents=True)
  path = npz_of(tmp_path / "weights.npz", model)
  read = frozen_teacher.initial_weights._read_npz
  monkeypatch.setattr(
    frozen_teacher.initial_weights,
    "_read_run",
    lambda _, told: read(path, told),
  )
  return place, ledger


def test_a_model_dir_without_a_ledger_teaches_nobody(finished, model):
  place, ledger = finished
  ledger.path.unlink()
  with pytest.raises(FileNotFoundError, match="does not exist"):
    load(place, model)


def test_a_model_dir_teaches_at_the_price_in_its_ledger(
  finished, model, tmp_path
):
  place, ledger = finished
  ledger.record_other(others_lib.OtherRelease("vocabulary", "x", 2.0, 1e-8))
  found = load(place, model, corpora="disjoint")
  assert found.teacher.step == 4
  (source,) = found.sources
  assert source.run == found.teacher.run == ledger.header["seed"]
  assert source.others == ledger.others
  own = ledger_of(tmp_path / "own", "own")
  found.check(own, claim=True)
  other = ledger_of(tmp_path / "other", "other", relation="replace_one")
  with pytest.raises(
    ValueError, match=r"FrozenTeacher\.path=.* cannot teach this run: its rel"
  ):
    found.check(other, claim=True)


def test_what_is_declared_says_nothing_of_the_teachers_own_teachers(
  finished, model
):
  place, ledger = finished
  settings = frozen_teacher.FrozenTeacher(path="x", corpora="disjoint")
  name = ledger.header["seed"]
  first = teachers_lib.Source(
    "first", settings.part("the teacher", None, name), ()
  )
  part = settings.part("the student", None, name)
  branch = ledger.open_branch(
    checkpoint_branch="", checkpoint_step=0, lineage="l", environment="e"
  ).name
  ledger.record_lesson(branch, 0, teachers_lib.Lesson(part, (), (first,)))
  found = load(place, model, corpora="disjoint")
  learner = keys.SecretSeed(b"s" * 32).digest("identity").hex()
  own = teachers_lib.Source(
    learner, settings.part("the student", None, learner), ()
  )
  assert list(teachers_lib.by_part([own, *found.sources])) == [""]
  # Of a teacher that nobody has taught it says enough.
  alone = found.sources[0]._replace(
    part=settings.part("the teacher", None, learner)
  )
  assert len(teachers_lib.by_part([own, alone])) == 2


def test_another_vocabulary_is_refused(finished, model, monkeypatch):
  place, _ = finished
  (place / VOCABULARY_FILE).write_bytes(b"of the teacher")
  monkeypatch.setattr(
    frozen_teacher.vocabulary_lib,
    "load_vocabulary",
    lambda path: types.SimpleNamespace(
      fingerprint={b"of the teacher": "w"}.get(path.read_bytes(), "v")
    ),
  )
  with pytest.raises(
    ValueError, match=r"another vocabulary .* VocabularySettings\.path="
  ):
    load(place, model)
  (place / VOCABULARY_FILE).write_bytes(b"of the student")
  assert load(place, model).teacher.step == 4


@pytest.mark.parametrize(
  ("settings", "told"),
  [
    ({"declared_public": True}, r"FrozenTeacher\.path is None"),
    ({"corpora": "apart"}, r"FrozenTeacher\.corpora='apart' is unknown"),
    ({"path": 3}, r"FrozenTeacher\.path=3 must be the name of a MODEL_DIR"),
    ({"path": "x", "declared_public": 1}, r"FrozenTeacher\.declared_public"),
  ],
)
def test_settings_of_no_teacher(settings, told):
  with pytest.raises(ValueError, match=told):
    frozen_teacher.FrozenTeacher(**settings)


def test_descriptions_are_plain_data(tmp_path):
  both(tmp_path)
  path = tmp_path / "exchange" / "replica_1" / "description.json"
  told = json.loads(path.read_text())
  assert told["shards"].keys() == {"count", "corpus", "key", "by"}
  exchange_lib.check_fits(told, {**told, "run": "other"}, "0", "here")


def test_declared_disjoint_is_not_believed_against_the_ledgers():
  one = {"corpus": "a", "key": "k", "count": 2, "index": 0, "by": "document"}
  other = {**one, "index": 1}
  teacher_checks.check_apart(one, other)
  teacher_checks.check_apart(None, other)
  teacher_checks.check_apart({**one, "corpus": "b"}, one)
  for same in (one, {**other, "key": "l"}, {**other, "count": 3}):
    with pytest.raises(ValueError, match="declare 'overlapping'"):
      teacher_checks.check_apart(same, one)
