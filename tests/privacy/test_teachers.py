"""What runs that learn from each other cost together, and how it is written."""

import dataclasses
import json
import os

from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from ledger_sessions import PLAN
from ledger_sessions import entries
from ledger_sessions import record
from ledger_sessions import start
import pytest
from test_forged_ledgers import rechained

from dptrain.privacy import accounting
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import others as others_lib
from dptrain.privacy import teachers
from dptrain.privacy.accounting import Releases

DELTA = 1e-5
OTHERS = [
  others_lib.OtherRelease("the vocabulary", name, noise, 1e-7)
  for name, noise in (("x", 2.0), ("y", 3.0))
]

releases = st.lists(
  st.builds(
    Releases,
    st.integers(1, 5),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.sampled_from([1.0, 2.0]),
  ),
  max_size=3,
).map(tuple)


def lists_of(parts):
  """Runs with names of their own, each in one of some parts."""
  source = st.builds(
    teachers.Source,
    st.sampled_from("abcdef"),
    st.sampled_from(parts),
    releases,
    st.lists(st.sampled_from(OTHERS), max_size=3).map(tuple),
  )
  return st.lists(source, max_size=6, unique_by=lambda each: each.run)


ONE_DIVISION = ["shards/0", "shards/1", "shards/2"]
DECLARED = [teachers.declared_part("all", each) for each in range(3)]
ANY = ["", *ONE_DIVISION, "others/0", "others/1", *DECLARED]


@pytest.fixture
def quick(monkeypatch):
  """A price that is monotonic, adds up and takes no time."""

  def epsilon(released, delta, relation, *, quick=False):
    del quick
    return accounting.Epsilon(price(released, delta), relation, "", 0.0, 0.0)

  monkeypatch.setattr(accounting, "epsilon", epsilon)


def price(released, delta):
  costs = (r.count * r.sampling_prob / r.noise_multiplier**2 for r in released)
  return sum(costs) / delta


def naive(runs, others):
  """The price of all that runs released in turn, and of others once each."""
  everything = [r for run in runs for r in run.releases]
  unique = set(others)
  everything += [Releases(1, 1.0, o.noise_multiplier) for o in unique]
  return price(everything, DELTA - sum(o.failure_prob for o in unique))


quickly = settings(
  deadline=None,
  max_examples=50,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(sources=lists_of(ONE_DIVISION))
@quickly
def test_shards_cost_what_the_dearest_of_them_costs(quick, sources):
  found = teachers.composed_epsilon(sources, DELTA, "zero_out").value
  # A vocabulary has read the units of all shards.
  others = [other for each in sources for other in each.others]
  parts = {each.part for each in sources}
  expected = [
    naive([each for each in sources if each.part == part], others)
    for part in parts
  ]
  assert found == pytest.approx(max(expected, default=0.0))


@given(sources=lists_of(DECLARED))
@quickly
def test_declared_corpora_pay_for_their_own_vocabularies(quick, sources):
  found = teachers.composed_epsilon(sources, DELTA, "zero_out").value
  expected = []
  for part in {each.part for each in sources}:
    runs = [each for each in sources if each.part == part]
    expected.append(naive(runs, [o for run in runs for o in run.others]))
  assert found == pytest.approx(max(expected, default=0.0))


@given(sources=lists_of(ANY))
@quickly
def test_whatever_may_overlap_adds_up(quick, sources):
  found = teachers.composed_epsilon(sources, DELTA, "zero_out").value
  divisions = {each.part.rpartition("/")[0] for each in sources}
  everything = naive(sources, [o for each in sources for o in each.others])
  if len(divisions) > 1 or "" in divisions:
    assert found == pytest.approx(everything)
    assert teachers.by_part(sources) == {"": tuple(sources)}
  assert found <= everything * (1 + 1e-9)


@given(sources=lists_of(ANY), more=lists_of(ANY))
@quickly
def test_another_source_never_lowers_it(quick, sources, more):
  def cost(runs):
    return teachers.composed_epsilon(runs, DELTA, "zero_out").value

  # Of one run, too: a newer state of it, in whatever part.
  known = {each.run: each.releases for each in sources}
  more = [
    each._replace(releases=known.get(each.run, ()) + each.releases)
    for each in more
  ]
  assert cost([*sources, *more]) >= cost(sources) * (1 - 1e-9)


@given(sources=lists_of(ANY), data=st.data())
@quickly
def test_the_order_of_sources_does_not_matter(quick, sources, data):
  other = data.draw(st.permutations(sources))
  one, two = (
    teachers.composed_epsilon(each, DELTA, "zero_out").value
    for each in (sources, other)
  )
  assert one == pytest.approx(two)


@given(states=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9))))
@quickly
def test_the_newest_state_of_a_run_counts(states):
  sources = [
    teachers.Source(
      run, "p/0", (Releases(count, 0.1, 1.0),), (OTHERS[count % 2],)
    )
    for run, count in states
  ]
  found = {each.run: each for each in teachers.newest(sources)}
  assert len(found) == len(teachers.newest(sources))
  for run in {run for run, _ in states}:
    counts = [count for other, count in states if other == run]
    assert found[run].num_releases == max(counts)
    # What any of them released beside its updates is not forgotten.
    assert set(found[run].others) == {OTHERS[count % 2] for count in counts}


