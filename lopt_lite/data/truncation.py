"""Cuts an example that is too long, keeping its answers where possible."""

from __future__ import annotations

import numpy as np


def shorten(
    ids: np.ndarray, is_target: np.ndarray, max_length: int, bos_token_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Cut one example to ``max_length`` tokens, keeping answer tokens where possible, and after its last target.

    Parameters
    ----------
    ids, is_target:
        int32 and bool [tokens].
    bos_token_id:
        If the first token is this one, it is kept.
    """
    excess = len(ids) - max_length
    if excess > 0 and is_target.any():
        first_target = int(is_target.argmax())
        begin = 1 if ids[0] == bos_token_id else 0
        # The token just before the answer stays: it is the end of the head of the answer, what the model goes on from.
        end = begin + max(0, min(excess, first_target - 1 - begin))
        ids = np.concatenate([ids[:begin], ids[end:]])[:max_length]
        is_target = np.concatenate([is_target[:begin], is_target[end:]])[:max_length]
    # What follows the last target influences nothing.
    length = length_through_last_target(is_target)
    return ids[:length], is_target[:length]


def length_through_last_target(is_target: np.ndarray) -> int:
    """Tokens up to and including the last one to be predicted; 0 when there is none."""
    targets = np.flatnonzero(is_target)
    return int(targets[-1]) + 1 if len(targets) else 0
