"""What the blocks of a stage learn: what their outputs are read with, and the losses of one optimiser step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lopt_lite.data.dataset import Batch
from lopt_lite.residency.head import AnswerHead, open_head
from lopt_lite.residency.pool import MicroBatch
from lopt_lite.seeds import derive_seed
from lopt_lite.training.anchors import AnchorReader
from lopt_lite.training.around import Around
from lopt_lite.training.block_plan import Block, Stage
from lopt_lite.training.matching import Targets
from lopt_lite.training.objectives import ReconstructionHead, matching_loss, reconstruction_loss
from lopt_lite.training.trained import TrainedParameters
from lopt_lite.training.workbench import Workbench

#: Given a micro-batch's number and a block's output: its share of the block's loss, whose gradient it sends back.
Local = Callable[[int, torch.Tensor], float]


@dataclass
class StepLosses:
    """Of one step: of the task, the squared errors of early blocks, and the divergence at anchored tokens."""

    task: float = 0.0
    squared: dict[int, float] = field(default_factory=dict)
    kl: float = 0.0

    @property
    def mean_squared(self) -> float:
        """Of the blocks that have one; 0 where none has."""
        return sum(self.squared.values()) / max(1, len(self.squared))


class StageLosses:
    """Makes the losses of a stage's blocks. To be opened before, and closed by the caller.

    Parameters
    ----------
    trained:
        Learns of the reconstruction heads, and of what is trained around the layers.
    anchors:
        What holds the last block to the untouched model, if anything does.
    targets:
        What a block that is alone in its stage is to match, if it is.

    Attributes
    ----------
    reconstruction_heads:
        By the numbers of the blocks that have one.
    answers:
        The LM head, where a block learns the task.
    around:
        Embedding, final norm and LM head, where they are trained.
    """

    def __init__(
        self,
        bench: Workbench,
        stage: Stage,
        trained: TrainedParameters,
        *,
        anchors: AnchorReader | None,
        targets: Targets | None,
    ) -> None:
        self._bench, self._stage, self._trained = bench, stage, trained
        self._anchors, self._targets = anchors, targets
        self.reconstruction_heads: dict[int, ReconstructionHead] = {}
        self.answers: AnswerHead | None = None
        self.around: Around | None = None

    def open(self) -> None:
        """Put in place what makes the losses: the LM head, and a reconstruction head for each block that needs one."""
        bench, settings = self._bench, self._bench.settings
        for block in self._stage.blocks:
            if block.objective == "reconstruct":
                seed = derive_seed(settings.seed, "block", block.index)
                head = ReconstructionHead(bench.skeleton.hidden_size, seed=seed).to(bench.device)
                self.reconstruction_heads[block.index] = head
                name = f"head-{block.index}"
                parameters = {f"{name}.{part}": parameter for part, parameter in head.named_parameters()}
                self._trained.add(name, parameters, scaffolding=True)
        if not any(block.objective == "task" for block in self._stage.blocks):
            return
        self.answers = open_head(
            bench.skeleton,
            bench.store,
            device=bench.device,
            logit_elements=bench.residence.logit_elements,
            slice_rows=bench.residence.head_slice_rows,
            compared=None if self._anchors is None else self._anchors.sample.compared(bench.skeleton.vocabulary_rows),
        )
        if settings.trains_around:
            self.around = Around(bench.store, bench.skeleton, self._trained)
            self.answers.train(tuple(self.around.output.values()))

    def close(self) -> None:
        """Take the heads off the device."""
        if self.around is not None:
            self.around.close()
        if self.answers is not None:
            self.answers.close()

    def read_ahead(self, batches: list[Batch]) -> None:
        """Read what a block is to match in the next step, meanwhile."""
        if self._targets is not None:
            self._targets.read_ahead(batches)

    def of_block(
        self,
        block: Block,
        batches: list[Batch],
        entering: list[MicroBatch],
        losses: StepLosses,
        *,
        fits_heads: bool,
    ) -> Local:
        """What makes a block's share of the step's loss, micro-batch by micro-batch, and adds it to ``losses``.

        Parameters
        ----------
        batches, entering:
            The micro-batches of the step, and what enters the block (it may still be growing).
        fits_heads:
            Only reconstruction heads learn.
        """
        if block.index in self.reconstruction_heads or self._targets is not None:
            return self._squares(block, batches, entering, losses, fits_heads=fits_heads)
        if block.objective != "task" or fits_heads:
            return lambda part, output: 0.0
        return self._task(block, batches, losses)

    def _squares(
        self, block: Block, batches: list[Batch], entering: list[MicroBatch], losses: StepLosses, *, fits_heads: bool
    ) -> Local:
        """Reconstruction or matching: a mean of squares over the real tokens of training examples."""
        settings, device = self._bench.settings, self._bench.device
        learnt = [self._learnt(batch) for batch in batches]
        tokens = sum(int(mask.sum()) for mask in learnt)
        # A block that is trained alone by Adam does not feel a weight.
        together = settings.schedule == "joint" and not fits_heads
        weight = settings.reconstruction_weight / len(self.reconstruction_heads) if together else 1.0
        losses.squared[block.index] = 0.0

        def reconstruct_or_match(part: int, output: torch.Tensor) -> float:
            real = learnt[part].to(device)
            if self._targets is not None:
                loss = matching_loss(output, self._targets.of(batches[part]), real, tokens=tokens)
            else:
                head = self.reconstruction_heads[block.index]
                loss = reconstruction_loss(head, output, entering[part].hidden, real, tokens=tokens)
            (weight * loss).backward()
            losses.squared[block.index] += float(loss.detach())
            return weight * float(loss.detach())

        return reconstruct_or_match

    def _task(self, block: Block, batches: list[Batch], losses: StepLosses) -> Local:
        """The cross-entropy of answers; with the last block of all, the divergence from the untouched model too."""
        answers = self.answers
        assert answers is not None
        answer_tokens = sum(batch.answer_tokens for batch in batches)
        ends_stage = block is self._stage.blocks[-1]
        anchors = self._anchors if ends_stage and block.index == len(self._bench.blocks) - 1 else None
        anchored_tokens = 0
        if anchors is not None:
            anchored_tokens = sum(int(anchors.sample.counts[batch.examples].sum()) for batch in batches)

        def learn(part: int, output: torch.Tensor) -> float:
            batch = batches[part]
            targets = batch.targets.to(self._bench.device)
            if anchors is None:
                value = answers.loss_backward(output, targets, answer_tokens=answer_tokens)
            else:
                held = anchors.anchors(batch, tokens=anchored_tokens)
                value, kl = answers.anchored_loss_backward(output, targets, held, answer_tokens=answer_tokens)
                losses.kl += kl
            if ends_stage:
                losses.task += value
            return value

        return learn

    def _learnt(self, batch: Batch) -> torch.Tensor:
        """bool [rows, longest]: real tokens of training examples."""
        return batch.real & (batch.examples < self._bench.train_count)[:, None]
