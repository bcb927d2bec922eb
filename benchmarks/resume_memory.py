"""Peak memory of a run that was killed and resumed, against that of the same run uninterrupted.

A resumed run may not take more than one that was never interrupted, but for 1 % that equal runs differ by. Budgets from
the smallest one up are tried until every way of working that they lead to was found; each of them is then run through,
killed (SIGKILL) after a checkpoint in the middle of its last block, and resumed. Every step makes a checkpoint. Peaks
are those of the whole process, on the CPU.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.alone import FailedAlone, Killed, Refused
from benchmarks.report import MIB, Bench, describe, parser
from benchmarks.shapes import Shape, write_data, write_store
from lopt_lite import files
from lopt_lite.settings import Quantize

NAME = "resume_memory"
NOISE = 0.01
STEPS = 6

#: Multiples of the smallest budget.
BUDGETS = (1.01, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5, 4.0)
#: (blocks, tune, stored) of the runs.
KINDS: tuple[tuple[int, str, Quantize], ...] = (
    (2, "lora", "nf4"),
    (1, "lora", "nf4"),
    (2, "full", "none"),
    (1, "full", "none"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a resumed run took more."""
    made = parser(NAME, __doc__)
    made.add_argument("--tune", default="lora,full", help="kinds of tuning, separated by commas (lora,full)")
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    kinds = KINDS[:1] if bench.quick else [kind for kind in KINDS if kind[1] in options.tune.split(",")]
    rows = []
    for blocks, tune, stored in kinds:
        kind = f"K={blocks}, {tune}, {stored}"
        settings = _settings(bench, blocks, tune, stored)
        ways = bench.measure(f"ways of working of {kind}", partial(_ways, bench, settings))
        for way, budget_mib in ways.items():
            key = f"{kind}, {way}, within {budget_mib} MiB"
            found = bench.measure(key, partial(_measure, bench, settings, budget_mib))
            through_mib, resumed_mib = found["through_bytes"] / MIB, found["resumed_bytes"] / MIB
            bench.expect(
                resumed_mib <= through_mib * (1 + NOISE),
                f"{key}: {resumed_mib:.0f} MiB resumed, {through_mib:.0f} MiB uninterrupted",
            )
            bench.expect(found["same_way"], f"{key}: two starts with the same budget chose different ways of working")
            bench.expect(found["same_adapter"], f"{key}: the resumed run's result has other bytes")
            ratio = resumed_mib / through_mib
            same = "yes" if found["same_adapter"] else "no"
            rows.append((blocks, tune, way, budget_mib, int(through_mib), int(resumed_mib), float(ratio), same))
    columns = ("K", "tune", "way of working", "budget MiB", "uninterrupted MiB", "resumed MiB", "ratio", "same result")
    bench.table(columns, rows)
    return bench.finish()


def _settings(bench: Bench, blocks: int, tune: str, stored: Quantize) -> dict[str, Any]:
    shape = Shape(64, 4, 128, 4, 2, 512) if bench.quick else Shape(1024, 12, 4096, 16, 4, 16384)
    length, batch = (32, 2) if bench.quick else (256, 4)
    return {
        "model": str(write_store(bench.directory / f"store-{stored}", shape, stored)),
        "data": str(write_data(bench.directory / "data.jsonl", STEPS * batch, length)),
        "output": str(bench.directory / "run"),
        "blocks": blocks,
        "tune": tune,
        "quantize": stored,
        "batch_size": batch,
        "max_length": length,
        "head_fit_epochs": 0,
        "checkpoint_every": "0s",
        "device": "cpu",
    }


def _ways(bench: Bench, settings: dict[str, Any]) -> dict[str, int]:
    """Every way of working that budgets lead to, and the first budget, in MiB, that leads to it."""
    smallest_mib = bench.alone.smallest_mib(**settings, fresh=True)
    ways: dict[str, int] = {}
    for factor in (1.01, 1.5) if bench.quick else BUDGETS:
        budget_mib = int(smallest_mib * factor)
        try:
            residence = bench.alone.decide(**settings, memory=f"{budget_mib}MiB", fresh=True)
        except Refused:
            continue
        words = describe(residence)
        # However many layers stay, it is one way.
        way = "partly streamed" + words[words.index(" resident") + 9 :] if " of " in words else words
        ways.setdefault(way, budget_mib)
    return ways


def _measure(bench: Bench, settings: dict[str, Any], budget_mib: int) -> dict[str, Any]:
    within = {**settings, "memory": f"{budget_mib}MiB"}
    output = Path(settings["output"])
    through = bench.alone.run("train", **within, fresh=True)
    expected = _digest(output)
    try:
        bench.alone.run("train", **within, fresh=True, kill_after_step=STEPS // 2)
    except Killed:
        pass
    else:
        raise FailedAlone("the run ended without a checkpoint in the middle of its last block")
    resumed = bench.alone.run("train", **within)
    same = _digest(output) == expected
    files.remove_tree(output)
    return {
        "through_bytes": through["peak_bytes"],
        "resumed_bytes": resumed["peak_bytes"],
        "same_way": through["residence"] == resumed["residence"],
        "same_adapter": same,
    }


def _digest(run: Path) -> str:
    """One hash over the result's weight files, whatever they are called."""
    digest = hashlib.sha256()
    for path in sorted([*(run / "adapter").rglob("*.safetensors"), *(run / "model").rglob("*.safetensors")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
