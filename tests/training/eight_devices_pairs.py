"""What needs eight devices; `test_pairs_on_a_mesh.py` runs it, with as many."""

import re
import types

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pairs
import pytest
import small_run

from dptrain.training import classroom as classroom_lib
from dptrain.training import shared_mesh
from dptrain.training import together

_COLLECTIVE = re.compile(
  r"= .*? (all-reduce|all-gather|all-to-all|reduce-scatter"
  r"|collective-permute|collective-broadcast)(?:-start)?\("
)
STEPS = 4


def trees(replicas=2):
  """Parameters of each replica, split along an axis of its own mesh."""
  groups = np.split(np.array(jax.devices()), replicas)
  found = []
  for number, group in enumerate(groups):
    mesh = Mesh(group.reshape(-1, 2), ("data", "model"))
    tree = {
      "split": (np.arange(24.0).reshape(4, 6) + 100 * number, "model"),
      "whole": (np.arange(3.0) + 100 * number, None),
    }
    found.append(
      {
        name: jax.device_put(
          jnp.asarray(x), NamedSharding(mesh, PartitionSpec(axis))
        )
        for name, (x, axis) in tree.items()
      }
    )
  return found


@pytest.mark.parametrize("replicas", [2, 4])
def test_every_replica_gets_all(replicas):
  own = trees(replicas)
  for number, tree in enumerate(shared_mesh.gathered(own)):
    for name, array in tree.items():
      assert set(array.devices()) == set(own[number][name].devices())
      spec = own[number][name].sharding.spec
      assert array.sharding.spec == PartitionSpec(None, *spec)
      for other in range(replicas):
        np.testing.assert_array_equal(array[other], own[other][name])


def test_one_collective_for_each_array(monkeypatch):
  texts, jit = [], jax.jit

  def spied(function, **options):
    def call(*arguments):
      compiled = jit(function, **options).lower(*arguments).compile()
      texts.append(compiled.as_text())
      return compiled(*arguments)

    return call

  monkeypatch.setattr(jax, "jit", spied)
  shared_mesh.gathered(trees())
  (text,) = texts
  assert _COLLECTIVE.findall(text) == ["all-gather"] * 2


def test_weights_are_split_as_a_replay_will_have_them():
  """At rest they are split along fsdp, too: then sums would round otherwise."""
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "model"))
  array = jnp.arange(24.0).reshape(4, 6)
  at_rest = NamedSharding(mesh, PartitionSpec("fsdp", "model"))
  wanted = NamedSharding(mesh, PartitionSpec(None, "model"))
  classroom = classroom_lib.Classroom(
    None,
    types.SimpleNamespace(layout=None),
    types.SimpleNamespace(
      placed=lambda fingerprint: {"a": jax.device_put(array, at_rest)}
    ),
  )
  classroom.places = classroom_lib.Places(peers={"a": wanted})
  found = classroom._on_devices("f", None, None)["a"]
  assert found.sharding == wanted
  np.testing.assert_array_equal(found, array)


def runs(folder, exchange=None):
  return [
    pairs.make_run(
      folder,
      number,
      steps=STEPS,
      exchanging={"exchange": exchange, "period": 2},
      distilling={"burn_in": 1},
      validation_split=None,
      mesh={"model": 2},
    )
    for number in range(2)
  ]


def test_the_mesh_changes_nothing(tmp_path, monkeypatch):
  """Weights by a collective, or by a way around through the host."""
  records = [small_run.records(validation=False)] * 2
  results = together.train_together(runs(tmp_path / "mesh"), records)
  assert [result.step for result in results] == [STEPS] * 2
  monkeypatch.setattr(
    shared_mesh.SharedMesh, "placed", lambda self, fingerprint, reader: None
  )
  together.train_together(runs(tmp_path / "host"), records)
  for name in ("r0", "r1"):
    small_run.assert_same(tmp_path / "mesh" / name, tmp_path / "host" / name)
    told = [
      (step, [at for _, at, _ in teachers])
      for step, teachers in pairs.lessons(tmp_path / "mesh" / name)
    ]
    assert told == [(1, [1]), (3, [3])]


def test_interrupted_together_and_resumed(tmp_path, monkeypatch):
  records = [small_run.records(validation=False)] * 2
  together.train_together(runs(tmp_path / "whole"), records)
  from dptrain.training import loop

  update = loop._Loop._update

  def interrupted(self, step, state):
    if step == 2 and self.run.codistillation.replica == 1:
      raise KeyboardInterrupt
    return update(self, step, state)

  with monkeypatch.context() as patch:
    patch.setattr(loop._Loop, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
      together.train_together(runs(tmp_path / "cut"), records)
  # Replica 0 saved what it had, one update more than replica 1.
  together.train_together(runs(tmp_path / "cut"), records)
  for name in ("r0", "r1"):
    small_run.assert_same(tmp_path / "whole" / name, tmp_path / "cut" / name)


def test_devices_that_cannot_be_divided(tmp_path):
  three = [
    pairs.make_run(tmp_path, number, replicas=3, exchanging={"exchange": None})
    for number in range(3)
  ]
  with pytest.raises(ValueError, match="8 devices cannot be divided into 3"):
    together.train_together(three)
