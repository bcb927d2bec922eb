"""Random permutations that depend on named seeds alone: not on global state, platform or library version."""

from __future__ import annotations

import hashlib
import json

import numpy as np

SeedParts = tuple[int | str, ...]


def permutation(count: int, seed: SeedParts) -> np.ndarray:
    """A random order of ``range(count)``: int64 [count], always the same for the same seed.

    numpy promises the raw numbers of a bit generator for ever, but not what ``Generator.permutation`` makes of
    them; so 64-bit random keys are sorted here.
    """
    digest = hashlib.sha256(json.dumps(list(seed)).encode()).digest()
    bits = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "big")))
    keys = np.asarray(bits.random_raw(count), dtype=np.uint64)
    return np.argsort(keys, kind="stable").astype(np.int64)
