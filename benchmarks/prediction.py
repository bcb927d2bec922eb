"""Predicted and measured peak memory over shapes, budgets, batches, numbers of blocks and ways of tuning.

The peak may not exceed the budget, and the prediction may not be off by more than 10 %. Budgets are multiples of the
smallest that each run says it can work with. Peaks are those of the whole process, on the CPU.
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
from lopt_lite.settings import Quantize

NAME = "prediction"
WITHIN = 0.10

SHAPES = {
    "narrow": Shape(512, 24, 1536, 8, 8, 32000),
    "middle": Shape(1024, 16, 2816, 16, 4, 8192),
    "wide": Shape(2048, 8, 5632, 32, 4, 32000),
    # More words than its layers have weights: what is measured before training outweighs a step.
    "wordy": Shape(256, 8, 512, 4, 2, 131072),
    "tiny": Shape(64, 4, 128, 4, 2, 512),
    # Rows that are longer than its window of tokens; scores of all pairs of tokens; values that are narrower than keys.
    "windowed": Shape(512, 12, 1536, 8, 4, 8192, "mistral", (("sliding_window", 256),)),
    "capped": Shape(512, 12, 1536, 8, 4, 8192, "gemma2", (("head_dim", 64), ("sliding_window", 256))),
    "latent": Shape(
        512,
        12,
        1536,
        8,
        8,
        8192,
        "deepseek_v3",
        (
            ("first_k_dense_replace", 12),
            ("q_lora_rank", 256),
            ("kv_lora_rank", 128),
            ("qk_nope_head_dim", 64),
            ("qk_rope_head_dim", 32),
            ("v_head_dim", 64),
        ),
    ),
}


@dataclass(frozen=True)
class Case:
    """One combination.

    Attributes
    ----------
    budget:
        A multiple of the smallest one.
    uneven:
        Whether only a few examples have ``tokens`` tokens, the others fewer.
    held_out:
        Tokens of held-out examples, 0 without any.
    """

    shape: str
    budget: float
    batch: int
    tokens: int
    blocks: int = 2
    tune: str = "lora"
    quantize: Quantize = "nf4"
    steps: int = 2
    uneven: bool = False
    held_out: int = 0

    @property
    def batches(self) -> str:
        """Rows and tokens of a step."""
        return f"{self.batch} x {'up to ' if self.uneven else ''}{self.tokens}"

    @property
    def key(self) -> str:
        """What tells this case from others."""
        return (
            f"{self.shape} {self.budget} times the smallest, {self.batches} tokens, K={self.blocks}, "
            f"{self.tune}, {self.quantize}" + (f", held out {self.held_out} tokens" if self.held_out else "")
        )


#: A little above 1, since a process starts with a little more or less than the one that was asked.
_SMALLEST = 1.01

CASES = [
    Case("narrow", _SMALLEST, 4, 128),
    Case("narrow", 1.3, 4, 128, blocks=1),
    Case("narrow", 4.0, 8, 256),
    Case("narrow", 1.5, 8, 256, blocks=3),
    Case("narrow", 2.0, 4, 128, quantize="none"),
    Case("middle", _SMALLEST, 4, 256, blocks=1),
    Case("middle", 1.15, 4, 256),
    Case("middle", 1.6, 8, 128, blocks=1),
    Case("middle", 4.0, 8, 256),
    Case("middle", 1.1, 4, 128, tune="full", quantize="none"),
    Case("wide", _SMALLEST, 2, 256),
    Case("wide", 1.25, 4, 256, blocks=1),
    Case("wide", 2.0, 4, 128),
    Case("wide", 4.0, 4, 256),
    Case("wide", 1.2, 2, 256, blocks=1, quantize="none"),
    Case("wide", _SMALLEST, 2, 128, tune="full", quantize="none"),
    Case("wordy", _SMALLEST, 1, 64, steps=32),
    Case("wordy", 1.5, 1, 64, steps=32),
    Case("wordy", 1.2, 2, 64, blocks=1, steps=16),
    Case("narrow", 1.3, 2, 1024, steps=4),
    Case("middle", 4.0, 4, 1024),
    Case("narrow", 4.0, 8, 512, steps=4, uneven=True),
    Case("narrow", 1.5, 4, 512, steps=12, uneven=True),
    Case("middle", 1.15, 8, 256, steps=4, uneven=True),
    Case("wide", 2.0, 4, 256, blocks=1, steps=6, uneven=True),
    Case("wide", _SMALLEST, 4, 64, held_out=512),
    Case("wide", 2.0, 4, 64, held_out=512),
    Case("middle", 4.0, 4, 64, blocks=1, held_out=512),
    Case("middle", 1.1, 4, 64, tune="full", quantize="none", held_out=512),
    Case("windowed", _SMALLEST, 2, 4096),
    Case("windowed", 1.3, 2, 4096, blocks=1),
    Case("windowed", 2.0, 4, 1024),
    Case("capped", _SMALLEST, 2, 1024, blocks=1),
    Case("capped", 2.0, 2, 1024),
    Case("latent", _SMALLEST, 2, 2048),
    Case("latent", 4.0, 2, 2048, blocks=1),
]
QUICK = [Case("tiny", 1.2, 2, 32), Case("tiny", 2.0, 2, 32, blocks=1)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a run exceeded its budget or a prediction was wrong."""
    made = parser(NAME, __doc__)
    made.add_argument("--only", default="", help="only cases whose description has this in it")
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    rows = []
    for case in QUICK if bench.quick else CASES:
        if options.only not in case.key:
            continue
        found = bench.measure(case.key, partial(_measure, bench, case))
        rows.append(_row(bench, case, found))
    columns = (
        "shape",
        "batch",
        "K",
        "tune",
        "stored",
        "budget MiB",
        "way of working",
        "predicted MiB",
        "peak MiB",
        "predicted / peak",
    )
    bench.table(columns, rows)
    return bench.finish()


