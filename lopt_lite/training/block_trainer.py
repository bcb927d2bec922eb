"""Training a stage on its inputs: one block alone (the sequential schedule), or all blocks together (the joint one).

Read :meth:`BlockTrainer.run` from top to bottom: load, go on where a checkpoint stands, fit the reconstruction heads,
train, write the blocks' adapters (of full tuning: their layers).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lopt_lite import devices, files
from lopt_lite.checkpoints.integrity import DamagedFileError
from lopt_lite.data.batches import length_sorted_batches
from lopt_lite.data.dataset import Batch, collate
from lopt_lite.errors import DoesNotFitError, is_out_of_memory
from lopt_lite.events import BlockDone, BlockStarted, CheckpointSaved, Notice, Progress, Step, Validation
from lopt_lite.residency.block_major import groups
from lopt_lite.residency.layers import open_layers
from lopt_lite.residency.memory_model import FORWARD_ROWS
from lopt_lite.residency.pool import LayerPool, MicroBatch
from lopt_lite.residency.spill import Spill
from lopt_lite.seeds import derive_seed
from lopt_lite.training.adapters import adapter_parameters, attach_adapter, set_training
from lopt_lite.training.anchors import AnchorReader
from lopt_lite.training.around import EMBEDDING
from lopt_lite.training.block_inputs import BlockInputs
from lopt_lite.training.block_plan import Block, Stage
from lopt_lite.training.checkpoint import CheckpointDirectory, Cursor, read_cursor, restore_checkpoint, save_lazily
from lopt_lite.training.divergence import DivergenceWatch
from lopt_lite.training.fast_layers import fast_layers
from lopt_lite.training.from_answers import FromAnswers, sampled_examples
from lopt_lite.training.full import has_eight_bit_moments, own_weights, write_layers
from lopt_lite.training.job import other_rows
from lopt_lite.training.matching import Targets
from lopt_lite.training.micro_batch_size import MicroBatchSize, describe
from lopt_lite.training.optimisation import learning_rate
from lopt_lite.training.stage_losses import Local, StageLosses, StepLosses
from lopt_lite.training.step_batches import PHASES, epoch_steps
from lopt_lite.training.stopping import stopped
from lopt_lite.training.trained import TrainedParameters
from lopt_lite.training.workbench import Workbench

HEAD_FIT_LR = 1e-3


@dataclass(frozen=True)
class _Phase:
    """A stretch of training with new optimisers: how long. ``"head-fit"`` leaves everything but the heads alone."""

    name: str
    steps: int


class BlockTrainer:
    """Trains the blocks of a stage from their inputs to their adapter files, or the files of their layers.

    Parameters
    ----------
    bench:
        The run's parts.
    stage:
        Which blocks. They train together, each by its own objective.
    inputs:
        Makes the first block's input for a batch.
    anchors:
        What holds the last block to the untouched model, if anything does.
    targets:
        What a block that is alone in its stage is to match, if it is.
    """

    def __init__(
        self,
        bench: Workbench,
        stage: Stage,
        inputs: BlockInputs,
        *,
        anchors: AnchorReader | None = None,
        targets: Targets | None = None,
    ) -> None:
        self._bench, self._stage, self._inputs = bench, stage, inputs
        self._anchors = anchors
        self._is_last = stage.blocks[-1].index == len(bench.blocks) - 1
        self._checkpoints = CheckpointDirectory(bench.paths.checkpoint(stage.index))
        self._lengths = bench.dataset.lengths
        self._counts = bench.step_counts
        self._last_checkpoint_s = time.monotonic()
        self._working_on = stage.blocks[0].index
        self._last_block_lr: float | None = None
        self._sizes = MicroBatchSize(
            bench.journal,
            stage=stage.index,
            phases=PHASES,
            planned_tokens=bench.residence.micro_batch_tokens,
            lengths=bench.dataset.lengths,
            device=bench.device,
        )
        self._storage = Spill(bench.residence.state_limits, bench.paths.root, bench.device)
        self._trained = TrainedParameters(
            storage=self._storage if bench.residence.offload_state else None,
            per_layer=bench.settings.tune == "full" and bench.settings.schedule == "sequential",
            eight_bit=has_eight_bit_moments(bench.settings, bench.device),
        )
        self._losses = StageLosses(bench, stage, self._trained, anchors=anchors, targets=targets)

    def run(self) -> None:
        """Train the blocks, from the last checkpoint if there is one, until their results are durable.

        Raises
        ------
        StoppedError
            A signal or a time limit came; a checkpoint stands.
        DivergedError
            The loss was not a finite number for several steps in a row.
        """
        bench, stage = self._bench, self._stage
        pool = open_layers(
            bench.residence,
            bench.store,
            bench.skeleton,
            stage.first,
            stage.end,
            device=bench.device,
            scratch=bench.paths.root,
            on_layer=self._attach,
            state=self._trained,
            on_pass=self._report_pass,
        )
        try:
            self._losses.open()
            digests = self._train(pool)
        finally:
            pool.close()
            # The pool tells us of its progress, and so refers back: nothing of it would go before this does.
            vars(self).pop("_pool", None)
            self._storage.close()
            self._losses.close()
        for block, digest in digests.items():
            bench.journal.add("block", block=block, sha256=digest)
        bench.on_event(BlockDone(block=stage.index, blocks=len(bench.stages)))

    def _train(self, pool: LayerPool) -> dict[int, str]:
        """Go through the phases and write what was trained; returns a sha256 of each block's result."""
        self._pool = pool
        phases = self._plan_phases()
        cursor, self._restore_name = self._take_up()
        for phase in phases[[p.name for p in phases].index(cursor.phase) :]:
            self._run_phase(phase, cursor if phase.name == cursor.phase else Cursor(phase.name, 0))
        return {block.index: self._write(block) for block in self._stage.blocks if block.objective != "none"}

    def _write(self, block: Block) -> str:
        """Write a block's adapter or layers, and with the last block what was trained around them."""
        bench, layers = self._bench, range(block.first, block.end)
        files.make_directory(bench.paths.block(block.index))
        if bench.settings.tune == "full":
            shards = bench.paths.block_layers(block.index, layers)
            digest = write_layers(self._trained, shards, store=bench.store, skeleton=bench.skeleton)
            if self._losses.around is not None and block is self._stage.blocks[-1]:
                digest += self._losses.around.write(bench.paths.around(block.index))
            return digest
        tensors = {tensor.name: tensor for tensor in self._trained.parameters(lambda group: group in layers)}
        return save_lazily(bench.paths.block_adapter(block.index), tensors)

    def _attach(self, index: int, layer: nn.Module) -> None:
        """Put a new adapter on a layer, to be trained; or train the layer itself."""
        if self._stage.block_of(index).objective == "none":
            layer.requires_grad_(False)
            return
        if self._bench.settings.tune == "full":
            parameters = own_weights(layer)
        else:
            attach_adapter(layer, index, skeleton=self._bench.skeleton, settings=self._bench.settings)
            parameters = adapter_parameters(layer)
        self._trained.add(index, {f"{index}.{name}": parameter for name, parameter in parameters.items()})

    def _report_pass(self, done: int, total: int) -> None:
        """Progress within one step of a streamed block, layer by layer."""
        self._bench.on_event(
            Progress(task=f"layers of block {self._working_on + 1}", done=done, total=total, unit="layers")
        )

    # -- the stretches of training ------------------------------------------------------------------------------------

    def _plan_phases(self) -> list[_Phase]:
        fit_steps = self._counts.head_fit if self._losses.reconstruction_heads else 0
        train = _Phase("train", self._counts.train)
        return [_Phase("head-fit", fit_steps), train] if fit_steps else [train]

    def _peak_lr(self, phase: _Phase, group: int | str) -> float:
        """The last block and what follows it learn by ``--lr``; earlier blocks, heads and embeddings by their own."""
        settings, model = self._bench.settings, self._bench.skeleton.kind
        if phase.name == "head-fit":
            return HEAD_FIT_LR
        first_of_last = self._bench.blocks[-1].first
        if isinstance(group, int):
            is_early = group < first_of_last
        else:
            is_early = group.startswith("head-") or (group == EMBEDDING and first_of_last > 0)
        if is_early:
            return settings.early_lr(model)
        return settings.model_lr(model) if self._last_block_lr is None else self._last_block_lr

    def _take_up(self) -> tuple[Cursor, str | None]:
        """Where to begin, and the checkpoint to begin with: the last journalled one if it is sound.

        Else it is the start of the first phase, and none. All other checkpoints are deleted.
        """
        fact = self._bench.journal.last("checkpoint", block=self._stage.index)
        first = self._plan_phases()[0].name
        name = None if fact is None else str(fact["name"])
        if fact is not None:
            try:
                self._checkpoints.check(str(fact["name"]), fact.get("sha256"))
            except DamagedFileError as error:
                name = None
                text = f"{error.found}; {self._stage.name} is trained again from its start"
                self._bench.on_event(Notice(text=text))
        self._checkpoints.keep_only(name)
        if name is None:
            return Cursor(first, 0), None
        return read_cursor(self._checkpoints.path(name)), name

    def _run_phase(self, phase: _Phase, cursor: Cursor) -> None:
        bench, stage = self._bench, self._stage
        self._divergence = DivergenceWatch(bench, stage)
        self._trained.begin(scaffolding_only=phase.name == "head-fit")
        for layer in self._pool.layers:
            set_training(layer, phase.name == "train")
        if self._restore_name is not None and cursor.step > 0:
            restore_checkpoint(self._checkpoints.path(self._restore_name), self._trained)
        bench.metrics.forget_undone(stage.index, PHASES, phase.name, cursor.step)
        steps, per_epoch = phase.steps, self._counts.per_epoch
        bench.on_event(
            BlockStarted(
                block=stage.index,
                blocks=len(bench.stages),
                objective=stage.objective if phase.name == "train" else "fit the reconstruction head",
                first_layer=stage.first,
                end_layer=stage.end,
                step=cursor.step,
                steps=steps,
            )
        )
        self._last_checkpoint_s = time.monotonic()
        if phase.name == "train" and self._is_last:
            self._follow_answers(steps)
        if cursor.step > 0 and cursor.step % per_epoch == 0:
            # The checkpoint was made between an epoch's last step and its validation.
            self._end_epoch(phase, cursor.step // per_epoch)
        for epoch in range(cursor.step // per_epoch, -(-steps // per_epoch)):
            batches = epoch_steps(
                self._lengths[: bench.train_count],
                batch_size=bench.settings.batch_size,
                seed=bench.settings.seed,
                stage=stage.index,
                phase=phase.name,
                epoch=epoch,
                steps=steps,
            )
            for number, indices in enumerate(batches, start=epoch * per_epoch):
                if number < cursor.step:
                    continue
                self._stop_or_checkpoint(phase, number, needed_s=0.0)
                following = batches[number + 1 - epoch * per_epoch :][:1]
                took_s = self._step(phase, epoch, number, steps, indices, following)
                self._stop_or_checkpoint(phase, number + 1, needed_s=took_s)
            self._end_epoch(phase, epoch + 1)
        self._divergence.end(steps)

    def _follow_answers(self, steps: int) -> None:
        """Find out what nobody has said of the last block: how heavy its anchor is, and how fast it learns."""
        sample = sampled_examples(self._bench)
        found = FromAnswers(self._bench, lambda task: self._loss_of(sample, task))
        if self._anchors is not None and self._anchors.weight is None:
            self._anchors.weight = found.anchor_weight()
        if self._bench.settings.lr is None:
            self._last_block_lr = found.learning_rate(steps)

    def _examples(self, phase: _Phase, number: int, indices: list[int]) -> list[int]:
        """The examples ``indices`` of a step, and others to anchor on."""
        if self._anchors is None or phase.name != "train":
            return indices
        rows = other_rows(self._bench.settings.batch_size, len(self._bench.other_range))
        return [*indices, *self._anchors.sample.others_of_step(number, rows)]

    def _micro_batches(self, phase: _Phase, number: int, indices: list[int]) -> list[Batch]:
        """What belongs to a step, as it passes through the layers together."""
        parts = self._sizes.split(phase.name, number, self._examples(phase, number, indices))
        return [collate(self._bench.dataset, part, self._bench.pad_token_id) for part in parts]

    def _step(
        self, phase: _Phase, epoch: int, number: int, steps: int, indices: list[int], following: list[list[int]]
    ) -> float:
        """One optimiser step on the examples ``indices``; returns the seconds it took.

        ``following``: the examples of the step after this one (none at an epoch's end), to be read meanwhile.
        """
        bench = self._bench
        started = time.monotonic()

        def rate(group: int | str) -> float:
            return learning_rate(number, steps, self._peak_lr(phase, group))

        seed = derive_seed(bench.settings.seed, "step", phase.name, number)
        while True:
            batches = self._micro_batches(phase, number, indices)
            self._trained.begin_step(rate, seed=seed)
            try:
                losses = self._accumulate(phase, batches, number, following)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_micro_batches(phase, number, indices, error)
            # Here nothing refers any more to the tensors of what failed.
            devices.release_everything(bench.device)
        squared = losses.mean_squared
        is_task = phase.name == "train" and self._stage.blocks[-1].objective == "task"
        loss = losses.task if is_task else squared
        finite = all(map(math.isfinite, (loss, squared, losses.kl)))
        norm = self._trained.end_step(finite=finite)
        devices.synchronize(bench.device)
        took_s = time.monotonic() - started
        tokens = sum(batch.tokens for batch in batches)
        step = Step(
            block=self._stage.index,
            phase=phase.name,
            epoch=epoch + 1,
            step=number + 1,
            steps=steps,
            loss=loss,
            lr=rate(self._stage.end - 1),
            grad_norm=norm,
            tokens=tokens,
            tokens_per_s=tokens / max(took_s, 1e-9),
            device_peak_bytes=bench.peak.read(),
            host_rss_bytes=devices.host_rss_bytes(),
            time=time.time(),
            reconstruction_loss=squared if is_task and self._losses.reconstruction_heads else None,
            retain_kl=losses.kl if is_task and self._anchors is not None else None,
        )
        bench.metrics.add(step)
        bench.on_event(step)
        self._divergence.note(finite and math.isfinite(norm), number + 1)
        return took_s

    def _halve_micro_batches(self, phase: _Phase, number: int, indices: list[int], error: BaseException) -> None:
        """Memory ran out in a step: make what is left of it forgotten, and go on with half of the tokens at once.

        Raises
        ------
        DoesNotFitError
            One example at a time is too much; or part of the step is done, and it takes a new start from the checkpoint
            to begin it again (the smaller size is remembered).
        """
        before = self._sizes.tokens(phase.name, number)
        fact = self._sizes.halve(phase.name, number, self._examples(phase, number, indices))
        text = describe(fact, before)
        if self._trained.updated_in_step:
            raise DoesNotFitError(text, fix="give the same command again to go on from the last checkpoint") from error
        self._trained.abandon_step()
        self._bench.on_event(Notice(text=f"{self._stage.name}: {text}"))

    def _accumulate(self, phase: _Phase, batches: list[Batch], number: int, following: list[list[int]]) -> StepLosses:
        """The gradients of one step: all micro-batches through each block; what comes out enters the next one."""
        settings = self._bench.settings
        losses = StepLosses()
        entering: list[MicroBatch] = []

        def inputs_of_step():  # type: ignore[no-untyped-def]
            for batch in batches:
                entering.append(self._inputs.micro_batch(batch))
                if batch is batches[-1]:
                    coming = [self._micro_batches(phase, number + 1, part) for part in following]
                    ahead = [batch for part in coming for batch in part]
                    self._inputs.read_ahead(ahead)
                    self._losses.read_ahead(ahead)
                yield entering[-1]

        def dropout_seed(layer: int, part: int) -> int:
            return derive_seed(settings.seed, "dropout", phase.name, number, layer, part)

        for block in self._blocks_of(phase):
            self._working_on = block.index
            outputs: list[torch.Tensor] = []
            is_last = block is self._stage.blocks[-1]
            local = self._losses.of_block(block, batches, entering, losses, fits_heads=phase.name == "head-fit")

            def loss_and_keep(
                part: int, output: torch.Tensor, local: Local = local, kept: list[torch.Tensor] = outputs
            ) -> float:
                kept.append(output.detach())
                return local(part, output)

            with fast_layers(self._bench.device):
                self._pool.accumulate(
                    entering if block is not self._stage.blocks[0] else inputs_of_step(),
                    # Nothing comes after the last block: its outputs need not stay.
                    local if is_last else loss_and_keep,
                    dropout_seed if settings.lora_dropout else None,
                    first=block.first,
                    end=block.end,
                )
            if not is_last:
                entering = [MicroBatch(output, part.calls) for output, part in zip(outputs, entering, strict=True)]
        return losses

    def _blocks_of(self, phase: _Phase) -> list[Block]:
        """All blocks of the stage; to fit heads, those up to the last one with a head."""
        if phase.name == "train":
            return list(self._stage.blocks)
        return [block for block in self._stage.blocks if block.index <= max(self._losses.reconstruction_heads)]

    # -- between steps ------------------------------------------------------------------------------------------------

    def _stop_or_checkpoint(self, phase: _Phase, step: int, *, needed_s: float) -> None:
        """Checkpoint when it is time to, or when there is a reason to stop; then stop."""
        bench = self._bench
        reason = bench.stop.reason(needed_s=needed_s)
        due = time.monotonic() - self._last_checkpoint_s >= bench.settings.checkpoint_every_s
        if (reason is not None or due) and step > 0 and self._divergence.in_a_row == 0:
            self._checkpoint(phase, step)
        if reason is not None:
            where = f"after step {step} of {phase.steps}"
            raise stopped(f"{reason} in {self._stage.name} of {len(bench.blocks)}, {where}")

    def _checkpoint(self, phase: _Phase, step: int) -> None:
        bench, started = self._bench, time.monotonic()
        saved = self._checkpoints.save(Cursor(phase.name, step), self._trained)
        newest = bench.journal.last("checkpoint", block=self._stage.index)
        if newest is None or (newest["name"], newest.get("sha256")) != saved:
            bench.journal.add("checkpoint", block=self._stage.index, name=saved.name, sha256=saved.sha256)
        self._checkpoints.keep_only(saved.name)
        self._last_checkpoint_s = time.monotonic()
        seconds = self._last_checkpoint_s - started
        bench.on_event(CheckpointSaved(block=self._stage.index, step=step, seconds=seconds))

    def _end_epoch(self, phase: _Phase, epoch: int) -> None:
        """Held-out loss after an epoch of the last block, once per epoch however often the run is resumed."""
        bench = self._bench
        ends_here = self._is_last and phase.name == "train"
        if not ends_here or not bench.held_out_count or bench.journal.last("validation", epoch=epoch):
            return
        if self._divergence.in_a_row == 0:
            # So that a stop while the loss is measured costs no step.
            self._checkpoint(phase, self._counts.at_end_of(epoch))
        self._validate(epoch)

    def _validate(self, epoch: int) -> None:
        bench, epochs = self._bench, self._counts.epochs
        loss, answer_tokens = self._loss_of(bench.held_out_range, "held-out loss")
        bench.journal.add("validation", epoch=epoch, loss=loss, answer_tokens=answer_tokens)
        bench.on_event(Validation(epoch=epoch, epochs=epochs, loss=loss, answer_tokens=answer_tokens))

    def _loss_of(self, examples: Sequence[int], task: str) -> tuple[float, int]:
        """Mean loss of the answers of ``examples``, in nats, and their tokens; while training."""
        bench = self._bench
        lengths = self._lengths[torch.tensor(examples)]
        batches = length_sorted_batches(lengths, max_tokens=bench.residence.forward_tokens, max_rows=FORWARD_ROWS)
        for layer in self._pool.layers:
            set_training(layer, False)
        total, answer_tokens, done = 0.0, 0, 0
        for group in groups(batches, lengths, bench.residence.group_tokens):
            parts = [collate(bench.dataset, [examples[i] for i in batches[b]], bench.pad_token_id) for b in group]

            def take(number: int, output: torch.Tensor, parts: list[Batch] = parts) -> None:
                nonlocal total, answer_tokens, done
                bench.stop.check()
                targets = parts[number].targets.to(bench.device)
                assert self._losses.answers is not None
                total += self._losses.answers.loss_sum(output, targets)
                answer_tokens += parts[number].answer_tokens
                done += 1
                bench.on_event(Progress(task=task, done=done, total=len(batches), unit="batches"))

            self._pool.forward_all([self._inputs.micro_batch(part) for part in parts], take)
        for layer in self._pool.layers:
            set_training(layer, True)
        return total / answer_tokens, answer_tokens