def test_of_two_states_within_a_round_the_dearer_is_the_newer():
  states = [
    teachers.Source("a", "s/0", (Releases(3, 0.1, 1.0), Releases(1, prob, 1.0)))
    for prob in (0.1, 0.2)
  ]
  for each in (states, states[::-1]):
    assert teachers.newest(each) == (states[1],)


def test_a_run_that_is_said_to_be_in_two_parts_is_in_none():
  states = [teachers.Source("a", f"s/{part}", ()) for part in (0, 1, 1)]
  assert [each.part for each in teachers.newest(states)] == [""]
  assert [each.part for each in teachers.newest(states[1:])] == ["s/1"]


def test_it_is_what_the_accountant_says_of_the_naive_composition():
  one = Releases(4, 0.1, 2.0)
  runs = [
    teachers.Source("a", "s/0", (one,), (OTHERS[0],)),
    teachers.Source("b", "s/1", (one,), (OTHERS[0],)),
    teachers.Source("c", "s/1", (Releases(2, 0.3, 2.0),), (OTHERS[0],)),
  ]
  left = DELTA - OTHERS[0].failure_prob
  vocabulary = Releases(1, 1.0, 2.0)
  dearest = [vocabulary, one, Releases(2, 0.3, 2.0)]
  found = teachers.composed_epsilon(runs, DELTA, "replace_one", quick=True)
  expected = accounting.epsilon(dearest, left, "replace_one", quick=True)
  assert found.value == pytest.approx(expected.value, rel=1e-9)
  runs[0] = runs[0]._replace(part="")
  found = teachers.composed_epsilon(runs, DELTA, "replace_one", quick=True)
  expected = accounting.epsilon(
    [one, *dearest], left, "replace_one", quick=True
  )
  assert found.value == pytest.approx(expected.value, rel=1e-9)


def test_nothing_costs_nothing_and_a_used_up_delta_is_refused():
  assert teachers.composed_epsilon([], DELTA, "zero_out").value == 0.0
  dear = OTHERS[0]._replace(failure_prob=DELTA)
  source = teachers.Source("a", "s/0", (), (dear,))
  with pytest.raises(ValueError, match="is used up"):
    teachers.composed_epsilon([source], DELTA, "zero_out")


