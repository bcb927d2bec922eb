"""Peak memory of models with 8, 16, 32 and 64 layers (hidden 1024) under one budget.

The budget is what 8 layers need when they are streamed, plus 5 %: it is the same for every depth, and neither training
nor evaluation may exceed it. Peaks are those of the whole process, on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.alone import Refused
from benchmarks.report import MIB, Bench, describe, parser
from benchmarks.shapes import Shape, write_data, write_store

NAME = "depth"
SLACK = 1.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a run exceeded its budget or was refused."""
    made = parser(NAME, __doc__)
    made.add_argument("--layers", default="8,16,32,64")
    made.add_argument("--blocks", default="2,1")
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    depths = [2, 4] if bench.quick else [int(n) for n in options.layers.split(",")]
    block_counts = [1] if bench.quick else [int(n) for n in options.blocks.split(",")]
    length = 32 if bench.quick else 128
    data = write_data(bench.directory / "data.jsonl", 8, length)
    rows = []
    for blocks in block_counts:
        settings = {"data": str(data), "blocks": blocks, "max_length": length, "batch_size": 4, "device": "cpu"}
        budget = bench.measure(
            f"smallest budget of {depths[0]} layers in {blocks} blocks",
            partial(_smallest, bench, depths[0], settings),
        )
        budget_mib = int(budget["mib"] * SLACK)
        for layers in depths:
            found = bench.measure(
                f"{layers} layers in {blocks} blocks within {budget_mib} MiB",
                partial(_measure, bench, layers, settings, budget_mib),
            )
            rows.append((layers, blocks, budget_mib, *_row(bench, found, budget_mib, f"{layers} layers, K={blocks}")))
    columns = ("layers", "blocks", "budget MiB", "mode", "predicted MiB", "train MiB", "evaluate MiB", "step s")
    bench.table(columns, rows)
    return bench.finish()


def _store(bench: Bench, layers: int) -> Path:
    shape = Shape(64, layers, 128, 4, 2, 512) if bench.quick else Shape(1024, layers, 4096, 16, 4, 8192)
    return write_store(bench.directory / f"store-{layers}", shape)


def _run(bench: Bench, layers: int, settings: dict[str, Any]) -> Path:
    return bench.directory / f"run-{layers}-{settings['blocks']}"


def _smallest(bench: Bench, layers: int, settings: dict[str, Any]) -> dict[str, int]:
    output = bench.directory / "run-smallest"
    return {
        "mib": bench.alone.smallest_mib(model=str(_store(bench, layers)), output=str(output), **settings, fresh=True)
    }


def _measure(bench: Bench, layers: int, settings: dict[str, Any], budget_mib: int) -> dict[str, Any]:
    memory = f"{budget_mib}MiB"
    run = _run(bench, layers, settings)
    try:
        trained = bench.alone.run(
            "train", model=str(_store(bench, layers)), output=str(run), memory=memory, **settings, fresh=True
        )
    except Refused as refusal:
        return {"refused_mib": refusal.needs_mib}
    evaluated = bench.alone.run("evaluate", run=str(run), data=settings["data"], memory=memory, device="cpu")
    return {"trained": trained, "evaluated": evaluated}


def _row(bench: Bench, found: dict[str, Any], budget_mib: int, what: str) -> tuple[object, ...]:
    if "refused_mib" in found:
        bench.expect(False, f"{what} was refused: it needs {found['refused_mib']} MiB")
        return ("refused", found["refused_mib"], "", "", "")
    trained, evaluated = found["trained"], found["evaluated"]
    for doing, peak in (("training", trained["peak_bytes"]), ("evaluating", evaluated["peak_bytes"])):
        bench.expect(peak <= budget_mib * MIB, f"{doing} {what} took {peak / MIB:.0f} of {budget_mib} MiB")
    seconds = max(step["seconds"] for step in trained["steps"] if step["phase"] == "train")
    return (
        describe(trained["residence"]),
        trained["residence"]["predicted_bytes"] // MIB,
        trained["peak_bytes"] // MIB,
        evaluated["peak_bytes"] // MIB,
        float(seconds),
    )


if __name__ == "__main__":
    sys.exit(main())
