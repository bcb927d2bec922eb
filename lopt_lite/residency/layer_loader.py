"""One layer module with real weights, from the tensors of its shard."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn

from lopt_lite.checkpoints.names import split_nf4_suffix
from lopt_lite.checkpoints.nf4 import STATE_SUFFIX, dequantize_matrix
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.errors import ModelError


class DequantizedLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear layer whose matrix was dequantised once: the same products, without dequantising in each.

    It stays a ``Linear4bit`` so that PEFT puts the same class of adapter on it, which rounds in the same places:
    results do not depend on whether memory allowed the dequantised form.
    """

    def __init__(self, linear: nn.Linear, dense: torch.Tensor) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4", device="meta"
        )
        weight = nn.Parameter(dense, requires_grad=False)
        weight.compress_statistics, weight.quant_type = True, "nf4"  # what PEFT asks a 4-bit weight for
        self.compute_dtype = dense.dtype
        self._parameters["weight"] = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], in the dtype of ``x``."""
        return nn.functional.linear(x, self.weight, self.bias)


def build_layer(
    skeleton: Skeleton,
    index: int,
    tensors: dict[str, torch.Tensor],
    *,
    device: torch.device,
    dequantize: bool,
) -> nn.Module:
    """Fill a copy of the architecture's layer ``index`` with weights.

    Parameters
    ----------
    tensors:
        The layer's tensors by name within the layer, as :meth:`Store.layer` returns them.
    device:
        Where the layer will run.
    dequantize:
        Turn NF4 matrices into the skeleton's compute dtype once, instead of in every product. Four times the memory,
        the same numbers: bitsandbytes multiplies with exactly this dequantised matrix.

    Returns
    -------
    nn.Module
        In evaluation mode: the model's own dropout is off. Nothing in it is trainable.

    Raises
    ------
    ModelError
        A parameter has no tensor, or one of another shape.
    """
    layer = skeleton.layer_template(index)
    _place_linears(skeleton, index, layer, tensors, device, dequantize)
    for name, expected in skeleton.layer_parameters(index).items():
        owner_name, _, leaf = name.rpartition(".")
        owner = layer.get_submodule(owner_name)
        current = owner._parameters.get(leaf)
        if current is not None and not current.is_meta:
            continue
        if name not in tensors or tuple(tensors[name].shape) != expected:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise ModelError(f"layer {index}: the store has {found} for {name}", expected=f"shape {list(expected)}")
        value = tensors[name]
        value = value.to(device, skeleton.dtype) if value.is_floating_point() else value.to(device)
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    for module_name, module in layer.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is None:
                continue
            name = f"{module_name}.{leaf}".lstrip(".")
            module._buffers[leaf] = tensors.get(name, buffer).to(device)
    return layer.eval()


def _place_linears(
    skeleton: Skeleton,
    index: int,
    layer: nn.Module,
    tensors: dict[str, torch.Tensor],
    device: torch.device,
    dequantize: bool,
) -> None:
    for name in skeleton.linear_names(index):
        weight_name = f"{name}.weight"
        if weight_name + STATE_SUFFIX not in tensors:
            continue
        linear = layer.get_submodule(name)
        packed = {k: v for k, v in tensors.items() if split_nf4_suffix(k)[0] == weight_name}
        if dequantize:
            dense = dequantize_matrix(weight_name, packed, device).to(skeleton.dtype)
            if tuple(dense.shape) != (linear.out_features, linear.in_features):
                raise ModelError(f"layer {index}: {weight_name} has shape {list(dense.shape)} once dequantised")
            replacement: nn.Module = DequantizedLinear4bit(linear, dense)
        else:
            replacement = _linear4bit(linear, weight_name, packed, skeleton, device)
        parent_name, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(parent_name), leaf, replacement)


def _linear4bit(
    linear: nn.Linear,
    weight_name: str,
    packed: dict[str, torch.Tensor],
    skeleton: Skeleton,
    device: torch.device,
) -> bnb.nn.Linear4bit:
    module = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=skeleton.dtype,
        quant_type="nf4",
        device="meta",
    )
    sides = {k[len(weight_name) + 1 :]: v for k, v in packed.items() if k != weight_name}
    module.weight = bnb.nn.Params4bit.from_prequantized(
        data=packed[weight_name], quantized_stats=sides, requires_grad=False, device=device, module=module
    )
    # On some CPUs bitsandbytes would repack the weights in place for a second kernel, with other rounding, whenever a
    # forward pass runs without gradients. Training and evaluation must see the same numbers.
    module.support_avx512bf16_for_cpu = False
    return module
