"""Secret keys: one 256-bit seed, one key for each purpose, branch and step.

Noise that is a pure function of (seed, step) makes a crash harmless: the same
run replays the same release. It has a trap: whoever goes back to an earlier
checkpoint and continues *differently* would add the same noise to other
gradients, and the difference of two saved models cancels it. So every key is
bound to a branch (`dptrain.privacy.ledger`), whose name is a digest of all that
decides the gradients.
"""

import dataclasses
import hashlib
import hmac
import os
import pathlib
import secrets
import stat

import jax
import jax.numpy as jnp
import numpy as np

SEED_FILE = "secret_seed"
_SEED_BYTES = 32


@dataclasses.dataclass(frozen=True, repr=False)
class SecretSeed:
  """256 secret bits from which all keys of a run derive.

  Attributes:
    value: 32 bytes. Never log it, bind it in gin or publish it.
    fixed: True for a seed known to others (tests, demos of reproducibility):
      such a run makes no privacy claim.
  """

  value: bytes
  fixed: bool = False

  def __post_init__(self) -> None:
    if len(self.value) != _SEED_BYTES:
      raise ValueError(
        f"a secret seed has {_SEED_BYTES} bytes, not {len(self.value)}."
      )

  def __repr__(self) -> str:
    """Hides the bits, so that no log can hold them."""
    return f"SecretSeed(<hidden>, fixed={self.fixed})"

  def digest(self, purpose: str, *context: str) -> bytes:
    """32 bytes that only holders of the seed can compute (HMAC-SHA256)."""
    # A key of a unit may hold bytes that were no text.
    message = "\x1f".join((purpose, *context)).encode(errors="surrogatepass")
    return hmac.new(self.value, message, hashlib.sha256).digest()

  def fingerprint(self, content: bytes) -> str:
    """Names private content without revealing it to those without the seed.

    A plain hash would tell two neighbouring corpora apart, which no guarantee
    survives.
    """
    return self.digest("fingerprint", hashlib.sha256(content).hexdigest()).hex()

  def key(self, purpose: str, branch: str, step: int = 0) -> jax.Array:
    """Typed threefry key, whatever jax's default generator is.

    Args:
      purpose: what the key is for; a key serves one purpose.
      branch: name of the branch of the run (`ledger.Branch.name`).
      step: the update, counted from 0.

    Returns:
      A scalar key array of dtype `key<fry>`.
    """
    words = np.frombuffer(self.digest(purpose, branch, str(step))[:8], "<u4")
    return jax.random.wrap_key_data(
      jnp.asarray(words, jnp.uint32), impl="threefry2x32"
    )


def fixed_seed(number: int) -> SecretSeed:
  """A seed that anyone can recompute: for tests; voids the privacy claim."""
  text = f"dptrain fixed seed {number}".encode()
  return SecretSeed(hashlib.sha256(text).digest(), fixed=True)


def load_or_create(
  directory: pathlib.Path,
  file: str = SEED_FILE,
  danger: str = "subtract the noise",
) -> SecretSeed:
  """Reads the run's secret seed; the first call draws it from the OS.

  Args:
    directory: MODEL_DIR; the file is readable by its owner only.
    file: its name.
    danger: what whoever knows the seed can do, for messages.

  Returns:
    The seed.

  Raises:
    PermissionError: others may read the file.
    ValueError: the file does not hold 64 hexadecimal digits.
  """
  path = directory / file
  if not path.exists():
    _create(path)
  mode = stat.S_IMODE(path.stat().st_mode)
  if mode & 0o077:
    raise PermissionError(
      f"{path} can be read by others (mode {mode:o}): whoever knows the seed"
      f" can {danger}. Run `chmod 600` on it if nobody else has read it;"
      f" otherwise start again in a new {_folder(file)}."
    )
  try:
    return SecretSeed(bytes.fromhex(path.read_text(encoding="ascii")))
  except ValueError:
    # Not chained: a decoding error carries the bytes that it could not read.
    raise ValueError(
      f"{path} is damaged: it must hold 64 hexadecimal digits. Restore it from"
      " a backup; without it this run cannot continue."
    ) from None


def _folder(file: str) -> str:
  return "MODEL_DIR" if file == SEED_FILE else "folder"


def _create(path: pathlib.Path) -> None:
  # Written whole under another name first: a kill leaves no half seed behind.
  draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
  descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
  with os.fdopen(descriptor, "w", encoding="ascii") as file:
    file.write(secrets.token_hex(_SEED_BYTES) + "\n")
    file.flush()
    os.fsync(file.fileno())
  try:
    os.link(draft, path)  # not over one that another has just made
  except FileExistsError:
    pass
  except OSError:  # no hard links here
    os.replace(draft, path)
  draft.unlink(missing_ok=True)
