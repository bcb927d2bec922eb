"""Where everything will be: decided once per run and kept in its journal; a resumed run computes as it began."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lopt_lite.journal import Fact, Journal, last_fact
from lopt_lite.residency.choices import Memory, Residence
from lopt_lite.residency.process_size import steady_size
from lopt_lite.settings import TrainSettings
from lopt_lite.training.block_plan import Block, plan_stages
from lopt_lite.training.job import make_job
from lopt_lite.training.memory_choice import Demand
from lopt_lite.training.model_facts import ModelFacts

#: The journal's facts.
_TRAINING, _MATCHING = "residence", "matching-residence"


@dataclass(frozen=True)
class Decision:
    """What was decided, and what it follows from.

    ``matching_residence``: where unquantised layers are while targets are made of them; None where no block needs any.
    """

    residence: Residence
    matching_residence: Residence | None
    memory: Memory
    facts: ModelFacts

    @property
    def predicted_bytes(self) -> int:
        """Predicted peak of device memory (on the CPU: of the process) in the whole run."""
        found = (self.residence, self.matching_residence)
        return max(residence.predicted_bytes for residence in found if residence is not None)

    def note(self, journal: Journal, device: torch.device) -> None:
        """Write it down, unless it is there already."""
        if journal.last(_TRAINING, device=device.type) is not None:
            return
        # The one that every run has goes last: with it, the decision stands.
        for name, residence in ((_MATCHING, self.matching_residence), (_TRAINING, self.residence)):
            if residence is not None:
                journal.add(name, device=device.type, **residence.to_json())


def decide(
    known: Sequence[Fact],
    settings: TrainSettings,
    facts: ModelFacts,
    blocks: Sequence[Block],
    *,
    lengths: torch.Tensor,
    train_examples: int,
    other_examples: int,
    most_answers: int | None,
    most_anchors: int,
    device: torch.device,
) -> Decision:
    """What the journal says of this kind of device, or what fits now.

    Parameters
    ----------
    known:
        The journal's facts so far.
    lengths:
        int64 [examples], tokens of each example of any kind.
    train_examples, other_examples, most_answers, most_anchors:
        See :func:`make_job`.

    Raises
    ------
    DoesNotFitError
        The budget is too small; the message names the smallest that would do.
    """
    memory = Memory.now(device, settings.memory_bytes())
    if device.type == "cpu":
        memory = dataclasses.replace(memory, used_bytes=steady_size(memory.used_bytes))
    training, matching = (last_fact(known, name, device=device.type) for name in (_TRAINING, _MATCHING))
    if training is not None:
        of_matching = None if matching is None else Residence.from_json(matching)
        return Decision(Residence.from_json(training), of_matching, memory, facts)
    job = make_job(
        settings,
        facts.shapes,
        blocks,
        train_examples=train_examples,
        all_examples=len(lengths),
        other_examples=other_examples,
        longest=int(lengths.max()),
        all_tokens=int(lengths.sum()),
        most_answers=most_answers,
        most_anchors=most_anchors,
    )
    stages = [(stage.first, stage.end) for stage in plan_stages(blocks, settings.schedule)]
    chosen = Demand(
        shapes=facts.shapes,
        blocks=blocks,
        stages=stages,
        job=job,
        train_examples=train_examples,
        device=device,
        memory=memory,
    ).residences()
    return Decision(*chosen, memory, facts)