def test_two_declarations_say_nothing_of_each_other():
  # A student is declared apart from its teacher, which was declared apart from
  # its own: nobody said so of the first and the last, which may be one corpus.
  mine, yours = (
    [teachers.declared_part(by, each) for each in ("student", "teacher")]
    for by in ("run c", "run b")
  )
  chain = [
    teachers.Source("c", mine[0], (Releases(1, 1.0, 2.0),)),
    teachers.Source("b", mine[1], ()),
    teachers.Source("a", yours[1], (Releases(1, 1.0, 2.0),)),
  ]
  found = teachers.composed_epsilon(chain, DELTA, "zero_out", quick=True)
  both = accounting.epsilon([Releases(2, 1.0, 2.0)], DELTA, quick=True)
  assert found.value == pytest.approx(both.value)


def test_the_part_of_a_shard_names_all_that_decides_it():
  shard = {"index": 0, "count": 2, "corpus": "c", "key": "k", "by": "user"}
  changes = [{"count": 3}, {"corpus": "d"}, {"key": "l"}, {"by": "document"}]
  changes.append({})
  divisions = {
    teachers.shard_part({**shard, **change}).rpartition("/")[0]
    for change in changes
  }
  assert len(divisions) == len(changes)
  assert teachers.shard_part(None) == ""
  runs = [
    teachers.Source(str(i), teachers.shard_part({**shard, "index": i}), ())
    for i in range(2)
  ]
  assert len(teachers.by_part(runs)) == 2


# --- lessons in a ledger -----------------------------------------------------


def lesson(*sources, part="s/0", step=3):
  return teachers.Lesson(
    part,
    tuple(
      teachers.Teacher(f"replica {i}", step, f"f{i}", each.run)
      for i, each in enumerate(sources)
    ),
    sources,
  )


SOURCE = teachers.Source(
  "b",
  "s/1",
  (
    Releases(3, 0.1, 2.0),
    Releases(1, 0.5, 2.0, "truncated_poisson", 100, 60),
    Releases(2, 0.1, 2.0, group_size=3),
  ),
  (OTHERS[0],),
  ("told",),
)


@given(sources=lists_of(ANY))
@quickly
def test_a_lesson_is_read_as_it_was_written(sources):
  for each in (lesson(*sources), lesson(SOURCE)):
    assert teachers.from_dict(json.loads(json.dumps(each.as_dict()))) == each


@pytest.fixture
def opened(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "fsync", lambda _: None)
  with ledger_lib.opened(tmp_path) as ledger:
    start(ledger)
    yield ledger


def branch_of(ledger, branch="", step=0, repeatable=None, lineage="l"):
  return ledger.open_branch(
    checkpoint_branch=branch,
    checkpoint_step=step,
    lineage=lineage,
    environment="e",
    repeatable=repeatable or (lambda branch: True),
  ).name


def test_lessons_are_read_back_equal(opened, tmp_path):
  branch = branch_of(opened)
  later = lesson(SOURCE._replace(releases=(Releases(9, 0.1, 2.0),)), step=9)
  opened.record_lesson(branch, 0, lesson(SOURCE))
  record(opened, branch, 0, 4)
  opened.record_lesson(branch, 4, later)
  record(opened, branch, 4, 6)
  fork = branch_of(opened, branch, 5, lineage="m")
  opened.record_lesson(fork, 5, lesson())
  read = ledger_lib.read(tmp_path)
  assert read.lessons == opened.lessons
  at = read.lessons.at
  assert [at(branch, step) for step in (0, 3, 4, 5)] == [
    *[lesson(SOURCE)] * 2,
    *[later] * 2,
  ]
  assert at(fork, 4) is None
  assert at(fork, 7) == lesson()
  assert read.lessons.begins_at(branch, 4)
  assert not read.lessons.begins_at(branch, 3)
  assert read.lessons.since(branch, 3) == [lesson(SOURCE), later]
  assert read.lessons.since(branch, 4) == [later]
  assert read.lessons.since(fork, 0) == [lesson()]
  assert read.lessons.all() == [lesson(SOURCE), later, lesson()]


