"""Attention to nearby tokens without a mask of all pairs of tokens.

Where layers see no further than a sliding window (Mistral, Gemma) or their own chunk of the row (Llama 4), transformers
gives them a dense mask, and attention makes a copy of it in its own dtype for every row and every layer, to be kept
for the backward pass. A :class:`LocalMask` stands for such a mask: it holds no values, and attention that is given
one is computed part by part of the row, with just the keys that the part sees. Code that does anything else with it
gets the dense mask.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from lopt_lite.attention import ATTENTION, AttentionCall
from lopt_lite.checkpoints.layer_calls import LayerCall

#: Rows of a dense mask that are compared at a time.
_COMPARED = 256
#: Queries of a part, for a sliding window of twice as many tokens: the fewest pairs that are computed for nothing, as
#: far as products are not too small, nor masks too large.
_FEWEST_QUERIES, _MOST_QUERIES = 64, 1024
_NO_VALUES = "a mask that has no values of its own cannot be changed: change what it gives"
#: Of rows of so many tokens a mask takes next to nothing, and its use gives the bits that transformers gives.
_SHORT_ROW = 64
#: Last dimensions of masks are filled up to a multiple of this, as some kernels would copy them else.
_ALIGNED = 16


class LocalMask(torch.Tensor):
    """A mask, bool [rows, 1, tokens, tokens]: true where a token (dimension 2) sees another (dimension 3).

    It sees itself and those before it, if they are less than ``size`` tokens before it (a sliding window), or else
    (``chunked``) if no multiple of ``size`` lies between them.
    """

    size: int
    chunked: bool

    @staticmethod
    def __new__(cls, shape: torch.Size, size: int, *, chunked: bool, device: torch.device) -> LocalMask:
        make: Any = torch.Tensor._make_wrapper_subclass
        mask: LocalMask = make(cls, shape, dtype=torch.bool, device=device)
        mask.size, mask.chunked = size, chunked
        return mask

    def __repr__(self) -> str:
        return f"LocalMask({list(self.shape)}, {self.size}, chunked={self.chunked})"

    def on(self, device: torch.device | str) -> LocalMask:
        """The same mask for another device."""
        return LocalMask(self.shape, self.size, chunked=self.chunked, device=torch.device(device))

    def says_causal(self, queries: int, keys: int) -> bool:
        """Whether, in attention of so many, tokens see just themselves and all before them."""
        return queries == keys == self.shape[-1] <= self.size

    def dense(self) -> torch.Tensor:
        """All its values, of one row for all."""
        tokens = self.shape[-1]
        values = _rows_of_mask(tokens, 0, tokens, self.size, chunked=self.chunked, device=self.device)
        return values.expand(self.shape)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is ATTENTION:
            return _attention(AttentionCall(*args, **(kwargs or {})))
        if func is torch.Tensor.__setitem__ and isinstance(args[0], LocalMask):
            raise RuntimeError(_NO_VALUES)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            raise RuntimeError(_NO_VALUES)
        args, kwargs = tree_map(lambda v: v.dense() if isinstance(v, LocalMask) else v, (args, kwargs or {}))
        return func(*args, **kwargs)


def without_dense_masks(calls: list[LayerCall]) -> list[LayerCall]:
    """The same calls, a :class:`LocalMask` in place of each dense mask that is equal to one; of one batch."""
    found: dict[int, LocalMask | None] = {}

    def change(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or isinstance(value, LocalMask):
            return value
        if id(value) not in found:
            found[id(value)] = _as_local(value)
        local = found[id(value)]
        return value if local is None else local

    changed = [
        dataclasses.replace(
            call,
            args=tuple(change(value) for value in call.args),
            kwargs={name: change(value) for name, value in call.kwargs.items()},
        )
        for call in calls
    ]
    return changed if any(local is not None for local in found.values()) else calls


def _as_local(mask: torch.Tensor) -> LocalMask | None:
    """What a dense mask is equal to, if all rows have the same."""
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3] or mask.is_meta:
        return None
    one = mask[0, 0]
    if mask.stride(0) and not all(torch.equal(row[0], one) for row in mask[1:]):
        return None
    size = int(one[:, 0].sum())  # how many tokens see the first one
    for chunked in (False, True):
        if size and all(
            torch.equal(
                one[start : start + _COMPARED],
                _rows_of_mask(
                    len(one), start, min(start + _COMPARED, len(one)), size, chunked=chunked, device=mask.device
                ),
            )
            for start in range(0, len(one), _COMPARED)
        ):
            return LocalMask(mask.shape, size, chunked=chunked, device=mask.device)
    return None


def _rows_of_mask(tokens: int, start: int, end: int, size: int, *, chunked: bool, device: torch.device) -> torch.Tensor:
    """The mask's rows ``start`` to ``end`` (exclusive), bool [end - start, tokens]."""
    query = torch.arange(start, end, device=device)[:, None]
    key = torch.arange(tokens, device=device)
    near = key >= query - query % size if chunked else key > query - size
    return near.logical_and_(key <= query)


