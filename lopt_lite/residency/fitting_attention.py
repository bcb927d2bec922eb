"""Attention in the shapes that PyTorch's fused kernels take, so that no weights of all pairs of tokens are kept.

Some architectures' heads are not as these kernels want them: values narrower than keys (DeepSeek's latent attention),
one head of keys for all heads of queries (Falcon), a dense mask that says no more than "causal". PyTorch takes its slow
attention for them, which keeps several numbers for each pair of tokens and head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lopt_lite.checkpoints.local_mask import LocalMask


@contextmanager
def fitting_attention() -> Iterator[None]:
    """Within the context, what attention is given is brought into these shapes, and its output back."""
    before = nn.functional.scaled_dot_product_attention

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        width = value.shape[-1]
        if query.dim() == key.dim() == value.dim() == 4:
            if isinstance(attn_mask, LocalMask) and attn_mask.says_causal(query.shape[2], key.shape[2]):
                attn_mask, is_causal = None, True
            if key.shape[1] == value.shape[1] == 1 and not enable_gqa:
                key, value = (tensor.expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
            if width != query.shape[-1]:
                scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
                widest = max(width, query.shape[-1])
                query, key, value = (_filled_up(tensor, widest) for tensor in (query, key, value))
        output = before(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return output[..., :width] if output.shape[-1] > width else output

    nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = before


def is_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout_p: float, enable_gqa: bool
) -> bool:
    """Whether devices that have a fused kernel take it, for [rows, heads, tokens, width] each."""
    return (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and (enable_gqa or query.shape[1] == key.shape[1] == value.shape[1])
        and all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        and dropout_p == 0
    )


def _filled_up(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """With zeros in the last dimension, which change neither products nor, once they are cut off, outputs."""
    return tensor if tensor.shape[-1] == width else nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
