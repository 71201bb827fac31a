"""Reports of runs that learned from others, or read shards of one corpus."""

import json
import math

import pytest

from dptrain import cli
from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import others as others_lib
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.privacy import teachers
from dptrain.privacy.accounting import Releases
from dptrain.reports import report as report_lib
from dptrain.reports import report_page
from dptrain.reports import several_runs

DELTA = 1e-5


def shard(index, **changes):
  told = {"index": index, "count": 2, "corpus": "c", "key": "k", "by": "user"}
  return {**told, **changes}


def run(
  folder,
  *,
  steps=10,
  size=1000,
  shard=None,
  lessons=(),
  noise=1.5,
  budget=None,
  unprotected=(),
  public_teacher=False,
  **settings,
):
  """A ledger; `lessons`: what it learns before its first updates."""
  folder.mkdir()
  if public_teacher:
    told = teachers.Teacher("the frozen teacher", 0, "p", "")
    lessons = [teachers.Lesson("", (told,), ())]
  plan = plan_lib.make_plan(
    plan_lib.PrivacySettings(
      schedule=schedule.constant(50, max(steps, 1)),
      delta=DELTA,
      noise_multiplier=noise,
      target_epsilon=budget,
      **settings,
    ),
    size,
    calibrated_noise=noise,
  )
  with ledger_lib.opened(folder) as ledger:
    ledger.start(
      plan,
      corpus=folder.name,
      seed=f"seed of {folder.name}",
      fixed_seed=False,
      shard=shard,
    )
    for told in unprotected:
      ledger.declare_unprotected(told)
    branch = ledger.open_branch(
      checkpoint_branch="", checkpoint_step=0, lineage="l", environment="e"
    ).name
    for step in range(steps):
      if step < len(lessons):
        ledger.record_lesson(branch, step, lessons[step])
      ledger.record(branch, step, plan.release(step))
  return ledger_lib.read(folder)


def lesson(teacher, *, theirs, own, name="replica 1", step=None):
  sources = teacher.sources(theirs)
  step = sources[0].num_releases if step is None else step
  told = teachers.Teacher(name, step, f"f{step}", sources[0].run)
  return teachers.Lesson(own, (told,), sources)


def price(count, sampling_prob=0.05):
  return accounting.epsilon([Releases(count, sampling_prob, 1.5)], DELTA).value


def parts(*indices):
  return [teachers.shard_part(shard(index)) for index in indices]


# --- several runs ------------------------------------------------------------


def test_shards_are_found_to_be_disjoint(tmp_path):
  ledgers = {
    "a": run(tmp_path / "a", shard=shard(0)),
    # Shards of one corpus are not quite of one size.
    "b": run(tmp_path / "b", shard=shard(1), size=980, steps=7),
  }
  for disjoint in (False, True):
    made = several_runs.make_joint_report(ledgers, disjoint=disjoint)
    assert made.disjoint
    assert made.epsilon == max(made.runs.values()) == price(10)
    assert "shards of one corpus" in made.composed_by
  assert "parallel composition" in made.as_text()


def test_one_shard_twice_adds_up(tmp_path):
  ledgers = {
    name: run(tmp_path / name, shard=shard(index))
    for name, index in (("a", 0), ("b", 0), ("c", 1))
  }
  made = several_runs.make_joint_report(ledgers)
  assert made.disjoint  # a and b together from c
  assert made.epsilon == price(20)


@pytest.mark.parametrize(
  "other",
  [
    None,
    shard(1, corpus="d"),
    shard(1, key="l"),
    shard(1, count=3),
    shard(1, by="document"),
  ],
)
def test_other_divisions_may_share_units(tmp_path, other):
  ledgers = {
    "a": run(tmp_path / "a", shard=shard(0)),
    "b": run(tmp_path / "b", shard=other),
  }
  made = several_runs.make_joint_report(ledgers)
  assert not made.disjoint
  assert made.epsilon == price(20)
  assert "sequential" in made.composed_by
  with pytest.raises(
    ledger_lib.LedgerError, match="--disjoint, but by their ledgers these runs"
  ):
    several_runs.make_joint_report(ledgers, disjoint=True)