def _measure(bench: Bench, case: Case) -> dict[str, Any]:
    name = f"data-{case.held_out}-{case.steps}-{case.batches.replace(' ', '-')}.jsonl"
    # --max-length is that of the held-out examples then, and cuts none of these: with their prompts they are so long.
    tokens = case.tokens // 2 if case.held_out else case.tokens
    data = write_data(bench.directory / name, case.steps * case.batch, tokens, uneven=case.uneven)
    model = write_store(bench.directory / f"store-{case.shape}-{case.quantize}", SHAPES[case.shape], case.quantize)
    output = bench.directory / "run"
    settings: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "blocks": case.blocks,
        "batch_size": case.batch,
        "max_length": case.tokens,
        "tune": case.tune,
        "quantize": case.quantize,
        "device": "cpu",
        "fresh": True,
    }
    if case.held_out:
        held_out = write_data(bench.directory / f"held-out-{case.held_out}.jsonl", 16, case.held_out)
        settings |= {"validation": str(held_out), "max_length": case.held_out}
    budget_mib = int(bench.alone.smallest_mib(**settings) * case.budget)
    try:
        found = bench.alone.run("train", **settings, memory=f"{budget_mib}MiB")
    except Refused as refusal:
        return {"budget_mib": budget_mib, "refused_mib": refusal.needs_mib}
    finally:
        files.remove_tree(output)
    return {**found, "budget_mib": budget_mib}


def _row(bench: Bench, case: Case, found: dict[str, Any]) -> tuple[object, ...]:
    budget_mib = found["budget_mib"]
    row = (
        str(SHAPES[case.shape]),
        case.batches + (f"; held out 16 x {case.held_out}" if case.held_out else ""),
        case.blocks,
        case.tune,
        case.quantize,
        budget_mib,
    )
    if "refused_mib" in found:
        bench.expect(False, f"{case.key} was refused: it needs {found['refused_mib']} MiB")
        return (*row, f"refused: needs {found['refused_mib']} MiB", 0, 0, 0.0)
    predicted_mib, peak_mib = found["residence"]["predicted_bytes"] / MIB, found["peak_bytes"] / MIB
    ratio = predicted_mib / peak_mib
    bench.expect(peak_mib <= budget_mib, f"{case.key} took {peak_mib:.0f} of {budget_mib} MiB")
    bench.expect(abs(ratio - 1) <= WITHIN, f"{case.key} was predicted {abs(ratio - 1):.0%} off")
    return (*row, describe(found["residence"]), int(predicted_mib), int(peak_mib), float(ratio))


if __name__ == "__main__":
    sys.exit(main())
