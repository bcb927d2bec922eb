"""Where layers are while they are trained, unquantised ones while targets are made of them (``match``), and all of them
while the untouched model answers prompts (``--retain-answers``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lopt_lite.checkpoints.locate import ModelDescription, ModelFiles
from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX
from lopt_lite.errors import DoesNotFitError, SettingsError
from lopt_lite.residency.answer_places import place, smallest_place
from lopt_lite.residency.choices import Memory, Residence, choose_residence, smallest_budget
from lopt_lite.residency.memory_model import Job
from lopt_lite.residency.shapes import ModelShapes
from lopt_lite.training.block_plan import Block
from lopt_lite.training.own_prompts import ANSWERED_AT_ONCE


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
class Answering:
    """Where all layers are while the untouched model answers prompts, and how many at once."""

    residence: Residence
    rows: int


@dataclass(frozen=True)
class Residences:
    """What was chosen: ``matching`` and ``answering`` are None where there is nothing to match or to answer."""

    training: Residence
    matching: Residence | None
    answering: Answering | None

    @property
    def predicted_bytes(self) -> int:
        """Predicted peak of device memory (on the CPU: of the process) in the whole run."""
        return max(residence.predicted_bytes for residence in self._all)

    @property
    def predicted_host_bytes(self) -> int:
        """Predicted peak of the process in the whole run."""
        return max(residence.predicted_host_bytes for residence in self._all)

    @property
    def _all(self) -> list[Residence]:
        answering = None if self.answering is None else self.answering.residence
        return [residence for residence in (self.training, self.matching, answering) if residence is not None]


@dataclass(frozen=True)
class Demand:
    """What has to fit: training, making targets where blocks are to match their unquantised layers, and answering.

    Attributes
    ----------
    stages, job:
        Of training: (first layer, end layer) of what is trained at the same time, and the largest step.
    answered, longest_answered, answer_tokens:
        Prompts that the untouched model answers, the tokens of the longest of them with its answer, and those of an
        answer; 0 for none.
    """

    shapes: ModelShapes
    blocks: Sequence[Block]
    stages: Sequence[tuple[int, int]]
    job: Job
    train_examples: int
    answered: int
    longest_answered: int
    answer_tokens: int
    device: torch.device
    memory: Memory

    def residences(self) -> Residences:
        """Where layers are in each part of the run.

        Raises
        ------
        DoesNotFitError
            The budget is too small; the message names the smallest that would do for all.
        """
        where = {"device": self.device, "memory": self.memory}
        try:
            training = choose_residence(self.shapes, self.stages, self.job, **where)
            matching = choose_residence(*self._matching, **where) if self._matching else None
            found = Residences(training, matching, self._answering(training))
        except DoesNotFitError as error:
            expected = f"at least --memory {self.smallest_budget() >> 20}MiB"
            raise DoesNotFitError(error.found, expected=expected, fix=error.fix) from error
        return found

    def smallest_budget(self) -> int:
        """The smallest budget for all, in bytes."""
        asked = [(self.shapes, self.stages, self.job)] + ([self._matching] if self._matching else [])
        where = {"device": self.device, "memory": self.memory}
        of_answers = [smallest_place(_untuned(self.shapes), longest=self.longest_answered, **where)]
        return max([*(smallest_budget(*one, **where) for one in asked), *(of_answers if self.answered else [])])

    def _answering(self, training: Residence) -> Answering | None:
        """Within what training needs: answering takes a small part of a run's time, and should not decide its size."""
        if not self.answered:
            return None
        shapes, longest = _untuned(self.shapes), self.longest_answered
        needed = smallest_place(shapes, longest=longest, memory=self.memory, device=self.device)
        budget = min(max(needed, training.predicted_bytes), self.memory.limit_bytes)
        found = place(
            shapes,
            longest=longest,
            rows=min(ANSWERED_AT_ONCE, self.answered),
            memory=self.memory.with_budget(budget),
            device=self.device,
            fix="raise --memory, or leave --retain-answers out",
            prompt_at_once=longest - self.answer_tokens,
        )
        return Answering(*found)

    @property
    def _matching(self) -> tuple[ModelShapes, Sequence[tuple[int, int]], Job] | None:
        """Unquantised shapes, blocks and work of the pass that makes targets; None where none are to be made."""
        ranges = matching_ranges(self.blocks)
        if not ranges:
            return None
        return _unquantised(self.shapes), ranges, _job(self.shapes, self.train_examples, self.job.longest)


def _untuned(shapes: ModelShapes) -> ModelShapes:
    """The same model, nothing being trained."""
    return dataclasses.replace(shapes, state_bytes_per_parameter=0)


def _unquantised(shapes: ModelShapes) -> ModelShapes:
    """The same model in its compute dtype, nothing being trained."""
    layers = tuple(dataclasses.replace(layer, stored_bytes=layer.dense_bytes) for layer in shapes.layers)
    return dataclasses.replace(shapes, quantised=False, state_bytes_per_parameter=0, layers=layers)


def _job(shapes: ModelShapes, train_examples: int, longest: int) -> Job:
    """The pass that writes targets: no gradients, no LM head."""
    tokens = train_examples * longest
    row_bytes = shapes.hidden * shapes.itemsize
    return Job(step_tokens=0, longest=longest, measured_tokens=0, all_tokens=tokens, cache_bytes=tokens * row_bytes)
