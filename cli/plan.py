"""``lopt-lite plan``: what ``train`` would do, and what it would take."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator

import lopt_lite
from lopt_lite.events import OnEvent
from lopt_lite.outcomes import PlanAlternative, PlanBlock, PlanOutcome
from lopt_lite.settings import PlanSettings

from .command import Command
from .units import bytes_text, counted, duration_text, gib_text, residence_text


def _plan(settings: PlanSettings, on_event: OnEvent) -> PlanOutcome:
    with _no_garbage_collection():
        return lopt_lite.plan(settings, on_event=on_event)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Leave out the garbage collector's passes over the libraries, which take two fifths of a plan's time.

    It looks through all objects again and again while the libraries make hundreds of thousands of them and little
    garbage; and once more, of no use to anyone, when the process ends.
    """
    collects = gc.isenabled()
    gc.disable()
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _render(outcome: PlanOutcome) -> str:
    parts = [_what(outcome), _memory(outcome), _disk(outcome), _time(outcome)]
    if outcome.advice:
        parts.append(list(outcome.advice))
    parts.append(
        ["Alternatives (each with the other options as given)", *_table(outcome.alternatives, outcome.disk.free_bytes)]
    )
    parts.append(["To run it", f"  {outcome.command}"])
    return "\n\n".join("\n".join(lines) for lines in parts)


def _what(outcome: PlanOutcome) -> list[str]:
    weights = "" if outcome.weights_found else "; its weights are not here yet"
    held_out = f", {counted(outcome.held_out_examples, 'held-out example')}" if outcome.held_out_examples else ""
    in_all = f", {outcome.steps:,} in all for each block" if outcome.steps != outcome.steps_per_epoch else ""
    how = {"counted": "", "sampled": " (from a sample)", "from bytes": " (guessed from the file's size)"}
    return [
        f"{outcome.model}: {outcome.architecture}, {outcome.parameters / 1e9:.2f} billion parameters, "
        f"{counted(outcome.layers, 'layer')} in {counted(len(outcome.blocks), 'block')}, on {outcome.device}{weights}",
        f"{outcome.data}: {counted(outcome.examples, 'example')}{held_out}, about {counted(outcome.tokens, 'token')}, "
        f"{outcome.answer_tokens:,} of them answers{how[outcome.data_how]}; the longest has {outcome.longest_tokens:,}",
        f"Steps: {counted(outcome.batch_size, 'example')} (about {outcome.step_tokens:,} tokens) each, "
        f"{outcome.steps_per_epoch:,} for a pass over the data{in_all}",
    ]


def _memory(outcome: PlanOutcome) -> list[str]:
    memory = outcome.memory
    where = [
        f"{bytes_text(size)} {place}"
        for size, place in (
            (memory.boundary_device_bytes, "on the device" if outcome.device != "cpu" else "in memory"),
            (memory.boundary_host_bytes, "in host memory"),
            (memory.boundary_bytes - memory.boundary_device_bytes - memory.boundary_host_bytes, "in a scratch file"),
        )
        if size > 0
    ]
    lines = [
        "Memory",
        f"  layers           {residence_text(memory.mode, memory.resident_layers, memory.layers)}",
        f"  micro-batch      {memory.micro_batch_tokens:,} tokens go through a layer at once",
        f"  backward pass    {'runs each layer again' if memory.recompute else 'keeps all activations of a block'}",
    ]
    if where:
        lines.append(f"  between layers   activations, {', '.join(where)}")
    if memory.offload_state:
        lines.append("  adapters         put aside, with optimiser state, while their layer is not worked on")
    if memory.head_sliced:
        lines.append("  LM head          streamed in slices")
    if outcome.device == "cpu":
        lines.append(f"  predicted peak   {gib_text(memory.predicted_bytes)} of the process")
    else:
        lines.append(f"  predicted peak   {gib_text(memory.predicted_bytes)} on the device")
        lines.append(f"  host             {gib_text(memory.predicted_host_bytes)} of the process")
    lines.append(
        f"  budget           {gib_text(memory.budget_bytes)}; the smallest that works is "
        f"{gib_text(memory.smallest_budget_bytes)} (--memory {memory.smallest_budget_bytes >> 20}MiB)"
    )
    return lines


