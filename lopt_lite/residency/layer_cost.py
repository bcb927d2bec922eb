"""What one layer's activations cost per token, found by running it on the meta device: shapes only, no arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from lopt_lite.checkpoints.skeleton import Skeleton


_PROBE_TOKENS = 8


@dataclass(frozen=True)
class ActivationCost:
    """Costs of a layer, in bytes per token.

    Attributes
    ----------
    saved_bytes_per_token:
        Activations that autograd keeps for the backward pass.
    transient_bytes_per_token:
        An estimate of what else exists for a moment within a layer: four of its widest activation.
    measured:
        False where the layer could not run on the meta device and a formula had to do.
    """

    saved_bytes_per_token: int
    transient_bytes_per_token: int
    measured: bool


def activation_cost(
    skeleton: Skeleton, index: int, *, targets: Sequence[str], rank: int, dropout: bool, full: bool
) -> ActivationCost:
    """Measure layer ``index``.

    Parameters
    ----------
    targets, rank, dropout:
        Names (within the layer) of the modules that get a LoRA adapter, and what it is like.
    full:
        Whether the layer's own weights are trained, so that every matrix product keeps its input.
    """
    layer = skeleton.layer_template(index).to("meta")
    for parameter in layer.parameters():
        parameter.requires_grad_(full)
    shapes = {n: torch.Size(shape) for n, shape in skeleton.layer_parameters(index).items()}
    widest = max(shape[0] for shape in shapes.values() if len(shape) > 1)
    measured = True
    try:
        saved = _saved_bytes(skeleton, index, layer) // _PROBE_TOKENS
    except (RuntimeError, NotImplementedError):
        # Routing tokens to experts needs their values, which the meta device does not have.
        saved, measured = _estimated_saved_bytes(skeleton, list(shapes.values())), False
    for target in targets:
        saved += _lora_saved_bytes(skeleton, shapes[f"{target}.weight"], rank, dropout=dropout)
    return ActivationCost(saved, 4 * widest * skeleton.dtype.itemsize, measured)


def _lora_saved_bytes(skeleton: Skeleton, shape: torch.Size, rank: int, *, dropout: bool) -> int:
    """What a LoRA adapter on a matrix [out, in] keeps: its input in float32, a mask if it has dropout, its middle."""
    return shape[-1] * (4 + (5 if dropout else 0)) + 4 * rank


def _estimated_saved_bytes(skeleton: Skeleton, shapes: list[torch.Size]) -> int:
    """Input and output of every matrix, and the norms."""
    widths = sum(shape[-1] + shape[-2] for shape in shapes if len(shape) > 1)
    return skeleton.dtype.itemsize * (widths + 12 * skeleton.hidden_size)


def _saved_bytes(skeleton: Skeleton, index: int, layer: torch.nn.Module) -> int:
    call = skeleton.probe(_PROBE_TOKENS)[index]
    on_meta: dict[str, Any] = {"args": call.args, "kwargs": call.kwargs}
    on_meta = tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, on_meta)
    meta_call = type(call)(on_meta["args"], on_meta["kwargs"], call.hidden_keyword)
    weights = {p.untyped_storage()._cdata for p in layer.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    shape = (1, _PROBE_TOKENS, skeleton.hidden_size)
    hidden = torch.empty(shape, dtype=skeleton.dtype, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = meta_call.run(layer, hidden)
    note(output)
    return sum(storage.nbytes() for storage in storages.values())
