"""Attention in the shapes that PyTorch's fused kernels take, so that no weights of all pairs of tokens are kept.

Some architectures' heads are not as these kernels want them: values narrower than keys (DeepSeek's latent attention),
one head of keys for all heads of queries (Falcon), a dense mask that says no more than "causal". PyTorch takes its slow
attention for them, which keeps several numbers for each pair of tokens and head.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import AbstractContextManager

import torch
from torch import nn

from lopt_lite.attention import AttentionCall, Before, replaced_attention
from lopt_lite.checkpoints.local_mask import LocalMask


def fitting_attention() -> AbstractContextManager[None]:
    """Within the context, what attention is given is brought into these shapes, and its output back."""
    return replaced_attention(_fitting)


def is_fused(call: AttentionCall) -> bool:
    """Whether devices that have a fused kernel take it."""
    query, key, value = call.query, call.key, call.value
    return (
        call.of_heads
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and (call.enable_gqa or query.shape[1] == key.shape[1] == value.shape[1])
        and all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        and call.dropout_p == 0
        # A mask that is made of hidden states would need a gradient.
        and not (call.attn_mask is not None and call.attn_mask.requires_grad)
    )


def _fitting(call: AttentionCall, before: Before) -> torch.Tensor:
    if not call.of_heads:
        return before(call)
    query, key, value, width = call.query, call.key, call.value, call.value.shape[-1]
    if isinstance(call.attn_mask, LocalMask) and call.attn_mask.says_causal(query.shape[2], key.shape[2]):
        call = dataclasses.replace(call, attn_mask=None, is_causal=True)
    if key.shape[1] == value.shape[1] == 1 and not call.enable_gqa:
        key, value = (tensor.expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
    scale, widest = call.scale, max(width, query.shape[-1])
    if width != query.shape[-1]:
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        query, key, value = (_filled_up(tensor, widest) for tensor in (query, key, value))
    output = before(dataclasses.replace(call, query=query, key=key, value=value, scale=scale))
    return output[..., :width] if widest > width else output


def _filled_up(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """With zeros in the last dimension, which change neither products nor, once they are cut off, outputs."""
    return tensor if tensor.shape[-1] == width else nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
