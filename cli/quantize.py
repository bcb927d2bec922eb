"""``lopt-lite quantize``: make the 4-bit store alone."""

from __future__ import annotations

import lopt_lite
from lopt_lite.events import OnEvent
from lopt_lite.outcomes import QuantizeOutcome
from lopt_lite.settings import QuantizeSettings

from .command import Command
from .units import bytes_text, counted, duration_text


def _quantize(settings: QuantizeSettings, on_event: OnEvent) -> QuantizeOutcome:
    return lopt_lite.quantize(settings, on_event=on_event)


def _render(outcome: QuantizeOutcome) -> str:
    begin = "everything is done already" if outcome.already_done else f"done in {duration_text(outcome.seconds)}"
    lines = [
        f"{begin}: {counted(outcome.shards, 'shard')}",
        f"store        {outcome.store}",
        f"size         {bytes_text(outcome.store_bytes)}, from {bytes_text(outcome.source_bytes)}",
    ]
    if outcome.unquantized:
        lines.append(f"unquantised  {', '.join(outcome.unquantized)}")
    return "\n".join(lines)


COMMAND = Command(
    name="quantize",
    help=(
        "Make the store that training reads its frozen weights from. 'train' makes one by itself; this is for "
        "sharing one between runs. The same command again goes on where an earlier one stopped."
    ),
    settings=QuantizeSettings,
    operation=_quantize,
    render=_render,
)
