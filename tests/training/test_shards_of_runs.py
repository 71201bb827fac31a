"""Runs on shards of one corpus sample, together, what one run would: once."""

import dataclasses
import json
import stat

import numpy as np
import pytest
import small_run

from dptrain.data import disjoint_shards
from dptrain.data import prepared
from dptrain.data import store as store_lib
from dptrain.privacy import keys
from dptrain.privacy import plan as plan_lib
from dptrain.privacy import schedule
from dptrain.training import examples

K, SHARDS, OWNERS = 2, 3, 40
SEED = keys.fixed_seed(3)
SETTINGS = [
  ("record", "units", "zero_out"),
  ("record", "units", "replace_one"),
  ("record", "units", "add_or_remove_one"),
  ("document", "units", "zero_out"),
  ("document", "units", "add_or_remove_one"),
  ("user", "units", "replace_one"),
  ("document", "records", "zero_out"),
  ("user", "records", "zero_out"),
]


def corpus(unit, seed=0):
  """Records of owners of all sizes; the other kind of key is a trap."""
  draw = np.random.default_rng(seed)
  owners = draw.integers(0, OWNERS, 150).astype(np.uint64) * np.uint64(7919)
  tokens = draw.integers(5, 1000, (150, small_run.LENGTH), np.int32)
  alike = np.zeros(150, np.uint64)
  documents, users = (alike, owners) if unit == "user" else (owners, alike)
  return store_lib.RecordStore(tokens, documents, users)


def on_disk(folder, records):
  """The same as a prepared store of several files, without tokenising."""
  folder.mkdir()
  shards = []
  for number, rows in enumerate(np.array_split(np.arange(150), 4)):
    entry = {"records": len(rows)}
    for kind in ("tokens", "documents", "users"):
      path = folder / f"{kind}_{number}.npy"
      np.save(path, getattr(records, kind)[rows])
      entry[kind] = {"file": path.name, "bytes": path.stat().st_size}
    shards.append(entry)
  manifest = {
    "format": prepared.FORMAT,
    "sequence_length": records.sequence_length,
    "splits": {
      "train": {
        "records": records.num_examples,
        "shards": shards,
        "content": records.content_digest().hex(),
        "token_range": records.token_range(),
      }
    },
  }
  manifest = json.loads(json.dumps(manifest))
  digest = prepared.manifest_digest(manifest)
  (folder / prepared.MANIFEST).write_text(
    json.dumps({**manifest, "sha256": digest})
  )
  return prepared.PreparedStore(folder, "train")


def run_of(setting, folder, index=0, count=SHARDS):
  unit, unit_sampling, relation = setting
  run = small_run.make_run("nowhere")
  privacy = plan_lib.PrivacySettings(
    schedule=schedule.constant(5, 2),
    delta=1e-9,
    noise_multiplier=4.0,
    relation=relation,
    public_num_examples=50 if relation == "add_or_remove_one" else None,
    unit=unit,
    records_per_unit=1 if unit == "record" else K,
    unit_sampling=unit_sampling,
  )
  shard = disjoint_shards.ShardSettings(index, count, str(folder))
  return dataclasses.replace(run, privacy=privacy, shard=shard)


def sampled(found):
  """All examples, each as bytes: tokens drawn at random name their record."""
  every = found.gather(np.arange(found.num_examples))
  assert every.shape == (found.num_examples, *found.record_shape)
  return [each.tobytes() for each in every]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("setting", SETTINGS, ids="-".join)
def test_shards_together_sample_what_the_whole_corpus_does(
  setting, where, tmp_path
):
  records = corpus(setting[0])
  if where == "disk":
    records = on_disk(tmp_path / "prepared", records)
  whole = sampled(
    examples.of_run(run_of(setting, tmp_path, 0, 1), records, None, SEED)
  )
  shards = [
    sampled(examples.of_run(run_of(setting, tmp_path, i), records, None, SEED))
    for i in range(SHARDS)
  ]
  assert all(shards)
  together = [each for shard in shards for each in shard]
  assert len(set(together)) == len(together)  # none twice
  assert set(together) == set(whole)
  # In the same order: an index is all that a sampler knows of an example.
  for shard in shards:
    assert shard == [each for each in whole if each in set(shard)]


