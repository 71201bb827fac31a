"""Codebooks in the private step, in runs, and where they leak on purpose."""

import dataclasses
import shutil

import flax.linen as nn
import hypothesis
from hypothesis import strategies
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax
import pytest
import small_run

from dptrain import configuration
from dptrain.auditing import audit
from dptrain.clipping import rules
from dptrain.models import masked_lm
from dptrain.models import ngrammer
from dptrain.models import scaled
from dptrain.optimizers import codebook_learning
from dptrain.optimizers import codebook_settings
from dptrain.optimizers import ngram_parameters
from dptrain.optimizers import sgd
from dptrain.privacy import ledger as ledger_lib
from dptrain.reports import report
from dptrain.reports import several_runs
from dptrain.training import checkpoints
from dptrain.training import initial_weights
from dptrain.training import loop
from dptrain.training import ngram_learning
from dptrain.training import preparation
from dptrain.training import sharded_step
from dptrain.training import step as step_lib

ROWS, LENGTH, HEADS, WIDTH, K = 4, 6, 2, 16, 5
METHODS = ("one_pass", "vmap")


class Encoder(nn.Module):
  """The layer and nothing beside it: compiles in a tenth of Bert's time."""

  vocab_size: int
  width: int
  num_heads: int
  max_length: int
  ngrammer: ngrammer.NGrammerSettings
  dropout_rate: float = 0.0
  logit_scale: float | None = None

  @nn.compact
  def __call__(self, inputs, positions):
    tokens = nn.Embed(self.vocab_size, self.width, name="token_embedding")
    layer = ngrammer.NGrammer(self.ngrammer, self.num_heads, name="ngrammer")
    x = layer(tokens(inputs), inputs != 0)
    x = jnp.tanh(x + x.mean(1, keepdims=True))
    return tokens.attend(jnp.take_along_axis(x, positions[..., None], axis=1))


def model(heads=HEADS, **settings):
  given = {
    "num_clusters": K,
    "table_size": 23,
    "ngram_dim": 4,
    "deviation_scale": 0.1,
    **settings,
  }
  return masked_lm.MaskedLanguageModel(
    Encoder(
      vocab_size=small_run.VOCABULARY,
      width=heads * WIDTH // HEADS,
      num_heads=heads,
      max_length=small_run.LENGTH,
      ngrammer=ngrammer.NGrammerSettings(**given),
    )
  )


def key(number):
  return jax.random.key(number, impl="threefry2x32")


def batch_of(seed, rows=ROWS, lengths=None):
  draw = np.random.default_rng(seed)
  tokens = draw.integers(5, small_run.VOCABULARY, (rows, LENGTH), np.int32)
  if lengths is not None:
    tokens[np.arange(LENGTH) >= np.asarray(lengths)[:, None]] = 0
  return {
    "inputs": tokens,
    "positions": np.tile(np.arange(2), (rows, 1)),
    "labels": draw.integers(5, small_run.VOCABULARY, (rows, 2), np.int32),
    "weights": np.ones((rows, 2), np.float32),
    "is_padding": np.zeros(rows, bool),
    "example_ids": np.arange(rows),
  }


def make_step(model, method="auto", norm=1.0, optimizer=None, **settings):
  optimizer = sgd.sgd(0.1) if optimizer is None else optimizer
  return step_lib.PrivateStep(
    model.losses,
    rules.ClippingRule("flat", norm),
    ngram_learning.optimizer_for(
      model, optimizer, codebook_settings.CodebookSettings(decay=0.9)
    ),
    clipping_method=method,
    unprotected_codebooks=ngram_learning.unprotected_codebooks(model),
    **settings,
  )


def summed(model, method, norm):
  """A compiled function from parameters and a batch to the clipped sum."""
  step = make_step(model, method, norm)

  @jax.jit
  def found(params, batch):
    zeros = step.zeros(params, batch)
    return step.accumulate(params, zeros, batch, key(1)).gradients

  return found


