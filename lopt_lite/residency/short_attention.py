"""Causal attention over short rows on the CPU, by plain products of matrices.

PyTorch's fused kernel for the CPU works in blocks that suit long rows: at 128 to 256 tokens it took a third of a
training step of SmolLM2-135M. Products of whole matrices take two thirds of its time at 256 tokens, and a third at 128;
scores of all pairs exist for a moment, which is little for short rows. Scores are rounded to bfloat16 once, where
transformers' own plain ("eager") attention rounds them twice.

Where products are made in float32 (:mod:`lopt_lite.float32_products`), the fused kernel is faster.

It is used while training alone: evaluation and generation compute as transformers does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lopt_lite import float32_products

#: Tokens of the longest row for which it is faster.
LONGEST = 320
#: Matrices of [tokens, tokens] per row and head that exist at once: scores' probabilities, their gradient, the scores'.
_MATRICES = 3


def transient_bytes_per_pair(heads: int, dtype: torch.dtype) -> int:
    """Bytes that exist for a moment for each pair of tokens of a row; 0 where the fused kernel is used."""
    here = dtype == torch.bfloat16 and not float32_products.needed(torch.device("cpu"))
    return _MATRICES * heads * dtype.itemsize if here else 0


@contextmanager
def short_attention(device: torch.device) -> Iterator[None]:
    """Within the context, attention that suits is computed here; all other as before."""
    if device.type != "cpu" or float32_products.needed(device):
        yield
        return
    fused = nn.functional.scaled_dot_product_attention

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
        plain = attn_mask is None and dropout_p == 0 and is_causal
        if not plain or not _suits(query, key, value):
            return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        output: torch.Tensor = _ShortAttention.apply(query, key, value, scale)
        return output

    nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = fused


def _suits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        query.dim() == 4
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[2] == key.shape[2] <= LONGEST
        and query.shape[-1] == value.shape[-1]
    )


class _ShortAttention(torch.autograd.Function):
    """softmax(s Q Kᵀ + causal mask) V. Q, K, V and the result are [rows, heads, tokens, width]; s is a number.

    Probabilities are made again for the backward pass, so that no more is kept than the fused kernel keeps.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return torch.bmm(_probabilities(_flat(query), _flat(key), scale), _flat(value)).view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = (_flat(tensor) for tensor in ctx.saved_tensors)
        flat = _flat(gradient)
        p = _probabilities(query, key, ctx.scale)
        of_value = torch.bmm(p.transpose(1, 2), flat)
        of_scores = torch.bmm(flat, value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_scores, p, -1, p.dtype)
        of_query = torch.bmm(of_scores, key).mul_(ctx.scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), query).mul_(ctx.scale)
        shape = gradient.shape
        return of_query.view(shape), of_key.view(shape), of_value.view(shape), None


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, *tensor.shape[2:])


def _probabilities(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """[heads, tokens, tokens]: how much each token attends to each one up to it."""
    tokens = query.shape[1]
    ahead = torch.full((tokens, tokens), -math.inf, dtype=query.dtype).triu_(1)
    scores = torch.baddbmm(ahead.expand(query.shape[0], -1, -1), query, key.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1)
