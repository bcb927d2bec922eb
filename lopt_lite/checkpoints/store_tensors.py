"""The tensors of a store, each made when its turn to be written has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lopt_lite.checkpoints.names import NF4_SUFFIXES, Recipe
from lopt_lite.checkpoints.nf4 import dequantize_matrix, quantize_matrix
from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX
from lopt_lite.checkpoints.store_plan import ShardPlan, StoreSource
from lopt_lite.errors import ModelError

#: (name in the model, tensor) -> the tensor to store, same shape.
Transform = Callable[[str, torch.Tensor], torch.Tensor]

_FINITE_PIECE = 1 << 22


class StoreTensors:
    """Makes the tensors of a store's shards.

    Parameters
    ----------
    device:
        Where to quantise.
    transform:
        Applied to each tensor before it is quantised or stored; None to leave them as they are.
    """

    def __init__(self, source: StoreSource, device: torch.device, transform: Transform | None) -> None:
        self._source = source
        self._device = device
        self._transform = transform

    def of(self, plan: ShardPlan) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one shard with their names, in the order of its specs.

        Raises
        ------
        ModelError
            A tensor holds values that are not finite numbers, or its parts make another shape than the model has.
        """
        ready: dict[str, torch.Tensor] = {}
        for spec in plan.specs:
            if spec.name not in ready:
                ready.update(self._make(plan, spec.name))
            yield spec.name, ready.pop(spec.name)

    def _make(self, plan: ShardPlan, name: str) -> dict[str, torch.Tensor]:
        skeleton, weights = self._source.skeleton, self._source.files.weights
        base = next((name[: -len(s)] for s in NF4_SUFFIXES if name.endswith(s)), name)
        if self._source.unties and base == skeleton.head_name:
            return {name: self._untied_head()}
        recipe: Recipe = self._source.recipes[base]
        given = recipe.sources[0][0]
        if given + STATE_SUFFIX in weights and self._source.nf4:
            return {name: weights.read(given + name[len(base) :])}
        if given + STATE_SUFFIX in weights:
            packed = {base + s: weights.read(given + s) for s in ("", *NF4_SUFFIXES) if given + s in weights}
            made = {base: dequantize_matrix(base, packed, self._device).cpu()}
        else:
            made = recipe.make(weights.read, skeleton.model)
        result: dict[str, torch.Tensor] = {}
        for target, tensor in made.items():
            if tuple(tensor.shape) != skeleton.state_shapes[target]:
                raise ModelError(f"{target} has shape {list(tensor.shape)} once its parts are put together")
            if tensor.is_floating_point() and not _all_finite(tensor):
                raise ModelError(
                    f"tensor {given} holds values that are not finite numbers (NaN or infinity)",
                    fix="download the checkpoint again, or ask its authors for a sound one",
                )
            if self._transform is not None:
                tensor = self._transform(target, tensor)
            if target in plan.quantized:
                result |= quantize_matrix(target, tensor, dtype=self._source.dtype, device=self._device)
            else:
                result[target] = tensor.to(self._source.dtype) if tensor.is_floating_point() else tensor
        return result

    def _untied_head(self) -> torch.Tensor:
        skeleton = self._source.skeleton
        embedding = self._source.recipes[skeleton.embedding_name]
        tensor = embedding.make(self._source.files.weights.read, skeleton.model)[skeleton.embedding_name]
        if self._transform is not None:
            tensor = self._transform(skeleton.head_name, tensor)
        return tensor.to(self._source.dtype)


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, found out piece by piece: an embedding's worth of answers is large too."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.reshape(-1).split(_FINITE_PIECE))
