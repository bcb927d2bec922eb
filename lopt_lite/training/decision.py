"""Where everything will be: decided once per run and kept in its journal; a resumed run computes as it began."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lopt_lite.data.batches import shortest
from lopt_lite.journal import Fact, Journal, last_fact
from lopt_lite.residency.choices import Memory, Residence
from lopt_lite.residency.process_size import steady_size
from lopt_lite.settings import TrainSettings
from lopt_lite.training.block_plan import Block, check_something_learns, plan_stages
from lopt_lite.training.job import make_job
from lopt_lite.training.memory_choice import Answering, Demand, Residences
from lopt_lite.training.model_facts import ModelFacts
from lopt_lite.training.run_directory import RESIDENCE_FACTS
from lopt_lite.training.step_batches import LargestMicroBatch

_TRAINING, _MATCHING, _ANSWERING = RESIDENCE_FACTS


@dataclass(frozen=True)
class Decision:
    """What was decided, and what it follows from."""

    chosen: Residences
    memory: Memory
    facts: ModelFacts

    @property
    def residence(self) -> Residence:
        """Where layers are while they are trained."""
        return self.chosen.training

    def note(self, journal: Journal, device: torch.device) -> None:
        """Write it down, unless it is there already."""
        if journal.last(_TRAINING, device=device.type) is not None:
            return
        # The one that every run has goes last: with it, the decision stands.
        chosen = self.chosen
        if chosen.answering is not None:
            answering = chosen.answering
            journal.add(_ANSWERING, device=device.type, rows=answering.rows, **answering.residence.to_json())
        if chosen.matching is not None:
            journal.add(_MATCHING, device=device.type, **chosen.matching.to_json())
        journal.add(_TRAINING, device=device.type, **chosen.training.to_json())


def decide(
    known: Sequence[Fact],
    settings: TrainSettings,
    facts: ModelFacts,
    blocks: Sequence[Block],
    *,
    lengths: torch.Tensor,
    train_examples: int,
    other_examples: int,
    most_answers: int,
    held_out_answers: int,
    most_anchors: int,
    answered: int,
    longest_answered: int,
    device: torch.device,
    reached_bytes: int,
) -> Decision:
    """What the journal says of this kind of device, or what fits now.

    Parameters
    ----------
    known:
        The journal's facts so far.
    lengths:
        int64 [examples], tokens of each example of any kind; those of the training examples come first.
    train_examples, other_examples, most_answers, held_out_answers, most_anchors:
        See :func:`make_job`.
    answered, longest_answered, reached_bytes:
        See :class:`Demand`, and :class:`Memory`.

    Raises
    ------
    SettingsError
        There is nothing to train in a block that is to learn.
    DoesNotFitError
        The budget is too small; the message names the smallest that would do.
    """
    check_something_learns(blocks, [layer.trained_parameters for layer in facts.shapes.layers], settings.lora_targets)
    memory = Memory.now(device, settings.memory_bytes(), reached_bytes=reached_bytes)
    if device.type == "cpu":
        memory = dataclasses.replace(memory, used_bytes=steady_size(memory.used_bytes))
    training, matching, answering = (
        last_fact(known, name, device=device.type) for name in (_TRAINING, _MATCHING, _ANSWERING)
    )
    if training is not None:
        decided = Residences(
            Residence.from_json(training),
            None if matching is None else Residence.from_json(matching),
            None if answering is None else Answering(Residence.from_json(answering), int(answering["rows"])),
        )
        return Decision(decided, memory, facts)
    stages = plan_stages(blocks, settings.schedule)
    job = make_job(
        settings,
        facts.shapes,
        blocks,
        train_examples=train_examples,
        all_examples=len(lengths),
        other_examples=other_examples,
        longest=int(lengths.max()),
        all_tokens=int(lengths.sum()),
        shortest=partial(shortest, lengths),
        most_answers=most_answers,
        held_out_answers=held_out_answers,
        most_anchors=most_anchors,
        largest_micro_batch=LargestMicroBatch(settings, stages, lengths[:train_examples], device),
    )
    chosen = Demand(
        shapes=facts.shapes,
        blocks=blocks,
        stages=[(stage.first, stage.end) for stage in stages],
        job=job,
        train_examples=train_examples,
        answered=answered,
        longest_answered=longest_answered,
        answer_tokens=settings.retain_answers,
        device=device,
        memory=memory,
    ).residences()
    return Decision(chosen, memory, facts)
