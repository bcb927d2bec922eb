"""Opening a block's layers as the plan says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.residency.choices import Residence
from lopt_lite.residency.pool import LayerPool, LayerState, NoState, OnLayer, ResidentLayers
from lopt_lite.residency.spill import Spill
from lopt_lite.residency.streamed import StreamedLayers, spread


def open_layers(
    residence: Residence,
    store: Store,
    skeleton: Skeleton,
    first: int,
    end: int,
    *,
    device: torch.device,
    scratch: Path,
    on_layer: OnLayer | None = None,
    state: LayerState | None = None,
    on_pass: Callable[[int, int], None] = lambda done, total: None,
) -> LayerPool:
    """The layers ``first`` to ``end`` (exclusive), as ``residence`` says. To be closed by the caller.

    Parameters
    ----------
    scratch:
        Directory for activations that fit nowhere else.
    on_layer, state, on_pass:
        See :class:`StreamedLayers`.
    """
    hooks = NoState() if state is None else state
    count = min(residence.resident_layers, end - first)
    if count == end - first and not residence.recompute:
        return ResidentLayers(
            store,
            skeleton,
            first,
            end,
            device=device,
            dequantize=residence.dequantised,
            on_layer=on_layer,
            state=hooks,
        )
    return StreamedLayers(
        store,
        skeleton,
        first,
        end,
        device=device,
        resident=spread(first, end, count),
        dequantize=residence.dequantised,
        boundaries=Spill(residence.boundary_limits, scratch, device),
        on_layer=on_layer,
        state=hooks,
        on_pass=on_pass,
    )
