"""Rotary embeddings whose frequencies follow from the longest row (dynamic NTK)."""

from __future__ import annotations

from typing import Any

from torch import nn

#: How transformers names the length that frequencies are for now, after the kind of layer where there are several.
_LENGTH = "max_seq_len_cached"


def forget_longer_rows(model: nn.Module) -> None:
    """Make what ``model`` computes of a batch independent of the batches before it.

    transformers keeps the frequencies of the longest row so far, for the shorter ones after it too. A run that was cut
    off, and begins anew in the middle, would go on with others.
    """
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")) and hasattr(module, "original_max_seq_len"):
            module.register_forward_pre_hook(_forget)


def _forget(module: Any, args: tuple[Any, ...]) -> None:
    for name in [name for name in vars(module) if name.endswith(_LENGTH)]:
        prefix = name.removesuffix(_LENGTH)
        at_first = getattr(module, f"{prefix}original_inv_freq", None)
        if at_first is not None:
            setattr(module, f"{prefix}inv_freq", at_first)
            setattr(module, name, module.original_max_seq_len)
