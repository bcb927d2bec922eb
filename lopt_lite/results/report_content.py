"""What the report of a run says, as text: gathered from what the run has written of itself, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path

from lopt_lite import files
from lopt_lite.journal import last_fact
from lopt_lite.results.commands import Commands, changed_settings
from lopt_lite.results.report_notices import notices
from lopt_lite.results.run_record import RunRecord
from lopt_lite.results.stage_steps import PHASES, PhaseSteps, StageSteps, number, seconds_of, tokens_of
from lopt_lite.training.block_plan import plan_blocks
from lopt_lite.units import bytes_text, counted, duration_text, loss_text, residence_text

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class ReportContent:
    """The words of the page. Rows are tuples of cells; commands come with what they are for."""

    title: str
    state: str
    state_text: str
    cards: Rows
    notices: tuple[str, ...]
    phases: Rows
    held_out: Rows
    memory: Rows
    layers_place: str | None
    disk: Rows
    given: Rows
    settings: Rows
    commands: Rows
    python: str | None


def report_content(record: RunRecord) -> ReportContent:
    """Put into words what a run has done."""
    commands = Commands(record.paths, record.content, record.status)
    return ReportContent(
        title=record.paths.root.absolute().name,
        state=record.status.state,
        state_text=_state_text(record),
        cards=_cards(record),
        notices=notices(record),
        phases=_phases(record),
        held_out=_held_out(record.held_out),
        memory=_memory(record),
        layers_place=_layers_place(record),
        disk=_disk(record),
        given=_given(record),
        settings=changed_settings(record.content),
        commands=commands.rows(),
        python=commands.python(),
    )


def _state_text(record: RunRecord) -> str:
    found = record.status
    if found.state == "done":
        return "Done."
    process = f" (process {found.pid})" if found.pid is not None else ""
    left = "" if found.seconds_left is None else f"; about {duration_text(found.seconds_left)} left"
    state = "Training" if found.state == "running" else "Stopped"
    return f"{state}{process}. Next: {found.next}{left}."


def _cards(record: RunRecord) -> Rows:
    """(what, value, remark) of what matters most."""
    cards = [_held_out_card(record)]
    last = record.stages[-1].phase("train")
    if last is not None and last.first_loss is not None and last.last_loss is not None:
        ends = f"{loss_text(last.first_loss)} → {loss_text(last.last_loss)}"
        cards.append(("Training loss", ends, f"{last.unit}; means of the first and last steps"))
    lines = record.lines
    if lines:
        seconds = seconds_of(lines)
        left = record.status.seconds_left
        more = f"; about {duration_text(left)} left" if left is not None and record.status.state != "done" else ""
        cards.append(("Time", duration_text(seconds), f"in {counted(len(lines), 'optimiser step')}{more}"))
        pace = f"{tokens_of(lines) / seconds:,.0f} tokens/s" if seconds else ""
        cards.append(("Tokens", f"{tokens_of(lines):,}", f"through the layers in these steps; {pace}"))
    peak, predicted = record.peak("device_peak_bytes"), record.predicted("predicted_bytes")
    if peak is not None:
        remarks = [f"{bytes_text(predicted)} predicted"] if predicted else []
        remarks += [f"budget {bytes_text(record.budget_bytes)}"] if record.budget_bytes else []
        cards.append(("Peak memory", bytes_text(peak), ", ".join(remarks)))
    elif predicted:
        cards.append(("Peak memory", bytes_text(predicted), "predicted; nothing measured yet"))
    return cards


def _held_out_card(record: RunRecord) -> tuple[str, ...]:
    found = record.held_out
    last = max(found, default=0)
    if 0 in found and last:
        ends = f"{loss_text(found[0])} → {loss_text(found[last])}"
        perplexities = f"{_perplexity(found[0])} → {_perplexity(found[last])}"
        of_epochs = "" if last >= record.step_counts.epochs else f", after epoch {last}"
        return "Held-out loss", ends, f"nats per answer token{of_epochs}; perplexity {perplexities}"
    if 0 in found:
        return "Held-out loss", loss_text(found[0]), f"before training; perplexity {_perplexity(found[0])}"
    asked = (record.content.get("validation") or {}).get("given") is not None
    return "Held-out loss", "–", "not measured yet" if asked else "no held-out data: see --validation"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 700 else "inf"


def _phases(record: RunRecord) -> Rows:
    """(what, objective, layers, steps, losses, unit, time, tokens/s, state) of each phase of each stage."""
    layers = _layer_ranges(record)
    rows = []
    for stage in record.stages:
        objectives = _objectives(stage)
        first, end = stage.blocks[0].block, stage.blocks[-1].block
        which = f"{layers[first][0] + 1}–{layers[end][1]}" if layers else ""
        state = stage.blocks[0].state
        head = (stage.name, objectives, which)
        for phase in stage.phases:
            label = f"{stage.name}, {PHASES[phase.name]}" if len(stage.phases) > 1 else stage.name
            rows.append((label, *head[1:], *_phase_cells(phase), state))
        if not stage.phases:
            frozen = all(block.objective == "none" for block in stage.blocks)
            steps = "none: left as it is" if frozen else f"0 of {stage.blocks[0].steps:,}"
            rows.append((*head, steps, "", "", "", "", state))
    return rows


def _objectives(stage: StageSteps) -> str:
    """``reconstruct``, or of blocks that are trained together ``3 × reconstruct, task``."""
    runs = [(name, len(list(same))) for name, same in groupby(block.objective for block in stage.blocks)]
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in runs)


def _phase_cells(phase: PhaseSteps) -> tuple[str, ...]:
    seconds = seconds_of(phase.lines)
    first, last = phase.first_loss, phase.last_loss
    losses = "not finite" if first is None or last is None else f"{loss_text(first)} → {loss_text(last)}"
    pace = f"{tokens_of(phase.lines) / seconds:,.0f}" if seconds else ""
    return f"{len(phase.lines):,} of {phase.steps:,}", losses, phase.unit, duration_text(seconds), pace


def _layer_ranges(record: RunRecord) -> list[tuple[int, int]] | None:
    """First layer and the one after the last, of each block; None before the store tells how many there are."""
    objectives = tuple(block.objective for block in record.status.blocks)
    layers = sum(1 for _ in record.store.glob("layer-*.safetensors")) if record.status.store_done else 0
    if layers < len(objectives):
        return None
    last_layers = record.settings.get("last_layers")
    return [(block.first, block.end) for block in plan_blocks(layers, objectives, last_layers)]


def _held_out(losses: dict[int, float]) -> Rows:
    """(when, loss, perplexity, change) of each measurement."""
    rows: Rows = []
    for epoch, loss in sorted(losses.items()):
        when = "before training (untouched model)" if epoch == 0 else f"after epoch {epoch}"
        change = f"{loss - losses[0]:+.4f}" if epoch and 0 in losses else ""
        rows.append((when, loss_text(loss), _perplexity(loss), change))
    return rows


def _memory(record: RunRecord) -> Rows:
    """(what, budget, predicted, measured) of device and process, and what stays where."""

    def cells(peak: str, predicted: str) -> tuple[str, str]:
        found = record.predicted(predicted), record.peak(peak)
        return tuple("–" if value is None else bytes_text(value) for value in found)  # type: ignore[return-value]

    device = str(record.content["device"])
    budget = str(record.settings.get("memory", "auto"))
    named = "none named" if record.budget_bytes is None else budget
    what = "the process (device: cpu)" if device == "cpu" else f"device memory ({device})"
    rows: Rows = [(what, named, *cells("device_peak_bytes", "predicted_bytes"))]
    if device != "cpu":
        rows.append(("the process", "–", *cells("host_rss_bytes", "predicted_host_bytes")))
    return rows


def _layers_place(record: RunRecord) -> str | None:
    """A sentence on what stays in memory, None before that is decided."""
    found = record.residence
    known = {"dequantised", "resident", "recomputed", "partly streamed", "streamed"}
    if found.get("mode") not in known or not isinstance(found.get("layers"), int):
        return None
    return residence_text(str(found["mode"]), int(found.get("resident_layers", 0)), int(found["layers"]))


def _disk(record: RunRecord) -> Rows:
    """(what, where, size) of the parts of the run, as they are now."""
    paths = record.paths
    own_store = record.store == paths.store
    parts: Sequence[tuple[str, str, Iterable[Path]]] = (
        ("weights", "store/" if own_store else f"{record.store} (may be shared)", [record.store]),
        ("activations between blocks", "cache/", [paths.root / "cache"]),
        ("blocks and their checkpoints", "blocks/", [paths.root / "blocks"]),
        ("the result", f"{record.result.name}/", [record.result]),
    )
    rows, total_bytes = [], 0
    for what, where, places in parts:
        size = sum(files.directory_bytes(place) for place in places)
        total_bytes += size
        rows.append((what, where, bytes_text(size)))
    return [*rows, ("together", "", bytes_text(total_bytes))]


def _given(record: RunRecord) -> Rows:
    """(what, value) of what was run, and when."""
    content, settings = record.content, record.settings
    rows: Rows = [("model", str(content["model"].get("given"))), ("data", str(content["data"].get("given")))]
    for key, name in (("validation", "held-out data"), ("retain", "text to hold the model to")):
        value = (content.get(key) or {}).get("given")
        if value is not None:
            rows.append((name, str(value)))
    if record.examples is not None:
        per_step = f"{settings['batch_size']} per step, {counted(record.step_counts.per_epoch, 'step')} per epoch"
        rows.append(("training examples", f"{record.examples:,} ({per_step})"))
    what = "the weights themselves" if settings.get("tune") == "full" else "a LoRA adapter"
    count = counted(len(record.status.blocks), "block")
    rows.append(("trained", f"{what}, {count}, {settings.get('schedule', 'sequential')} schedule"))
    rows += [(what, text) for what, text in (("learning rate", _rate(record)), ("anchor", _anchor(record))) if text]
    times = [t for m in record.lines if math.isfinite(t := number(m, "time"))]
    if times:
        rows.append(("first step", _moment(min(times))))
        rows.append(("last step" if record.status.state == "done" else "newest step", _moment(max(times))))
    rows.append(("device", str(content["device"])))
    versions = content.get("versions") or {}
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


def _rate(record: RunRecord) -> str | None:
    """The peak learning rate of the last block; None where it is not known yet."""
    found_out, asked = last_fact(record.facts, "learning-rate"), record.settings.get("lr")
    rate = asked if found_out is None else found_out["lr"]
    return None if rate is None else f"{float(rate):g} at its peak"


def _anchor(record: RunRecord) -> str | None:
    """How much the run is held to the untouched model; None where it is not, or is not known to be yet."""
    found_out, asked = last_fact(record.facts, "anchor-weight"), record.settings.get("retain")
    if found_out is not None:
        loss = loss_text(float(found_out["loss"]))
        return f"weight {float(found_out['weight']):g}: answers cost the model {loss} nats a token before"
    return f"weight {float(asked):g}" if asked else None


def _moment(seconds: float) -> str:
    """A time of the clock, in the time zone of whoever reads it on this machine."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
