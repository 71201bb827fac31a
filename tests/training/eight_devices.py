"""What needs eight devices; `test_mesh.py` runs it, in a process that has them.

One CPU gives as many devices as XLA_FLAGS asks for, before jax starts.
"""

import collections
import contextlib
import dataclasses
import re
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run

from dptrain.clipping import adaptation
from dptrain.clipping import private_metrics
from dptrain.clipping import rules
from dptrain.data import masking
from dptrain.optimizers import preconditioner_refresh
from dptrain.optimizers import shampoo
from dptrain.optimizers import shampoo_blocks
from dptrain.optimizers import shampoo_settings
from dptrain.privacy import sampling
from dptrain.training import initial_weights
from dptrain.training import loop
from dptrain.training import mesh as mesh_lib
from dptrain.training import objective
from dptrain.training import programs as programs_lib
from dptrain.training import public_data
from dptrain.training import step as step_lib

ROWS = 16
COLLECTIVE = re.compile(
  r"= (?P<shape>.*?) (?P<kind>all-reduce|all-gather|all-to-all|reduce-scatter"
  r"|collective-permute|collective-broadcast)(-start)?\("
)


def test_there_are_eight():
  assert jax.device_count() == 8


# --- one update ---------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def as_the_loop_does():
  jax.config.update("jax_threefry_partitionable", True)


class Update:
  """One update of a small Bert in two physical batches, the last not full."""

  def __init__(self, **settings):
    self.model = small_run.model(vocab_size=48, **settings)
    losses = objective.Objective(self.model, masking.MaskingSettings()).losses
    self.step = step_lib.PrivateStep(
      losses,
      rules.ClippingRule("normalized", 0.1),
      optax.adam(1e-3),
      collect_statistics=True,
      adaptation=adaptation.NormAdaptation(),
      metrics=private_metrics.PrivateMetrics(),
    )
    self.params = self.model.init(jax.random.key(0))
    tokens = small_run.store(2 * ROWS).gather(np.arange(2 * ROWS)) % 48
    ids = np.arange(2 * ROWS, dtype=np.int32)
    whole = {"tokens": tokens, "example_ids": ids, "is_padding": ids >= 27}
    self.batches = [
      {name: x[start : start + ROWS] for name, x in whole.items()}
      for start in (0, ROWS)
    ]

  def programs(self, layout=None, **changes):
    step = dataclasses.replace(self.step, **changes)
    params, batch = jax.eval_shape(lambda: (self.params, self.batches[0]))
    return programs_lib.make_programs(step, params, batch, layout)

  def start(self, programs, layout=None):
    """Parameters, optimizer state and arguments of one `accumulate`."""
    params, opt_state = self.params, self.step.init(self.params)
    batches = self.batches
    if layout is not None:
      params = jax.device_put(params, layout.params)
      places = layout.opt_state(params, opt_state)
      opt_state = jax.device_put(opt_state, places)
      rows = layout.own_rows(ROWS)
      batches = [
        layout.place(jax.tree.map(lambda x: x[rows], b), ROWS) for b in batches
      ]
    gathered = programs.gathered(params)
    accumulator = programs.zeros(gathered, opt_state)
    return params, opt_state, gathered, accumulator, batches

  finishing = {  # noqa: RUF012
    "noise_key": jax.random.key(5),
    "noise_multiplier": 1.0,
    "expected_batch_size": 50.0,
  }

  def __call__(self, layout=None, **changes):
    programs = self.programs(layout, **changes)
    params, opt_state, gathered, total, batches = self.start(programs, layout)
    for batch in batches:
      total = programs.accumulate(gathered, total, batch, jax.random.key(3))
    return programs.finish(params, opt_state, total, **self.finishing)


@pytest.fixture(scope="module")
def update():
  return Update()


def layout_of(update, **sizes):
  return mesh_lib.make_layout(mesh_lib.MeshSettings(**sizes), update.model)


def assert_close(one, other):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5),
    jax.device_get(one),
    jax.device_get(other),
  )


@pytest.fixture(scope="module")
def scanned():
  """An update under scan, remat and microbatches; and one device's result."""
  update = Update(scan_layers=True, remat=True)
  return update, update(microbatch_size=2)


@pytest.mark.parametrize(
  "sizes",
  [{"data": 4, "model": 2}, {"data": 2, "fsdp": 2, "model": 2}],
  ids=["4x2", "2x2x2"],
)
def test_an_update_of_bert_is_that_of_one_device(scanned, sizes):
  update, on_one_device = scanned
  layout = layout_of(update, **sizes)
  found = update(layout, microbatch_size=2)
  assert found[2]["realised_batch_size"] == 27
  assert_close(found, on_one_device)
  params, opt_state, _ = found
  places = layout.opt_state(update.params, opt_state)
  for array, place in zip(
    jax.tree.leaves((params, opt_state)),
    jax.tree.leaves((layout.params, places)),
    strict=True,
  ):
    assert array.sharding.is_equivalent_to(place, array.ndim)


