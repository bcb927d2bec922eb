"""``lopt-lite status``: what a run has done, and what is next."""

from __future__ import annotations

from dataclasses import dataclass

import lopt_lite
from lopt_lite.events import OnEvent
from lopt_lite.option_fields import argument
from lopt_lite.outcomes import BlockStatus, StatusOutcome

from .command import Command
from .units import duration_text, loss_text


@dataclass(frozen=True, kw_only=True)
class StatusSettings:
    """Everything ``lopt-lite status`` can be told."""

    run: str = argument("Run directory.")


def _status(settings: StatusSettings, on_event: OnEvent) -> StatusOutcome:
    return lopt_lite.status(settings.run)


def _render(outcome: StatusOutcome) -> str:
    process = f" (process {outcome.pid})" if outcome.pid is not None else ""
    lines = [
        f"run    {outcome.run}: {outcome.state}{process}",
        f"model  {outcome.model}",
        f"data   {outcome.data}",
        f"store  {'done' if outcome.store_done else 'not done yet'}",
    ]
    lines += [_block_line(block, len(outcome.blocks)) for block in outcome.blocks]
    if outcome.last_loss is not None:
        lines.append(f"last training loss  {loss_text(outcome.last_loss)}")
    if outcome.loss_before is not None:
        lines.append(f"held-out loss before  {loss_text(outcome.loss_before)} nats per answer token")
    if outcome.loss_after is not None:
        lines.append(f"held-out loss after   {loss_text(outcome.loss_after)} nats per answer token")
    if outcome.next:
        lines.append(f"next   {outcome.next}")
    if outcome.seconds_left is not None and outcome.state != "done":
        lines.append(f"left   about {duration_text(outcome.seconds_left)}")
    return "\n".join(lines)


def _block_line(block: BlockStatus, blocks: int) -> str:
    steps = f", step {block.step}/{block.steps}" if block.state == "training" else ""
    return f"block  {block.block + 1} of {blocks}, {block.objective}: {block.state}{steps}"


COMMAND = Command(
    name="status",
    help="Show what a run has done, what is next and how long it will take. Works while it trains.",
    settings=StatusSettings,
    operation=_status,
    render=_render,
)
