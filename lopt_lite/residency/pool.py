"""Running a range of layers, wherever they lie.

Everything above this room asks for *a range of layers to run*, never for where they are. A pool has the layers of one
block; how many of them stay on the device is its own affair:

* :class:`ResidentLayers` loads all of them once. A step pushes one micro-batch after the other through all layers.
* :class:`StreamedLayers` (in ``streamed.py``) keeps some or none of them and loads the others for each pass. A step
  pushes all its micro-batches through one layer after the other.

Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from lopt_lite.checkpoints.layer_calls import LayerCall
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.devices import release_cached_memory
from lopt_lite.freed_memory import look
from lopt_lite.residency.fitting_attention import fitting_attention
from lopt_lite.residency.layer_loader import LayerShell, quantised_linears

#: Called with a layer's index and module after it is made (to attach an adapter, say).
OnLayer = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class MicroBatch:
    """What goes through a range of layers at once.

    Attributes
    ----------
    hidden:
        [rows, tokens, hidden], input of the first layer of the range, in the compute dtype. If it requires a gradient,
        :meth:`LayerPool.accumulate` sends it one.
    calls:
        One entry per layer of the model.
    """

    hidden: torch.Tensor
    calls: list[LayerCall]


#: Given a micro-batch's number and the range's output, computes its loss, calls backward on it, and returns its value.
LossBackward = Callable[[int, torch.Tensor], float]

#: Seed for the dropout of (layer, micro-batch number), or None where there is none.
DropoutSeed = Callable[[int, int], int]


class LayerState(Protocol):
    """What is trained in the layers, told when they are used (so that it may be elsewhere in between)."""

    def enter(self, index: int) -> None:
        """Layer ``index`` is about to run."""
        ...

    def leave(self, index: int) -> None:
        """Layer ``index`` has run on everything of this pass."""
        ...

    def after_backward(self, index: int) -> None:
        """The step's gradients of layer ``index`` are complete; it has not been left yet."""
        ...


class NoState:
    """Nothing is trained, or what is stays where it is until the step is done. See :class:`LayerState`."""

    def enter(self, index: int) -> None:
        """Nothing to do."""

    def leave(self, index: int) -> None:
        """Nothing to do."""

    def after_backward(self, index: int) -> None:
        """Nothing to do."""


class LayerPool(Protocol):
    """The layers of one block."""

    first: int
    end: int
    layers: list[nn.Module]

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """The output of the last layer of the range, [rows, tokens, hidden], without gradients."""
        ...

    def forward_all(self, batches: Sequence[MicroBatch], on_output: Callable[[int, torch.Tensor], None]) -> None:
        """Run several batches without gradients; ``on_output`` gets each one's number and output, in order."""
        ...

    def accumulate(
        self,
        batches: Iterable[MicroBatch],
        loss_backward: LossBackward,
        dropout_seed: DropoutSeed | None = None,
        *,
        first: int | None = None,
        end: int | None = None,
    ) -> float:
        """Add the gradients of one optimiser step to the trainable parameters.

        Parameters
        ----------
        batches:
            The step's micro-batches.
        loss_backward:
            Sees each micro-batch's output. Its values, already weighted for the whole step, are summed.
        dropout_seed:
            Seeds the random state before a layer runs on a micro-batch, so that running it again repeats its dropout.
        first, end:
            The part of the range to run (all of it by default): ``batches`` are its inputs, and the loss is that of its
            outputs.

        Returns
        -------
        float
            The step's loss.
        """
        ...

    def modules(self) -> list[nn.Module]:
        """The layers as modules that can be called one by one, wherever their weights are."""
        ...

    def close(self) -> None:
        """Take the layers off the device."""
        ...


class ResidentLayers:
    """Layers ``first`` to ``end`` (exclusive) of a model, on the device until :meth:`close`. See :class:`LayerPool`.

    Parameters
    ----------
    store, skeleton:
        The weights and the architecture.
    device:
        Where the layers go.
    dequantize:
        See :class:`LayerShell`.
    on_layer:
        Called for each layer once it is loaded.
    state:
        See :class:`LayerState`; what it looks after stays on the device.
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
        state: LayerState | None = None,
    ) -> None:
        self.first, self.end = first, end
        self._device = device
        self._state = NoState() if state is None else state
        self.layers: list[nn.Module] = []
        for index in range(first, end):
            self.layers.append(load_layer(store, skeleton, index, device=device, dequantize=dequantize).layer)
            if on_layer is not None:
                on_layer(index, self.layers[-1])

    @torch.no_grad()
    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """See :class:`LayerPool`."""
        return self._run(batch, 0, None)

    def forward_all(self, batches: Sequence[MicroBatch], on_output: Callable[[int, torch.Tensor], None]) -> None:
        """See :class:`LayerPool`."""
        for number, batch in enumerate(batches):
            on_output(number, self.forward(batch))

    def accumulate(
        self,
        batches: Iterable[MicroBatch],
        loss_backward: LossBackward,
        dropout_seed: DropoutSeed | None = None,
        *,
        first: int | None = None,
        end: int | None = None,
    ) -> float:
        """See :class:`LayerPool`. Micro-batches are read one at a time, each once, in order."""
        part = part_of(self, first, end)
        total = 0.0
        for number, batch in enumerate(batches):
            total += loss_backward(number, self._run(batch, number, dropout_seed, part))
        for index in reversed(part):
            self._state.after_backward(index)
        return total

    def _run(
        self, batch: MicroBatch, number: int, dropout_seed: DropoutSeed | None, part: range | None = None
    ) -> torch.Tensor:
        hidden = batch.hidden
        for index in part_of(self, None, None) if part is None else part:
            if dropout_seed is not None:
                torch.manual_seed(dropout_seed(index, number))
            hidden = run_layer(batch.calls[index], self.layers[index - self.first], hidden)
        return hidden

    def modules(self) -> list[nn.Module]:
        """See :class:`LayerPool`."""
        return self.layers

    def close(self) -> None:
        """See :class:`LayerPool`."""
        self.layers.clear()
        release_cached_memory(self._device)

    def __enter__(self) -> ResidentLayers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def run_layer(call: LayerCall, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What ``layer`` makes of ``hidden`` [rows, tokens, hidden]; freed memory is looked at on the way, and back."""
    look()
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: look())
    with fitting_attention():
        return call.run(layer, hidden)


def part_of(pool: LayerPool, first: int | None, end: int | None) -> range:
    """The layers of a pool, or a part of them; both ends default to the pool's.

    Raises
    ------
    ValueError
        The part is empty or not within the pool.
    """
    part = range(pool.first if first is None else first, pool.end if end is None else end)
    if not pool.first <= part.start < part.stop <= pool.end:
        raise ValueError(f"layers {part.start} to {part.stop} of a pool of layers {pool.first} to {pool.end}")
    return part


def load_layer(store: Store, skeleton: Skeleton, index: int, *, device: torch.device, dequantize: bool) -> LayerShell:
    """A layer with its weights on ``device``, to stay there."""
    tensors = store.layer(skeleton, index)
    shell = LayerShell(skeleton, index, quantised=quantised_linears(skeleton, index, tensors), dequantize=dequantize)
    shell.fill(tensors, device)
    return shell