def vector_update(layout, noise_multiplier=1.0):
  """Programs of four weights whose gradients are the rows; one update's."""
  step = step_lib.PrivateStep(
    lambda params, batch, keys: (batch["x"] @ params["w"], {}),
    rules.ClippingRule("flat", 2.0),
    optax.sgd(1.0),
  )
  batch = {
    "x": np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32),
    "example_ids": np.arange(ROWS, dtype=np.int32),
    "is_padding": np.arange(ROWS) >= ROWS - 3,
  }
  params = {"w": jnp.zeros(4)}
  programs = programs_lib.make_programs(step, params, batch, layout)
  opt_state = step.init(params)
  total = programs.zeros(params, opt_state)
  accumulate = programs.accumulate.lower(
    params, total, batch, jax.random.key(1)
  ).compile()
  finishing = {
    "noise_key": jax.random.key(2),
    "noise_multiplier": noise_multiplier,
    "expected_batch_size": 10.0,
  }
  finish = programs.finish.lower(params, opt_state, total, **finishing)
  for _ in range(2):
    total = programs.accumulate(params, total, batch, jax.random.key(1))
  new, _, _ = programs.finish(params, opt_state, total, **finishing)
  return new["w"], accumulate, finish.compile()


def vector_layout(**sizes):
  made = mesh_lib.make_layout(mesh_lib.MeshSettings(**sizes), small_run.model())
  return mesh_lib.Layout(made.mesh, {"w": jax.sharding.PartitionSpec("fsdp")})


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.5])
def test_sum_and_noise_do_not_know_the_mesh(noise_multiplier):
  """One noise for the sum of all shards, and no shard is forgotten."""
  np.testing.assert_allclose(
    vector_update(vector_layout(), noise_multiplier)[0],
    vector_update(None, noise_multiplier)[0],
    rtol=1e-5,
  )


# --- the compiled programs ----------------------------------------------------


def collectives(compiled):
  """Kinds of the collectives in a program, with the floats that they move."""
  found = collections.Counter()
  for line in compiled.as_text().splitlines():
    if match := COLLECTIVE.search(line):
      sizes = re.findall(r"f32\[([\d,]*)\]", match["shape"])
      found[match["kind"]] += sum(
        int(np.prod([int(n) for n in size.split(",") if n])) for size in sizes
      )
  return found


def test_gradients_meet_once_per_update(update):
  """Of the whole loop's programs for Bert, on eight shards of data."""
  layout = layout_of(update, data=8)
  programs = update.programs(layout)
  params, opt_state, gathered, total, batches = update.start(programs, layout)
  accumulate = programs.accumulate.lower(
    gathered, total, batches[0], jax.random.key(3)
  )
  assert not collectives(accumulate.compile())
  finish = programs.finish.lower(params, opt_state, total, **update.finishing)
  number = sum(x.size for x in jax.tree.leaves(update.params))
  others = 2 + len(jax.tree.leaves(total.statistics)) + total.metrics.shape[1]
  found = collectives(finish.compile())
  assert found.keys() == {"all-reduce"}
  assert number <= found["all-reduce"] <= number + others


def test_parameters_split_at_rest_change_nothing_in_an_update():
  """Along fsdp they are gathered before, and each shard sums on its own."""
  layout = vector_layout(data=2, fsdp=4)
  found, accumulate, finish = vector_update(layout)
  np.testing.assert_allclose(found, vector_update(None)[0], rtol=1e-5)
  assert found.sharding.is_equivalent_to(layout.params["w"], 1)
  assert not set(collectives(accumulate)) - {"all-gather"}  # of parameters
  assert collectives(finish)["all-reduce"] in (4, 1)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "model": 2}])
