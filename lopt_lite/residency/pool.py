"""Which layers are on the device, and running them.

Everything above this room asks for *a range of layers to run*, never for where they lie. Here all layers of the range
are resident: loaded once, kept until closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lopt_lite.checkpoints.skeleton import LayerCall, Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.devices import release_cached_memory
from lopt_lite.residency.layer_loader import build_layer

#: Called with a layer's index and module after it is loaded (to attach an adapter, say).
OnLayer = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class MicroBatch:
    """What goes through a range of layers at once.

    Attributes
    ----------
    hidden:
        [rows, tokens, hidden], input of the first layer of the range, in the compute dtype.
    calls:
        One entry per layer of the model.
    """

    hidden: torch.Tensor
    calls: list[LayerCall]


#: Given a micro-batch's number and the range's output, computes its loss, calls backward on it, and returns its value.
LossBackward = Callable[[int, torch.Tensor], float]


class ResidentLayers:
    """Layers ``first`` to ``end`` (exclusive) of a model, on the device until :meth:`close`.

    Parameters
    ----------
    store, skeleton:
        The weights and the architecture.
    device:
        Where the layers go.
    dequantize:
        See :func:`build_layer`.
    on_layer:
        Called for each layer once it is loaded.
    """

    def __init__(
        self,
        store: Store,
        skeleton: Skeleton,
        first: int,
        end: int,
        *,
        device: torch.device,
        dequantize: bool,
        on_layer: OnLayer | None = None,
    ) -> None:
        self.first, self.end = first, end
        self._device = device
        self.layers: list[nn.Module] = []
        for index in range(first, end):
            tensors = store.layer(skeleton, index)
            layer = build_layer(skeleton, index, tensors, device=device, dequantize=dequantize)
            if on_layer is not None:
                on_layer(index, layer)
            self.layers.append(layer)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """The output of the last layer of the range, [rows, tokens, hidden]; differentiable if gradients are on."""
        hidden = batch.hidden
        for index, layer in enumerate(self.layers, start=self.first):
            hidden = batch.calls[index].run(layer, hidden)
        return hidden

    def accumulate(self, batches: Iterable[MicroBatch], loss_backward: LossBackward) -> float:
        """Add the gradients of one optimiser step to the trainable parameters.

        Parameters
        ----------
        batches:
            The step's micro-batches; read once, in order, so that they can be made while the previous one computes.
        loss_backward:
            Sees each micro-batch's output. Its values, already weighted for the whole step, are summed.

        Returns
        -------
        float
            The step's loss.
        """
        total = 0.0
        for number, batch in enumerate(batches):
            total += loss_backward(number, self.forward(batch))
        return total

    def close(self) -> None:
        """Take the layers off the device."""
        self.layers.clear()
        release_cached_memory(self._device)

    def __enter__(self) -> ResidentLayers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
