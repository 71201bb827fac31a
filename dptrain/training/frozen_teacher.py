"""A finished model that teaches: one-way distillation (arXiv 2106.05237).

The teacher sees the very input that the student sees, masks included, and never
changes: a large private model can teach a small one over a long schedule.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax

from dptrain.data import vocabulary as vocabulary_lib
from dptrain.models import masked_lm
from dptrain.privacy import keys as keys_lib
from dptrain.privacy import ledger as ledger_lib
from dptrain.privacy import teachers
from dptrain.training import checkpoints as checkpoints_lib
from dptrain.training import codistillation
from dptrain.training import initial_weights
from dptrain.training import settings
from dptrain.training import teacher_checks

NAME = "the frozen teacher"
_VOCABULARY_FILE = "vocabulary.model"


@dataclasses.dataclass(frozen=True)
class FrozenTeacher:
  """Where a finished teacher is, and what it was trained on.

  Attributes:
    path: a MODEL_DIR (its newest checkpoint counts), whose ledger prices what
      is learned from it; or an .npz file of weights, as `InitialWeights.path`.
      None: no such teacher.
    model: its architecture; None: the student's own.
    declared_public: nothing of a private corpus went into it. Ledger and report
      name it, with its fingerprint.
    corpora: how its corpus relates to the student's: "overlapping" (also if
      they are the same), "disjoint" (taken on trust) or "shards" (of one
      corpus, by `ShardSettings`).
  """

  path: str | None = None
  model: masked_lm.MaskedLanguageModel | None = None
  declared_public: bool = False
  corpora: str = "overlapping"

  def __post_init__(self) -> None:
    settings.check_flag("FrozenTeacher.declared_public", self.declared_public)
    if self.corpora not in codistillation.CORPORA:
      raise ValueError(
        f"FrozenTeacher.corpora={self.corpora!r} is unknown; use one of"
        f" {', '.join(map(repr, codistillation.CORPORA))}."
      )
    if not isinstance(self.path, (str, type(None))):
      raise ValueError(
        f"FrozenTeacher.path={self.path!r} must be the name of a MODEL_DIR or"
        " of an .npz file."
      )
    if self.path is None and (self.model is not None or self.declared_public):
      raise ValueError(
        "FrozenTeacher.path is None, but its model or declared_public is set:"
        " name the MODEL_DIR or .npz file of the teacher."
      )

  def part(self, number: str, shard: Any, student: str) -> str:
    """Which part of the corpora a run has read (`teachers.Source.part`).

    Args:
      number: names the run among those that are declared to be disjoint: the
        student and the teacher. Of the teacher's own teachers it says nothing.
      shard: of its ledger's header.
      student: run (`teachers.Source.run`) that declares it.
    """
    if self.corpora == "shards":
      return teachers.shard_part(shard)
    if self.corpora == "disjoint":
      return teachers.declared_part(f"run {student}", number)
    return ""

  def load(
    self,
    student: masked_lm.MaskedLanguageModel,
    sequence_length: int,
    vocabulary: str,
    own: keys_lib.SecretSeed,
  ) -> "LoadedTeacher | None":
    """Reads the teacher.

    Args:
      student: the run's own model.
      sequence_length: T of the records.
      vocabulary: fingerprint of the run's vocabulary.
      own: the run's seed.

    Returns:
      The teacher; None if there is none.

    Raises:
      ValueError: it does not fit, or nothing tells what learning from it costs.
    """
    if self.path is None:
      return None
    told = f"FrozenTeacher.path={self.path!r}"
    model = (student if self.model is None else self.model).bare
    model.check(sequence_length, student.bert.vocab_size)
    key = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))
    like = jax.eval_shape(model.init, key)
    params = initial_weights.load(self.path, like, "FrozenTeacher.path")
    fingerprint = checkpoints_lib.state_digest(params)
    step, ledger = 0, None
    if not initial_weights.is_file(self.path):
      directory = pathlib.Path(self.path).expanduser()
      step = initial_weights.newest_step(directory)
      _check_vocabulary(told, directory / _VOCABULARY_FILE, vocabulary)
      if not self.declared_public:
        ledger = ledger_lib.read(directory)
    if ledger is None and not self.declared_public and not own.fixed:
      raise ValueError(
        f"{told} has no ledger, so nobody knows what learning from it costs:"
        " name its MODEL_DIR, or, if no private record has entered it, set"
        " FrozenTeacher.declared_public=True."
      )
    run = "" if ledger is None else ledger.header["seed"]
    sources: tuple[teachers.Source, ...] = ()
    if ledger is not None:
      shard = ledger.header.get("shard")
      learner = own.digest("identity").hex()
      sources = ledger.sources(self.part("the teacher", shard, learner))
    teacher = teachers.Teacher(NAME, step, fingerprint, run)
    return LoadedTeacher(
      model, params, teacher, sources, ledger, told, self.corpora
    )


class LoadedTeacher(NamedTuple):
  """A frozen teacher, read whole.

  Attributes:
    model: its architecture.
    params: tree of NumPy arrays.
    teacher: as lessons name it.
    sources: its run and those that it learned from; none if it is public.
    ledger: of its run; None if it has none, or is public.
    told: the setting that named it, for messages.
    corpora: as `FrozenTeacher.corpora`.
  """

  model: masked_lm.MaskedLanguageModel
  params: Any
  teacher: teachers.Teacher
  sources: tuple[teachers.Source, ...]
  ledger: ledger_lib.Ledger | None
  told: str
  corpora: str

  def check(self, own: ledger_lib.Ledger, *, claim: bool) -> None:
    """Refuses a teacher whose releases do not compose with the student's.

    Args:
      own: the student's ledger, with its header.
      claim: whether the student makes a privacy claim.

    Raises:
      ValueError: says why.
    """
    if self.ledger is None:
      return
    try:
      teacher_checks.check_ledger(self.ledger, own, claim=claim)
      if self.corpora == "disjoint":
        there, here = self.ledger.header, own.header
        teacher_checks.check_apart(there.get("shard"), here.get("shard"))
    except ValueError as error:
      raise ValueError(
        f"{self.told} cannot teach this run: {error}."
      ) from error


def _check_vocabulary(told: str, path: pathlib.Path, wanted: str) -> None:
  if not path.exists():
    return
  if vocabulary_lib.load_vocabulary(path).fingerprint != wanted:
    raise ValueError(
      f"{told} speaks another vocabulary than this run: its tokens are others."
      f" Train with VocabularySettings.path={str(path)!r}."
    )
