"""A training run's settings: what a gin file binds."""

import dataclasses

import optax

from dptrain.clipping import methods
from dptrain.data import disjoint_shards
from dptrain.data import masking as masking_lib
from dptrain.data import vocabulary as vocabulary_lib
from dptrain.models import distillation as distillation_lib
from dptrain.models import masked_lm
from dptrain.optimizers import codebook_settings
from dptrain.privacy import plan as plan_lib
from dptrain.training import checkpoints as checkpoints_lib
from dptrain.training import codistillation as codistillation_lib
from dptrain.training import evaluation as evaluation_lib
from dptrain.training import frozen_teacher
from dptrain.training import initial_weights as initial_weights_lib
from dptrain.training import mesh as mesh_lib
from dptrain.training import ngram_learning
from dptrain.training import public_data as public_data_lib
from dptrain.training import settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun:
  """Everything that a user decides about one run.

  Attributes:
    model_dir: where checkpoints, ledger, report and vocabulary go. Its secret
      seed must never be published.
    task: seqio task or mixture of raw documents (feature "text").
    model: encoder and objective.
    privacy: batch schedule, clipping, noise, budget.
    optimizer: any optax transformation.
    sequence_length: T, tokens of one record; a record is the privacy unit.
    physical_batch_size: records whose gradients are in memory at once, on all
      devices together; changes speed and memory, never the result.
    microbatch_size: records that one shard of the mesh (one device, say) clips
      at once, in a loop; divides its part of `physical_batch_size`. None: all
      of them. Also changes only speed and memory.
    mesh: how devices are arranged; all of them by default.
    clipping_method: "auto", "one_pass", "two_pass" or "vmap": changes speed and
      memory, never the result (`dptrain.clipping.methods`).
    vocabulary: how the vocabulary is trained, or where it is.
    masking: what is masked.
    checkpoints: when to save.
    evaluation: when to evaluate on the validation split.
    public_data: public records that take part, unclipped and without noise.
    initial_weights: where training starts; fresh parameters by default.
    codebooks: rates and thresholds of an N-Grammer's codebooks and tables; not
      read for a model without one.
    shard: which units of the corpus are this run's; all of them by default.
    codistillation: which other runs it learns from while they train.
    teacher: a finished model that it learns from; none by default.
    distillation: how it learns from teachers, if it has any.
    prepared: folder that `dptrain prepare` has written: train on its records,
      and never read the task. None: read and tokenise the task at each start.
    train_split: name of the task's split to train on.
    validation_split: name of the split to evaluate on; None for none.
    log_period: updates between figures of progress and TensorBoard points.
    tensorboard: write TensorBoard curves into MODEL_DIR.
    unprotected_training_metrics: also log loss, accuracy, realised batch size,
      clip fraction and gradient SNR of the private examples. They are outside
      the guarantee and the report says so.
    fixed_seed: a seed known to everyone, for tests: no privacy claim.
  """

  model_dir: str
  task: str
  model: masked_lm.MaskedLanguageModel
  privacy: plan_lib.PrivacySettings
  optimizer: optax.GradientTransformation
  sequence_length: int
  physical_batch_size: int
  microbatch_size: int | None = None
  clipping_method: str = "auto"
  vocabulary: vocabulary_lib.VocabularySettings = dataclasses.field(
    default_factory=vocabulary_lib.VocabularySettings
  )
  masking: masking_lib.MaskingSettings = dataclasses.field(
    default_factory=masking_lib.MaskingSettings
  )
  checkpoints: checkpoints_lib.CheckpointSettings = dataclasses.field(
    default_factory=checkpoints_lib.CheckpointSettings
  )
  evaluation: evaluation_lib.EvaluationSettings = dataclasses.field(
    default_factory=evaluation_lib.EvaluationSettings
  )
  mesh: mesh_lib.MeshSettings = dataclasses.field(
    default_factory=mesh_lib.MeshSettings
  )
  public_data: public_data_lib.PublicData = dataclasses.field(
    default_factory=public_data_lib.PublicData
  )
  initial_weights: initial_weights_lib.InitialWeights = dataclasses.field(
    default_factory=initial_weights_lib.InitialWeights
  )
  codebooks: codebook_settings.CodebookSettings = dataclasses.field(
    default_factory=codebook_settings.CodebookSettings
  )
  shard: disjoint_shards.ShardSettings = dataclasses.field(
    default_factory=disjoint_shards.ShardSettings
  )
  codistillation: codistillation_lib.Codistillation = dataclasses.field(
    default_factory=codistillation_lib.Codistillation
  )
  teacher: frozen_teacher.FrozenTeacher = dataclasses.field(
    default_factory=frozen_teacher.FrozenTeacher
  )
  distillation: distillation_lib.Distillation = dataclasses.field(
    default_factory=distillation_lib.Distillation
  )
  prepared: str | None = None
  train_split: str = "train"
  validation_split: str | None = "validation"
  log_period: int = 10
  tensorboard: bool = True
  unprotected_training_metrics: bool = False
  fixed_seed: int | None = None

  def __post_init__(self) -> None:
    if not self.model_dir:
      raise ValueError(
        "TrainingRun.model_dir is empty: set MODEL_DIR to a folder for the"
        " checkpoints, for example --gin.MODEL_DIR=\"'runs/first'\"."
      )
    for name in ("physical_batch_size", "log_period", "sequence_length"):
      settings.check_whole(f"TrainingRun.{name}", getattr(self, name), least=1)
    if self.microbatch_size is not None:
      settings.check_whole(
        "TrainingRun.microbatch_size", self.microbatch_size, least=1
      )
      if self.physical_batch_size % self.microbatch_size:
        raise ValueError(
          f"TrainingRun.microbatch_size={self.microbatch_size} does not divide"
          f" physical_batch_size={self.physical_batch_size}; choose a divisor."
        )
    for name in ("tensorboard", "unprotected_training_metrics"):
      settings.check_flag(f"TrainingRun.{name}", getattr(self, name))
    if self.fixed_seed is not None:
      settings.check_whole("TrainingRun.fixed_seed", self.fixed_seed, least=0)
    if self.clipping_method not in methods.METHODS:
      raise ValueError(
        f"TrainingRun.clipping_method={self.clipping_method!r} is unknown; use"
        f" one of {', '.join(map(repr, methods.METHODS))}."
      )
    if self.clipping_method == "two_pass" and (
      getattr(self.model.bert, "ngrammer", None) is not None
    ):
      raise ValueError(
        "TrainingRun.clipping_method='two_pass' makes each gradient twice, and"
        " the clusters that Bert.ngrammer finds nearest may differ between the"
        " norm and the sum; use 'auto' or 'one_pass'."
      )
    if self.clipping_method == "two_pass" and self.model.sampling is not None:
      # Compiled twice, a hidden state may round otherwise and draw otherwise.
      raise ValueError(
        "TrainingRun.clipping_method='two_pass' makes each gradient twice, and"
        " classes drawn by MaskedLanguageModel.sampling may differ between the"
        " norm and the sum; use 'auto' or 'one_pass'."
      )
    self.codistillation.check_shard(self.shard.index, self.shard.count)
    if self.learns:
      self.model.check_takes_targets()
    ngram_learning.check_scaled(self.model)
    ngram_learning.check_claim(self.model, self.fixed_seed)
    self.model.check(self.sequence_length, self.model.bert.vocab_size)

  @property
  def learns(self) -> bool:
    """Whether any teacher's predictions can enter an update."""
    if self.distillation.weight == 0:
      return False
    return bool(self.codistillation.teachers) or self.teacher.path is not None


@dataclasses.dataclass(frozen=True)
class TrainingResult:
  """How a run ended.

  Attributes:
    step: updates made.
    stopped: why it ended before the plan's last update; empty if it did not.
    epsilon: of everything released from this MODEL_DIR.
    delta: of the guarantee.
    accuracy: on the validation split; None without one.
    baseline_accuracy: of always guessing the most frequent token.
    expected_examples: sum of expected batch sizes: public.
  """

  step: int
  stopped: str
  epsilon: float
  delta: float
  accuracy: float | None
  baseline_accuracy: float | None
  expected_examples: int
