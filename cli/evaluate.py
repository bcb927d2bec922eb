"""``lopt-lite evaluate``: held-out loss of the base and the tuned model."""

from __future__ import annotations

import lopt_lite
from lopt_lite.events import OnEvent
from lopt_lite.outcomes import EvaluateOutcome
from lopt_lite.settings import EvaluateSettings

from .command import Command
from .units import counted


def _evaluate(settings: EvaluateSettings, on_event: OnEvent) -> EvaluateOutcome:
    return lopt_lite.evaluate(settings, on_event=on_event)


def _render(outcome: EvaluateOutcome) -> str:
    return "\n".join(
        [
            f"{outcome.run} on {outcome.data}: "
            f"{counted(outcome.examples, 'example')}, {counted(outcome.answer_tokens, 'answer token')}",
            "       loss (nats per answer token)  perplexity",
            f"base   {outcome.base_loss:<28.4f}  {outcome.base_perplexity:.4g}",
            f"tuned  {outcome.tuned_loss:<28.4f}  {outcome.tuned_perplexity:.4g}",
        ]
    )


COMMAND = Command(
    name="evaluate",
    help="Measure loss and perplexity of the base model and of the tuned one on examples held out from training.",
    settings=EvaluateSettings,
    operation=_evaluate,
    render=_render,
)
