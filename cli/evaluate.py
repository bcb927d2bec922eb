"""``lopt-lite evaluate``: held-out loss and task scores of the base and the tuned model."""

from __future__ import annotations

import lopt_lite
from lopt_lite.events import OnEvent
from lopt_lite.outcomes import EvaluateOutcome
from lopt_lite.settings import EvaluateSettings

from .command import Command
from .text import one_line
from .units import bytes_text, counted


def _evaluate(settings: EvaluateSettings, on_event: OnEvent) -> EvaluateOutcome:
    return lopt_lite.evaluate(settings, on_event=on_event)


def _render(outcome: EvaluateOutcome) -> str:
    lines = [*_losses(outcome), *_tasks(outcome)]
    if outcome.device_peak_bytes:
        lines.append(f"peak memory {bytes_text(outcome.device_peak_bytes)}")
    return "\n".join(lines)


def _losses(outcome: EvaluateOutcome) -> list[str]:
    if outcome.base_loss is None or outcome.tuned_loss is None:
        return []
    examples, tokens = outcome.examples or 0, outcome.answer_tokens or 0
    return [
        f"{outcome.run} on {outcome.data}: {counted(examples, 'example')}, {counted(tokens, 'answer token')}",
        "       loss (nats per answer token)  perplexity",
        f"base   {outcome.base_loss:<28.4f}  {outcome.base_perplexity:.4g}",
        f"tuned  {outcome.tuned_loss:<28.4f}  {outcome.tuned_perplexity:.4g}",
    ]


def _tasks(outcome: EvaluateOutcome) -> list[str]:
    """A table of the tasks; those within a group are only in the JSON document."""
    shown = [score for score in outcome.tasks if score.group is None]
    if not shown:
        return []
    table = [("task", "metric", "examples", "base", "tuned")]
    for score in shown:
        metric = score.metric if score.filter is None else f"{score.metric} ({score.filter})"
        base, tuned = _score(score.base, score.base_stderr), _score(score.tuned, score.tuned_stderr)
        table.append((one_line(score.task), one_line(metric), f"{score.examples:,}", base, tuned))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _score(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


COMMAND = Command(
    name="evaluate",
    help="Compare the base model and the tuned one: loss and perplexity on examples held out from training, and, with "
    "--tasks, their scores on tasks of lm-eval.",
    settings=EvaluateSettings,
    operation=_evaluate,
    render=_render,
)