def test_a_lesson_that_comes_too_late_is_not_written(opened):
  branch = branch_of(opened)
  opened.record_lesson(branch, 2, lesson(SOURCE))
  record(opened, branch, 0, 4)
  before = opened.path.read_bytes()
  fork = branch_of(opened, branch, 3, lineage="m")
  opened_fork = opened.path.read_bytes()
  for where, step, told in (
    (branch, 3, "update 3 was made without its lesson"),
    ("b" * 64, 9, "never opened"),
    (fork, 2, "update 2 was made"),
  ):
    with pytest.raises(ledger_lib.LedgerError, match=told):
      opened.record_lesson(where, step, lesson(SOURCE))
  opened.record_lesson(fork, 5, lesson(SOURCE))
  with pytest.raises(ledger_lib.LedgerError, match=r"of update 4 stands after"):
    opened.record_lesson(fork, 4, lesson(SOURCE))
  assert opened_fork.startswith(before)
  assert len(ledger_lib.Ledger(opened.path).lessons.all()) == 2


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (lambda x: [*x[:3], *x[4:], x[3]], "update 2 was made without its lesson"),
    (lambda x: [*x[:2], x[3], x[2], *x[4:]], "stands after that of 2"),
    (lambda x: [*x[:3], {**x[3], "branch": "b" * 64}], "never opened"),
    (lambda x: [*x, {**x[3], "step": 1}], "update 1 was made"),
    (lambda x: [*x[:3], {**x[3], "sources": [{"run": "b"}]}], "'part'"),
    (lambda x: [*x[:3], {**x[3], "teachers": [{"name": "b"}]}], "'step'"),
  ],
)
def test_forged_lessons_are_named_by_their_line(opened, change, told):
  branch = branch_of(opened)
  opened.record_lesson(branch, 0, lesson(SOURCE))
  opened.record_lesson(branch, 2, lesson(SOURCE))
  record(opened, branch, 0, 4)
  rechained(opened.path, change)
  with pytest.raises(ledger_lib.LedgerError, match=rf"line \d+ is .*{told}"):
    ledger_lib.Ledger(opened.path)


# --- branches whose teachers are gone ----------------------------------------


def test_a_branch_whose_teachers_are_gone_is_not_repeated(opened):
  root = branch_of(opened)
  record(opened, root, 0, 6)

  def gone(branch):
    return branch != root

  assert branch_of(opened, root, 4) == root
  # Behind its last update there is nothing to repeat.
  assert branch_of(opened, root, 6, gone) == root
  fork = branch_of(opened, root, 4, gone)
  assert fork != root
  record(opened, fork, 4, 8)
  # All is there again, or still: the same fork, whose noise is the same.
  assert branch_of(opened, root, 4, gone) == fork
  assert branch_of(opened, fork, 4) == fork


def test_neither_is_a_fork_of_the_same_name(opened, tmp_path):
  root = branch_of(opened)
  record(opened, root, 0, 6)
  gone = {root}
  names = [root]
  for _ in range(3):
    names.append(branch_of(opened, root, 4, lambda branch: branch not in gone))
    record(opened, names[-1], 4, 5)
    gone.add(names[-1])
  assert len(set(names)) == 4
  # From the very start, likewise.
  again = branch_of(opened, "", 0, lambda branch: branch not in gone)
  assert again not in names
  made = sum(each.count for each in ledger_lib.read(tmp_path).releases())
  assert made == 6 + 3


def test_a_lesson_that_was_not_used_yet_binds_its_branch(opened):
  """Written down and its weights lost: it cannot be written again."""
  root = branch_of(opened)
  record(opened, root, 0, 6)
  opened.record_lesson(root, 6, teachers.Lesson("", (), ()))

  def gone(branch):
    return branch != root

  assert branch_of(opened, root, 6) == root
  fork = branch_of(opened, root, 6, gone)
  assert fork != root
  opened.record_lesson(fork, 6, teachers.Lesson("", (), ()))
  assert branch_of(opened, root, 6, gone) == fork
  assert branch_of(opened, root, 6, lambda _: False) not in (root, fork)