def test_shards_of_other_units_are_not_composed(tmp_path):
  ledgers = {
    "a": run(tmp_path / "a", shard=shard(0)),
    "b": run(tmp_path / "b", shard=shard(1), unit="user", records_per_unit=2),
  }
  with pytest.raises(ledger_lib.LedgerError, match="unit is 'user' in one"):
    several_runs.make_joint_report(ledgers)


def test_a_joint_report_brings_the_teachers_of_its_runs(tmp_path):
  teacher = run(tmp_path / "t", steps=12)
  learned = [lesson(teacher, theirs="", own="")]
  ledgers = {
    "a": run(tmp_path / "a", lessons=learned),
    "b": run(tmp_path / "b", steps=3),
  }
  made = several_runs.make_joint_report(ledgers)
  assert made.epsilon == price(25)
  # Its own state in full, and not what the learner knew of it.
  again = several_runs.make_joint_report({**ledgers, "t": teacher})
  assert again.epsilon == price(25)
  with pytest.raises(ledger_lib.LedgerError, match="--disjoint, but by their"):
    several_runs.make_joint_report(ledgers, disjoint=True)


def test_disjoint_says_nothing_of_teachers_that_were_declared_before(tmp_path):
  # b's corpus may be that of a's teacher: nobody said that it is not.
  teacher = run(tmp_path / "t", steps=12)
  theirs, own = (teachers.declared_part("run a", each) for each in (1, 0))
  ledgers = {
    "a": run(tmp_path / "a", lessons=[lesson(teacher, theirs=theirs, own=own)]),
    "b": run(tmp_path / "b", steps=3),
  }
  assert several_runs.make_joint_report(ledgers).epsilon == price(25)
  with pytest.raises(ledger_lib.LedgerError, match="--disjoint, but by their"):
    several_runs.make_joint_report(ledgers, disjoint=True)


def test_replicas_that_taught_each_other_count_once_each(tmp_path):
  ends = parts(0, 1)
  start = run(tmp_path / "early", steps=2, shard=shard(1))
  # What a knew of b, two updates, is part of what b is by now.
  known = lesson(start, theirs=ends[1], own=ends[0])
  source = known.sources[0]._replace(run="seed of b")
  a = run(
    tmp_path / "a",
    shard=shard(0),
    lessons=[known._replace(sources=(source,))],
  )
  b = run(
    tmp_path / "b",
    shard=shard(1),
    lessons=[lesson(a, theirs=ends[0], own=ends[1])],
  )
  made = several_runs.make_joint_report({"a": a, "b": b})
  assert made.disjoint
  assert made.epsilon == price(10)


def test_on_the_command_line(tmp_path, capsys):
  for index in range(2):
    run(tmp_path / f"{index}", shard=shard(index))
  names = [str(tmp_path / f"{index}") for index in range(2)]
  assert cli.main(["report", *names, "--format=json"]) == 0
  told = json.loads(capsys.readouterr().out)
  assert told["disjoint"]
  assert told["epsilon"] == price(10)


# --- one run -----------------------------------------------------------------


def test_a_taught_run_pays_for_its_teacher(tmp_path):
  teacher = run(tmp_path / "t", steps=12, unprotected=["its vocabulary"])
  learner = run(
    tmp_path / "a",
    budget=3.0,
    lessons=[
      lesson(teacher, theirs="", own="", step=8),
      lesson(teacher, theirs="", own="", step=12),
    ],
    unprotected=["the vocabulary"],
  )
  made = report_lib.make_report(learner)
  assert made.epsilon.value == price(22)
  assert made.taught.alone == price(10)
  text = made.as_text()
  assert "all weights of other runs that they learned from," in made.statement()
  facts = dict(made.facts())
  assert facts["budget"] == "epsilon 3, for this run's own releases"
  assert facts["composed by"].startswith("sequential composition")
  assert facts["this run"].endswith(" alone")
  assert facts["replica 1"].startswith("run seed of t, ")
  assert "2 time(s) new weights, last of update 12" in facts["replica 1"]
  assert made.unprotected[:2] == [
    "the vocabulary",
    "Of a run that taught this one: its vocabulary",
  ]
  assert all(len(line) <= 80 for line in text.splitlines())


