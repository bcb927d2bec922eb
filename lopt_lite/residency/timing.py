"""How long the work of a run takes, from shapes and measured speeds.

A layer's pass over some tokens is arithmetic (2 operations per parameter and token, once forward, once more for the
gradient of its input, once more where its own weights are trained, and once more where the forward is run again),
traffic (norms, activation functions, adapters and their casts: proportional to what a layer keeps for its backward
pass), and memory for new activations, which a CPU's operating system clears first. NF4 matrices that are not kept
dequantised are dequantised in every pass. Streamed layers are loaded beside this; what takes longer decides.

The two factors below were fitted to steps of SmolLM2-135M on the CPU build.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lopt_lite.residency.choices import Residence
from lopt_lite.residency.machine import MachineSpeeds
from lopt_lite.residency.shapes import ModelShapes

#: Bytes read and written, and bytes of new memory, for each byte that a layer keeps, in a pass one way.
_TRAFFIC, _NEW_MEMORY = 8.0, 2.0
#: Operations of a layer's pass one way, however small.
_OPERATIONS = 120
#: NF4 until it is measured: dense bytes per second as a share of elementwise traffic, and for each CPU thread.
_DEQUANTISE_SHARE, _QUANTISE_BYTES_PER_THREAD, _QUANTISE_BYTES_ON_GPU = 0.2, 2.2e7, 2e10
#: Setting up a block: modules, adapters, opening files.
_SET_UP_S_PER_LAYER = 0.02
#: A layer's modules on a few tokens take so long whatever they compute: a guess from the CPU.
_SHORT_PASS_S_PER_LAYER = 0.004


@dataclass(frozen=True)
class Amounts:
    """What a run goes through.

    Attributes
    ----------
    tokens, answer_tokens, held_out_tokens, held_out_answer_tokens:
        Of all examples, once.
    padding:
        Padded tokens for each real one.
    steps_per_epoch:
        Optimiser steps of one pass over the data.
    mean_length:
        Tokens of an example.
    epochs, head_fit_epochs:
        Passes over the data; of training the last one perhaps in part.
    other_tokens, anchored_tokens:
        Of one epoch: tokens of examples that are only there to anchor on, and anchored tokens; 0 without an anchor.
    anchored_prompts:
        Whether prompts of the training examples are anchored.
    answers:
        Of the untouched model: passes in which they are written, and how many at once.
    """

    tokens: int
    answer_tokens: int
    held_out_tokens: int
    held_out_answer_tokens: int
    padding: float
    steps_per_epoch: int
    mean_length: float
    epochs: float
    head_fit_epochs: int
    other_tokens: int = 0
    anchored_tokens: int = 0
    anchored_prompts: bool = True
    answers: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one block. ``waiting_share`` is the part of its steps spent waiting for layers to be loaded."""

    load_s: float
    targets_s: float
    head_fit_s: float
    train_s: float
    held_out_s: float
    cache_s: float
    waiting_share: float

    @property
    def total_s(self) -> float:
        """Everything that is done for the block."""
        return self.load_s + self.targets_s + self.head_fit_s + self.train_s + self.held_out_s + self.cache_s


@dataclass(frozen=True)
class RunTimes:
    """Seconds of a whole run. ``store_s`` is 0 where the store is there already, ``anchor_s`` without an anchor."""

    store_s: float
    held_out_before_s: float
    anchor_s: float
    blocks: tuple[BlockTimes, ...]

    @property
    def total_s(self) -> float:
        """From start to result."""
        return self.store_s + self.held_out_before_s + self.anchor_s + sum(block.total_s for block in self.blocks)


