"""Products of bfloat16 matrices, and attention, on CPUs that have no instructions for them.

PyTorch computes such products by plain loops there: on an AVX2 machine at 1 to 20 billion operations per second,
backward slower than forward, where float32 products reach 150. So operands are turned into float32 piece by piece,
multiplied, summed up in float32 and rounded to bfloat16 once, as CPUs do that have the instructions. What is kept stays
bfloat16: nothing but :data:`SCRATCH_BYTES` is added to a run's memory. Attention by PyTorch's fused kernel, whose
backward pass consists of such products, is done with a few rows or heads at a time.

It works below autograd, for whatever code asks for a product: transformers' models, adapters, losses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Values of the pieces of operands and results that are in float32 at one time.
_SCRATCH = 8 << 20
SCRATCH_BYTES = 4 * _SCRATCH
#: Longest sum made in one product; longer ones are added up from several.
_LONGEST_SUM = 2048

#: Tensors like the queries that exist in float32 in attention's backward pass: five operands, three gradients.
_ATTENTION_TENSORS = 8

_aten = torch.ops.aten
_ATTEND = _aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTEND_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def needed(device: torch.device) -> bool:
    """Whether ``device`` is a CPU without fast products of bfloat16 matrices."""
    return device.type == "cpu" and not _cpu_multiplies_bfloat16()


@contextlib.contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Within the context, this thread's bfloat16 products on the CPU are made in float32, if that is :func:`needed`."""
    if not needed(device):
        yield
        return
    with _Float32Products():
        yield