def test_it_is_told_as_json(tmp_path):
  ends = parts(0, 1)
  teacher = run(tmp_path / "t", steps=12, shard=shard(1))
  learned = [lesson(teacher, theirs=ends[1], own=ends[0])]
  learner = run(tmp_path / "a", shard=shard(0), lessons=learned)
  told = json.loads(report_lib.make_report(learner).as_json())
  assert told["epsilon"]["value"] == price(12)
  taught = told["taught"]
  assert taught["epsilon"] == told["epsilon"]
  assert taught["alone"] == price(10)
  assert "shards of one corpus" in taught["composed_by"]
  assert taught["runs"] == [
    {
      "run": "seed of t",
      "taught_as": "replica 1",
      "lessons": 1,
      "last_step": 12,
      "epsilon": price(12),
    }
  ]
  plain = json.loads(report_lib.make_report(teacher).as_json())
  assert plain["taught"] is None


def refused(constant):
  raise AssertionError(f"{constant} is no JSON")


def test_json_knows_no_infinity(tmp_path):
  teacher = run(tmp_path / "t", noise=1e-200)
  learned = [lesson(teacher, theirs="", own="")]
  learner = run(tmp_path / "a", noise=1e-200, lessons=learned)
  made = report_lib.make_report(learner)
  assert made.epsilon.value == math.inf
  told = json.loads(made.as_json(), parse_constant=refused)
  assert told["taught"]["alone"] == "inf"
  assert told["taught"]["runs"][0]["epsilon"] == "inf"
  joint = several_runs.make_joint_report({"a": learner, "t": teacher})
  assert json.loads(joint.as_json(), parse_constant=refused)["epsilon"] == "inf"


def test_a_teacher_of_a_teacher_is_named(tmp_path):
  first = run(tmp_path / "f", steps=12)
  second = run(
    tmp_path / "s",
    steps=4,
    lessons=[lesson(first, theirs="", own="", name="the frozen teacher")],
  )
  learner = run(
    tmp_path / "a",
    lessons=[lesson(second, theirs="", own="", name="the frozen teacher")],
  )
  made = report_lib.make_report(learner)
  assert made.epsilon.value == price(26)
  facts = dict(made.facts())
  assert facts["the frozen teacher"].startswith("run seed of s, ")
  assert facts["teacher of a teacher"].startswith("run seed of f, ")
  assert "new weights" not in facts["teacher of a teacher"]


def test_what_teachers_took_as_public_is_told(tmp_path):
  teacher = run(tmp_path / "t")
  with ledger_lib.opened(tmp_path / "t") as ledger:
    ledger.declare_public(others_lib.DeclaredPublic("some records", "p"))
  teacher = ledger_lib.read(tmp_path / "t")
  learned = [lesson(teacher, theirs="", own="")]
  made = report_lib.make_report(run(tmp_path / "a", lessons=learned))
  told = [each for each in made.unprotected if "some records" in each]
  assert len(told) == 1
  assert "declared to be public, which is taken on trust" in told[0]


def test_the_page_shows_no_curves_of_one_run_alone(tmp_path):
  teacher = run(tmp_path / "t", shard=shard(1))
  theirs, own = parts(1, 0)
  learned = [lesson(teacher, theirs=theirs, own=own)]
  learner = run(tmp_path / "a", shard=shard(0), lessons=learned)
  page = report_page.make_page(learner)
  assert "Privacy report" in page
  assert "<h2>Groups" not in page
  assert "Behind the number" not in page


def test_a_public_teacher_costs_nothing(tmp_path):
  made = report_lib.make_report(run(tmp_path / "a", public_teacher=True))
  assert made.taught is None
  assert made.epsilon.value == price(10)
  assert "other runs that they learned from" not in made.statement()
