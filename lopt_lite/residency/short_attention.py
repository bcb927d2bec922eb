"""Causal attention over short rows on the CPU, by plain products of matrices.

PyTorch's fused kernel for the CPU works in blocks that suit long rows: at 128 to 256 tokens it took a third of a
training step of SmolLM2-135M. Here the scores of pairs of tokens exist for a moment, of so few heads at a time that
they stay in the processor's cache. Query heads that share a head of keys are multiplied with it as one longer matrix.
Rows of 144 tokens and more are gone through in up to four parts, each with the keys up to its own end, which leaves out
up to three eighths of all pairs.
Scores are rounded to bfloat16 once, where transformers' own plain ("eager") attention rounds them twice.

Where products are made in float32 (:mod:`lopt_lite.float32_products`), the fused kernel is faster.

It is used while training alone: evaluation and generation compute as transformers does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from lopt_lite import float32_products
from lopt_lite.attention import AttentionCall, Before, replaced_attention

#: Tokens of the longest row for which it is faster.
LONGEST = 1024
#: Bytes of scores that a thread works on at a time: half of what a core's own cache usually holds, or less.
_GROUP_BYTES = 2**20
#: Keys are filled up with zeros to a multiple of this: softmax takes 1.6 times as long for 217 of them as for 224.
_KEYS = 32
#: Tokens of a part, about. Parts of 64 are faster where few heads share their keys and slower where none do.
_PART = 96
#: Parts of a row: gradients of keys and values are rounded to bfloat16 with each that is added.
_MOST_PARTS = 4
#: Matrices of scores that exist at once: probabilities, their gradient, the scores' gradient.
_MATRICES = 3


def heads_of(config: Any, dtype: torch.dtype) -> int:
    """Query heads of a model that uses it on the CPU, computing in ``dtype``, for rows of :data:`LONGEST` at most.

    0 for one that does not.
    """
    applies = dtype == torch.bfloat16 and not float32_products.needed(torch.device("cpu"))
    return int(getattr(config, "num_attention_heads", 0)) if applies else 0


def transient_bytes(rows: int, tokens: int, heads: int) -> int:
    """Bytes of scores and their mask that exist for a moment, of ``rows`` of at most ``tokens`` tokens each.

    At most: the heads of one row are taken to share a head of keys, which makes the largest group and mask.
    """
    row = heads * _most_pairs(tokens) * torch.bfloat16.itemsize
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


@cache
def _most_pairs(tokens: int) -> int:
    """Queries of one head times keys, of the largest part of a row of at most ``tokens`` tokens."""
    return max(min(n, _part_tokens(n)) * _filled_up(n) for n in range(1, tokens + 1))


def _part_tokens(tokens: int) -> int:
    """Tokens of each part of a row, but for the last one."""
    return _filled_up(-(-tokens // max(1, min(round(tokens / _PART), _MOST_PARTS))))


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
        for part, group in heads.pieces():
            p = heads.probabilities(part, group, scale)
            torch.bmm(p, heads.value[group, part.keys], out=output[group, part.queries])
            del p  # before the next piece's
        return heads.by_head(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        heads = _Heads(query, key, value)
        of_output = heads.together(gradient)
        of_query, of_key, of_value = (torch.empty_like(t) for t in (heads.query, heads.key, heads.value))
        for part, group in heads.pieces():
            queries, keys = (group, part.queries), (group, part.keys)
            p = heads.probabilities(part, group, ctx.scale)
            part.put(of_value[keys], p.transpose(1, 2), of_output[queries])
            of_scores = torch.bmm(of_output[queries], heads.value[keys].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_scores, p, -1, p.dtype)
            del p
            torch.bmm(of_scores, heads.key[keys], out=of_query[queries])
            part.put(of_key[keys], of_scores.transpose(1, 2), heads.query[queries])
            del of_scores  # before the next piece's probabilities
        of_query.mul_(ctx.scale)
        of_key.mul_(ctx.scale)
        tokens = slice(key.shape[2])
        of_key, of_value = (found.unflatten(0, key.shape[:2])[:, :, tokens] for found in (of_key, of_value))
        return heads.by_head(of_query), of_key, of_value, None


@dataclass(frozen=True)
class _Part:
    """Queries of some tokens in a row, the keys up to the last of them, and what these queries may not see.

    Attributes
    ----------
    ahead:
        [queries, keys]: -inf for a key behind the query's token, else 0.
    is_first:
        Whether it is gone through first: its keys are all there are.
    """

    queries: slice
    keys: slice
    ahead: torch.Tensor
    is_first: bool

    def put(self, place: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Put products of two stacks of matrices into their place, or add them to what other parts have put there."""
        if self.is_first:
            torch.bmm(a, b, out=place)
        else:
            place.baddbmm_(a, b)


class _Heads:
    """Q [heads of keys, queries, width], the queries of all heads that share a head of keys in one dimension; K and V
    [heads of keys, keys, width], a key for each token and zeros. Heads of all rows are in one dimension.

    Queries lie head after head where a row is one part, which is how they come, else token after token.
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        self._shape, self._keys = query.shape, key.shape[1]
        tokens, keys = query.shape[2], _filled_up(query.shape[2])
        self._by_token = _part_tokens(tokens) < tokens
        self.query = self.together(query)
        self.key, self.value = (
            nn.functional.pad(tensor, (0, 0, 0, keys - tokens)).reshape(-1, keys, key.shape[3])
            for tensor in (key, value)
        )

    def together(self, query: torch.Tensor) -> torch.Tensor:
        """[rows, heads, tokens, width] -> [heads of keys, queries, width]."""
        if self._by_token:
            query = query.unflatten(1, (self._keys, -1)).transpose(2, 3)
        return query.reshape(self._shape[0] * self._keys, -1, self._shape[3])

    def by_head(self, query: torch.Tensor) -> torch.Tensor:
        """The way back."""
        if not self._by_token:
            return query.view(self._shape)
        rows, _, tokens, width = self._shape
        return query.view(rows, self._keys, tokens, -1, width).transpose(2, 3).reshape(self._shape)

    def pieces(self) -> Iterator[tuple[_Part, slice]]:
        """Parts of rows, and heads of keys of which they are worked on together."""
        tokens, size = self._shape[2], _part_tokens(self._shape[2])
        # The last part first: it writes to all places of keys, to which the others add.
        for first in reversed(range(0, tokens, size)):
            part = self._part(first, min(tokens, first + size))
            count = max(1, _group_bytes() // (part.ahead.numel() * part.ahead.itemsize))
            for start in range(0, len(self.key), count):
                yield part, slice(start, start + count)

    def _part(self, first: int, end: int) -> _Part:
        """That of the tokens from ``first`` to ``end``."""
        keys = _filled_up(end)
        ahead = torch.full((end - first, keys), -math.inf, dtype=self.query.dtype).triu_(first + 1)
        sharing = self._shape[1] // self._keys
        ahead = ahead.repeat_interleave(sharing, 0) if self._by_token else ahead.repeat(sharing, 1)
        return _Part(slice(first * sharing, end * sharing), slice(keys), ahead, end == self._shape[2])

    def probabilities(self, part: _Part, group: slice, scale: float) -> torch.Tensor:
        """[heads of keys, queries, keys]: how much each token attends to each one up to it."""
        query, key = self.query[group, part.queries], self.key[group, part.keys]
        scores = torch.baddbmm(part.ahead.expand(len(query), -1, -1), query, key.transpose(1, 2), alpha=scale)
        return torch.softmax(scores, -1)
