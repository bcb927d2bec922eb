"""Training one block on its inputs, with only this block on the device.

Read :meth:`BlockTrainer.run` from top to bottom: load, go on where a checkpoint stands, fit the reconstruction head,
train, write the block's adapter (of full tuning: its layers).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from lopt_lite import devices, files
from lopt_lite.data.batches import epoch_batches, length_sorted_batches, micro_batches
from lopt_lite.data.dataset import Batch, collate
from lopt_lite.errors import DivergedError
from lopt_lite.events import BlockDone, BlockStarted, CheckpointSaved, Notice, Progress, Step, Validation
from lopt_lite.residency.block_major import groups
from lopt_lite.residency.head import AnswerHead, open_head
from lopt_lite.residency.layers import open_layers
from lopt_lite.residency.pool import LayerPool, MicroBatch
from lopt_lite.residency.spill import Spill, SpillLimits
from lopt_lite.seeds import derive_seed
from lopt_lite.training.adapters import adapter_parameters, attach_adapter, set_training
from lopt_lite.training.block_inputs import BlockInputs
from lopt_lite.training.block_plan import Block
from lopt_lite.training.checkpoint import CheckpointDirectory, Cursor, read_cursor, restore_checkpoint, save_lazily
from lopt_lite.training.full import has_eight_bit_moments, own_weights, write_layers
from lopt_lite.training.objectives import ReconstructionHead, reconstruction_loss
from lopt_lite.training.optimisation import learning_rate
from lopt_lite.training.stopping import stopped
from lopt_lite.training.trained import TrainedParameters
from lopt_lite.training.workbench import FORWARD_ROWS, Workbench

PHASES = ("head-fit", "train")
HEAD_FIT_LR = 1e-3
_STEPS_WITHOUT_FINITE_LOSS = 5


@dataclass(frozen=True)
class _Phase:
    """A stretch of training with new optimisers: how long, how fast. ``"head-fit"`` leaves the layers alone."""

    name: str
    epochs: int
    peak_lr: float


class BlockTrainer:
    """Trains one block from its inputs to its adapter file, or the files of its layers.

    Parameters
    ----------
    bench:
        The run's parts.
    block:
        Which layers, and what they learn.
    inputs:
        Makes the block's input for a batch.
    """

    def __init__(self, bench: Workbench, block: Block, inputs: BlockInputs) -> None:
        self._bench, self._block, self._inputs = bench, block, inputs
        self._is_last = block.index == len(bench.blocks) - 1
        self._checkpoints = CheckpointDirectory(bench.paths.checkpoint(block.index))
        self._peak = devices.PeakMemory(bench.device)
        self._lengths = bench.dataset.lengths
        self._steps_per_epoch = math.ceil(bench.train_count / bench.settings.batch_size)
        self._last_checkpoint_s = time.monotonic()
        self._not_finite = 0
        self._head: ReconstructionHead | None = None
        self._answers: AnswerHead | None = None
        # On the CPU what is put aside goes to a file, elsewhere to host memory.
        self._storage = Spill(SpillLimits(0, 1 << 62), bench.paths.root, bench.device)
        self._trained = TrainedParameters(
            storage=self._storage if bench.residence.offload_state else None,
            per_layer=bench.settings.tune == "full",
            eight_bit=has_eight_bit_moments(bench.settings, bench.device),
        )

    def run(self) -> None:
        """Train the block, from the last checkpoint if there is one, until its result is durable.

        Raises
        ------
        StoppedError
            A signal or a time limit came; a checkpoint stands.
        DivergedError
            The loss was not a finite number for several steps in a row.
        """
        bench, block = self._bench, self._block
        if block.objective == "task":
            self._answers = open_head(
                bench.skeleton,
                bench.store,
                device=bench.device,
                logit_elements=bench.residence.logit_elements,
                slice_rows=bench.residence.head_slice_rows,
            )
        pool = open_layers(
            bench.residence,
            bench.store,
            bench.skeleton,
            block.first,
            block.end,
            device=bench.device,
            scratch=bench.paths.root,
            on_layer=self._attach,
            state=self._trained,
            on_pass=self._report_pass,
        )
        try:
            digest = self._train(pool)
        finally:
            pool.close()
            # The pool tells us of its progress, and so refers back: nothing of it would go before this does.
            vars(self).pop("_pool", None)
            self._storage.close()
            if self._answers is not None:
                self._answers.close()
        bench.journal.add("block", block=block.index, sha256=digest)
        bench.on_event(BlockDone(block=block.index, blocks=len(bench.blocks)))

    def _train(self, pool: LayerPool) -> str:
        """Go through the phases and write the adapter, or the layers; returns the sha256 of what was written."""
        bench, block = self._bench, self._block
        self._pool = pool
        phases = self._plan_phases()
        cursor = self._cursor()
        for phase in phases[[p.name for p in phases].index(cursor.phase) :]:
            self._run_phase(phase, cursor if phase.name == cursor.phase else Cursor(phase.name, 0))
        if bench.settings.tune == "full":
            shards = bench.paths.block_layers(block.index, range(block.first, block.end))
            return write_layers(self._trained, shards, store=bench.store, skeleton=bench.skeleton)
        files.make_directory(bench.paths.block(block.index))
        layers = {tensor.name: tensor for tensor in self._trained.parameters(lambda group: isinstance(group, int))}
        return save_lazily(bench.paths.block_adapter(block.index), layers)

    def _attach(self, index: int, layer: nn.Module) -> None:
        """Put a new adapter on a layer, to be trained; or train the layer itself."""
        if self._bench.settings.tune == "full":
            parameters = own_weights(layer)
        else:
            attach_adapter(layer, index, skeleton=self._bench.skeleton, settings=self._bench.settings)
            parameters = adapter_parameters(layer)
        self._trained.add(index, {f"{index}.{name}": parameter for name, parameter in parameters.items()})

    def _report_pass(self, done: int, total: int) -> None:
        """Progress within one step of a streamed block, layer by layer."""
        self._bench.on_event(
            Progress(task=f"layers of block {self._block.index + 1}", done=done, total=total, unit="layers")
        )

    # -- the stretches of training ------------------------------------------------------------------------------------

    def _plan_phases(self) -> list[_Phase]:
        settings = self._bench.settings
        train = _Phase("train", settings.epochs, settings.lr if self._is_last else settings.early_lr)
        if self._block.objective != "reconstruct":
            return [train]
        seed = derive_seed(settings.seed, "block", self._block.index)
        self._head = ReconstructionHead(self._bench.skeleton.hidden_size, seed=seed).to(self._bench.device)
        self._trained.add("head", {f"head.{name}": parameter for name, parameter in self._head.named_parameters()})
        if not settings.head_fit_epochs:
            return [train]
        return [_Phase("head-fit", settings.head_fit_epochs, HEAD_FIT_LR), train]

    def _cursor(self) -> Cursor:
        """Where to begin: at the last journalled checkpoint, or at the first phase."""
        fact = self._bench.journal.last("checkpoint", block=self._block.index)
        first = "head-fit" if self._head is not None and self._bench.settings.head_fit_epochs else "train"
        self._restore_name = None if fact is None else str(fact["name"])
        self._checkpoints.keep_only(self._restore_name)
        if self._restore_name is None:
            return Cursor(first, 0)
        return read_cursor(self._checkpoints.path(self._restore_name))

    def _run_phase(self, phase: _Phase, cursor: Cursor) -> None:
        bench, block = self._bench, self._block
        self._trained.begin(layers=phase.name == "train")
        for layer in self._pool.layers:
            set_training(layer, phase.name == "train")
        if self._restore_name is not None and cursor.step > 0:
            restore_checkpoint(self._checkpoints.path(self._restore_name), self._trained)
        bench.metrics.forget_undone(block.index, PHASES, phase.name, cursor.step)
        steps = phase.epochs * self._steps_per_epoch
        bench.on_event(
            BlockStarted(
                block=block.index,
                blocks=len(bench.blocks),
                objective=block.objective if phase.name == "train" else "fit the reconstruction head",
                first_layer=block.first,
                end_layer=block.end,
                step=cursor.step,
                steps=steps,
            )
        )
        self._last_checkpoint_s = time.monotonic()
        if cursor.step > 0 and cursor.step % self._steps_per_epoch == 0:
            # The checkpoint was made between an epoch's last step and its validation.
            self._end_epoch(phase, cursor.step // self._steps_per_epoch)
        for epoch in range(cursor.step // self._steps_per_epoch, phase.epochs):
            batches = epoch_batches(
                self._lengths[: bench.train_count],
                batch_size=bench.settings.batch_size,
                seed=(bench.settings.seed, "block", block.index, phase.name, epoch),
            )
            for number, indices in enumerate(batches, start=epoch * self._steps_per_epoch):
                if number < cursor.step:
                    continue
                self._stop_or_checkpoint(phase, number, needed_s=0.0)
                following = batches[number + 1 - epoch * self._steps_per_epoch :][:1]
                took_s = self._step(phase, epoch, number, steps, indices, following)
                self._stop_or_checkpoint(phase, number + 1, needed_s=took_s)
            self._end_epoch(phase, epoch + 1)

    def _micro_batches(self, indices: list[int]) -> list[Batch]:
        """The examples ``indices`` of one step, as they pass through the layers together."""
        bench = self._bench
        parts = micro_batches(indices, self._lengths, max_tokens=bench.residence.micro_batch_tokens)
        return [collate(bench.dataset, part, bench.pad_token_id) for part in parts]

    def _step(
        self, phase: _Phase, epoch: int, number: int, steps: int, indices: list[int], following: list[list[int]]
    ) -> float:
        """One optimiser step on the examples ``indices``; returns the seconds it took.

        ``following``: the examples of the step after this one (none at an epoch's end), to be read meanwhile.
        """
        bench = self._bench
        started = time.monotonic()
        batches = self._micro_batches(indices)
        lr = learning_rate(number, steps, phase.peak_lr)
        self._trained.begin_step(lr, seed=derive_seed(bench.settings.seed, "step", phase.name, number))
        loss = self._accumulate(phase, batches, number, following)
        norm = self._trained.end_step(finite=math.isfinite(loss))
        devices.synchronize(bench.device)
        took_s = time.monotonic() - started
        tokens = sum(batch.tokens for batch in batches)
        step = Step(
            block=self._block.index,
            phase=phase.name,
            epoch=epoch + 1,
            step=number + 1,
            steps=steps,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=tokens,
            tokens_per_s=tokens / max(took_s, 1e-9),
            device_peak_bytes=self._peak.read(),
            host_rss_bytes=devices.host_rss_bytes(),
            time=time.time(),
        )
        bench.metrics.add(step)
        bench.on_event(step)
        self._watch_for_divergence(math.isfinite(loss) and math.isfinite(norm), number + 1)
        return took_s

    def _accumulate(self, phase: _Phase, batches: list[Batch], number: int, following: list[list[int]]) -> float:
        """The gradients of one step, from all its micro-batches; returns the step's loss."""
        bench, settings = self._bench, self._bench.settings
        tokens = sum(batch.tokens for batch in batches)
        answer_tokens = sum(batch.answer_tokens for batch in batches)
        made: list[MicroBatch] = []

        def micro_batches_of_step():  # type: ignore[no-untyped-def]
            for batch in batches:
                made.append(self._inputs.micro_batch(batch))
                if batch is batches[-1]:
                    self._inputs.read_ahead([coming for part in following for coming in self._micro_batches(part)])
                yield made[-1]

        def loss_backward(part: int, output: torch.Tensor) -> float:
            batch = batches[part]
            if self._head is None:
                assert self._answers is not None
                return self._answers.loss_backward(output, batch.targets.to(bench.device), answer_tokens=answer_tokens)
            real = batch.real.to(bench.device)
            loss = reconstruction_loss(self._head, output, made[part].hidden, real, tokens=tokens)
            loss.backward()
            return float(loss.detach())

        def dropout_seed(layer: int, part: int) -> int:
            return derive_seed(settings.seed, "dropout", phase.name, number, layer, part)

        return self._pool.accumulate(
            micro_batches_of_step(), loss_backward, dropout_seed if settings.lora_dropout else None
        )

    def _watch_for_divergence(self, finite: bool, step: int) -> None:
        if finite:
            self._not_finite = 0
            return
        self._not_finite += 1
        if self._not_finite >= _STEPS_WITHOUT_FINITE_LOSS:
            raise DivergedError(
                f"block {self._block.index + 1}: the loss or its gradient was not a finite number for "
                f"{self._not_finite} steps in a row, up to step {step}",
                fix="lower --lr (and --lr-early) and start anew with --fresh; the last good checkpoint is kept",
            )
        self._bench.on_event(Notice(text=f"step {step}: the loss or its gradient is not finite; the step is skipped"))

    # -- between steps ------------------------------------------------------------------------------------------------

    def _stop_or_checkpoint(self, phase: _Phase, step: int, *, needed_s: float) -> None:
        """Checkpoint when it is time to, or when there is a reason to stop; then stop."""
        bench = self._bench
        reason = bench.stop.reason(needed_s=needed_s)
        due = time.monotonic() - self._last_checkpoint_s >= bench.settings.checkpoint_every_s
        if (reason is not None or due) and step > 0 and self._not_finite == 0:
            self._checkpoint(phase, step)
        if reason is not None:
            steps = phase.epochs * self._steps_per_epoch
            raise stopped(
                f"{reason} in block {self._block.index + 1} of {len(bench.blocks)}, after step {step} of {steps}"
            )

    def _checkpoint(self, phase: _Phase, step: int) -> None:
        bench, started = self._bench, time.monotonic()
        name = self._checkpoints.save(Cursor(phase.name, step), self._trained)
        newest = bench.journal.last("checkpoint", block=self._block.index)
        if newest is None or newest["name"] != name:
            bench.journal.add("checkpoint", block=self._block.index, name=name)
        self._checkpoints.keep_only(name)
        self._last_checkpoint_s = time.monotonic()
        seconds = self._last_checkpoint_s - started
        bench.on_event(CheckpointSaved(block=self._block.index, step=step, seconds=seconds))

    def _end_epoch(self, phase: _Phase, epoch: int) -> None:
        """Held-out loss after an epoch of the last block, once per epoch however often the run is resumed."""
        bench = self._bench
        if not self._is_last or not bench.held_out_count or bench.journal.last("validation", epoch=epoch):
            return
        if self._not_finite == 0:
            # So that a stop while the loss is measured costs no step.
            self._checkpoint(phase, epoch * self._steps_per_epoch)
        self._validate(phase, epoch)

    def _validate(self, phase: _Phase, epoch: int) -> None:
        bench = self._bench
        held_out = range(bench.train_count, len(bench.dataset))
        batches = length_sorted_batches(
            self._lengths[bench.train_count :], max_tokens=bench.residence.forward_tokens, max_rows=FORWARD_ROWS
        )
        for layer in self._pool.layers:
            set_training(layer, False)
        total, answer_tokens, done = 0.0, 0, 0
        for group in groups(batches, self._lengths[bench.train_count :], bench.residence.group_tokens):
            parts = [collate(bench.dataset, [held_out[i] for i in batches[b]], bench.pad_token_id) for b in group]

            def take(number: int, output: torch.Tensor, parts: list[Batch] = parts) -> None:
                nonlocal total, answer_tokens, done
                bench.stop.check()
                targets = parts[number].targets.to(bench.device)
                assert self._answers is not None
                total += self._answers.loss_sum(output, targets)
                answer_tokens += parts[number].answer_tokens
                done += 1
                bench.on_event(Progress(task="held-out loss", done=done, total=len(batches), unit="batches"))

            self._pool.forward_all([self._inputs.micro_batch(part) for part in parts], take)
        for layer in self._pool.layers:
            set_training(layer, phase.name == "train")
        loss = total / answer_tokens
        bench.journal.add("validation", epoch=epoch, loss=loss, answer_tokens=answer_tokens)
        bench.on_event(Validation(epoch=epoch, epochs=phase.epochs, loss=loss, answer_tokens=answer_tokens))
