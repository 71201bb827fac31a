import dataclasses
import hashlib
import hmac
import itertools
import os
import stat
import traceback
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from dptrain.privacy import keys
from dptrain.privacy.keys import SecretSeed

SEED = keys.fixed_seed(0)


@dataclasses.dataclass
class Holder:
  seed: SecretSeed


class Pair(NamedTuple):
  seed: SecretSeed
  other: Any


def written(directory):
  return directory / keys.SEED_FILE


def test_the_seed_file_is_for_its_owner_only(tmp_path):
  before = os.umask(0)  # whatever the user's umask is
  try:
    keys.load_or_create(tmp_path)
  finally:
    os.umask(before)
  assert stat.S_IMODE(written(tmp_path).stat().st_mode) == 0o600
  assert [path.name for path in tmp_path.iterdir()] == [keys.SEED_FILE]


def test_the_seed_is_drawn_once(tmp_path):
  first = keys.load_or_create(tmp_path)
  text = written(tmp_path).read_bytes()
  assert keys.load_or_create(tmp_path) == first
  assert written(tmp_path).read_bytes() == text
  assert text == first.value.hex().encode() + b"\n"
  assert not first.fixed


def test_every_run_has_a_seed_of_its_own(tmp_path):
  seeds = set()
  for name in "abcd":
    (tmp_path / name).mkdir()
    seeds.add(keys.load_or_create(tmp_path / name).value)
  assert len(seeds) == 4


def test_a_kill_while_drawing_leaves_no_half_seed(tmp_path, monkeypatch):
  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(os, "link", killed)
    with pytest.raises(KeyboardInterrupt):
      keys.load_or_create(tmp_path)
  assert not written(tmp_path).exists()
  assert keys.load_or_create(tmp_path) == keys.load_or_create(tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o601])
def test_refuses_a_seed_that_others_can_reach(tmp_path, mode):
  keys.load_or_create(tmp_path)
  written(tmp_path).chmod(mode)
  with pytest.raises(PermissionError, match=rf"mode {mode:o}.*chmod 600"):
    keys.load_or_create(tmp_path)


@pytest.mark.parametrize(
  "damage",
  [
    lambda text: b"",
    lambda text: text[:20],
    lambda text: text[:63],
    lambda text: text + text,
    lambda text: b"x" + text[1:],
    lambda text: b"\xff" + text[1:],
    lambda text: text[:40] + b"\0" + text[41:],
  ],
  ids=["empty", "cut", "odd", "twice", "no digit", "no text", "zero byte"],
)
def test_refuses_a_damaged_seed_without_showing_it(tmp_path, damage):
  seed = keys.load_or_create(tmp_path)
  written(tmp_path).write_bytes(damage(written(tmp_path).read_bytes()))
  with pytest.raises(ValueError, match=r"is damaged: .* Restore it") as info:
    keys.load_or_create(tmp_path)
  told = "".join(traceback.format_exception(info.value))
  assert str(written(tmp_path)) in told
  assert seed.value.hex()[1:15] not in told


@pytest.mark.parametrize("length", [0, 31, 33])
def test_refuses_seeds_of_another_length(length):
  with pytest.raises(ValueError, match=f"has 32 bytes, not {length}"):
    SecretSeed(b"s" * length)


@pytest.mark.parametrize(
  "show",
  [
    repr,
    str,
    "{}".format,
    "{!r:>50}".format,
    lambda seed: f"{seed}",
    lambda seed: "%s %r" % (seed, seed),  # noqa: UP031
    lambda seed: repr(Holder(seed)),
    lambda seed: str((seed, [seed], {"seed": seed})),
    lambda seed: str(Pair(seed, Holder(seed))),
  ],
)
def test_no_text_shows_the_bits(show):
  shown = show(SEED)
  assert "<hidden>" in shown
  bits = SEED.value
  for part in (bits.hex(), repr(bits)[2:-1], str(list(bits))[1:-1]):
    assert part not in shown
    assert part[:8] not in shown


def test_keys_are_the_documented_function_of_the_seed():
  # Whoever changes this changes the noise of every run that is resumed.
  message = b"noise\x1fbranch\x1f7"
  digest = hmac.new(SEED.value, message, hashlib.sha256).digest()
  words = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
  data = jax.random.key_data(SEED.key("noise", "branch", 7))
  assert data.tolist() == words
  assert data.dtype == np.uint32


def test_keys_are_threefry_whatever_the_default_is():
  expected = jax.random.key_data(SEED.key("noise", "b", 1))
  draw = jax.random.normal(SEED.key("noise", "b", 1), (8,))
  with jax.default_prng_impl("rbg"):
    key = SEED.key("noise", "b", 1)
    assert str(jax.random.key_impl(key)) == "threefry2x32"
    assert key.shape == ()
    np.testing.assert_array_equal(jax.random.key_data(key), expected)
    np.testing.assert_array_equal(jax.random.normal(key, (8,)), draw)


def test_keys_differ_by_seed_purpose_branch_and_update():
  cases = itertools.product(
    [keys.fixed_seed(0), keys.fixed_seed(1)],
    ["noise", "sampling", "examples"],
    ["", "a", "b"],
    [0, 1, 2, 10, 100],
  )
  data = [
    tuple(jax.random.key_data(seed.key(*rest)).tolist())
    for seed, *rest in cases
  ]
  assert len(set(data)) == len(data) == 90


def test_a_digest_is_not_the_seed_nor_one_of_its_keys():
  # The identity is written into the ledger, which may be published.
  identity = SEED.digest("identity")
  assert len(identity) == 32
  assert identity != SEED.value
  words = np.frombuffer(identity, "<u4").tolist()
  key = jax.random.key_data(SEED.key("identity", "")).tolist()
  assert key != words[:2]


def test_fingerprints_depend_on_content_and_on_the_seed():
  other = keys.fixed_seed(1)
  prints = {
    SEED.fingerprint(b"corpus"),
    SEED.fingerprint(b"corpuS"),
    SEED.fingerprint(b""),
    other.fingerprint(b"corpus"),
    hashlib.sha256(b"corpus").hexdigest(),
  }
  assert len(prints) == 5
  assert SEED.fingerprint(b"corpus") == SEED.fingerprint(b"corpus")


def test_fixed_seeds_are_known_and_say_so():
  assert keys.fixed_seed(5) == keys.fixed_seed(5)
  assert keys.fixed_seed(5) != keys.fixed_seed(6)
  assert keys.fixed_seed(5).fixed
  assert "fixed=True" in repr(keys.fixed_seed(5))
