"""Layers that are loaded for each pass: training a block in the memory of two layers.

A step is layer-major. Going up, each layer is loaded once and all micro-batches of the step pass through it, their
inputs to every layer being kept. At the top layer each micro-batch's loss is taken and sent back at once. Going down,
each layer is loaded once more, run again on the kept inputs (now with a graph), and sent the gradient of its output.
So a step loads each layer twice, the turning layer once, however many micro-batches it has; and the only graph that
ever exists is that of one layer and one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.devices import release_cached_memory
from lopt_lite.residency.layer_loader import LayerShell, quantised_linears
from lopt_lite.residency.pool import DropoutSeed, LossBackward, MicroBatch, OnLayer
from lopt_lite.residency.slabs import ShardStream


class StreamedLayers:
    """Layers ``first`` to ``end`` (exclusive), streamed from the store. See :class:`LayerPool`.

    Parameters
    ----------
    store, skeleton, device, on_layer:
        As :class:`ResidentLayers`. What ``on_layer`` attaches to a layer stays on the device.
    prefetch:
        See :class:`ShardStream`.
    on_pass:
        Called after each layer of each pass with (layers done, layers of the whole step), so that one long step of a
        huge model does not look like a hang.
    """

    def __init__(
        self,
        store: Store,
        skeleton: Skeleton,
        first: int,
        end: int,
        *,
        device: torch.device,
        on_layer: OnLayer | None = None,
        prefetch: bool = True,
        on_pass: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.first, self.end = first, end
        self._device = device
        self._on_pass = on_pass
        views = {index: store.layer_view(skeleton, index) for index in range(first, end)}
        self._stream = ShardStream(views, device=device, prefetch=prefetch)
        self._shells: list[LayerShell] = []
        self.layers: list[nn.Module] = []
        for index in range(first, end):
            quantised = quantised_linears(skeleton, index, self._stream.names(index))
            shell = LayerShell(skeleton, index, quantised=quantised, dequantize=False)
            self._shells.append(shell)
            self.layers.append(shell.layer)
        if on_layer is not None:
            indices = list(range(first, end))
            for position, index in enumerate(indices):
                # PEFT puts an adapter where the weights beside it are, so they have to be there.
                with self.loaded(index, indices[position + 1 :]) as layer:
                    on_layer(index, layer)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """See :class:`LayerPool`. Loads every layer for this one batch: use :meth:`forward_all` for several."""
        outputs: list[torch.Tensor] = []
        self.forward_all([batch], lambda number, output: outputs.append(output))
        return outputs[0]

    @torch.no_grad()
    def forward_all(self, batches: Sequence[MicroBatch], on_output: Callable[[int, torch.Tensor], None]) -> None:
        """See :class:`LayerPool`. Every layer is loaded once for all batches."""
        hidden = [batch.hidden for batch in batches]
        indices = list(range(self.first, self.end))
        for position, index in enumerate(indices):
            with self.loaded(index, indices[position + 1 :]) as layer:
                for number, batch in enumerate(batches):
                    hidden[number] = batch.calls[index].run(layer, hidden[number])
            self._on_pass(position + 1, len(indices))
        for number in range(len(batches)):
            on_output(number, hidden[number])

    def accumulate(
        self, batches: Iterable[MicroBatch], loss_backward: LossBackward, dropout_seed: DropoutSeed | None = None
    ) -> float:
        """See :class:`LayerPool`."""
        parts = list(batches)
        top = self.end - 1
        upwards, downwards = list(range(self.first, top)), list(range(top - 1, self.first - 1, -1))
        total_passes = len(upwards) + 1 + len(downwards)
        kept: dict[int, list[torch.Tensor]] = {}

        def run(index: int, layer: nn.Module, number: int, hidden: torch.Tensor) -> torch.Tensor:
            if dropout_seed is not None:
                torch.manual_seed(dropout_seed(index, number))
            return parts[number].calls[index].run(layer, hidden)

        hidden = [part.hidden for part in parts]
        for position, index in enumerate(upwards):
            kept[index] = hidden
            with self.loaded(index, [*upwards[position + 1 :], top]) as layer, torch.no_grad():
                hidden = [run(index, layer, number, kept[index][number]) for number in range(len(parts))]
            self._on_pass(position + 1, total_passes)

        loss = 0.0
        gradients: list[torch.Tensor | None] = []
        with self.loaded(top, downwards) as layer:
            for number in range(len(parts)):
                inner = hidden[number].detach().requires_grad_(top > self.first and self._trains_below(top))
                loss += loss_backward(number, run(top, layer, number, inner))
                gradients.append(inner.grad)
        del hidden
        self._on_pass(len(upwards) + 1, total_passes)

        for position, index in enumerate(downwards):
            inputs = kept.pop(index)
            if not any(gradient is not None for gradient in gradients):
                break
            with self.loaded(index, downwards[position + 1 :]) as layer:
                for number in range(len(parts)):
                    inner = inputs[number].detach().requires_grad_(self._trains_below(index))
                    output = run(index, layer, number, inner)
                    if output.requires_grad:
                        torch.autograd.backward(output, gradients[number])
                    gradients[number] = inner.grad
            self._on_pass(len(upwards) + 1 + position + 1, total_passes)
        return loss

    def modules(self) -> list[nn.Module]:
        """See :class:`LayerPool`. Each module loads its layer when it is called, and reads the next one ahead."""
        return [_StreamedLayer(self, index) for index in range(self.first, self.end)]

    def close(self) -> None:
        """See :class:`LayerPool`."""
        self._stream.close()
        self._shells.clear()
        self.layers.clear()
        release_cached_memory(self._device)

    def __enter__(self) -> StreamedLayers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _trains_below(self, index: int) -> bool:
        """Whether a layer of the range under ``index`` has trainable parameters, so that a gradient must reach it."""
        return any(p.requires_grad for layer in self.layers[: index - self.first] for p in layer.parameters())

    @contextmanager
    def loaded(self, index: int, upcoming: Sequence[int]) -> Iterator[nn.Module]:
        """Layer ``index`` with its weights, until the context ends; ``upcoming`` layers are read ahead."""
        shell = self._shells[index - self.first]
        with self._stream.item(index, upcoming) as tensors:
            shell.fill(tensors, self._device)
            try:
                yield shell.layer
            finally:
                shell.empty()


class _StreamedLayer(nn.Module):
    """One layer of a streamed range, callable like the layer itself (for transformers' generation loop)."""

    def __init__(self, pool: StreamedLayers, index: int) -> None:
        super().__init__()
        self._loaded = pool.loaded
        self._index = index
        self._next = [index + 1 if index + 1 < pool.end else pool.first]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._loaded(self._index, self._next) as layer:
            return layer(*args, **kwargs)