def test_a_fork_without_updates_needs_no_teachers(opened):
  root = branch_of(opened)
  record(opened, root, 0, 6)

  def nothing(branch):
    return False

  fork = branch_of(opened, root, 4, nothing)
  assert branch_of(opened, root, 4, nothing) == fork


# --- chains ------------------------------------------------------------------


def make_run(folder, name, updates, lessons=(), step=0):
  """A ledger in `folder`; `lessons`: of its first updates."""
  folder.mkdir(exist_ok=True)
  with ledger_lib.opened(folder) as ledger:
    start(ledger, seed=name)
    branch = branch_of(ledger)
    for number, each in enumerate(lessons):
      ledger.record_lesson(branch, step + number, each)
      record(ledger, branch, step + number, step + number + 1)
    first = step + len(lessons)
    record(ledger, branch, first, first + updates)
  return ledger_lib.read(folder)


def taught_by(ledger, *, part, own):
  sources = ledger.sources(part)
  head = sources[0]
  teacher = teachers.Teacher("it", head.num_releases, "f", head.run)
  return teachers.Lesson(own, (teacher,), sources)


@pytest.fixture
def fast(monkeypatch):
  monkeypatch.setattr(os, "fsync", lambda _: None)


def told(sources):
  return {each.run: (each.part, each.num_releases) for each in sources}


def test_a_chain_brings_all_that_it_rests_on(tmp_path, fast):
  c = make_run(tmp_path / "c", "c", 5)
  b = make_run(tmp_path / "b", "b", 2, [taught_by(c, part="s/2", own="s/1")])
  a = make_run(tmp_path / "a", "a", 1, [taught_by(b, part="s/1", own="s/0")])
  assert told(a.sources()) == {
    "a": ("s/0", 2),
    "b": ("s/1", 3),
    "c": ("s/2", 5),
  }
  found = teachers.composed_epsilon(a.sources(), 1e-6, "zero_out", quick=True)
  alone = accounting.epsilon(c.update_releases(), 1e-6, quick=True)
  assert found.value == alone.value


def test_two_that_teach_each_other_count_once_each(tmp_path, fast):
  a = make_run(tmp_path / "a", "a", 2)
  b = make_run(tmp_path / "b", "b", 3, [taught_by(a, part="s/0", own="s/1")])
  other = taught_by(b, part="s/1", own="s/0")
  a = make_run(tmp_path / "a", "a", 1, [other], step=2)
  # Itself, in full, and not what somebody knew of it.
  assert told(a.sources()) == {"a": ("s/0", 4), "b": ("s/1", 4)}
  assert a.sources()[0].run == "a"


def test_a_run_whose_part_changed_is_in_no_part(tmp_path, fast):
  c = make_run(tmp_path / "c", "c", 2)
  lessons = [taught_by(c, part="s/2", own=own) for own in ("s/0", "s/1")]
  a = make_run(tmp_path / "a", "a", 1, lessons)
  assert told(a.sources("s/0"))["a"] == ("", 3)
  assert list(teachers.by_part(a.sources())) == [""]
  alone = make_run(tmp_path / "b", "b", 1)
  assert told(alone.sources("s/4")) == {"b": ("s/4", 1)}


def test_all_branches_of_a_teacher_count(tmp_path, fast):
  tmp_path.joinpath("c").mkdir()
  with ledger_lib.opened(tmp_path / "c") as ledger:
    start(ledger, seed="c")
    for lineage in "lm":
      record(ledger, branch_of(ledger, lineage=lineage), 0, 3)
  c = ledger_lib.read(tmp_path / "c")
  assert told(c.sources("s/1")) == {"c": ("s/1", 6)}
  assert [each["kind"] for each in entries(tmp_path / "c")].count(
    "release"
  ) == 6
  assert PLAN.release(0) in [
    dataclasses.replace(r, count=1) for r in c.update_releases()
  ]
