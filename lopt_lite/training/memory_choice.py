"""Where layers are while they are trained, and unquantised ones while targets are made of them (``match``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lopt_lite.checkpoints.locate import ModelDescription, ModelFiles
from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX
from lopt_lite.errors import DoesNotFitError, SettingsError
from lopt_lite.residency.choices import Memory, Residence, choose_residence, smallest_budget
from lopt_lite.residency.memory_model import Job
from lopt_lite.residency.shapes import ModelShapes
from lopt_lite.training.block_plan import Block


def check_unquantised(model: ModelDescription, blocks: Sequence[Block]) -> None:
    """Refuse a model whose unquantised layers are nowhere, if blocks are to match them.

    Raises
    ------
    SettingsError
        Its weights have 4 bits already.
    """
    if not matching_ranges(blocks) or not isinstance(model, ModelFiles):
        return
    if any(name.endswith(STATE_SUFFIX) for name in model.weights.names()):
        raise SettingsError(
            f"--objective match needs unquantised layers, and the weights of {model.origin} have 4 bits already",
            fix="name the model that they were made from, or choose another objective",
        )


def matching_ranges(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """(first layer, end layer) of each block that is to match its unquantised layers."""
    return [(block.first, block.end) for block in blocks if block.objective == "match"]


@dataclass(frozen=True)
class Demand:
    """What has to fit: training, and making targets where blocks are to match their unquantised layers.

    Attributes
    ----------
    stages, job:
        Of training: (first layer, end layer) of what is trained at the same time, and the largest step.
    """

    shapes: ModelShapes
    blocks: Sequence[Block]
    stages: Sequence[tuple[int, int]]
    job: Job
    train_examples: int
    device: torch.device
    memory: Memory

    def residences(self) -> tuple[Residence, Residence | None]:
        """Where layers are while they are trained, and unquantised ones while targets are made of them, if any are.

        Raises
        ------
        DoesNotFitError
            The budget is too small; the message names the smallest that would do for both.
        """
        where = {"device": self.device, "memory": self.memory}
        try:
            training = choose_residence(self.shapes, self.stages, self.job, **where)
            return training, choose_residence(*self._matching, **where) if self._matching else None
        except DoesNotFitError as error:
            expected = f"at least --memory {self.smallest_budget() >> 20}MiB"
            raise DoesNotFitError(error.found, expected=expected, fix=error.fix) from error

    def smallest_budget(self) -> int:
        """The smallest budget for both, in bytes."""
        asked = [(self.shapes, self.stages, self.job)] + ([self._matching] if self._matching else [])
        return max(smallest_budget(*one, device=self.device, memory=self.memory) for one in asked)

    @property
    def _matching(self) -> tuple[ModelShapes, Sequence[tuple[int, int]], Job] | None:
        """Unquantised shapes, blocks and work of the pass that makes targets; None where none are to be made."""
        ranges = matching_ranges(self.blocks)
        if not ranges:
            return None
        return _unquantised(self.shapes), ranges, _job(self.shapes, self.train_examples, self.job.longest)


def _unquantised(shapes: ModelShapes) -> ModelShapes:
    """The same model in its compute dtype, nothing being trained."""
    layers = tuple(dataclasses.replace(layer, stored_bytes=layer.dense_bytes) for layer in shapes.layers)
    return dataclasses.replace(shapes, quantised=False, state_bytes_per_parameter=0, layers=layers)


def _job(shapes: ModelShapes, train_examples: int, longest: int) -> Job:
    """The pass that writes targets: no gradients, no LM head."""
    tokens = train_examples * longest
    row_bytes = shapes.hidden * shapes.itemsize
    return Job(step_tokens=0, longest=longest, answer_tokens=0, all_tokens=tokens, cache_bytes=tokens * row_bytes)
