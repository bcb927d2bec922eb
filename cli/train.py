"""``lopt-lite train``: train, or continue."""

from __future__ import annotations

import shlex

import lopt_lite
from lopt_lite.events import OnEvent
from lopt_lite.outcomes import TrainOutcome
from lopt_lite.settings import TrainSettings

from .command import Command
from .units import bytes_text, counted, duration_text, loss_text


def _train(settings: TrainSettings, on_event: OnEvent) -> TrainOutcome:
    return lopt_lite.train(settings, on_event=on_event)


def _render(outcome: TrainOutcome) -> str:
    begin = "everything is done already" if outcome.already_done else f"done in {duration_text(outcome.seconds)}"
    lines = [f"{begin}: {counted(outcome.examples, 'example')}, {counted(outcome.steps, 'step')}"]
    if outcome.loss_before is not None and outcome.loss_after is not None:
        before, after = loss_text(outcome.loss_before), loss_text(outcome.loss_after)
        lines.append(f"held-out loss  {before} before, {after} after (nats per answer token)")
    else:
        if outcome.final_train_loss is not None:
            lines.append(f"training loss  {loss_text(outcome.final_train_loss)} at the end (nats per answer token)")
        lines.append("held-out loss  not measured: give --validation FILE or --validation 0.05 to see it")
    if outcome.device_peak_bytes:
        predicted = f" ({bytes_text(outcome.predicted_bytes)} predicted)" if outcome.predicted_bytes else ""
        lines.append(f"peak memory    {bytes_text(outcome.device_peak_bytes)}{predicted}")
    if outcome.tuned_model is not None:
        lines.append(f"model          {outcome.tuned_model}")
    else:
        lines.append(f"adapter        {outcome.adapter}")
    lines.append(f'try it         lopt-lite generate {shlex.quote(outcome.run)} --prompt "..."')
    return "\n".join(lines)


COMMAND = Command(
    name="train",
    help=(
        "Train MODEL on DATA, or continue: the same command again goes on where an earlier one stopped. "
        "The result is a PEFT adapter in the run directory, or with --tune full a Hugging Face checkpoint."
    ),
    settings=TrainSettings,
    operation=_train,
    render=_render,
    json_events=True,
)