def distance(one, other):
  """L2 distance of two trees, over all leaves, in float64."""
  return np.sqrt(
    sum(
      np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
      for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
  )


@pytest.fixture(scope="module")
def sums():
  """By method: the sum of a model whose every part of a release is long."""
  norm = 0.5
  chosen = model(
    sides="both", select_rows=True, weight=3.0, row_weight=2.0, ngram_dim=2
  )
  found = {method: summed(chosen, method, norm) for method in METHODS}
  return found, jax.jit(chosen.init)


@pytest.mark.parametrize("method", METHODS)
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(data=strategies.data())
def test_one_example_moves_the_whole_sum_by_no_more_than_is_priced(
  sums, method, data
):
  found, init = sums[0][method], sums[1]
  seed = data.draw(strategies.integers(0, 2**16))
  lengths = data.draw(
    strategies.lists(
      strategies.integers(2, LENGTH), min_size=ROWS, max_size=ROWS
    )
  )
  spread = data.draw(strategies.sampled_from([1.0, 10.0, 100.0]))
  row = data.draw(strategies.integers(0, ROWS - 1))
  params = jax.tree.map(lambda x: spread * x, init(key(seed)))
  batch = batch_of(seed, lengths=lengths)
  if data.draw(strategies.booleans()):  # one word again and again: collisions
    batch["inputs"][row, : lengths[row]] = 7
  whole = found(params, batch)
  absent = {**batch, "is_padding": np.arange(ROWS) == row}
  rule = rules.ClippingRule("flat", 0.5)
  assert distance(whole, found(params, absent)) <= rule.sensitivity * 1.00001
  another = {
    name: np.where(
      (np.arange(ROWS) == row).reshape(-1, *[1] * (x.ndim - 1)), y, x
    )
    for (name, x), y in zip(
      batch.items(), batch_of(seed + 1).values(), strict=True
    )
  }
  moved = distance(whole, found(params, another))
  assert moved <= 2 * rule.sensitivity * 1.00001


def test_the_sum_has_all_its_parts_and_both_methods_agree(sums):
  found, init = sums
  batch = batch_of(3, lengths=[6, 2, 4, 6])
  params = init(key(3))
  one, other = (found[method](params, batch) for method in METHODS)
  assert distance(one, other) <= 1e-5
  for part in (ngram_parameters.is_codebook, ngram_parameters.is_table):
    for leaf in jax.tree.leaves(ngram_parameters.divided(one, part)[1]):
      # Centres' deviations or rows, and counts.
      assert np.abs(leaf[:, :-1]).max() > 0
      assert leaf[:, -1].max() > 0
      assert leaf[:, -1].min() == 0


def praxis(params, batches, decay):
  """The paper's running means, in float64, over all examples of all batches."""
  tokens = np.concatenate([b["inputs"][~b["is_padding"]] for b in batches])
  table = np.asarray(params["token_embedding"]["embedding"], np.float64)
  heads = table[tokens].reshape(-1, HEADS, WIDTH // HEADS)
  found = []
  for head in range(HEADS):
    book = params["ngrammer"][f"codebook_{head}"]["embedding"]
    centres, x = np.asarray(book, np.float64)[:, :-1], heads[:, head]
    ids = np.argmin(((x[:, None] - centres) ** 2).sum(-1), axis=1)
    hot = np.eye(len(centres))[ids]
    means = hot.T @ x / np.maximum(hot.sum(0), 1)[:, None]
    means = decay * centres + (1 - decay) * means
    # An empty cluster keeps its centre, unlike the paper's.
    found.append(np.where(hot.sum(0)[:, None] > 0, means, centres))
  return found


def test_unprotected_codebooks_are_the_papers_means_of_the_batch():
  """Over microbatches, physical batches and shards, whatever clipping does."""
  chosen = model(learning="unprotected")
  params = chosen.init(key(0))
  batches = [batch_of(1), batch_of(2)]
  batches[1]["is_padding"][2:] = True
  step = make_step(chosen, "vmap", 1e-3, microbatch_size=2)
  state = step.init(params)
  accumulate = jax.jit(step.accumulate)
  parts = [
    accumulate(params, step.zeros(params, batch, state), batch, key(1))
    for batch in batches
  ]
  # Of two shards, whose sums `finish` joins.
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
  new, _, _ = jax.jit(sharded_step.ShardedStep(step, mesh).finish)(
    params,
    state,
    jax.tree.map(lambda *x: jnp.stack(x), *parts),
    noise_key=key(2),
    noise_multiplier=1.0,
    expected_batch_size=3.0,
  )
  new = new["ngrammer"]
  for head, means in enumerate(praxis(params, batches, 0.9)):
    book = np.asarray(new[f"codebook_{head}"]["embedding"])
    np.testing.assert_allclose(book[:, :-1], means, rtol=1e-4, atol=1e-7)
  # All else is private as ever: tables got noise on every row.
  table = np.asarray(params["ngrammer"]["table_0"]["embedding"])
  assert (np.asarray(new["table_0"]["embedding"]) != table).all()


def run_of(directory, chosen, **settings):
  made = small_run.make_run(directory, steps=4, period=2, **settings)
  return dataclasses.replace(
    made,
    model=chosen,
    codebooks=codebook_settings.CodebookSettings(
      decay=0.5, mass_floor=0.1, restart_after=1, table_rate=2.0
    ),
  )


def trained(directory, chosen, **settings):
  run = run_of(directory, chosen, **settings)
  loop.train(run, small_run.records(validation=False))
  return small_run.newest_state(directory)


def test_a_run_resumes_with_its_codebooks_bit_for_bit(tmp_path):
  whole, resumed = tmp_path / "whole", tmp_path / "resumed"
  one = model(heads=1)
  step, state = trained(whole, one, optimizer="sgd")
  assert step == 4
  shutil.copytree(whole, resumed)
  small_run.cut(resumed, 2)
  assert small_run.newest_state(resumed)[0] == 2
  step, again = trained(resumed, one, optimizer="sgd")
  assert step == 4
  assert state.keys() == again.keys()
  for name, array in state.items():
    np.testing.assert_array_equal(array, again[name], err_msg=name)
  assert small_run.ledger_bytes(whole) == small_run.ledger_bytes(resumed)
  inner = [n for n in state if "/inner/" in n and "codebook" in n]
  assert not inner  # moments of codebooks are nobody's
  own = [n for n in state if "/opt_state/" in n and "codebook" in n]
  assert len(own) == 1
  masses = state["/params/ngrammer/codebook_0/embedding"][:, -1]
  assert (masses != 0).all()
  told = report.make_report(ledger_lib.read(whole)).as_text()
  assert "codebook" not in told
  # A codebook of another size is another model's.
  other = model(heads=1, num_clusters=K + 1)
  params = jax.eval_shape(other.init, key(0))
  with pytest.raises(
    ValueError, match=r"codebook_0/embedding is \(5, 9\) there"
  ):
    initial_weights.InitialWeights(path=str(whole)).load(params)
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  state = {
    "params": params,
    "opt_state": jax.eval_shape(make_step(other).init, params),
  }
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state
  )
  message = r"of another model or optimizer: .*codebook_0.* there and .* here"
  with (
    checkpoints.Checkpoints(
      whole, checkpoints.CheckpointSettings(period=2), print
    ) as saved,
    pytest.raises(checkpoints.CheckpointError, match=message),
  ):
    saved.restore(like)


def test_unprotected_codebooks_need_a_run_without_claim(tmp_path):
  chosen = model(learning="unprotected")
  with pytest.raises(ValueError, match="learning='unprotected' publishes"):
    run_of(tmp_path, chosen, fixed_seed=None)
  run = run_of(tmp_path, chosen)
  with ledger_lib.opened(tmp_path) as ledger:
    prepared = preparation.prepare(
      run, tmp_path, ledger, small_run.records(validation=False)
    )
    (text,) = [t for t in ledger.unprotected if "codebooks" in t]
    made = report.make_report(ledger)
  assert "exact means of each batch, neither clipped nor noised" in text
  # Not what a fixed seed is told: with a secret one this run claims nothing.
  assert made.statement().startswith("NO PRIVACY CLAIM: the N-Grammer's")
  assert "The seed is fixed, too." in made.statement()
  joint = several_runs.make_joint_report({"one": ledger})
  assert "NO PRIVACY CLAIM: the N-Grammer's" in joint.as_text()
  with pytest.raises(ValueError, match="leaves no claim to audit"):
    audit.audit(run, audit.AuditSettings())
  assert prepared.step.unprotected_codebooks is not None
  optimizer = prepared.step.optimizer
  assert isinstance(optimizer, codebook_learning.CodebookOptimizer)


def test_who_wraps_an_optimizer_wraps_it_once():
  plain, chosen = sgd.sgd(0.1), model()
  assert ngram_learning.optimizer_for(small_run.model(), plain) is plain
  wrapped = ngram_learning.optimizer_for(chosen, plain)
  assert isinstance(wrapped, codebook_learning.CodebookOptimizer)
  assert ngram_learning.optimizer_for(chosen, wrapped) is wrapped
  around = ngram_learning.complete(optax.chain(wrapped, optax.identity()))
  assert ngram_learning.optimizer_for(chosen, around) is around
  assert ngram_learning.unprotected_codebooks(chosen) is None
  with pytest.raises(ValueError, match="ScaledModel divides"):
    run_of("unused", scaled.ScaledModel(base=chosen))
  with pytest.raises(ValueError, match="ScaledModel divides"):
    ngram_learning.optimizer_for(scaled.ScaledModel(base=chosen), plain)


def test_a_loss_without_the_term_is_told():
  chosen = model(learning="unprotected")
  step = dataclasses.replace(make_step(chosen), loss_fn=model().losses)
  params = jax.eval_shape(chosen.init, key(0))
  batch = batch_of(1)
  zeros = jax.eval_shape(step.zeros, params, batch)
  with pytest.raises(ValueError, match="reads 'codebook_term', which the loss"):
    jax.eval_shape(step.accumulate, params, zeros, batch, key(1))


def test_gin_binds_the_settings():
  run = configuration.training_run(
    ["demo.gin"],
    [
      "MODEL_DIR = 'unused'",
      "TASK = 'not read'",
      "CodebookSettings.table_rate = 5.0",
    ],
  )
  assert run.codebooks == codebook_settings.CodebookSettings(table_rate=5.0)
