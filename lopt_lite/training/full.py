"""Full tuning: a layer's own weights are trained, and written as shards that stand for those of the store.

A trained layer's shard holds everything that the store's shard of the layer holds, under the same names. So whatever
reads layers afterwards, to write the next block's inputs or the final model, reads them as it reads any layer: through
:meth:`Store.overlaid <lopt_lite.checkpoints.store.Store.overlaid>`.
"""

from __future__ import annotations

import hashlib
import operator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lopt_lite import files
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.settings import TrainSettings
from lopt_lite.training.checkpoint import save_lazily
from lopt_lite.training.trained import SavedTensor, TrainedParameters

_NO_EIGHT_BIT = (
    "bitsandbytes has no 8-bit Adam for MPS: its moments are kept in the type of the weights, which takes more memory"
)


def has_eight_bit_moments(settings: TrainSettings, device: torch.device) -> bool:
    """Whether Adam's moments are kept in 8 bits: in full tuning in bfloat16, where bitsandbytes can."""
    return _wants_eight_bit_moments(settings) and device.type != "mps"


def remarks(settings: TrainSettings, device: torch.device) -> list[str]:
    """What the user should know of full tuning on this device."""
    lacks = _wants_eight_bit_moments(settings) and not has_eight_bit_moments(settings, device)
    return [_NO_EIGHT_BIT] if lacks else []


def _wants_eight_bit_moments(settings: TrainSettings) -> bool:
    return settings.tune == "full" and settings.dtype == "bfloat16"


def own_weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a loaded layer, by name within the layer, as parameters of its own that can be trained.

    They are copied: a layer that was just loaded may lie in memory that the next layer will be read into.
    """
    found = {name: parameter for name, parameter in layer.named_parameters() if parameter.is_floating_point()}
    for parameter in found.values():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
    return found


def write_layers(trained: TrainedParameters, shards: dict[int, Path], *, store: Store, skeleton: Skeleton) -> str:
    """Write each trained layer as a shard, one tensor at a time.

    Parameters
    ----------
    trained:
        Its group of a layer's number holds the layer's parameters, called by that number, a dot, and the name within
        the layer.
    shards:
        The file of each layer.
    store:
        Has what is not trained in these layers: buffers.

    Returns
    -------
    str
        A sha256 over all shards.

    Raises
    ------
    DoesNotFitError, RunDirectoryError
        The disk is full or a file cannot be written.
    """
    digest = hashlib.sha256()
    for index, path in shards.items():
        files.make_directory(path.parent)
        prefix = skeleton.layer_prefix(index)
        tensors = {
            prefix + name: SavedTensor(prefix + name, place.dtype, place.shape, partial(store.tensor, prefix + name))
            for name, place in store.layer_view(skeleton, index).tensors.items()
        }
        for tensor in trained.parameters(partial(operator.eq, index)):
            tensors[prefix + tensor.name.removeprefix(f"{index}.")] = tensor
        digest.update(save_lazily(path, tensors).encode())
    return digest.hexdigest()