@pytest.mark.parametrize("unit", ["document", "user"])
@pytest.mark.parametrize("unit_sampling", ["units", "records"])
def test_all_records_of_a_unit_are_in_one_shard(unit, unit_sampling, tmp_path):
  records = corpus(unit)
  owners = records.documents if unit == "document" else records.users
  by_tokens = {
    row.tobytes(): owner
    for row, owner in zip(records.tokens, owners, strict=True)
  }
  seen = []
  for index in range(SHARDS):
    # Each run chooses by its own seed which records of a large unit it keeps.
    found = examples.of_run(
      run_of((unit, unit_sampling, "zero_out"), tmp_path, index),
      records,
      None,
      keys.fixed_seed(index),
    )
    rows = found.tokens if unit_sampling == "units" else found.tokens[:, None]
    here = [
      {by_tokens[row.tobytes()] for row in each if row.any()} for each in rows
    ]
    assert all(len(each) == 1 for each in here)
    seen.append(set.union(*here))
  assert sum(map(len, seen)) == len(set.union(*seen)) == len(set(owners))


def test_what_ledgers_tell_of_shards(tmp_path):
  setting = SETTINGS[0]
  told = [
    examples.shard(run_of(setting, tmp_path / "key", i), corpus("record"))
    for i in range(2)
  ]
  assert told[0] == {**told[1], "index": 0}
  other_corpus = examples.shard(
    run_of(setting, tmp_path / "key"), corpus("record", seed=1)
  )
  other_key = examples.shard(
    run_of(setting, tmp_path / "other"), corpus("record")
  )
  other_count = examples.shard(
    run_of(setting, tmp_path / "key", 0, 2), corpus("record")
  )
  for other, changed in (
    (other_corpus, {"corpus"}),
    (other_key, {"corpus", "key"}),
    (other_count, {"count"}),
  ):
    differ = {name for name in other if other[name] != told[0][name]}
    assert differ == changed
  # Shards by document and by user share units, whatever these are called; where
  # numbers move, content takes their place.
  hashed = [
    examples.shard(run_of(each, tmp_path / "key"), corpus("record"))["by"]
    for each in SETTINGS
  ]
  assert len(set(hashed)) == 5
  whole = run_of(setting, tmp_path / "none", 0, 1)
  assert examples.shard(whole, corpus("record")) is None
  assert not (tmp_path / "none").exists()  # no key is drawn in vain


def test_the_key_stays_secret(tmp_path):
  run = run_of(SETTINGS[0], tmp_path / "key")
  told = json.dumps(examples.shard(run, corpus("record")))
  (path,) = (tmp_path / "key").iterdir()
  assert stat.S_IMODE(path.stat().st_mode) == 0o600
  assert path.read_text().strip() not in told
  # Whoever has the corpus, but no key, cannot tell that it is this one.
  assert corpus("record").content_digest().hex() not in told
  path.chmod(0o644)
  with pytest.raises(PermissionError, match="tell which records each run has"):
    examples.shard(run, corpus("record"))


def test_a_key_folder_that_cannot_be_made_is_refused(tmp_path):
  (tmp_path / "file").touch()
  run = run_of(SETTINGS[0], tmp_path / "file" / "key")
  with pytest.raises(
    ValueError, match=r"key_folder=.*file/key' cannot be made \(Not a directory"
  ):
    examples.shard(run, corpus("record"))


def test_units_of_other_shards_are_kept_out_of_validation_too(tmp_path):
  records = corpus("user")
  for index in range(SHARDS):
    with pytest.raises(ValueError, match="have records in both splits"):
      examples.of_run(
        run_of(("user", "units", "zero_out"), tmp_path, index),
        records,
        records,
        SEED,
      )
