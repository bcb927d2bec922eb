"""What one layer costs per token, found by running it on the meta device: shapes only, no weights, no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.residency.pool import OnLayer

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class LayerCost:
    """Costs of the model's most demanding layer.

    Attributes
    ----------
    saved_bytes_per_token:
        Activations that autograd keeps for the backward pass.
    transient_bytes_per_token:
        An estimate of what else exists for a moment within a layer: four of its widest activation.
    trained_parameters:
        Adapter parameters.
    largest_matrix:
        Elements of the largest weight.
    """

    saved_bytes_per_token: int
    transient_bytes_per_token: int
    trained_parameters: int
    largest_matrix: int


def measure_layer_cost(skeleton: Skeleton, attach: OnLayer | None) -> LayerCost:
    """Measure a middle layer of the model.

    Parameters
    ----------
    attach:
        Puts an adapter on a layer, None without training.
    """
    index = skeleton.layer_count // 2
    layer = skeleton.layer_template(index).to("meta")
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    shapes = [torch.Size(shape) for shape in skeleton.layer_parameters(index).values()]
    widest = max(shape[0] for shape in shapes if len(shape) > 1)
    if attach is not None:
        attach(index, layer)
    try:
        saved = _saved_bytes(skeleton, index, layer) // _PROBE_TOKENS
    except (RuntimeError, NotImplementedError):
        # Routing tokens to experts needs their values, which the meta device does not have.
        saved = _estimated_saved_bytes(skeleton, shapes)
    return LayerCost(
        saved_bytes_per_token=saved,
        transient_bytes_per_token=4 * widest * skeleton.dtype.itemsize,
        trained_parameters=sum(p.numel() for p in layer.parameters() if p.requires_grad),
        largest_matrix=max(shape.numel() for shape in shapes),
    )


def _estimated_saved_bytes(skeleton: Skeleton, shapes: list[torch.Size]) -> int:
    """Input and output of every matrix twice (adapters keep a float32 copy of their input), and the norms."""
    widths = sum(shape[-1] + shape[-2] for shape in shapes if len(shape) > 1)
    return skeleton.dtype.itemsize * (2 * widths + 12 * skeleton.hidden_size)


def _saved_bytes(skeleton: Skeleton, index: int, layer: torch.nn.Module) -> int:
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=skeleton.root_device)
    call = skeleton.record(ids, embed=False).calls[index]
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