def test_an_optimizer_shares_its_roots_out(sizes):
  """Of 16 factors each device has 2, and parameters come out as on one."""
  step = step_lib.PrivateStep(
    lambda params, batch, keys: (jnp.sum(batch["x"] @ params["w"], -1), {}),
    rules.ClippingRule("flat", 2.0),
    shampoo.shampoo(
      0.1,
      shampoo_settings.ShampooSettings(
        refresh=preconditioner_refresh.RefreshSettings(start=1),
        blocking=shampoo_blocks.Blocking(4),
      ),
    ),
  )
  batch = {
    "x": np.random.default_rng(0).normal(size=(ROWS, 16)).astype(np.float32),
    "example_ids": np.arange(ROWS, dtype=np.int32),
    "is_padding": np.zeros(ROWS, bool),
  }
  params = {"w": jnp.ones((16, 8))}
  finishing = {
    "noise_key": jax.random.key(2),
    "noise_multiplier": 1.0,
    "expected_batch_size": 10.0,
  }

  def after(layout):
    programs = programs_lib.make_programs(step, params, batch, layout)
    opt_state = step.init(params)
    total = programs.zeros(params, opt_state)
    finish = programs.finish.lower(params, opt_state, total, **finishing)
    total = programs.accumulate(params, total, batch, jax.random.key(1))
    new, state, _ = programs.finish(params, opt_state, total, **finishing)
    return finish.compile().as_text(), (new, state)

  made = mesh_lib.make_layout(mesh_lib.MeshSettings(**sizes), small_run.model())
  split = jax.sharding.PartitionSpec("fsdp")
  text, found = after(mesh_lib.Layout(made.mesh, {"w": split}))
  shares = re.findall(r"= f64\[(\d+),4,4\]\S* dot\(", text)
  assert set(shares) == {"2"}
  text, expected = after(None)
  assert re.search(r"= f64\[16,4,4\]\S* dot\(", text)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
    jax.device_get(found),
    jax.device_get(expected),
  )


# --- layouts ------------------------------------------------------------------


def test_every_row_is_dealt_once_and_padding_evenly(update):
  layout = layout_of(update, data=2, fsdp=2, model=2)
  rows = layout.own_rows(24)
  assert sorted(rows) == list(range(24))
  # The four shards get 6 rows each; of 10 true records 3, 3, 2 and 2.
  assert [(part < 10).sum() for part in np.split(rows, 4)] == [3, 3, 2, 2]
  placed = layout.place({"row": rows}, 24)["row"]
  assert placed.sharding.is_equivalent_to(layout.rows, 1)
  np.testing.assert_array_equal(placed, rows)


def test_parameters_are_split_by_their_names(update):
  layout = layout_of(update, data=2, fsdp=2, model=2)
  table = layout.specs["token_embedding"]["embedding"]
  assert tuple(table) == ("model", "fsdp")
  assert not layout.whole
  query = layout.specs["layer_0"]["attention"]["query"]["kernel"]
  assert tuple(query) == ("fsdp", "model", None)
  held = layout.params["token_embedding"]["embedding"].shard_shape((48, 16))
  assert held == (24, 8)


def test_what_the_mesh_does_not_divide_stays_whole():
  model = small_run.model()  # a vocabulary of 50, 2 heads
  layout = mesh_lib.make_layout(mesh_lib.MeshSettings(model=4), model)
  assert "['token_embedding']['embedding'] vocab=50" in layout.whole
  assert layout.specs["token_embedding"]["embedding"][0] is None
  assert any("heads=2" in name for name in layout.whole)


def test_a_parameter_without_names_is_on_every_device(update):
  class Nameless(type(update.model)):
    def logical_axes(self):
      return {}

  settings = mesh_lib.MeshSettings(model=2)
  layout = mesh_lib.make_layout(settings, Nameless(update.model.bert))
  specs = jax.tree.leaves(
    layout.specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
  )
  assert len(specs) == len(jax.tree.leaves(update.params))
  assert not any(axis for spec in specs for axis in spec)


def test_the_state_of_any_optimizer_has_a_place(update):
  layout = layout_of(update, fsdp=8)
  for optimizer in (
    optax.adam(1e-3),
    optax.sgd(1e-3, momentum=0.9),
    optax.adafactor(1e-3),
    optax.sm3(1e-3),
    optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adam)(1e-3)),
  ):
    state = jax.eval_shape(optimizer.init, update.params)
    places = layout.opt_state(update.params, state)
    jax.tree.map(lambda x, place: place.shard_shape(x.shape), state, places)
  moment = layout.opt_state(
    update.params, jax.eval_shape(optax.adam(1e-3).init, update.params)
  )[0].mu["token_embedding"]["embedding"]
  assert tuple(moment.spec) == ("model", "fsdp")


# --- whole runs ---------------------------------------------------------------


@contextlib.contextmanager
def listening():
  """What the loop draws."""
  seen, draw = [], sampling.poisson

  def spy(*arguments):
    sample = draw(*arguments)
    seen.append(sample.part(0, sample.size))
    return sample

  with mock.patch.object(sampling, "poisson", spy):
    yield seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """MODEL_DIR of a whole run of 6 updates on four devices, and its draws."""
  directory = tmp_path_factory.mktemp("four")
  with listening() as draws:
    small_run.train(directory, mesh={"data": 4})
  return directory, draws


