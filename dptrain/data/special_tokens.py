"""The special tokens that every dptrain vocabulary begins with."""

from __future__ import annotations

from typing import Final

PAD_ID: Final = 0
UNK_ID: Final = 1
CLS_ID: Final = 2
SEP_ID: Final = 3
MASK_ID: Final = 4

# Indexed by id.
SPECIAL_PIECES: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Ids from here on are ordinary tokens.
NUM_SPECIAL: Final = len(SPECIAL_PIECES)
