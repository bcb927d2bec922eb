"""Random states derived from names, so that any part of a run can be repeated alone.

No random generator runs along with training: each use derives its own seed from the run's seed and what it is for
(block, epoch, step). A resumed run therefore needs no saved generator state to see the same numbers.
"""

from __future__ import annotations

import hashlib

Part = int | str


def derive_seed(*parts: Part) -> int:
    """A 63-bit seed from a sequence of numbers and words, the same on every platform."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
