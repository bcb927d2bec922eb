"""What someone who was asleep should be told first: what went wrong in a run, or might mislead."""

from __future__ import annotations

from itertools import takewhile

from lopt_lite.results.run_record import RunRecord
from lopt_lite.results.stage_steps import PHASES, StageSteps, is_finite
from lopt_lite.units import bytes_text, counted, loss_text

_STEPS_NAMED = 8


def notices(record: RunRecord) -> tuple[str, ...]:
    """One sentence each, the gravest first."""
    return (*_result(record), *_not_finite(record), *_memory(record), *_held_out(record), *_cache(record))


def _result(record: RunRecord) -> list[str]:
    if record.status.state == "done" and not record.result.is_dir():
        return [f"The run is done, but its result, {record.result.absolute()}, is gone."]
    return []


def _not_finite(record: RunRecord) -> list[str]:
    said = []
    for stage in record.stages:
        said += [_skipped(stage, phase) for phase in PHASES if any(name == phase for name, _ in stage.skipped)]
    ending = sum(1 for _ in takewhile(lambda line: not is_finite(line), reversed(record.lines)))
    if ending and record.status.state == "stopped":
        steps = "The last step" if ending == 1 else f"The last {ending} steps"
        said.insert(
            0, f"{steps} had no finite loss or gradient: lower --lr (and --lr-early), and start anew with --fresh."
        )
    return said


def _skipped(stage: StageSteps, phase: str) -> str:
    steps = [step for name, step in stage.skipped if name == phase]
    named = ", ".join(map(str, steps[:_STEPS_NAMED])) + (", …" if len(steps) > _STEPS_NAMED else "")
    verb = "was" if len(steps) == 1 else "were"
    what = f"{counted(len(steps), 'step')} of {stage.name} ({PHASES[phase]}) {verb} skipped"
    return f"{what}: the loss or its gradient was not a finite number (step {named})."


def _memory(record: RunRecord) -> list[str]:
    peak, predicted = record.peak("device_peak_bytes"), record.predicted("predicted_bytes")
    budget = record.budget_bytes
    if peak is None:
        return []
    if budget is not None and peak > budget:
        return [f"Memory went above the budget of {bytes_text(budget)} by {bytes_text(peak - budget)}."]
    if predicted is None or peak <= predicted:
        return []
    said = f"Memory went above the prediction of {bytes_text(predicted)} by {bytes_text(peak - predicted)}"
    if budget is None and record.content["device"] == "cpu":
        return [f"{said}. Without a --memory budget, freed memory is kept for speed."]
    return [f"{said}."]


def _held_out(record: RunRecord) -> list[str]:
    losses = record.held_out
    last = max(losses, default=0)
    if not last:
        return []
    best = min(losses, key=lambda epoch: losses[epoch])
    if 0 in losses and losses[last] > losses[0]:
        ends = f"{loss_text(losses[0])} before, {loss_text(losses[last])} after epoch {last}"
        return [f"The held-out loss rose: {ends}. Fewer epochs or a lower --lr may help."]
    if best not in (0, last):
        said = f"The held-out loss was lowest after epoch {best} ({loss_text(losses[best])})"
        return [f"{said}, and the last one measured is {loss_text(losses[last])}: fewer epochs may be better."]
    return []


def _cache(record: RunRecord) -> list[str]:
    found = {
        int(f["block"]): float(f["relative_error"])
        for f in record.facts
        if f.get("relative_error") is not None and f["fact"] == "cache"
    }
    return [
        f"The 8-bit cache of block {block + 1} has a relative error of {100 * error:.2g} %."
        for block, error in sorted(found.items())
    ]