def _disk(outcome: PlanOutcome) -> list[str]:
    disk = outcome.disk
    there = " (there already)" if disk.store_exists else ""
    lines = ["Disk", f"  store            {bytes_text(disk.store_bytes)} in {disk.store}{there}"]
    for name, size, remark in (
        ("block inputs", disk.caches_bytes, " while it trains"),
        ("checkpoints", disk.checkpoints_bytes, " while it trains"),
        ("scratch", disk.scratch_bytes, " while it trains"),
        ("tuned layers" if disk.result == "model" else "block adapters", disk.blocks_bytes, ""),
        (disk.result, disk.result_bytes, ", put together from these at the end"),
    ):
        if size:
            lines.append(f"  {name:<17}{bytes_text(size)}{remark}")
    lines.append(
        f"  at most          {bytes_text(disk.total_bytes)} more at one time, {bytes_text(disk.free_bytes)} are free; "
        f"in {outcome.run}"
    )
    return lines


def _time(outcome: PlanOutcome) -> list[str]:
    lines = ["Time (an estimate from this machine's measured speeds)"]
    if outcome.store_s:
        lines.append(f"  store            {duration_text(outcome.store_s)}")
    if outcome.held_out_before_s:
        lines.append(f"  held-out loss    {duration_text(outcome.held_out_before_s)} before training")
    if outcome.anchor_s:
        lines.append(f"  anchor           {duration_text(outcome.anchor_s)} for what the untouched model says")
    lines += [_block_line(block) for block in outcome.blocks]
    lines.append(f"  total            {duration_text(outcome.total_s)}")
    return lines


def _block_line(block: PlanBlock) -> str:
    parts = [
        f"{name} {duration_text(seconds)}"
        for name, seconds in (
            ("loading", block.load_s),
            ("targets from unquantised layers", block.targets_s),
            ("fitting the head", block.head_fit_s),
            ("training", block.train_s),
            ("held-out loss", block.held_out_s),
            ("writing the next block's inputs", block.cache_s),
        )
        if seconds
    ]
    name = f"block {block.block + 1}"
    layers = f"layers {block.first_layer + 1}-{block.end_layer}, {block.objective}"
    return f"  {name:<17}{duration_text(block.total_s)} ({layers}): {', '.join(parts) or 'nothing to do'}"


def _table(alternatives: tuple[PlanAlternative, ...], disk_free_bytes: int) -> list[str]:
    rows = [("", "peak memory", "disk", "time", "layers")]
    for row in alternatives:
        mark = "* " if row.chosen else "  "
        if row.predicted_bytes is None or row.disk_bytes is None or row.seconds is None:
            needs = f"does not fit: needs --memory {row.smallest_budget_bytes >> 20}MiB"
            rows.append((mark + row.options, "-", "-", "-", needs))
        else:
            peak, disk = gib_text(row.predicted_bytes), gib_text(row.disk_bytes)
            lacking = "; needs more disk than is free" if row.disk_bytes > disk_free_bytes else ""
            rows.append((mark + row.options, peak, disk, duration_text(row.seconds), row.mode + lacking))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for first, *others, last in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:4], strict=True))]
        lines.append("  " + "  ".join([*cells, last]).rstrip())
    if any(row.chosen for row in alternatives):
        lines.append("  * as asked for")
    return lines


COMMAND = Command(
    name="plan",
    help=(
        "Show what 'train' would do with the same options: what stays in memory, peaks, disk, time and alternatives. "
        "Loads no weights, and writes only to the user's cache; MODEL may be a directory with just a config.json."
    ),
    settings=PlanSettings,
    operation=_plan,
    render=_render,
)
