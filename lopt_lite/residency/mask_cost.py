"""What masks of all pairs of tokens take, where an architecture makes any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils._pytree import tree_iter

from lopt_lite.checkpoints.local_mask import LocalMask

if TYPE_CHECKING:
    from lopt_lite.checkpoints.layer_calls import LayerCall
    from lopt_lite.checkpoints.skeleton import Skeleton

#: Tokens of the row with which masks are looked for, and the window that models are given for it.
_TRIED_TOKENS, _TRIED_WINDOW = 64, 16
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
    """

    longest_without: int | None = None
    kept_bytes_per_pair: int = 0

    def kept_bytes(self, pairs: int, row_length: int) -> int:
        """What batches keep that have so many pairs of tokens, in rows of ``row_length`` tokens at most."""
        return pairs * self.kept_bytes_per_pair if self._made(row_length) else 0

    def making_bytes(self, row_length: int) -> int:
        """What exists for a moment, beside that, while the masks of a batch are made."""
        return _COMPARISONS * row_length**2 if self._made(row_length) else 0

    def _made(self, row_length: int) -> bool:
        return self.longest_without is not None and row_length > self.longest_without


def mask_cost(skeleton: Skeleton) -> MaskCost:
    """Measure it.

    Raises
    ------
    ModelError
        The model's code fails.
    """
    tokens = min(_TRIED_TOKENS, skeleton.most_positions or _TRIED_TOKENS)
    found = _masks(skeleton.probe(tokens), tokens)
    if found is not None:
        return MaskCost(0, found)
    with _narrow(skeleton) as windows:
        if not windows:
            return MaskCost()
        return MaskCost(min(windows), _masks(skeleton.probe(tokens), tokens) or 0)


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


@contextmanager
def _narrow(skeleton: Skeleton) -> Iterator[list[int]]:
    """Within the context, windows are narrow; gives how wide they really are."""
    config = skeleton.model.base_model.config
    before = {
        name: getattr(config, name)
        for name in _WINDOW_NAMES
        if type(getattr(config, name, None)) is int and getattr(config, name) > 0
    }
    for name in before:
        setattr(config, name, _TRIED_WINDOW)
    try:
        yield list(before.values())
    finally:
        for name, window in before.items():
            setattr(config, name, window)