def _attention(call: AttentionCall) -> torch.Tensor:
    """As PyTorch's attention, given a :class:`LocalMask`."""
    mask, tokens = call.attn_mask, call.query.shape[-2]
    assert isinstance(mask, LocalMask)
    suits = (
        call.of_heads
        and tokens > _SHORT_ROW
        and call.key.shape[-2] == tokens
        and mask.shape == (call.query.shape[0], 1, tokens, tokens)
        and call.dropout_p == 0
        and not call.is_causal
    )
    if not suits:
        return dataclasses.replace(call, attn_mask=mask.dense()).run()
    parts = _Parts(mask, tokens, call.query.dtype)
    settings = {"scale": call.scale, "enable_gqa": call.enable_gqa}
    output: torch.Tensor = _LocalAttention.apply(call.query, call.key, call.value, parts, settings)
    return output


class _LocalAttention(torch.autograd.Function):
    """Attention part by part. Q, K, V are [rows, heads, tokens, width]; K and V may have fewer heads.

    Each part has a graph of its own. Slices of whole keys in one graph would each have a gradient as large as all keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: _Parts,
        settings: dict[str, Any],
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.parts = []
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        for queries, keys, seen in parts:
            inputs = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            if any(ctx.needs_input_grad):
                inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
                with torch.enable_grad():
                    found = ATTENTION(*inputs, **seen, **settings)
                ctx.parts.append((queries, keys, inputs, found))
            else:
                found = ATTENTION(*inputs, **seen, **settings)
            output[:, :, queries] = found.detach()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        if not ctx.parts:
            raise RuntimeError("attention to nearby tokens can go backward only once")
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        while ctx.parts:
            queries, keys, inputs, output = ctx.parts.pop()
            found = torch.autograd.grad(output, inputs, gradient[:, :, queries])
            of_query[:, :, queries] = found[0]
            of_key[:, :, keys] += found[1]
            of_value[:, :, keys] += found[2]
        return of_query, of_key, of_value, None, None


class _Parts:
    """(queries, keys that they see, arguments that say which of them each one sees), from a row's start to its end.

    Of a window the first part is as long as the window; each query of the others sees as many keys as that.
    """

    def __init__(self, mask: LocalMask, tokens: int, dtype: torch.dtype) -> None:
        self._mask, self._tokens, self._dtype = mask, tokens, dtype

    def __iter__(self) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
        size = self._mask.size
        if self._mask.chunked:
            for start in range(0, self._tokens, size):
                part = slice(start, min(start + size, self._tokens))
                yield part, part, {"is_causal": True}
            return
        first = slice(0, min(size, self._tokens))
        yield first, first, {"is_causal": True}
        bias = _bias(size, self._dtype, self._mask.device)
        for start in range(size, self._tokens, len(bias)):
            end = min(start + len(bias), self._tokens)
            keys = slice(start - size + 1, end)
            yield slice(start, end), keys, {"attn_mask": bias[: end - start, : keys.stop - keys.start]}


def bias_bytes(size: int, dtype: torch.dtype) -> int:
    """What attention over windows of ``size`` tokens keeps, once for all layers and batches."""
    queries = _queries(size)
    return queries * _filled_up(queries + size - 1) * dtype.itemsize


@functools.lru_cache(maxsize=4)
def _bias(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What is added to a part's scores, 0 or -inf: [queries, keys], the first query seeing the first ``size`` keys."""
    queries = _queries(size)
    keys = queries + size - 1
    seen = _rows_of_mask(keys, size - 1, keys, size, chunked=False, device=device)
    bias = torch.zeros(queries, _filled_up(keys), dtype=dtype, device=device)[:, :keys]
    return bias.masked_fill_(~seen, float("-inf"))


def _queries(size: int) -> int:
    return min(_MOST_QUERIES, max(_FEWEST_QUERIES, size // 2))


def _filled_up(keys: int) -> int:
    return -(-keys // _ALIGNED) * _ALIGNED
