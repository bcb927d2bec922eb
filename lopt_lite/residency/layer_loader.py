"""Layer modules and the weights in them.

A :class:`LayerShell` is a layer of the architecture whose frozen weights can be put in and taken out again while the
rest of it (an adapter attached to it, say) stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from lopt_lite.checkpoints.names import split_nf4_suffix
from lopt_lite.checkpoints.nf4 import dequantize, renewed, state_of, without_tensors
from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.errors import ModelError
from lopt_lite.residency import fused


class PackedLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear layer whose matrix is dequantised in every product.

    Training has one way of doing so on all devices, which :class:`DequantizedLinear4bit` stands for. Where nothing is
    trained a GPU has bitsandbytes' own products, which are faster for a few tokens, and round in other places.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the dtype of ``x``."""
        if x.device.type != "cpu" and not fused.in_use():
            output: torch.Tensor = super().forward(x)
            return output
        product: torch.Tensor = _PackedProduct.apply(x, self)
        return product

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [out, in]."""
        return dequantize(self.weight.data, self.weight.quant_state).to(dtype)


class _PackedProduct(torch.autograd.Function):
    """x [..., in] and a frozen :class:`PackedLinear4bit`: its output; no dense matrix is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: PackedLinear4bit) -> torch.Tensor:
        ctx.module = module
        return nn.functional.linear(x, module.dense(x.dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.module.dense(gradient.dtype), None


class DequantizedLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear layer whose matrix was dequantised once: the same products, without dequantising in each.

    It stays a ``Linear4bit`` so that PEFT puts the same class of adapter on it, which rounds in the same places:
    results do not depend on whether memory allowed the dequantised form.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the dtype of ``x``."""
        return nn.functional.linear(x, self.weight, self.bias)


class LayerShell:
    """One layer of the architecture, to be filled with weights.

    Parameters
    ----------
    skeleton, index:
        Which layer.
    quantised:
        Names (within the layer) of the linear modules whose weights are NF4 in the store.
    dequantize:
        Turn NF4 matrices into the compute dtype when they are put in, instead of in every product. Four times the
        memory, the same numbers: each product is one with exactly this dequantised matrix.

    Attributes
    ----------
    layer:
        The module, in evaluation mode: the model's own dropout is off. Nothing in it is trainable. Its parameters are
        on the meta device until :meth:`fill`.
    """

    def __init__(self, skeleton: Skeleton, index: int, *, quantised: set[str], dequantize: bool) -> None:
        self._skeleton, self._index, self._dequantize = skeleton, index, dequantize
        self.layer = skeleton.layer_template(index)
        for name in sorted(quantised):
            parent_name, _, leaf = name.rpartition(".")
            setattr(self.layer.get_submodule(parent_name), leaf, self._linear4bit(self.layer.get_submodule(name)))
        # Modules are found by name now: an adapter wraps them later, under other names.
        self._linears = {f"{name}.weight": self.layer.get_submodule(name) for name in quantised}
        self._states: dict[str, bnb.functional.QuantState] = {}
        self._plain: dict[str, tuple[nn.Module, str]] = {}
        self._buffers: dict[str, tuple[nn.Module, str]] = {}
        for module_name, module in self.layer.named_modules():
            prefix = f"{module_name}." if module_name else ""
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    parameter.requires_grad_(False)
                    if prefix + leaf not in self._linears:
                        self._plain[prefix + leaf] = (module, leaf)
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    self._buffers[prefix + leaf] = (module, leaf)
        self.layer.eval()

    def keep_trainable(self) -> bool:
        """Leave weights that were made trainable alone from now on; whether that leaves nothing to fill in.

        The plain weights of a layer that is trained as a whole are its own then: not from the store, never taken out.
        """
        self._plain = {n: place for n, place in self._plain.items() if not place[0]._parameters[place[1]].requires_grad}
        alone = not self._plain and not self._linears
        if alone:
            for module, leaf in self._buffers.values():
                module._buffers[leaf] = module._buffers[leaf].clone()
        return alone

    def fill(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Put weights in.

        Parameters
        ----------
        tensors:
            The layer's tensors by name within the layer, on the CPU or already on ``device`` (then they are used
            where they lie, as far as their type allows).

        Raises
        ------
        ModelError
            A parameter has no tensor, or one of another shape.
        """
        expected = self._skeleton.layer_parameters(self._index)
        for name, module in self._linears.items():
            packed = {k: v for k, v in tensors.items() if split_nf4_suffix(k)[0] == name}
            if name not in packed:
                raise ModelError(f"layer {self._index}: the store has nothing for {name}", fix="make the store again")
            state = self._state(name, packed, device)
            if tuple(state.shape) != expected[name]:
                raise ModelError(f"layer {self._index}: {name} has shape {list(state.shape)} once dequantised")
            if self._dequantize:
                dense = dequantize(packed[name].to(device), state).to(self._skeleton.dtype)
                _put(module, "weight", _as_4bit_weight(dense))
            else:
                module.weight, module.quant_state = _packed_weight(packed[name].to(device), state, module), state
        for name, (module, leaf) in self._plain.items():
            if name not in tensors or tuple(tensors[name].shape) != expected[name]:
                found = list(tensors[name].shape) if name in tensors else "nothing"
                raise ModelError(
                    f"layer {self._index}: the store has {found} for {name}",
                    expected=f"shape {list(expected[name])}",
                    fix="make the store again",
                )
            value = tensors[name]
            _put(
                module, leaf, value.to(device, self._skeleton.dtype) if value.is_floating_point() else value.to(device)
            )
        for name, (module, leaf) in self._buffers.items():
            module._buffers[leaf] = tensors.get(name, module._buffers[leaf]).to(device)

    def _state(self, name: str, packed: dict[str, torch.Tensor], device: torch.device) -> bnb.functional.QuantState:
        """How a matrix is quantised: found out when it is put in for the first time, and the same ever after."""
        if name not in self._states:
            state = state_of(name, packed, device)
            self._states[name] = without_tensors(state)
            return state
        return renewed(self._states[name], name, packed, device)

    def empty(self) -> None:
        """Let go of the weights; the module and what is attached to it stay."""
        expected = self._skeleton.layer_parameters(self._index)
        for name, module in self._linears.items():
            _put(module, "weight", _as_4bit_weight(torch.empty(expected[name], device="meta")))
            module.quant_state = None
        for name, (module, leaf) in self._plain.items():
            _put(module, leaf, torch.empty(expected[name], device="meta"))

    def _linear4bit(self, linear: nn.Linear) -> bnb.nn.Linear4bit:
        kind = DequantizedLinear4bit if self._dequantize else PackedLinear4bit
        return kind(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=self._skeleton.dtype,
            quant_type="nf4",
            device="meta",
        )


def _put(module: nn.Module, leaf: str, value: torch.Tensor) -> None:
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    module._parameters[leaf] = parameter


def _packed_weight(
    packed: torch.Tensor, state: bnb.functional.QuantState, module: bnb.nn.Linear4bit
) -> bnb.nn.Params4bit:
    """The parameter that bitsandbytes' ``from_prequantized`` makes, of a state that is known."""
    return bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        module=module,
        bnb_quantized=True,
    )


def _as_4bit_weight(dense: torch.Tensor) -> nn.Parameter:
    """A plain parameter with the two facts that PEFT asks a 4-bit weight for."""
    weight = nn.Parameter(dense, requires_grad=False)
    weight.compress_statistics, weight.quant_type = True, "nf4"
    return weight


def quantised_linears(skeleton: Skeleton, index: int, names: Mapping[str, object]) -> set[str]:
    """The linear modules of layer ``index`` that are NF4 among the stored tensor ``names`` (within the layer)."""
    return {n for n in skeleton.linear_names(index) if f"{n}.weight{STATE_SUFFIX}" in names}