def _cpu_multiplies_bfloat16() -> bool:
    """PyTorch's own condition for giving products to oneDNN; without oneDNN there are only the plain loops."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported is not None and torch.backends.mkldnn.is_available() and supported())


class _Float32Products(TorchDispatchMode):
    """Sees every operation of its thread, in the backward pass too (which runs in the same thread on a CPU)."""

    def __init__(self) -> None:
        super().__init__()
        self._scratch = torch.empty(_SCRATCH)
        self._products: dict[Any, Callable[..., torch.Tensor]] = {
            _aten.mm.default: self._mm,
            _aten.mm.out: self._mm,
            _aten.bmm.default: self._mm,
            _aten.bmm.out: self._mm,
            _aten.addmm.default: self._addmm,
            _aten.addmm.out: self._addmm,
            _aten.baddbmm.default: self._addmm,
            _aten.baddbmm.out: self._addmm,
            _aten.addmm_.default: self._addmm_,
            _aten.baddbmm_.default: self._addmm_,
        }
        self._attention: dict[Any, Callable[..., tuple[torch.Tensor, ...]]] = {
            _ATTEND: self._attend,
            _ATTEND_BACKWARD: self._attend_backward,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = self._products.get(func)
        if product is not None:
            # mm(a, b), addmm(c, a, b): the right operand is the last.
            if _is_slow(args[-2], args[-1]):
                return product(*args, **kwargs)
        elif func in self._attention:
            if args[0].dtype == torch.bfloat16 and args[0].device.type == "cpu":
                return self._attention[func](*args, **kwargs)
        elif torch.is_inference_mode_enabled():
            # Linear and matmul come here as they are, instead of as the products they are made of.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    def _mm(self, a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        out = _fitting(out, a, b)
        self._multiply(out, a, b, None, 0.0, 1.0)
        return out

    def _addmm(
        self,
        c: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = _fitting(out, a, b)
        self._multiply(out, a, b, c.expand(out.shape) if beta else None, beta, alpha)
        return out

    def _addmm_(
        self, c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
    ) -> torch.Tensor:
        self._multiply(c, a, b, c if beta else None, beta, alpha)
        return c

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout: float = 0.0,
        causal: bool = False,
        *,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """[rows, heads, tokens, width] of each: the output, and the logarithms of the softmax's sums."""

        def attend(part: Sequence[torch.Tensor], mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            output, sums = _ATTEND(*self._all_float32(part), dropout, causal, attn_mask=mask, scale=scale)
            return output.bfloat16(), sums

        return _in_parts(attend, (query, key, value), attn_mask)

    def _attend_backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        sums: torch.Tensor,
        dropout: float,
        causal: bool,
        *,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The gradients of query, key and value."""

        def attend(part: Sequence[torch.Tensor], mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            *values, sums = part
            made = _ATTEND_BACKWARD(*self._all_float32(values), sums, dropout, causal, attn_mask=mask, scale=scale)
            return tuple(gradient.bfloat16() for gradient in made)

        return _in_parts(attend, (gradient, query, key, value, output, sums), attn_mask)

    def _multiply(
        self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, beta: float, alpha: float
    ) -> None:
        """out = beta c + alpha a b; [rows, inner] [inner, columns], or several of each."""
        if a.dim() == 2:
            self._multiply_two(out, a, b, c, beta, alpha)
            return
        rows, inner, columns = a.shape[1], a.shape[2], b.shape[2]
        at_once = _SCRATCH // max(1, rows * inner + inner * columns + rows * columns)
        if not at_once:
            for i in range(a.shape[0]):
                self._multiply_two(out[i], a[i], b[i], None if c is None else c[i], beta, alpha)
            return
        for begin in range(0, a.shape[0], at_once):
            part = slice(begin, begin + at_once)
            left, used = self._float32(a[part], 0)
            right, used = self._float32(b[part], used)
            made = self._room((left.shape[0], rows, columns), used)
            torch.bmm(left, right, out=made)
            _finish(out[part], made, None if c is None else c[part], beta, alpha)

    def _multiply_two(
        self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, beta: float, alpha: float
    ) -> None:
        (rows, inner), columns = a.shape, b.shape[1]
        most_rows, most_inner, most_columns = _piece(rows, inner, columns)
        for top in range(0, rows, most_rows):
            for left in range(0, columns, most_columns):
                high, wide = min(most_rows, rows - top), min(most_columns, columns - left)
                made = self._room((high, wide), 0)
                if not inner:
                    made.zero_()
                for begin in range(0, inner, most_inner):
                    end = begin + most_inner
                    x, used = self._float32(a[top : top + high, begin:end], made.numel())
                    y, _ = self._float32(b[begin:end, left : left + wide], used)
                    if begin:
                        made.addmm_(x, y)
                    else:
                        torch.mm(x, y, out=made)
                there = (slice(top, top + high), slice(left, left + wide))
                _finish(out[there], made, None if c is None else c[there], beta, alpha)

    def _all_float32(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of all of them in the buffer, or of its own each if they are too large together."""
        if sum(part.numel() for part in values) > _SCRATCH:
            return [part.float() for part in values]
        copies, used = [], 0
        for part in values:
            copy, used = self._float32(part, used)
            copies.append(copy)
        return copies

    def _room(self, shape: Sequence[int], begin: int) -> torch.Tensor:
        """A contiguous part of the buffer, from value ``begin`` on."""
        return self._scratch[begin : begin + math.prod(shape)].view(*shape)

    def _float32(self, values: torch.Tensor, begin: int) -> tuple[torch.Tensor, int]:
        """A copy in the buffer, in the order of the original (rows or columns), and where the next one can begin."""
        by_columns = values.stride(-2) == 1 and values.stride(-1) != 1
        ordered = values.transpose(-1, -2) if by_columns else values
        copy = self._room(ordered.shape, begin).copy_(ordered)
        return copy.transpose(-1, -2) if by_columns else copy, begin + values.numel()


def _in_parts(
    attend: Callable[[Sequence[torch.Tensor], torch.Tensor | None], tuple[torch.Tensor, ...]],
    tensors: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """What ``attend`` makes of as many rows at once as the buffer takes; of fewer heads of one row, if it must be."""
    mask = None if mask is None else mask.float()
    rows, heads = tensors[0].shape[:2]
    of_row = _ATTENTION_TENSORS * max(tensor[0].numel() for tensor in tensors)
    if of_row <= _SCRATCH or any(tensor.shape[1] != heads for tensor in tensors):
        dim, whole, at_once = 0, rows, max(1, _SCRATCH // max(1, of_row))
    elif rows > 1:
        dim, whole, at_once = 0, rows, 1
    else:
        dim, whole, at_once = 1, heads, max(1, _SCRATCH * heads // of_row)
    if at_once >= whole:
        return attend(tensors, mask)
    made = []
    for begin in range(0, whole, at_once):
        part = [tensor.narrow(dim, begin, min(at_once, whole - begin)) for tensor in tensors]
        shared = mask is None or mask.dim() < 4 or mask.shape[dim] == 1
        of_part = mask if mask is None or shared else mask.narrow(dim, begin, part[0].shape[dim])
        made.append(_in_parts(attend, part, of_part))
    return tuple(torch.cat(parts, dim) for parts in zip(*made, strict=True))


def _is_slow(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether PyTorch has only plain loops for a b. Of one row with a matrix's rows, it makes fast sums."""
    plain = a.dtype == b.dtype == torch.bfloat16 and a.device.type == b.device.type == "cpu"
    return plain and not (a.dim() == 2 and a.shape[0] == 1 and b.stride(0) == 1)


def _fitting(out: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where the result goes: ``out`` in its shape, or a new tensor."""
    shape = (*a.shape[:-1], b.shape[-1])
    if out is None:
        return a.new_empty(shape)
    return out if out.shape == shape else out.resize_(shape)


def _finish(out: torch.Tensor, made: torch.Tensor, c: torch.Tensor | None, beta: float, alpha: float) -> None:
    """Round ``beta c + alpha made``, which is float32, into ``out``."""
    if alpha != 1:
        made.mul_(alpha)
    if c is not None:
        made.add_(c, alpha=beta)
    out.copy_(made)


def _piece(rows: int, inner: int, columns: int) -> tuple[int, int, int]:
    """Largest pieces of a product whose operands and result fit into the buffer together."""
    inner = max(1, min(inner, _LONGEST_SUM))
    side = math.isqrt(inner**2 + _SCRATCH) - inner
    wide = max(1, min(columns, side))
    high = max(1, min(rows, (_SCRATCH - inner * wide) // (inner + wide)))
    wide = max(1, min(columns, (_SCRATCH - inner * high) // (inner + high)))
    return high, inner, wide
