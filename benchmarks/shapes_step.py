"""One full optimiser step of models that are larger than the budget: a 7B shape in 2 GiB, a 70B shape in 6 GiB.

Every block trains for exactly one step of 4 examples (512 tokens each for 7B, 128 for 70B), on an NF4 store of random
weights. Peaks are those of the whole process, on the CPU; "beyond libraries" is that less what the process took once
everything was imported, which is no less than what would be device memory elsewhere: 4 GiB at most for the 70B shape.

Stores are deleted at the end unless --keep is given; the 70B one takes 40 GB of disk.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.alone import Refused
from benchmarks.report import MIB, Bench, describe, parser
from benchmarks.shapes import Shape, write_data, write_store
from lopt_lite import files

NAME = "shapes_step"
EXAMPLES = 4


@dataclass(frozen=True)
class Case:
    """A shape, how long its examples are, what is asked for, and what must not be exceeded."""

    shape: Shape
    tokens: int
    memory: str
    limit_mib: int
    #: Numbers of blocks.
    blocks: tuple[int, ...]
    #: What may be taken beyond the libraries, None for anything.
    device_limit_mib: int | None


CASES = {
    "7B": Case(Shape(4096, 32, 11008, 32, 32, 32000), 512, "1990MiB", 2048, (2, 1), None),
    "70B": Case(Shape(8192, 80, 28672, 64, 8, 128256), 128, "4500MiB", 6144, (2,), 4096),
}
TINY = {"tiny": Case(Shape(64, 4, 128, 4, 2, 512), 32, "2000MiB", 2048, (2, 1), None)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a step took more than it may."""
    made = parser(NAME, __doc__)
    made.add_argument("--cases", default="7B", help=f"of {', '.join(CASES)}, separated by commas (7B)")
    made.add_argument("--blocks", help="numbers of blocks, separated by commas (7B: 2,1; 70B: 2)")
    made.add_argument("--objective", default="reconstruct", help="objective of the early blocks (reconstruct)")
    made.add_argument("--memory", help="another budget than the case's")
    made.add_argument("--keep", action="store_true", help="keep the stores")
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    cases = TINY if bench.quick else {name: CASES[name] for name in options.cases.split(",")}
    rows = []
    for name, case in cases.items():
        for blocks in case.blocks if options.blocks is None else [int(n) for n in options.blocks.split(",")]:
            memory = options.memory or case.memory
            what = f"{name} in {blocks} blocks, {options.objective}, within {memory}"
            found = bench.measure(
                what,
                partial(_measure, bench, name, case, blocks=blocks, objective=options.objective, memory=memory),
            )
            rows.append((name, blocks, f"{EXAMPLES} x {case.tokens}", memory, *_row(bench, found, case, what)))
        if not options.keep:
            files.remove_tree(bench.directory / f"store-{name}")
    columns = (
        "shape",
        "blocks",
        "tokens",
        "budget",
        "way of working",
        "predicted MiB",
        "peak MiB",
        "beyond libraries MiB",
        "s per step of each block",
        "s in all",
    )
    bench.table(columns, rows)
    for name, case in cases.items():
        bench.text(f"{name}: {case.shape.parameters / 1e9:.2f}B parameters, {case.shape}.")
    return bench.finish()


def _measure(bench: Bench, name: str, case: Case, *, blocks: int, objective: str, memory: str) -> dict[str, Any]:
    data = write_data(bench.directory / f"data-{case.tokens}.jsonl", EXAMPLES, case.tokens)
    bench.say(f"the store of {name}")
    store = write_store(bench.directory / f"store-{name}", case.shape)
    bench.say("training")
    output = bench.directory / f"run-{name}-{blocks}"
    try:
        found = bench.alone.run(
            "train",
            model=str(store),
            data=str(data),
            output=str(output),
            blocks=blocks,
            objective=objective,
            head_fit_epochs=0,
            batch_size=EXAMPLES,
            max_length=case.tokens,
            memory=memory,
            device="cpu",
            fresh=True,
        )
    except Refused as refusal:
        return {"refused_mib": refusal.needs_mib}
    finally:
        files.remove_tree(output)
    return found


def _row(bench: Bench, found: dict[str, Any], case: Case, what: str) -> tuple[object, ...]:
    if "refused_mib" in found:
        bench.expect(False, f"{what} was refused: it needs {found['refused_mib']} MiB")
        return (f"refused: needs {found['refused_mib']} MiB", "", "", "", "", "")
    peak_mib = found["peak_bytes"] / MIB
    beyond_mib = (found["peak_bytes"] - found["start_bytes"]) / MIB
    bench.expect(peak_mib < case.limit_mib, f"{what} took {peak_mib:.0f} MiB, {case.limit_mib} are allowed")
    if case.device_limit_mib is not None:
        bench.expect(
            beyond_mib <= case.device_limit_mib,
            f"{what} took {beyond_mib:.0f} MiB beyond the libraries, {case.device_limit_mib} are allowed",
        )
    return (
        describe(found["residence"]),
        found["residence"]["predicted_bytes"] // MIB,
        int(peak_mib),
        int(beyond_mib),
        ", ".join(f"{step['seconds']:.1f}" for step in found["steps"]),
        float(found["seconds"]),
    )


if __name__ == "__main__":
    sys.exit(main())