@pytest.mark.parametrize(
  "sizes",
  [{"data": 1}, {"data": 8}, {"data": 2, "fsdp": 2, "model": 2}],
  ids=str,
)
def test_a_run_goes_on_on_another_mesh(finished, tmp_path, sizes):
  """Stopped after 2 updates on four devices: the same draws, noise, ledger."""
  whole, draws = finished
  copy = shutil.copytree(whole, tmp_path / "copy")
  small_run.cut(copy, 2)
  with listening() as own:
    result = small_run.train(copy, mesh=sizes)
  assert result.step == 6
  small_run.assert_close(whole, copy)
  assert len(own) == 4
  for one, other in zip(own, draws[2:], strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("optimizer", ["sm3", "shampoo"])
def test_optimizer_states_go_on_on_another_mesh(tmp_path, optimizer):
  """Rows, columns, factors and roots: saved on one mesh, read on another."""
  whole, copy = tmp_path / "whole", tmp_path / "copy"
  small_run.train(whole, mesh={"data": 4}, optimizer=optimizer, rate=1e-3)
  shutil.copytree(whole, copy)
  small_run.cut(copy, 2)
  sizes = {"data": 2, "fsdp": 2, "model": 2}
  small_run.train(copy, mesh=sizes, optimizer=optimizer, rate=1e-3)
  (_, one), (_, other) = map(small_run.newest_state, (whole, copy))
  assert one.keys() == other.keys()
  for name, array in one.items():
    if name.startswith("/params"):
      np.testing.assert_allclose(array, other[name], atol=1e-4, err_msg=name)
    if "failed" in name or "non_finite" in name:
      assert not array.any()


def test_correlated_noise_goes_on_on_another_mesh(tmp_path):
  def train(folder, sizes):
    run = small_run.make_run(folder, mesh=sizes)
    privacy = dataclasses.replace(
      run.privacy, sampling="cyclic_poisson", bands=3
    )
    run = dataclasses.replace(run, privacy=privacy)
    return loop.train(run, small_run.records())

  whole, copy = tmp_path / "whole", tmp_path / "copy"
  train(whole, {"data": 1})
  shutil.copytree(whole, copy)
  small_run.cut(copy, 4)
  train(copy, {"data": 2, "fsdp": 2, "model": 2})
  small_run.assert_close(whole, copy)


def test_public_records_and_given_weights_on_another_mesh(tmp_path):
  path = tmp_path / "weights.npz"
  model = small_run.make_run("unused").model
  np.savez(path, **jax.device_get(model.init(jax.random.key(1))))
  records = small_run.records()._replace(public=small_run.store(40, seed=5))

  def train(folder, sizes):
    run = small_run.make_run(
      folder,
      mesh=sizes,
      public_data=public_data.PublicData(task="given", batch_size=21),
      initial_weights=initial_weights.InitialWeights(str(path)),
    )
    return loop.train(run, records)

  whole, copy = tmp_path / "whole", tmp_path / "copy"
  train(whole, {"data": 2, "fsdp": 2, "model": 2})
  shutil.copytree(whole, copy)
  small_run.cut(copy, 2)
  train(copy, {"data": 1})
  small_run.assert_close(whole, copy)


def test_made_updates_are_not_repeated_on_another_mesh(finished, tmp_path):
  """Their rounding differs: what was released is not released again."""
  copy = shutil.copytree(finished[0], tmp_path / "copy")
  for step in (4, 6):
    shutil.rmtree(copy / "checkpoints" / str(step))
  small_run.train(copy, mesh={"data": 2}, steps=6)
  assert len(small_run.ledger_lines(copy, "branch")) == 2
  assert len(small_run.ledger_lines(copy, "release")) == 6 + 4


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"mesh": {"fsdp": 3}},
      r"fsdp=3, model=1: fsdp \* model = 3 does not divide the 8 devices",
    ),
    ({"mesh": {"data": 16}}, r"data=16.* 16 devices, but there are 8"),
    (
      {"mesh": {}, "physical_batch_size": 12},
      r"physical_batch_size=12 is not a multiple of the 8 shards .*data=8",
    ),
    (
      {"mesh": {}, "microbatch_size": 4},
      r"microbatch_size=4 does not divide the 2 rows .* 8 shards",
    ),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(tmp_path, options, message):
  directory = tmp_path / "new"
  with pytest.raises(ValueError, match=message):
    loop.train(small_run.make_run(directory, **options), small_run.records())
  assert not directory.exists()