class TimeModel:
    """Seconds of parts of a run on one machine.

    Parameters
    ----------
    active_parameters:
        For each layer, the parameters that each token is multiplied with (of routed experts only the chosen ones).
    host_free_bytes:
        What the system can use to cache files.
    together:
        Whether blocks are trained together: of the layers that stay, every block then has its share.
    """

    def __init__(
        self,
        shapes: ModelShapes,
        active_parameters: Sequence[int],
        residence: Residence,
        speeds: MachineSpeeds,
        *,
        dtype: torch.dtype,
        device: torch.device,
        host_free_bytes: int,
        together: bool = False,
    ) -> None:
        self._shapes, self._active, self._residence, self._speeds = shapes, active_parameters, residence, speeds
        self._together = together
        self._on_cpu = device.type == "cpu"
        self._flops = speeds.flops(dtype)
        self._host_free_bytes = host_free_bytes

    # -- one layer ----------------------------------------------------------------------------------------------------

    def forward_s(self, layer: int, tokens: float, mean_length: float) -> float:
        """A pass of ``tokens`` padded tokens through a layer that is there, without its dequantisation."""
        shapes, speeds = self._shapes, self._speeds
        products = 2 * self._active[layer] * tokens / self._flops
        # Scores and weighted sum, over half the tokens on average (causal).
        attention = 2 * shapes.hidden * mean_length * tokens / self._flops
        kept = shapes.layers[layer].kept_bytes_per_token(mean_length) * tokens
        traffic = _TRAFFIC * kept / speeds.elementwise_bytes_per_s
        fresh = _NEW_MEMORY * kept / speeds.fresh_bytes_per_s if self._on_cpu else 0.0
        adapters = 2 * shapes.layers[layer].trained_parameters * tokens / self._flops
        return products + attention + traffic + fresh + (0.0 if shapes.full else adapters)

    def backward_s(self, layer: int, tokens: float, mean_length: float) -> float:
        """The backward pass of the same. The weights' own gradients come on top of that of the input."""
        own = 2 * self._shapes.layers[layer].trained_parameters * tokens
        return self.forward_s(layer, tokens, mean_length) + own / self._flops

    def dequantise_s(self, layer: int) -> float:
        """Making a layer's NF4 matrices dense once."""
        if not self._shapes.quantised:
            return 0.0
        dense = self._shapes.layers[layer].dense_bytes
        made = dense / (self._speeds.dequantise_bytes_per_s or _DEQUANTISE_SHARE * self._speeds.elementwise_bytes_per_s)
        return made + (dense / self._speeds.fresh_bytes_per_s if self._on_cpu else 0.0)

    def load_s(self, layer: int) -> float:
        """Reading a layer's shard, and copying it to the device."""
        cached = self._shapes.stored_bytes(0, len(self._shapes.layers)) < 0.7 * self._host_free_bytes
        return self._shapes.layers[layer].stored_bytes / self._speeds.load_bytes_per_s(cached=cached)

    # -- one pass over a block ----------------------------------------------------------------------------------------

    def step_s(self, block: tuple[int, int], tokens: float, mean_length: float, *, train: bool) -> tuple[float, float]:
        """(seconds, of these waiting for layers) of one optimiser step on ``tokens`` padded tokens.

        Without ``train`` only a forward pass, as for fitting a head.
        """
        residence = self._residence
        micro = -(-tokens // max(residence.micro_batch_tokens, mean_length))
        return self._pass_s(block, tokens, mean_length, micro, train=train)

    def forward_all_s(self, block: tuple[int, int], tokens: float, mean_length: float) -> float:
        """One pass of all of ``tokens`` without gradients."""
        residence = self._residence
        groups = max(1.0, -(-tokens // max(residence.group_tokens, mean_length)))
        batches = -(-tokens // groups // max(residence.forward_tokens, mean_length))
        seconds, _ = self._pass_s(block, tokens / groups, mean_length, max(1.0, batches), train=False)
        return groups * seconds

    def _pass_s(
        self, block: tuple[int, int], tokens: float, mean_length: float, micro: float, *, train: bool
    ) -> tuple[float, float]:
        residence = self._residence
        first, end = block
        stay = residence.resident_layers
        if self._together:
            stay = stay * (end - first) // residence.layers
        streamed_from = first + stay
        total = waiting = 0.0
        started = micro * _OPERATIONS * self._speeds.operation_s
        for layer in range(first, end):
            dequantise = 0.0 if residence.dequantised and layer < streamed_from else micro * self.dequantise_s(layer)
            up = self.forward_s(layer, tokens, mean_length) + dequantise + started
            down = 0.0
            if train:
                down = self.backward_s(layer, tokens, mean_length) + dequantise + started
                # The turning layer's graph is there already.
                down += up if residence.recompute and layer < end - 1 else 0.0
            loads = self.load_s(layer) if layer >= streamed_from else 0.0
            waits = max(0.0, loads - up) + (max(0.0, loads - down) if train and layer < end - 1 else 0.0)
            total += up + down + waits
            waiting += waits
        if train:
            total += self._boundaries_s(block, tokens) + self._optimiser_s(block)
        return total, waiting

    def _boundaries_s(self, block: tuple[int, int], tokens: float) -> float:
        """Writing and reading back what neither the device nor the host keeps of the inputs of a step's layers."""
        residence = self._residence
        if not residence.recompute:
            return 0.0
        wanted = (block[1] - block[0] - 1) * tokens * self._shapes.hidden * self._shapes.itemsize
        spilled = max(0.0, wanted - residence.boundary_bytes - residence.boundary_host_bytes)
        return spilled / self._speeds.write_bytes_per_s + spilled / self._speeds.cached_read_bytes_per_s

    def _optimiser_s(self, block: tuple[int, int]) -> float:
        state = self._shapes.state_bytes_per_parameter * self._shapes.trained_parameters(*block)
        moved = 2 * state / self._speeds.elementwise_bytes_per_s
        if self._residence.offload_state:
            moved += state / self._speeds.write_bytes_per_s + state / self._speeds.cached_read_bytes_per_s
        return moved

    # -- around the layers --------------------------------------------------------------------------------------------

    def task_loss_s(self, answer_tokens: float, *, train: bool, rows: int | None = None) -> float:
        """LM head, or so many rows of it, and cross-entropy: a product, its gradient, passes over float32 logits."""
        shapes = self._shapes
        logits = (shapes.vocabulary if rows is None else rows) * answer_tokens
        ways = 2 if train else 1
        traffic = 16 * ways * logits / self._speeds.elementwise_bytes_per_s
        fresh = 6 * ways * logits / self._speeds.fresh_bytes_per_s if self._on_cpu else 0.0
        return 2 * ways * logits * shapes.hidden / self._flops + traffic + fresh

    def reconstruction_s(self, tokens: float) -> float:
        """A reconstruction head (hidden x hidden / 4, twice) in float32, forward and backward."""
        hidden = self._shapes.hidden
        products = 3 * 2 * (hidden * hidden / 2) * tokens / self._speeds.float32_flops
        return products + self.squares_s(tokens)

    def squares_s(self, tokens: float) -> float:
        """A mean of squared differences of hidden states in float32, and its gradient."""
        values = 4 * self._shapes.hidden * tokens
        fresh = 8 * values / self._speeds.fresh_bytes_per_s if self._on_cpu else 0.0
        return 24 * values / self._speeds.elementwise_bytes_per_s + fresh

    def put_in_place_s(self, block: tuple[int, int]) -> float:
        """Making a block's modules and loading what stays."""
        first, end = block
        resident = range(first, min(end, first + self._residence.resident_layers))
        loading = sum(self.load_s(i) + (self.dequantise_s(i) if self._residence.dequantised else 0) for i in resident)
        return loading + _SET_UP_S_PER_LAYER * (end - first)

    def store_s(self, source_bytes: int, store_bytes: int, threads: int) -> float:
        """Reading, quantising and writing the store."""
        speeds = self._speeds
        seconds = source_bytes / speeds.read_bytes_per_s + store_bytes / speeds.write_bytes_per_s
        if self._shapes.quantised:
            guess = _QUANTISE_BYTES_PER_THREAD * threads if self._on_cpu else _QUANTISE_BYTES_ON_GPU
            dense = self._shapes.dense_bytes(0, len(self._shapes.layers)) * 2 / self._shapes.itemsize
            seconds += dense / (speeds.quantise_bytes_per_s or guess)
        return seconds

    def hiding_tokens(self, layer: int, mean_length: float) -> int:
        """Tokens whose forward pass takes as long as loading the layer: fewer, and the device waits for its layers."""
        per_token = self.forward_s(layer, 1024.0, mean_length) / 1024
        # Dequantising takes its time whatever the tokens, and hides as much of the load.
        return max(0, round((self.load_s(layer) - self.dequantise_s(layer)) / per_token))

    # -- a whole run --------------------------------------------------------------------------------------------------

    def run_times(
        self,
        ranges: Sequence[tuple[int, int]],
        objectives: Sequence[str],
        amounts: Amounts,
        *,
        store_s: float,
        together: bool = False,
    ) -> RunTimes:
        """The parts of a run with these blocks, trained one after the other or ``together``."""
        before = 0.0
        if amounts.held_out_tokens:
            before = sum(
                self.put_in_place_s(block) + self.forward_all_s(block, amounts.held_out_tokens, amounts.mean_length)
                for block in ranges
            ) + self.task_loss_s(amounts.held_out_answer_tokens, train=False)
        blocks = tuple(
            self._block_times(block, objective, amounts, last=number == len(ranges) - 1, together=together)
            for number, (block, objective) in enumerate(zip(ranges, objectives, strict=True))
        )
        anchor = 0.0
        if amounts.anchored_tokens:
            # Where no block before the last is trained, its inputs are there already.
            untouched = together or any(objective != "none" for objective in objectives[:-1])
            # Examples pass as far as they are anchored: about their prompts.
            prompts = amounts.other_tokens
            prompts += amounts.tokens - amounts.answer_tokens if amounts.anchored_prompts else 0
            mean_length = amounts.mean_length * prompts / (amounts.tokens + amounts.other_tokens)
            anchor = sum(
                self.put_in_place_s(block) + self.forward_all_s(block, prompts, mean_length)
                for block in (ranges if untouched else ranges[-1:])
            ) + self._answers_s(*amounts.answers)
        return RunTimes(store_s=store_s, held_out_before_s=before, anchor_s=anchor, blocks=blocks)

    def _answers_s(self, passes: int, rows: int) -> float:
        """Letting the untouched model write: each token of ``rows`` answers is a pass through all layers."""
        streamed = self._residence.resident_layers < self._residence.layers
        return passes * sum(
            max(self.load_s(i) if streamed else 0.0, self.forward_s(i, rows, rows) + _SHORT_PASS_S_PER_LAYER)
            for i in range(len(self._shapes.layers))
        )

    def _targets_s(self, block: tuple[int, int], tokens: float, mean_length: float) -> float:
        """Reading a block's unquantised layers, writing and using them, and writing what comes out."""
        speeds, dense = self._speeds, self._shapes.dense_bytes(*block)
        moved = (
            dense / speeds.read_bytes_per_s + dense / speeds.write_bytes_per_s + dense / speeds.cached_read_bytes_per_s
        )
        written = tokens * self._shapes.hidden * self._shapes.itemsize / speeds.write_bytes_per_s
        products = sum(self.forward_s(layer, tokens, mean_length) for layer in range(*block))
        return moved + products + written + _SET_UP_S_PER_LAYER * (block[1] - block[0])

    def _block_times(
        self, block: tuple[int, int], objective: str, amounts: Amounts, *, last: bool, together: bool
    ) -> BlockTimes:
        padded = (amounts.tokens + (amounts.other_tokens if last or together else 0)) * amounts.padding
        step_tokens, mean = padded / amounts.steps_per_epoch, amounts.mean_length
        passes = amounts.steps_per_epoch
        targets = head_fit = train = held_out = cache = waited = 0.0
        if objective == "match":
            targets = self._targets_s(block, amounts.tokens, mean)
        if objective != "none":
            seconds, waited = self.step_s(block, step_tokens, mean, train=True)
            if objective == "task":
                local = self.task_loss_s(amounts.answer_tokens, train=True)
            elif objective == "match":
                local = self.squares_s(padded)
            else:
                local = self.reconstruction_s(padded)
            if last:
                # Both models' logits, and the gradient of one.
                rows = self._shapes.head.compared.rows
                local += 1.5 * self.task_loss_s(amounts.anchored_tokens, train=True, rows=rows)
            train = amounts.epochs * (passes * seconds + local)
            if objective == "reconstruct":
                fit_s, _ = self.step_s(block, step_tokens, mean, train=False)
                head_fit = amounts.head_fit_epochs * (passes * fit_s + self.reconstruction_s(padded))
        if last and amounts.held_out_tokens:
            once = self.forward_all_s(block, amounts.held_out_tokens, mean)
            once += self.task_loss_s(amounts.held_out_answer_tokens, train=False)
            held_out = math.ceil(amounts.epochs) * once
        if together and objective == "none":
            seconds, waited = self.step_s(block, padded / amounts.steps_per_epoch, mean, train=False)
            train = amounts.epochs * passes * seconds
        if not last and not together:
            everything = amounts.tokens + amounts.held_out_tokens
            written = everything * self._shapes.hidden * self._shapes.itemsize / self._speeds.write_bytes_per_s
            cache = self.forward_all_s(block, everything, mean) + written + self.put_in_place_s(block)
        return BlockTimes(
            load_s=self.put_in_place_s(block) if objective != "none" else 0.0,
            targets_s=targets,
            head_fit_s=head_fit,
            train_s=train,
            held_out_s=held_out,
            cache_s=cache,
            waiting_share=amounts.epochs * passes * waited / train if train else 0.0,
        )
