"""RMS norms with a frozen weight, as one operation: y = w x / sqrt(mean(x²) + ε).

transformers' modules do it in six passes over the activations, three of them in float32, keep two float32 copies for
the way back and take a dozen passes there: a seventh of a training step of SmolLM2-135M on the CPU. Here the input
itself is kept, and one number per token; passes are made piece by piece on the CPU, so that what is in float32 stays
in the processor's cache.

Forward it gives the module's own bits. Its gradients round in other places, so it is used while training alone
(:mod:`lopt_lite.residency.fused`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from lopt_lite.residency import fused

#: Values of a piece on the CPU, for each thread: 512 KiB in each of a few float32 buffers.
_PIECE = 2**17


def fuse_norms(layer: nn.Module) -> None:
    """Make the RMS norms of ``layer`` ready. Modules stay as they are but for their class, a subclass of their own."""
    for module in layer.modules():
        kind: Any = type(module)
        if "RMSNorm" in kind.__name__ and not issubclass(kind, _Fused) and _is_usual(module):
            module.__class__ = _fused_class(kind)


def _is_usual(module: nn.Module) -> bool:
    """Whether it computes what is computed here, to the last bit: there are norms that add 1, or round elsewhere."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or weight.dtype == torch.float32 or epsilon is None:
        return False
    key = (type(module), weight.dtype, epsilon)
    if key not in _usual:
        _usual[key] = _agrees(module, weight.dtype, epsilon)
    return _usual[key]


_usual: dict[tuple[type[nn.Module], torch.dtype, float], bool] = {}


def _agrees(module: nn.Module, dtype: torch.dtype, epsilon: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    width = len(module.get_parameter("weight"))
    x, weight = (torch.randn(size, generator=generator).to(dtype) for size in ((3, width), (width,)))
    try:
        with torch.no_grad():
            found = torch.func.functional_call(module, {"weight": weight}, (x,), strict=True)
            return torch.equal(found, _RmsNorm.apply(x, weight, epsilon))
    except (RuntimeError, TypeError, AttributeError):
        return False  # it has other parameters, or needs more than its input


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


class _Fused:
    """What the fused classes have of their own; mixed into those of the models."""

    def forward(self: Any, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        """[..., width] -> the same. With a gate, with a trained weight and outside training as the model does it."""
        # A norm that may have a gate computes the usual thing where it is given none.
        given = [value for value in (*more, *named.values()) if value is not None]
        if given or not fused.in_use() or self.weight.requires_grad or x.dtype != self.weight.dtype:
            return super().forward(x, *more, **named)  # type: ignore[misc]
        output: torch.Tensor = _RmsNorm.apply(x, self.weight, _epsilon(self))
        return output


@cache
def _fused_class(kind: Any) -> Any:
    return type(kind.__name__, (_Fused, kind), {})


class _RmsNorm(torch.autograd.Function):
    """x [..., width], w [width], ε: [..., width], all but sums and quotients in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        output = torch.empty_like(flat)
        scale = torch.empty(len(flat), 1, dtype=torch.float32, device=x.device)
        for piece, (values, squares) in _pieces(flat, 2):
            values.copy_(flat[piece])
            torch.mean(torch.pow(values, 2, out=squares), -1, keepdim=True, out=scale[piece])
            scale[piece].add_(epsilon).rsqrt_()
            output[piece].copy_(values.mul_(scale[piece]))
            output[piece].mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return output.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        flat, of_output = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, gradient))
        of_x = torch.empty_like(flat)
        for piece, (normed, of_normed, products) in _pieces(flat, 3):
            normed.copy_(flat[piece]).mul_(scale[piece])
            torch.mul(of_output[piece], weight, out=of_x[piece])
            of_normed.copy_(of_x[piece])
            along = torch.mul(normed, of_normed, out=products).mean(-1, keepdim=True)
            of_x[piece].copy_(of_normed.addcmul_(normed, along, value=-1).mul_(scale[piece]))
        return of_x.view(x.shape), None, None


def _pieces(flat: torch.Tensor, buffers: int) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Pieces of ``flat`` [tokens, width], each with so many float32 buffers of its shape."""
    tokens, width = flat.shape
    size = max(1, _PIECE // width) * torch.get_num_threads() if flat.device.type == "cpu" else max(1, tokens)
    made = [torch.empty(min(size, tokens), width, dtype=torch.float32, device=flat.device) for _ in range(buffers)]
    for start in range(0, tokens, size):
        end = min(tokens, start + size)
        yield slice(start, end), [buffer[: end - start] for buffer in made]
