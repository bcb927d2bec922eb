"""The tensors of a store, each made when its turn to be written has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lopt_lite.checkpoints.names import NF4_SUFFIXES, split_nf4_suffix
from lopt_lite.checkpoints.nf4 import dequantize_matrix, quantize_matrix
from lopt_lite.checkpoints.store_plan import ShardPlan, StoreSource, is_packed
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
        if name in plan.copied:
            return {name: self._copy(plan.copied[name])}
        skeleton = self._source.skeleton
        base = split_nf4_suffix(name)[0]
        if self._source.unties and base == skeleton.head_name:
            return {name: self._untied_head()}
        recipe = self._source.recipes[base]
        with skeleton.as_a_whole() as model:
            made = recipe.make(self._read, model)
        result: dict[str, torch.Tensor] = {}
        for target, tensor in made.items():
            if tuple(tensor.shape) != skeleton.state_shapes[target]:
                raise ModelError(f"{target} has shape {list(tensor.shape)} once its parts are put together")
            _check_finite(recipe.sources[0][0], tensor)
            if self._transform is not None:
                tensor = self._transform(target, tensor)
            if target in plan.quantized:
                result |= quantize_matrix(target, tensor, dtype=self._source.dtype, device=self._device)
            else:
                result[target] = tensor.to(self._source.dtype) if tensor.is_floating_point() else tensor
        return result

    def _read(self, given: str) -> torch.Tensor:
        """A tensor of the model's files, on the CPU; one in 4 bits as the matrix that it stands for."""
        weights = self._source.files.weights
        if not is_packed(self._source, given):
            return weights.read(given)
        packed = {given + s: weights.read(given + s) for s in ("", *NF4_SUFFIXES) if given + s in weights}
        return dequantize_matrix(given, packed, self._device).cpu()

    def _copy(self, given: str) -> torch.Tensor:
        """A tensor of a matrix that stays packed as it is; its scales are looked at as weights are."""
        tensor = self._source.files.weights.read(given)
        _check_finite(given, tensor)
        return tensor

    def _untied_head(self) -> torch.Tensor:
        skeleton = self._source.skeleton
        embedding = self._source.recipes[skeleton.embedding_name]
        tensor = embedding.make(self._read, skeleton.model)[skeleton.embedding_name]
        if self._transform is not None:
            tensor = self._transform(skeleton.head_name, tensor)
        return tensor.to(self._source.dtype)


def _check_finite(given: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not _all_finite(tensor):
        raise ModelError(
            f"tensor {given} holds values that are not finite numbers (NaN or infinity)",
            fix="download the checkpoint again, or ask its authors for a sound one",
        )


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, found out piece by piece: an embedding's worth of answers is large too."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.reshape(-1).split(_FINITE_PIECE))
