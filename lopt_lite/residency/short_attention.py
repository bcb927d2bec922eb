"""Causal attention over short rows on the CPU, by plain products of matrices.

PyTorch's fused kernel for the CPU works in blocks that suit long rows: at 128 to 256 tokens it took a third of a
training step of SmolLM2-135M. Here the scores of all pairs of tokens exist for a moment, of so few heads at a time that
they stay in the processor's cache. Query heads that share a head of keys are multiplied with it as one longer matrix.
Scores are rounded to bfloat16 once, where transformers' own plain ("eager") attention rounds them twice.

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
from lopt_lite.attention import AttentionCall, Before, replaced_attention

#: Tokens of the longest row for which it is faster.
LONGEST = 512
#: Bytes of scores that a thread works on at a time: half of what a core's own cache usually holds, or less.
_GROUP_BYTES = 2**20
#: Keys are filled up with zeros to a multiple of this: softmax takes 1.6 times as long for 217 of them as for 224.
_KEYS = 32
#: Matrices of scores that exist at once: probabilities, their gradient, the scores' gradient.
_MATRICES = 3


def heads_of(config: Any, dtype: torch.dtype) -> int:
    """Query heads of a model that uses it on the CPU, computing in ``dtype``, for rows of :data:`LONGEST` at most.

    0 for one that does not.
    """
    applies = dtype == torch.bfloat16 and not float32_products.needed(torch.device("cpu"))
    return int(getattr(config, "num_attention_heads", 0)) if applies else 0


def transient_bytes(rows: int, tokens: int, heads: int) -> int:
    """Bytes of scores and their mask that exist for a moment, of ``rows`` of ``tokens`` tokens each.

    At most: the heads of one row are taken to share a head of keys, which makes the largest group and mask.
    """
    row = heads * tokens * _filled_up(tokens) * torch.bfloat16.itemsize
    return _MATRICES * min(rows * row, max(_group_bytes(), row)) + row


@contextmanager
def short_attention(device: torch.device) -> Iterator[None]:
    """Within the context, attention that suits is computed here; all other as before."""
    if device.type != "cpu" or float32_products.needed(device):
        yield
        return

    def attend(call: AttentionCall, before: Before) -> torch.Tensor:
        plain = call.attn_mask is None and call.dropout_p == 0 and call.is_causal
        if not plain or not _suits(call.query, call.key, call.value):
            return before(call)
        scale = 1 / math.sqrt(call.query.shape[-1]) if call.scale is None else call.scale
        output: torch.Tensor = _ShortAttention.apply(call.query, call.key, call.value, scale)
        return output

    with replaced_attention(attend):
        yield


def _suits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        query.dim() == 4
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[2] == key.shape[2] <= LONGEST
        and query.shape[-1] == value.shape[-1]
    )


def _filled_up(tokens: int) -> int:
    return -(-tokens // _KEYS) * _KEYS


def _group_bytes() -> int:
    return _GROUP_BYTES * torch.get_num_threads()


class _ShortAttention(torch.autograd.Function):
    """softmax(s Q Kᵀ + causal mask) V. Q and the result are [rows, heads, tokens, width]; s is a number.

    K and V may have fewer heads, each for as many query heads in turn. Probabilities are made again for the backward
    pass, so that no more is kept than the fused kernel keeps.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        heads = _Heads(query, key, value)
        output = torch.empty_like(heads.query)
        for group in heads.groups():
            torch.bmm(heads.probabilities(group, scale), heads.value[group], out=output[group])
        return output.view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        heads = _Heads(query, key, value)
        of_output = gradient.reshape(heads.query.shape)
        of_query, of_key, of_value = (torch.empty_like(t) for t in (heads.query, heads.key, heads.value))
        for group in heads.groups():
            p = heads.probabilities(group, ctx.scale)
            torch.bmm(p.transpose(1, 2), of_output[group], out=of_value[group])
            of_scores = torch.bmm(of_output[group], heads.value[group].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_scores, p, -1, p.dtype)
            del p
            torch.bmm(of_scores, heads.key[group], out=of_query[group])
            torch.bmm(of_scores.transpose(1, 2), heads.query[group], out=of_key[group])
            del of_scores  # before the next group's probabilities
        of_query.mul_(ctx.scale)
        of_key.mul_(ctx.scale)
        tokens = slice(key.shape[2])
        of_key, of_value = (found.unflatten(0, key.shape[:2])[:, :, tokens] for found in (of_key, of_value))
        return of_query.view(query.shape), of_key, of_value, None


class _Heads:
    """Q [heads of keys, queries, width], the queries of all heads that share a head of keys one after the other; K and
    V [heads of keys, keys, width], a key for each token and zeros. Heads of all rows are in one dimension.
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        rows, count, tokens, width = query.shape
        keys, sharing = _filled_up(tokens), count // key.shape[1]
        self.query = query.reshape(rows * key.shape[1], sharing * tokens, width)
        self.key, self.value = (
            nn.functional.pad(tensor, (0, 0, 0, keys - tokens)).reshape(-1, keys, width) for tensor in (key, value)
        )
        self._ahead = torch.full((tokens, keys), -math.inf, dtype=query.dtype).triu_(1).repeat(sharing, 1)

    def groups(self) -> Iterator[slice]:
        """Heads of keys that are worked on together."""
        size = max(1, _group_bytes() // (self._ahead.numel() * self._ahead.itemsize))
        for start in range(0, len(self.key), size):
            yield slice(start, start + size)

    def probabilities(self, group: slice, scale: float) -> torch.Tensor:
        """[heads of keys, queries, keys]: how much each token attends to each one up to it."""
        query, key = self.query[group], self.key[group]
        scores = torch.baddbmm(self._ahead.expand(len(query), -1, -1), query, key.transpose(1, 2), alpha=scale)
        return torch.softmax(scores, -1)
