"""What the device can afford: decided once per run, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from lopt_lite.checkpoints.skeleton import Skeleton

#: Share of the free memory that one dequantised block may take; the rest is for activations and optimiser states.
_DEQUANTISED_SHARE = 0.35


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated on ``device`` now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return int(psutil.virtual_memory().available)


def afford_dequantised(skeleton: Skeleton, ranges: Sequence[tuple[int, int]], device: torch.device) -> bool:
    """Whether the largest block fits in the compute dtype with room to spare.

    Parameters
    ----------
    ranges:
        (first layer, end layer) of each block.
    """
    largest = max(
        sum(
            int(torch.Size(shape).numel()) * skeleton.dtype.itemsize
            for index in range(first, end)
            for shape in skeleton.layer_parameters(index).values()
        )
        for first, end in ranges
    )
    return largest <= _DEQUANTISED_SHARE * free_bytes(device)
