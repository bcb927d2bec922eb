"""What a run has written of itself, read once: no lock is taken and no model opened, so that it may be training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lopt_lite.errors import SettingsError
from lopt_lite.journal import Fact, last_fact, read_facts
from lopt_lite.outcomes import StatusOutcome
from lopt_lite.results.stage_steps import Line, StageSteps, number, stage_steps
from lopt_lite.results.status import recorded_examples, recorded_step_counts, status
from lopt_lite.step_counts import StepCounts
from lopt_lite.training.metrics import read_metrics
from lopt_lite.training.run_directory import RESIDENCE_FACTS, RunPaths, current_store, read_settings
from lopt_lite.units import parse_memory


@dataclass(frozen=True)
class RunRecord:
    """A run's settings, facts and steps, and what follows from them."""

    paths: RunPaths
    content: dict[str, Any]
    facts: list[Fact]
    status: StatusOutcome
    stages: list[StageSteps]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide the result."""
        return dict(self.content["settings"])

    @property
    def residence(self) -> Fact:
        """Where everything is while the run trains; empty before that is decided."""
        return last_fact(self.facts, "residence") or {"fact": "residence"}

    @property
    def examples(self) -> int | None:
        """Training examples, None before the data were read."""
        return recorded_examples(self.facts)

    @property
    def step_counts(self) -> StepCounts:
        """Optimiser steps of each block, none before the data were read."""
        return recorded_step_counts(self.settings, self.facts)

    @property
    def held_out(self) -> dict[int, float]:
        """Held-out losses by epoch; 0 is the untouched model."""
        return {int(f["epoch"]): float(f["loss"]) for f in self.facts if f["fact"] == "validation"}

    @cached_property
    def lines(self) -> list[Line]:
        """All steps, in order."""
        return [line for stage in self.stages for line in stage.lines]

    @property
    def store(self) -> Path:
        """Where the weights are."""
        return current_store(self.paths, self.content)

    @property
    def result(self) -> Path:
        """The adapter, or the model that was tuned in full."""
        return self.paths.model if self.settings.get("tune") == "full" else self.paths.adapter

    def peak(self, key: str) -> int | None:
        """The highest ``device_peak_bytes`` or ``host_rss_bytes`` known, None before the first step."""
        found = [int(v) for m in self.lines if math.isfinite(v := number(m, key))]
        if key == "device_peak_bytes":
            # What was done before, between and after the steps counts as well.
            found += [f["device_bytes"] for f in self.facts if f["fact"] == "peak"]
        return max(found, default=None)

    def predicted(self, key: str) -> int | None:
        """``predicted_bytes`` or ``predicted_host_bytes`` of the plan, the highest of all that is to be done."""
        found = [last_fact(self.facts, name) for name in RESIDENCE_FACTS]
        return max((int(fact[key]) for fact in found if fact is not None and fact.get(key)), default=None)

    @property
    def budget_bytes(self) -> int | None:
        """The budget that was named, None without one."""
        try:
            return parse_memory(str(self.settings.get("memory", "auto")))
        except SettingsError:
            return None


def read_run(run: str) -> RunRecord:
    """Read a run's files; no lock, no model.

    Raises
    ------
    RunDirectoryError
        The directory is no run.
    """
    paths = RunPaths(Path(run))
    content = read_settings(paths)
    found = status(run)
    facts, _ = read_facts(paths.journal)
    schedule = str(content["settings"].get("schedule"))
    stages = stage_steps(found.blocks, read_metrics(paths.metrics), schedule=schedule)
    return RunRecord(paths, content, facts, found, stages)
