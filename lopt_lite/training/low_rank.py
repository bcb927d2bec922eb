"""A frozen linear module and its LoRA adapter as one operation: y = W x + b + s B (A x).

PEFT's modules compute the same in seven passes over [tokens, width] tensors (a copy, the adapter's product, its
scaling, a sum; scaling and sums of gradients on the way back); here the adapter's products add to what is there
already. With the small matrices of SmolLM2-135M the other passes were a tenth of a training step on the CPU.

Sums round in other places then, so it is used while training alone (:mod:`lopt_lite.residency.fused`): evaluation and
generation give the bits that PEFT gives.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lopt_lite.residency import fused
from lopt_lite.residency.layer_loader import DequantizedLinear4bit, PackedLinear4bit


def fuse(layer: nn.Module, adapter: str) -> None:
    """Make the tuned linear modules of ``layer`` ready to compute with their ``adapter`` in one operation.

    Modules stay as they are but for their class, which is a subclass of PEFT's.
    """
    for module in layer.modules():
        if isinstance(module, BaseTunerLayer) and _can_fuse(module, adapter):
            module.__class__ = _FUSED[type(module)]


def _can_fuse(module: BaseTunerLayer, adapter: str) -> bool:
    base = module.get_base_layer()
    plain = not module.lora_variant and list(module.active_adapters) == [adapter]
    return plain and type(module) in _FUSED and type(base) in (nn.Linear, PackedLinear4bit, DequantizedLinear4bit)


class _Fused:
    """What the fused classes have of their own; mixed into PEFT's."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]. With dropout at work, without adapter, and outside training, as PEFT does it."""
        (name,) = self.active_adapters
        dropout = self.lora_dropout[name]
        drops = dropout.training and getattr(dropout, "p", 0) > 0
        if not fused.in_use() or self.disable_adapters or self.merged or drops:
            return super().forward(x)  # type: ignore[misc]
        a, b = (half[name].weight.to(x.dtype) for half in (self.lora_A, self.lora_B))
        output: torch.Tensor = _LowRankLinear.apply(x, a, b, self.base_layer, self.scaling[name])
        return output


class _FusedLinear(_Fused, LoraLinear):
    pass


class _FusedLinear4bit(_Fused, LoraLinear4bit):
    pass


_FUSED = {LoraLinear: _FusedLinear, LoraLinear4bit: _FusedLinear4bit}


class _LowRankLinear(torch.autograd.Function):
    """x [..., in], A [rank, in], B [out, rank], a frozen base module and s: base(x) + s (x Aᵀ) Bᵀ, [..., out].

    The base's weight is not kept but asked for again on the way back: it must be there until then.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, base: nn.Module, scaling: float
    ) -> torch.Tensor:
        output = base(x)
        inner = x.reshape(-1, x.shape[-1]) @ a.t()
        output.view(-1, output.shape[-1]).addmm_(inner, b.t(), alpha=scaling)
        ctx.save_for_backward(x, inner, a, b)
        ctx.base, ctx.scaling = base, scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_x = of_a = of_b = None
        if wants_x or wants_a:
            of_inner = (flat @ b).mul_(ctx.scaling)
            if wants_a:
                of_a = of_inner.t() @ x.reshape(-1, x.shape[-1])
            if wants_x:
                of_x = (flat @ _dense(ctx.base, flat.dtype)).addmm_(of_inner, a).view(x.shape)
        if wants_b:
            of_b = (flat.t() @ inner).mul_(ctx.scaling)
        return of_x, of_a, of_b, None, None


def _dense(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The base's matrix [out, in], as its own products have it."""
    if isinstance(base, PackedLinear4bit):
        return base.dense(dtype)
    weight = base.weight
    assert isinstance(weight, torch.Tensor)
    return weight.to(dtype)
