"""What masks of all pairs of tokens take, where an architecture makes any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils._pytree import tree_iter

from lopt_lite.checkpoints.local_mask import LocalMask, bias_bytes

if TYPE_CHECKING:
    from lopt_lite.checkpoints.layer_calls import LayerCall
    from lopt_lite.checkpoints.skeleton import Skeleton

#: Tokens of the row with which masks are looked for, and windows that models are given for it: less, and any row's.
_TRIED_TOKENS, _NARROW, _NO_WINDOW = 64, 16, 1 << 30
#: What config.json calls the tokens that a layer sees, where those are not all.
_WINDOW_NAMES = ("sliding_window", "attention_chunk_size")
#: Masks of one byte a pair that transformers' code has at once, while it makes one from comparisons.
_COMPARISONS = 3


@dataclass(frozen=True)
class MaskCost:
    """Costs of a batch's masks, in bytes.

    Attributes
    ----------
    longest_without:
        Tokens of the longest row for which none is made; None where none ever is.
    kept_bytes_per_pair:
        What a batch keeps for each pair of tokens of each row, as long as it is there: nothing where masks say no more
        than which tokens are near (:class:`~lopt_lite.checkpoints.local_mask.LocalMask`).
    bias_bytes:
        What attention to nearby tokens keeps, once for all batches.
    """

    longest_without: int | None = None
    kept_bytes_per_pair: int = 0
    bias_bytes: int = 0

    def kept_bytes(self, pairs: int, row_length: int) -> int:
        """What batches keep that have so many pairs of tokens, in rows of ``row_length`` tokens at most."""
        return pairs * self.kept_bytes_per_pair + self.bias_bytes if self.are_made(row_length) else 0

    def making_bytes(self, row_length: int) -> int:
        """What exists for a moment, beside that, while the masks of a batch are made."""
        return _COMPARISONS * row_length**2 if self.are_made(row_length) else 0

    def are_made(self, row_length: int) -> bool:
        """Whether there are masks for rows of so many tokens."""
        return self.longest_without is not None and row_length > self.longest_without


def mask_cost(skeleton: Skeleton) -> MaskCost:
    """Measure it.

    Raises
    ------
    ModelError
        The model's code fails.
    """
    tokens = min(_TRIED_TOKENS, skeleton.most_positions or _TRIED_TOKENS)
    with wide_windows(skeleton) as windows:
        always = _masks(skeleton.probe(tokens), tokens)
    if always is not None:
        return MaskCost(0, always)
    with narrow_windows(skeleton):
        kept = _masks(skeleton.probe(tokens), tokens) if windows else None
    if kept is None:
        return MaskCost()
    # A mask is made for rows that are as long as the window already.
    return MaskCost(min(windows) - 1, kept, max(bias_bytes(window, skeleton.dtype) for window in windows))


def wide_windows(skeleton: Skeleton) -> AbstractContextManager[list[int]]:
    """Within the context every token sees all before it; gives how many those with a window really see."""
    return _windows(skeleton, _NO_WINDOW)


def narrow_windows(skeleton: Skeleton) -> AbstractContextManager[list[int]]:
    """Within the context tokens with a window see few others, so that short rows have the masks of long ones."""
    return _windows(skeleton, _NARROW)


@contextmanager
def _windows(skeleton: Skeleton, tokens: int) -> Iterator[list[int]]:
    config = skeleton.model.base_model.config
    before = {
        name: getattr(config, name)
        for name in _WINDOW_NAMES
        if type(getattr(config, name, None)) is int and getattr(config, name) > 0
    }
    for name in before:
        setattr(config, name, tokens)
    try:
        yield list(before.values())
    finally:
        for name, window in before.items():
            setattr(config, name, window)


def _masks(calls: list[LayerCall], tokens: int) -> int | None:
    """Bytes for each pair in masks of all layers together, one counted once; None without any."""
    given = {id(v): v for call in calls for v in tree_iter((call.args, call.kwargs)) if isinstance(v, torch.Tensor)}
    masks = [tensor for tensor in given.values() if is_mask(tensor, tokens)]
    if not masks:
        return None
    dense = {m.untyped_storage()._cdata: m.untyped_storage() for m in masks if not isinstance(m, LocalMask)}
    return -(-sum(storage.nbytes() for storage in dense.values()) // tokens**2)


def is_mask(tensor: torch.Tensor, tokens: int) -> bool:
    """Whether it says something of each pair of ``tokens``."""
    return tensor.dim() >= 2 and tensor.shape[-2] == tensor.shape[-1] == tokens
