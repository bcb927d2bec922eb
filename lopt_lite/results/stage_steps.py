"""The optimiser steps of a run, sorted into what was trained at the same time, and the curves that they make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lopt_lite.outcomes import BlockStatus

Line = dict[str, Any]

NATS = "nats per answer token"
SQUARED_ERROR = "mean squared error"
PHASES = {"head-fit": "head fit", "train": "training"}

#: Steps whose mean stands for the loss at an end of a phase (fewer where there are not twice as many).
_STEPS_AT_AN_END = 10
#: What may be no finite number in a step that is skipped.
_WATCHED = ("loss", "grad_norm", "reconstruction_loss", "retain_kl")


def number(line: Line, key: str) -> float:
    """A value of a line of metrics.jsonl as a float; not a number where it has none."""
    value = line.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def seconds_of(lines: Iterable[Line]) -> float:
    """Time spent in these steps."""
    return sum(number(m, "tokens") / number(m, "tokens_per_s") for m in lines if number(m, "tokens_per_s") > 0)


def tokens_of(lines: Iterable[Line]) -> int:
    """Tokens that these steps passed through the layers."""
    return int(sum(tokens for m in lines if math.isfinite(tokens := number(m, "tokens"))))


def is_finite(line: Line) -> bool:
    """Whether the step had a finite loss and gradient; one that had not was skipped."""
    # Not every step has each of the others.
    others = all(line.get(key) is None or math.isfinite(number(line, key)) for key in _WATCHED)
    return others and all(math.isfinite(number(line, key)) for key in ("loss", "grad_norm"))


@dataclass(frozen=True)
class Curve:
    """One thing measured in every step of a stage. ``values`` hold not-a-number where a step has none of it.

    Attributes
    ----------
    learns_task:
        Whether held-out losses can stand beside it.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    learns_task: bool = False


@dataclass(frozen=True)
class PhaseSteps:
    """Steps of one phase of a stage, in order; their ``loss`` is of ``unit``."""

    name: str
    unit: str
    lines: tuple[Line, ...]

    @property
    def steps(self) -> int:
        """How many steps the whole phase has."""
        return int(number(self.lines[-1], "steps")) if math.isfinite(number(self.lines[-1], "steps")) else 0

    @property
    def first_loss(self) -> float | None:
        """Mean of the first finite losses."""
        losses = self._finite_losses()
        return _mean(losses[: _at_an_end(losses)])

    @property
    def last_loss(self) -> float | None:
        """Mean of the last finite losses."""
        losses = self._finite_losses()
        return _mean(losses[-_at_an_end(losses) :])

    def _finite_losses(self) -> list[float]:
        return [loss for line in self.lines if math.isfinite(loss := number(line, "loss"))]


@dataclass(frozen=True)
class StageSteps:
    """Blocks that are trained together (one, unless the schedule is joint), and their steps so far."""

    index: int
    name: str
    blocks: tuple[BlockStatus, ...]
    phases: tuple[PhaseSteps, ...]

    @property
    def objective(self) -> str:
        """What the blocks learn, in a word."""
        return self.blocks[0].objective if len(self.blocks) == 1 else "joint"

    @cached_property
    def lines(self) -> list[Line]:
        """All steps, in order."""
        return [line for phase in self.phases for line in phase.lines]

    def phase(self, name: str) -> PhaseSteps | None:
        """The phase of that name, if it has begun."""
        return next((phase for phase in self.phases if phase.name == name), None)

    @cached_property
    def skipped(self) -> list[tuple[str, int]]:
        """(phase, step) of all steps without a finite loss or gradient, which change nothing."""
        return [
            (phase.name, int(step) if math.isfinite(step := number(line, "step")) else position)
            for phase in self.phases
            for position, line in enumerate(phase.lines, start=1)
            if not is_finite(line)
        ]

    def curves(self) -> list[Curve]:
        """What there is to draw: losses first, the learning rate last. All have one value per step of ``lines``."""
        learns_task = self.blocks[-1].objective == "task"

        def taken(key: str, *, from_train: bool, from_fit: bool) -> tuple[float, ...]:
            wanted = {"train": from_train, "head-fit": from_fit}
            values = ((wanted[phase.name], line) for phase in self.phases for line in phase.lines)
            return tuple(number(line, key) if is_wanted else math.nan for is_wanted, line in values)

        curves = []
        if learns_task:
            losses = taken("loss", from_train=True, from_fit=False)
            curves.append(Curve("task loss", NATS, losses, learns_task=True))
        # Fitting a head, the loss is the reconstruction's; so it is in training, unless the task is learnt as well.
        fit = taken("loss", from_train=not learns_task, from_fit=True)
        beside = taken("reconstruction_loss", from_train=learns_task, from_fit=False)
        both = tuple(b if math.isnan(a) else a for a, b in zip(fit, beside, strict=True))
        curves.append(Curve("reconstruction loss", SQUARED_ERROR, both))
        divergence = tuple(number(line, "retain_kl") for line in self.lines)
        curves.append(Curve("divergence from the untouched model", "nats per token", divergence))
        # That of fitting a head is many times as high, and would flatten the curve.
        curves.append(Curve("learning rate", "", taken("lr", from_train=True, from_fit=False)))
        return [c for c in curves if c.learns_task or any(map(math.isfinite, c.values))]


def stage_steps(blocks: Sequence[BlockStatus], metrics: Iterable[Line], *, schedule: str) -> list[StageSteps]:
    """Sort the lines of metrics.jsonl by stage and phase; lines of neither are left out."""
    together = schedule == "joint"
    groups = [tuple(blocks)] if together else [(block,) for block in blocks]
    lines = list(metrics)
    stages = []
    for index, group in enumerate(groups):
        mine = [line for line in lines if line.get("block") == index]
        name = f"all {len(blocks)} blocks" if len(group) > 1 else f"block {group[0].block + 1} of {len(blocks)}"
        phases = []
        for phase in PHASES:
            found = tuple(line for line in mine if line.get("phase") == phase)
            unit = NATS if phase == "train" and group[-1].objective == "task" else SQUARED_ERROR
            if found:
                phases.append(PhaseSteps(phase, unit, found))
        stages.append(StageSteps(index, name, group, tuple(phases)))
    return stages


def _at_an_end(losses: Sequence[float]) -> int:
    return min(_STEPS_AT_AN_END, max(1, len(losses) // 2))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
