"""What a run directory says of itself. Reads only, takes no lock, loads no model: safe while the run trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lopt_lite.errors import SettingsError
from lopt_lite.journal import Fact, last_fact, read_facts
from lopt_lite.locks import holder_pid
from lopt_lite.outcomes import BlockStatus, StatusOutcome
from lopt_lite.step_counts import StepCounts, step_counts
from lopt_lite.training.block_plan import plan_blocks
from lopt_lite.training.metrics import read_metrics
from lopt_lite.training.run_directory import RESULT_FACTS, RunPaths, read_settings

_RECENT_STEPS = 20


def recorded_examples(facts: list[Fact]) -> int | None:
    """Training examples of a run, None before the data were read."""
    started = last_fact(facts, "started")
    return None if started is None else started.get("examples")


def recorded_step_counts(settings: dict[str, Any], facts: list[Fact]) -> StepCounts:
    """Optimiser steps of each block of a run, given what settings.json says; none before the data were read."""
    names = ("batch_size", "epochs", "head_fit_epochs")
    # Runs of the first versions could not be told how many.
    max_steps = settings.get("max_steps")
    return step_counts(recorded_examples(facts) or 0, max_steps=max_steps, **{name: settings[name] for name in names})


@dataclass(frozen=True)
class _Stage:
    """Blocks that are trained together (``first`` to ``end``, exclusive; one, unless the schedule is joint)."""

    index: int
    first: int
    end: int
    objective: str
    done: bool
    fit_steps: int
    train_steps: int
    fit_done: int
    train_done: int

    @property
    def left(self) -> dict[str, int]:
        """Steps still to do, by phase."""
        if self.done:
            return {}
        return {"head-fit": self.fit_steps - self.fit_done, "train": self.train_steps - self.train_done}


def status(run: str | Path) -> StatusOutcome:
    """What is done, what is next, and about how long is left (``lopt-lite status``).

    Raises
    ------
    RunDirectoryError
        The directory is no run.
    """
    paths = RunPaths(Path(run))
    content = read_settings(paths)
    facts, _ = read_facts(paths.journal)
    metrics = read_metrics(paths.metrics)
    pid = holder_pid(paths.root)
    finished = any(last_fact(facts, name) is not None for name in RESULT_FACTS)
    settings = content["settings"]
    stages = _stages(settings, facts, metrics)
    blocks = _blocks(settings, stages)
    counts = recorded_step_counts(settings, facts)
    left = _seconds_left(stages, _Paces(content, stages, facts, metrics), facts, steps_per_epoch=counts.per_epoch)
    result = "model" if settings.get("tune") == "full" else "adapter"
    before = last_fact(facts, "validation", epoch=0)
    after = last_fact(facts, "validation", epoch=counts.epochs) if counts.epochs else None
    losses = [m["loss"] for m in metrics if m.get("phase") == "train"]
    return StatusOutcome(
        run=str(run),
        state="done" if finished else "running" if pid is not None else "stopped",
        pid=pid,
        model=str(content["model"]["given"]),
        data=str(content["data"]["given"]),
        store_done=last_fact(facts, "store-ready") is not None,
        blocks=tuple(blocks),
        next="nothing, the run is done" if finished else _next(stages, len(blocks), facts, result),
        last_loss=losses[-1] if losses else None,
        loss_before=before["loss"] if before else None,
        loss_after=after["loss"] if after else None,
        seconds_left=0.0 if finished else left,
    )


def _objectives(settings: dict[str, Any]) -> list[str]:
    """Of each block."""
    early = [name.strip() for name in str(settings["objective"]).split(",")]
    count = int(settings["blocks"])
    return [*(early * (count - 1) if len(early) == 1 else early)[: count - 1], "task"]


def _stages(settings: dict[str, Any], facts: list[Fact], metrics: list[dict[str, Any]]) -> list[_Stage]:
    objectives = _objectives(settings)
    joint = settings.get("schedule") == "joint"
    ranges = [(0, len(objectives))] if joint else [(index, index + 1) for index in range(len(objectives))]
    counts = recorded_step_counts(settings, facts)
    stages = []
    for index, (first, end) in enumerate(ranges):
        mine = objectives[first:end]
        done_steps = {m["phase"]: int(m["step"]) for m in metrics if m.get("block") == index}
        fit_steps = counts.head_fit if "reconstruct" in mine else 0
        stages.append(
            _Stage(
                index=index,
                first=first,
                end=end,
                objective="joint" if joint and len(mine) > 1 else mine[0],
                done=last_fact(facts, "block", block=end - 1) is not None,
                fit_steps=fit_steps,
                train_steps=0 if set(mine) == {"none"} else counts.train,
                fit_done=fit_steps if "train" in done_steps else done_steps.get("head-fit", 0),
                train_done=done_steps.get("train", 0),
            )
        )
    return stages


def _blocks(settings: dict[str, Any], stages: list[_Stage]) -> list[BlockStatus]:
    objectives = _objectives(settings)
    blocks = []
    for stage in stages:
        step = stage.fit_done + stage.train_done
        state = "done" if stage.done else "training" if step else "waiting"
        for index in range(stage.first, stage.end):
            steps = stage.fit_steps + stage.train_steps
            blocks.append(BlockStatus(block=index, objective=objectives[index], state=state, step=step, steps=steps))
    return blocks


def _next(stages: list[_Stage], blocks: int, facts: list[Fact], result: str) -> str:
    if last_fact(facts, "store-ready") is None:
        return "prepare the weights"
    for stage in stages:
        name = f"block {stage.end} of {blocks}" if stage.end - stage.first == 1 else f"all {blocks} blocks together"
        if not stage.done:
            step = f"step {stage.fit_done + stage.train_done} of {stage.fit_steps + stage.train_steps}"
            return f"train {name} ({stage.objective}), {step}"
        if stage.end < blocks and last_fact(facts, "cache", block=stage.end) is None:
            return f"cache the outputs of {name}"
    return f"write the {result}"


class _Paces:
    """Seconds of a step, by what is trained and in which phase: a step that fits a head is a forward pass only."""

    def __init__(
        self, content: dict[str, Any], stages: list[_Stage], facts: list[Fact], metrics: list[dict[str, Any]]
    ) -> None:
        settings = content["settings"]
        self._objectives = {stage.index: stage.objective for stage in stages}
        self._layers = _layer_counts(content, stages)
        timed = (m for m in metrics if m.get("tokens") and m.get("tokens_per_s"))
        self._metrics = [m for m in timed if m["block"] in self._objectives]
        # Through the layers: forward; back for the inputs' gradients, and for those of weights that are trained
        # themselves; forward again where activations were not kept.
        residence = last_fact(facts, "residence")
        again = 1 if residence is not None and residence.get("recompute") else 0
        self._passes = {"head-fit": 1, "train": (3 if settings.get("tune") == "full" else 2) + again}

    def seconds(self, stage: _Stage, phase: str) -> float | None:
        """Of one step: as it is now; or else as it was in the newest stage that is most alike; None before any step.

        A step of one stage says how long a step of another takes, in proportion to their layers.
        """
        other = "train" if phase == "head-fit" else "head-fit"
        per_layer = (
            self._per_layer(phase, lambda index: index == stage.index)
            or self._per_layer(phase, lambda index: self._objectives[index] == stage.objective)
            or self._per_layer(phase, lambda index: True)
            or self._converted(other, phase)
        )
        return None if per_layer is None else per_layer * self._layers[stage.index]

    def forward_seconds(self, stage: _Stage) -> float | None:
        """Of a pass of one step's examples through the blocks of ``stage``."""
        per_layer = self._per_layer("head-fit", lambda index: True) or self._converted("train", "head-fit")
        return None if per_layer is None else per_layer * self._layers[stage.index]

    def _converted(self, seen: str, phase: str) -> float | None:
        seconds = self._per_layer(seen, lambda index: True)
        return None if seconds is None else seconds * self._passes[phase] / self._passes[seen]

    def _per_layer(self, phase: str, is_meant: Callable[[int], bool]) -> float | None:
        """Seconds of a step over the layers it passes: a mean of the newest steps of the newest stage that is meant."""
        found = [m for m in self._metrics if m["phase"] == phase and is_meant(m["block"])]
        newest = [m for m in found if m["block"] == found[-1]["block"]][-_RECENT_STEPS:]
        if not newest:
            return None
        return sum(m["tokens"] / m["tokens_per_s"] for m in newest) / len(newest) / self._layers[newest[-1]["block"]]


def _layer_counts(content: dict[str, Any], stages: list[_Stage]) -> dict[int, int]:
    """Layers of each stage by its index; 1 for all in a run of a version that did not write down how many there are."""
    settings = content["settings"]
    try:
        blocks = plan_blocks(content["model"]["layers"], tuple(_objectives(settings)), settings.get("last_layers"))
    except (KeyError, TypeError, SettingsError):
        return {stage.index: 1 for stage in stages}
    return {stage.index: sum(b.end - b.first for b in blocks[stage.first : stage.end]) for stage in stages}


def _seconds_left(stages: list[_Stage], paces: _Paces, facts: list[Fact], *, steps_per_epoch: int) -> float | None:
    """Of the steps still to do and the caches still to write, each at its own pace; None before the first step."""
    parts = [(count, paces.seconds(stage, phase)) for stage in stages for phase, count in stage.left.items() if count]
    for before, stage in pairwise(stages):
        if last_fact(facts, "cache", block=stage.index) is None:
            parts.append((steps_per_epoch, paces.forward_seconds(before)))
    if any(seconds is None for _, seconds in parts):
        return None
    return sum(count * seconds for count, seconds in parts if seconds is not None)
