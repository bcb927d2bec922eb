"""A training run on paper: everything that follows from a model, data, options and a machine in numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lopt_lite.data.batches import epoch_batches, micro_batches, shortest
from lopt_lite.data.estimate import DataEstimate
from lopt_lite.errors import DoesNotFitError
from lopt_lite.outcomes import PlanDisk
from lopt_lite.residency.choices import Memory, Residence
from lopt_lite.residency.machine import MachineSpeeds
from lopt_lite.residency.memory_model import Job
from lopt_lite.residency.timing import Amounts, RunTimes, TimeModel
from lopt_lite.settings import TrainSettings
from lopt_lite.step_counts import StepCounts
from lopt_lite.training.block_plan import Block, Stage, plan_blocks, plan_stages
from lopt_lite.training.disk_plan import disk_plan
from lopt_lite.training.job import answered_count, make_job, other_rows
from lopt_lite.training.memory_choice import Demand, Residences
from lopt_lite.training.micro_batch_size import group_cost_tokens
from lopt_lite.training.model_facts import ModelFacts, compute_dtype
from lopt_lite.training.own_prompts import ANSWERED_AT_ONCE, LONGEST_PROMPT
from lopt_lite.training.step_batches import LargestMicroBatch

#: Waiting for layers is worth a word from this share of a block's steps on.
_WORTH_A_WORD = 0.1


@dataclass(frozen=True)
class Places:
    """Run directory and store, and whether the store is complete already."""

    run: Path
    store: Path
    store_exists: bool


@dataclass(frozen=True)
class Draft:
    """Everything a plan follows from. Other settings make other drafts of the same model and data."""

    facts: ModelFacts
    settings: TrainSettings
    training: DataEstimate
    held_out: DataEstimate | None
    other: DataEstimate | None
    device: torch.device
    memory: Memory
    speeds: MachineSpeeds
    paths: Places
    source_bytes: int

    @property
    def blocks(self) -> list[Block]:
        """The blocks.

        Raises
        ------
        SettingsError
            There are more blocks than layers, or the last one leaves too few for the others.
        """
        layers = len(self.facts.shapes.layers)
        return plan_blocks(layers, self.settings.objectives(), self.settings.last_block_layers(layers))

    @property
    def stages(self) -> list[Stage]:
        """What is trained at the same time."""
        return plan_stages(self.blocks, self.settings.schedule)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(first layer, end layer) of each stage."""
        return [(stage.first, stage.end) for stage in self.stages]

    @property
    def job(self) -> Job:
        """The largest step."""
        everything = self._everything
        return make_job(
            self.settings,
            self.facts.shapes,
            self.blocks,
            train_examples=self.training.examples,
            all_examples=sum(part.examples for part in everything),
            other_examples=0 if self.other is None else self.other.examples,
            longest=max(part.longest for part in everything),
            all_tokens=self.cached_tokens,
            shortest=self._shortest,
            most_answers=None,
            held_out_answers=0 if self.held_out is None else None,
            most_anchors=self._most_anchors,
            largest_micro_batch=self._largest_micro_batch,
        )

    @property
    def _largest_micro_batch(self) -> LargestMicroBatch | None:
        """None where the data is only known by a sample."""
        if not self.training.is_exact:
            return None
        return LargestMicroBatch(self.settings, self.stages, self.training.lengths, self.device)

    def _shortest(self, most: int) -> tuple[int, ...]:
        """Tokens of so many of the shortest examples, from short to long."""
        return shortest([length for part in self._everything for length in part.shortest(most)], most)

    @property
    def _everything(self) -> list[DataEstimate]:
        return [part for part in (self.training, self.held_out, self.other) if part is not None]

    @property
    def step_counts(self) -> StepCounts:
        """Optimiser steps of each block."""
        return self.settings.step_counts(self.training.examples)

    @property
    def step_tokens(self) -> int:
        """Real tokens of an average optimiser step."""
        return round(self.training.tokens / self.step_counts.per_epoch)

    @property
    def mean_length(self) -> float:
        """Tokens of an average example."""
        return self.training.tokens / self.training.examples

    @property
    def cached_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(part.tokens for part in self._everything)

    def with_settings(self, **changes: Any) -> Draft:
        """The same with other values of some options, and with an anchor if it has one, which others may turn off."""
        # What it costs does not depend on its weight.
        turned_off = self.settings.retain is None and not changes.keys().isdisjoint(("blocks", "schedule"))
        retain = 1.0 if turned_off else self.settings.retain
        return replace(self, settings=dataclasses.replace(self.settings, **{"retain": retain, **changes}))

    def with_budget(self, budget_bytes: int) -> Draft:
        """The same with another budget."""
        return replace(self, memory=replace(self.memory, budget_bytes=budget_bytes))

    def residences(self) -> Residences:
        """See :meth:`Demand.residences`."""
        return self._demand.residences()

    def smallest_budget(self) -> int:
        """See :meth:`Demand.smallest_budget`."""
        return self._demand.smallest_budget()

    @property
    def _demand(self) -> Demand:
        return Demand(
            shapes=self.facts.shapes,
            blocks=self.blocks,
            stages=self.ranges,
            job=self.job,
            train_examples=self.training.examples,
            answered=self._answered,
            longest_answered=min(LONGEST_PROMPT, self.training.longest) + self.settings.retain_answers,
            answer_tokens=self.settings.retain_answers,
            device=self.device,
            memory=self.memory,
        )

    def disk(self, residence: Residence) -> PlanDisk:
        """Disk space needed."""
        return disk_plan(
            self.facts,
            self.settings,
            residence,
            self.blocks,
            self.job,
            cached_tokens=self.cached_tokens,
            anchored_tokens=self._all_anchored_tokens,
            run=self.paths.run,
            store=self.paths.store,
            store_exists=self.paths.store_exists,
        )

    def time_model(self, residence: Residence) -> TimeModel:
        """Seconds of parts of the run."""
        return TimeModel(
            self.facts.shapes,
            self.facts.active_parameters,
            residence,
            self.speeds,
            dtype=compute_dtype(self.settings),
            device=self.device,
            host_free_bytes=self.memory.free_host_bytes,
            together=self.settings.schedule == "joint",
        )

    def times(self, residence: Residence) -> RunTimes:
        """Seconds of the whole run."""
        model, held_out = self.time_model(residence), self.held_out
        store_bytes = self.facts.shapes.stored_bytes(0, len(self.facts.shapes.layers)) + self.facts.around_bytes
        store_s = 0.0
        if not self.paths.store_exists:
            store_s = model.store_s(self.source_bytes, store_bytes, torch.get_num_threads())
        amounts = Amounts(
            tokens=self.training.tokens,
            answer_tokens=self.training.answer_tokens,
            held_out_tokens=0 if held_out is None else held_out.tokens,
            held_out_answer_tokens=0 if held_out is None else held_out.answer_tokens,
            padding=_padding(self.training.lengths, self.settings.batch_size, self.device),
            steps_per_epoch=self.step_counts.per_epoch,
            mean_length=self.mean_length,
            epochs=self.step_counts.passes,
            head_fit_epochs=self.settings.head_fit_epochs,
            other_tokens=self._other_tokens_per_epoch,
            anchored_tokens=self._anchored_tokens,
            anchored_prompts=self._anchored_examples > 0,
            answers=self._answer_passes,
        )
        return model.run_times(
            [(block.first, block.end) for block in self.blocks],
            [block.objective for block in self.blocks],
            amounts,
            store_s=store_s,
            together=self.settings.schedule == "joint",
        )

    @property
    def _other_tokens_per_epoch(self) -> int:
        """Tokens of examples that are only there to anchor on, as they pass through the last block in one epoch."""
        if self.other is None:
            return 0
        rows = other_rows(self.settings.batch_size, self.other.examples) * self.step_counts.per_epoch
        return round(rows * self.other.tokens / self.other.examples)

    @property
    def _most_anchors(self) -> int:
        """Anchored tokens of one example, at most."""
        settings = self.settings
        if not settings.anchored:
            return 0
        if not settings.retain_answers:
            return settings.retain_tokens
        of_other_text = 0 if settings.retain_data is None else settings.retain_tokens
        return max(settings.retain_answers, of_other_text)

    @property
    def _answer_passes(self) -> tuple[int, int]:
        """Passes in which the untouched model writes its answers, and how many of them at once."""
        prompts = self._answered
        return -(-prompts // ANSWERED_AT_ONCE) * self.settings.retain_answers, min(prompts, ANSWERED_AT_ONCE)

    @property
    def _answered(self) -> int:
        """Prompts that the untouched model answers."""
        return answered_count(self.settings, self.training.examples)

    @property
    def _anchored_examples(self) -> int:
        """Training examples whose prompts are anchored."""
        return 0 if self.settings.retain_answers else self.training.examples

    @property
    def _all_anchored_tokens(self) -> int:
        """Anchored tokens of all examples, at most: no example has more of them than tokens."""
        found = min(self._most_anchors * self._anchored_examples, self.training.tokens)
        return found + (0 if self.other is None else min(self._most_anchors * self.other.examples, self.other.tokens))

    @property
    def _anchored_tokens(self) -> int:
        """Anchored tokens of one epoch: at most so many, as most prompts are longer than what is sampled of them."""
        found = min(self._most_anchors * self._anchored_examples, self.training.tokens)
        if self.other is None:
            return found
        rows = other_rows(self.settings.batch_size, self.other.examples) * self.step_counts.per_epoch
        return found + min(self._most_anchors * rows, self._other_tokens_per_epoch)

    def hiding_tokens(self, residence: Residence) -> int | None:
        """Tokens of a step from which on loading hides behind computing; None where nothing is streamed."""
        if residence.resident_layers == residence.layers:
            return None
        layers = range(len(self.facts.shapes.layers))
        largest = max(layers, key=lambda i: self.facts.shapes.layers[i].stored_bytes)
        return self.time_model(residence).hiding_tokens(largest, self.mean_length)

    def advice(self, residence: Residence) -> tuple[str, ...]:
        """Sentences for the user on what limits the run."""
        wanted = self.hiding_tokens(residence)
        waiting = max((block.waiting_share for block in self.times(residence).blocks), default=0.0)
        if wanted is None or waiting < _WORTH_A_WORD:
            return ()
        said = (
            f"Loading layers will be the limit: about {waiting:.0%} of the steps' time is spent waiting for them. "
            f"A step has about {self.step_tokens:,} tokens, and about {wanted:,} would hide the loading."
        )
        batch_size = math.ceil(wanted / self.mean_length)
        if batch_size > self.training.examples:
            return (f"{said} The data has only {self.training.tokens:,}, so no --batch-size can keep the device busy.",)
        try:
            self.with_settings(batch_size=batch_size).residences()
        except DoesNotFitError:
            return (f"{said} That many (--batch-size {batch_size}) do not fit this budget.",)
        return (f"{said} --batch-size {batch_size} would keep the device busy (and take fewer, larger steps).",)

    def whole_model_advice(self, residence: Residence) -> tuple[str, ...]:
        """A sentence where the whole model can stay on the device as its blocks do: cutting it then has little use."""
        settings = self.settings
        if settings.blocks == 1 or settings.tune != "lora" or settings.schedule != "sequential":
            return ()
        try:
            whole = self.with_settings(blocks=1, objective="none", last_layers=None).residences().training
        except DoesNotFitError:
            return ()
        if whole.resident_layers < whole.layers or whole.recompute or whole.mode != residence.mode:
            return ()
        return (
            "All layers fit this budget at once: --blocks 1 trains them together, which learns some tasks better in "
            "the same time (with an anchor, --retain, it keeps what the model knew); see docs/recipe.md.",
        )


def known_numbers(lengths: torch.Tensor, target_counts: torch.Tensor) -> DataEstimate:
    """Examples that are tokenised: int64 [examples], tokens and tokens to be predicted of each."""
    return DataEstimate(
        examples=len(lengths),
        tokens=int(lengths.sum()),
        answer_tokens=int(target_counts.sum()),
        longest=int(lengths.max()),
        lengths=tuple(lengths[torch.linspace(0, len(lengths) - 1, min(len(lengths), 1024)).long()].tolist()),
        how="counted",
    )


def _padding(lengths: tuple[int, ...], batch_size: int, device: torch.device) -> float:
    """Padded tokens for each real one, in the micro-batches of an epoch where memory suffices."""
    cost, enough = group_cost_tokens(device), batch_size * max(lengths)
    groups = [
        group
        for batch in epoch_batches(lengths, batch_size=batch_size, seed=(0,))
        for group in micro_batches(batch, lengths, max_tokens=enough, cost_tokens=cost)
    ]
    return sum(len(group) * lengths[group[0]] for group in groups) / sum(lengths)
