"""The README's demo with the smallest --memory that works, against the demo without a budget.

SmolLM2-135M-Instruct (from 'make demo-model') on the maths problems in examples/, as 'make demo' trains it, in two
blocks. Held-out losses are in nats per answer token; the peak is that of the whole process, on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import MIB, Bench, describe, parser
from benchmarks.shapes import Shape, write_data, write_store

NAME = "demo_smallest"
MODEL = Path(".demo/SmolLM2-135M-Instruct/model.safetensors")
TRAIN, HELD_OUT = Path("examples/gsm8k_train.jsonl"), Path("examples/gsm8k_heldout.jsonl")
#: Losses differ where micro-batches are summed in another order: this much, in nats, is the same.
SAME_LOSS = 0.01
#: A process starts with a little more or less memory than the one that was asked.
SLACK = 1.01


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when the budget was exceeded or the loss is another one."""
    made = parser(NAME, __doc__)
    made.add_argument("--examples", type=int, help="train on the first so many examples only")
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    if not bench.quick and not MODEL.is_file():
        print(f"{MODEL} is not here: run 'make demo-model' first, and this from the repository's root", file=sys.stderr)
        return 2
    settings = _settings(bench, options.examples)
    asked = bench.measure(
        f"smallest budget of {options.examples or 'all'} examples",
        partial(_smallest, bench, settings),
    )
    budget_mib = int(asked["mib"] * SLACK)
    rows = []
    found: dict[str, dict[str, Any]] = {}
    for name, memory in (("none", "auto"), (f"{budget_mib} MiB", f"{budget_mib}MiB")):
        found[name] = bench.measure(
            f"{options.examples or 'all'} examples within {memory}",
            partial(_train, bench, settings, memory),
        )
        outcome, residence = found[name]["outcome"], found[name]["residence"]
        losses = (float(outcome["loss_before"]), float(outcome["loss_after"]))
        peak_mib = found[name]["peak_bytes"] // MIB
        rows.append((name, describe(residence), peak_mib, *losses, float(found[name]["seconds"])))
    free, within = (run["outcome"]["loss_after"] for run in found.values())
    bench.expect(abs(free - within) <= SAME_LOSS, f"the loss is {within:.3f} within the budget and {free:.3f} without")
    bench.expect(rows[1][2] <= budget_mib, f"the run took {rows[1][2]} of {budget_mib} MiB")
    bench.table(("budget", "way of working", "peak MiB", "loss before", "loss after", "s in all"), rows)
    return bench.finish()


def _smallest(bench: Bench, settings: dict[str, Any]) -> dict[str, int]:
    return {"mib": bench.alone.smallest_mib(**settings, output=str(bench.directory / "run-smallest"), fresh=True)}


def _train(bench: Bench, settings: dict[str, Any], memory: str) -> dict[str, Any]:
    output = bench.directory / f"run-{memory}"
    return bench.alone.run("train", **settings, output=str(output), memory=memory, fresh=True)


def _settings(bench: Bench, examples: int | None) -> dict[str, Any]:
    common = {"store": str(bench.directory / "store"), "device": "cpu"}
    if bench.quick:
        model = write_store(bench.directory / "model", Shape(64, 4, 128, 4, 2, 512))
        data = write_data(bench.directory / "data.jsonl", 8, 32)
        return {**common, "store": None, "model": str(model), "data": str(data), "validation": "0.25", "max_length": 32}
    data = TRAIN
    if examples is not None:
        data = bench.directory / f"first-{examples}.jsonl"
        data.write_text("".join(TRAIN.open(encoding="utf-8").readlines()[:examples]), encoding="utf-8")
    return {**common, "model": str(MODEL), "data": str(data), "validation": str(HELD_OUT), "max_length": 384}


if __name__ == "__main__":
    sys.exit(main())
