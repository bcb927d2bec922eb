"""What every part of a run works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lopt_lite import devices
from lopt_lite.checkpoints.locate import ModelFiles
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.data.dataset import TokenizedDataset
from lopt_lite.events import OnEvent
from lopt_lite.journal import Journal
from lopt_lite.residency.choices import Residence
from lopt_lite.settings import TrainSettings
from lopt_lite.step_counts import StepCounts
from lopt_lite.training.block_plan import Block, Stage, plan_stages
from lopt_lite.training.memory_choice import Answering
from lopt_lite.training.metrics import Metrics
from lopt_lite.training.run_directory import RunPaths
from lopt_lite.training.stopping import Stopper


@dataclass(frozen=True)
class Workbench:
    """The parts of one run that do not change while it works.

    ``dataset`` holds the training examples first (``train_count`` of them), then the held-out ones, then those that are
    only there to anchor on (``--retain-data``, ``--retain-answers``), of which no token is to be predicted.
    ``matching_residence`` says where unquantised layers are while a block's targets are made of them, ``answering``
    where all are while the untouched model answers prompts; None where nothing is to be matched or answered.
    ``peak`` is of the whole run, reading the data included.
    """

    settings: TrainSettings
    paths: RunPaths
    journal: Journal
    metrics: Metrics
    model: ModelFiles
    store: Store
    skeleton: Skeleton
    tokenizer: Any
    pad_token_id: int
    dataset: TokenizedDataset
    train_count: int
    held_out_count: int
    blocks: list[Block]
    device: torch.device
    residence: Residence
    matching_residence: Residence | None
    answering: Answering | None
    peak: devices.PeakMemory
    stop: Stopper
    on_event: OnEvent

    @property
    def stages(self) -> list[Stage]:
        """The order in which blocks are trained."""
        return plan_stages(self.blocks, self.settings.schedule)

    @property
    def step_counts(self) -> StepCounts:
        """Optimiser steps of each block."""
        return self.settings.step_counts(self.train_count)

    @property
    def held_out_range(self) -> range:
        """Which examples are held out."""
        return range(self.train_count, self.train_count + self.held_out_count)

    @property
    def other_range(self) -> range:
        """Which examples are only there to anchor on."""
        return range(self.train_count + self.held_out_count, len(self.dataset))

    def held_out(self) -> TokenizedDataset:
        """The held-out examples."""
        return self.dataset.select(list(self.held_out_range))

    def release_memory(self) -> None:
        """Between two parts of the run, if it has a budget to keep: see :func:`devices.release_everything`.

        Looking through all of a process's objects takes half a second, so it is not done without need.
        """
        if self.settings.memory_bytes() is not None:
            devices.release_everything(self.device)
