"""Layers that are loaded for each pass: training a block in the memory of two layers.

A step is layer-major. Going up, each layer is loaded once and all micro-batches of the step pass through it, their
inputs to every layer being put aside. At the top layer each micro-batch's loss is taken and sent back at once. Going
down, each layer is loaded once more, run again on the inputs put aside (now with a graph), and sent the gradient of its
output. So a step loads each layer twice, the turning layer once, however many micro-batches it has; and the only graph
that ever exists is that of one layer and one micro-batch.

Some layers, or all, may stay on the device: they are not loaded, and pass by pass they are treated like the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lopt_lite.checkpoints.layer_calls import words_of
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.devices import release_cached_memory
from lopt_lite.residency.layer_loader import LayerShell, quantised_linears
from lopt_lite.residency.pool import (
    DropoutSeed,
    LayerState,
    LossBackward,
    MicroBatch,
    NoState,
    OnLayer,
    load_layer,
    part_of,
    run_layer,
)
from lopt_lite.residency.slabs import ShardStream
from lopt_lite.residency.spill import Spill, SpillLimits


class StreamedLayers:
    """Layers ``first`` to ``end`` (exclusive), streamed from the store. See :class:`LayerPool`.

    Parameters
    ----------
    store, skeleton, device, on_layer:
        As :class:`ResidentLayers`. What ``on_layer`` attaches to a layer stays on the device, unless ``state`` moves
        it. Weights that it makes trainable are no longer loaded from the store: ``state`` has to look after them.
    resident:
        Layers that stay on the device.
    dequantize:
        Turn matrices into the compute dtype when they are loaded, once for all micro-batches of the pass, instead of in
        every product. It takes the memory of one layer in the compute dtype (more for those that stay).
    boundaries:
        Where activations between layers are put aside; closed with the pool. Default: on the device.
    state:
        See :class:`LayerState`.
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
        resident: Collection[int] = (),
        dequantize: bool = False,
        boundaries: Spill | None = None,
        on_layer: OnLayer | None = None,
        state: LayerState | None = None,
        prefetch: bool = True,
        on_pass: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.first, self.end = first, end
        self._device = device
        self._on_pass = on_pass
        self._state = NoState() if state is None else state
        if boundaries is None:
            boundaries = Spill(SpillLimits(1 << 62, 0), Path(tempfile.gettempdir()), device)
        self._boundaries = boundaries
        views = {i: store.layer_view(skeleton, i) for i in range(first, end) if i not in resident}
        self._stream = ShardStream(views, device=device, prefetch=prefetch) if views else None
        self._streamed = set(views)
        self._shells: list[LayerShell] = []
        self.layers: list[nn.Module] = []
        for index in range(first, end):
            if index in self._streamed:
                names = views[index].tensors
                quantised = quantised_linears(skeleton, index, dict.fromkeys(names))
                shell = LayerShell(skeleton, index, quantised=quantised, dequantize=dequantize)
            else:
                shell = load_layer(store, skeleton, index, device=device, dequantize=dequantize)
            self._shells.append(shell)
            self.layers.append(shell.layer)
        if on_layer is not None:
            try:
                self._attach(on_layer)
            except BaseException:
                self.close()
                raise

    def _attach(self, on_layer: OnLayer) -> None:
        """Call ``on_layer`` for each layer while its weights are there: PEFT puts an adapter where they are."""
        indices = list(range(self.first, self.end))
        for position, index in enumerate(indices):
            with self.loaded(index, indices[position + 1 :]) as layer:
                on_layer(index, layer)
                if self._shells[position].keep_trainable():
                    self._streamed.discard(index)
            # What was attached and put elsewhere leaves holes, which what is attached next never quite fits.
            release_cached_memory(self._device)
        if self._stream is not None and not self._streamed:
            # Layers that are trained as a whole are their own now.
            self._stream.close()
            self._stream = None

    @property
    def waited_s(self) -> float:
        """Seconds for which computing has waited for layers so far."""
        return self._stream.waited_s if self._stream is not None else 0.0

    @property
    def loads(self) -> int:
        """Layers read from the store so far."""
        return self._stream.loads if self._stream is not None else 0

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
            # After the last layer comes the first one again, for the next batches.
            with self.loaded(index, [*indices[position + 1 :], *indices[:1]]) as layer:
                for number, batch in enumerate(batches):
                    hidden[number] = run_layer(batch.calls[index], layer, hidden[number])
            self._on_pass(position + 1, len(indices))
        for number in range(len(batches)):
            on_output(number, hidden[number])

    def accumulate(
        self,
        batches: Iterable[MicroBatch],
        loss_backward: LossBackward,
        dropout_seed: DropoutSeed | None = None,
        *,
        first: int | None = None,
        end: int | None = None,
    ) -> float:
        """See :class:`LayerPool`."""
        self._boundaries.clear()
        parts = list(batches)
        layers = part_of(self, first, end)
        bottom, top = layers.start, layers.stop - 1
        upwards, downwards = list(range(bottom, top)), list(range(top - 1, bottom - 1, -1))
        # What comes after this part: the next one, or the first one again.
        following = [layers.stop if layers.stop < self.end else self.first]
        total_passes = len(upwards) + 1 + len(downwards)
        wants_input_gradient = any(part.hidden.requires_grad for part in parts)
        trains_below = self._layers_with_trained_ones_below(layers, wants_input_gradient)

        def run(index: int, layer: nn.Module, number: int, hidden: torch.Tensor) -> torch.Tensor:
            if dropout_seed is not None:
                torch.manual_seed(dropout_seed(index, number))
            return run_layer(parts[number].calls[index], layer, hidden)

        hidden = [part.hidden.detach() for part in parts]
        returns = top in trains_below
        for position, index in enumerate(upwards):
            with self.loaded(index, [*upwards[position + 1 :], top]) as layer, torch.no_grad():
                for number in range(len(parts)):
                    output = run(index, layer, number, hidden[number])
                    if returns:
                        self._boundaries.put((index, number), hidden[number])
                    hidden[number] = output
            self._on_pass(position + 1, total_passes)

        loss = 0.0
        gradients: list[torch.Tensor | None] = []
        with self.loaded(top, downwards if returns else following) as layer:
            for number in range(len(parts)):
                inner = hidden[number].detach().requires_grad_(returns)
                loss += loss_backward(number, run(top, layer, number, inner))
                gradients.append(inner.grad)
            self._state.after_backward(top)
        del hidden
        self._on_pass(len(upwards) + 1, total_passes)

        for position, index in enumerate(downwards):
            if not returns or not any(gradient is not None for gradient in gradients):
                break
            with self.loaded(index, [*downwards[position + 1 :], *following]) as layer:
                for number in range(len(parts)):
                    inner = self._boundaries.take((index, number)).requires_grad_(index in trains_below)
                    output = run(index, layer, number, inner)
                    # A micro-batch without a loss has no gradient.
                    if output.requires_grad and gradients[number] is not None:
                        torch.autograd.backward(output, gradients[number])
                    gradients[number] = inner.grad
                self._state.after_backward(index)
            self._on_pass(len(upwards) + 1 + position + 1, total_passes)
        for part, gradient in zip(parts, gradients, strict=True):
            if part.hidden.requires_grad and gradient is not None:
                torch.autograd.backward(part.hidden, gradient)
        return loss

    def modules(self) -> list[nn.Module]:
        """See :class:`LayerPool`. Each module loads its layer when it is called, and reads the next one ahead."""
        return [_StreamedLayer(self, index) for index in range(self.first, self.end)]

    def close(self) -> None:
        """See :class:`LayerPool`."""
        if self._stream is not None:
            self._stream.close()
        self._boundaries.close()
        self._shells.clear()
        self.layers.clear()
        release_cached_memory(self._device)

    def __enter__(self) -> StreamedLayers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _layers_with_trained_ones_below(self, part: range, input_trains: bool) -> set[int]:
        """Layers of ``part`` whose input needs a gradient: something under them is trained, or the part's input is."""
        found: set[int] = set()
        below = input_trains
        for index in part:
            if below:
                found.add(index)
            below = below or any(p.requires_grad for p in self.layers[index - self.first].parameters())
        return found

    @contextmanager
    def loaded(self, index: int, upcoming: Sequence[int]) -> Iterator[nn.Module]:
        """Layer ``index`` with its weights, until the context ends; ``upcoming`` layers are read ahead."""
        shell = self._shells[index - self.first]
        self._state.enter(index)
        try:
            if self._stream is None or index not in self._streamed:
                yield shell.layer
                return
            with self._stream.item(index, [i for i in upcoming if i in self._streamed]) as tensors:
                shell.fill(tensors, self._device)
                try:
                    yield shell.layer
                finally:
                    shell.empty()
        finally:
            self._state.leave(index)


def spread(first: int, end: int, count: int) -> set[int]:
    """``count`` of the layers ``first`` to ``end`` (exclusive), evenly spread, so that loads come between them evenly.

    The top layer is among the first to stay: a step turns there.
    """
    total = end - first
    return {end - 1 - (number * total) // count for number in range(count)} if count else set()


class _StreamedLayer(nn.Module):
    """One layer of a streamed range, callable like the layer itself (for transformers' generation loop)."""

    def __init__(self, pool: StreamedLayers, index: int) -> None:
        super().__init__()
        self._loaded = pool.loaded
        self._index = index
        for name, word in words_of(pool.layers[index - pool.first]).items():
            setattr(self, name, word)
        self._next = [index + 1 if index + 1 < pool.end else pool.first]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._loaded(self._index, self._next) as layer:
            return layer(*args, **kwargs)
