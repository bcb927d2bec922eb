"""Time of a step with all layers streamed over the same step with all layers resident (4-bit, no recomputation).

A block of layers of a 1B shape (hidden 2048) with adapters, forward and backward, at 2,048 and 8,192 tokens per step;
both in one process, alternating, medians. A streamed step runs every layer but the last one twice, which alone makes it
up to 1.5 times as long as a resident one: a pass forward costs as much as one backward when the weights are frozen.
Layers are read from the system's file cache here, as in any training of what fits there. LM head and optimiser are left
out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.pools import OpenModel, Timing, alternate
from benchmarks.report import Bench, parser
from benchmarks.shapes import Shape, write_store
from lopt_lite.devices import choose_device

NAME = "streaming_cost"

#: Tokens per step -> the largest ratio that is as it should be.
TARGETS = {2048: 1.5, 8192: 1.4}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when streaming costs more than it should."""
    made = parser(NAME, __doc__)
    made.add_argument("--layers", type=int, default=6, help="layers of the block (6)")
    made.add_argument("--length", type=int, default=512, help="tokens of each row (512)")
    made.add_argument("--micro-batch", type=int, default=1024, help="tokens that go through a layer at once (1024)")
    made.add_argument("--repeats", type=int, default=3, help="steps of each kind (3)")
    made.add_argument("--device", default="cpu", help="cpu, cuda or mps (cpu)")
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    layers = 2 if bench.quick else options.layers
    length = 16 if bench.quick else options.length
    micro_batch = 32 if bench.quick else options.micro_batch
    targets = {64: 1.5} if bench.quick else TARGETS
    rows = []
    for tokens, target in targets.items():
        key = f"{tokens} tokens in rows of {length}, {micro_batch} at once, {layers} layers, {options.device}"
        found = bench.measure(
            f"{key}, {options.repeats} repeats",
            partial(_measure, bench, options, tokens, length, micro_batch, layers),
        )
        resident, streamed = Timing(**found["resident"]), Timing(**found["streamed"])
        ratio = streamed.median_s / resident.median_s
        bench.expect(ratio <= target, f"at {tokens} tokens a streamed step takes {ratio:.2f} times a resident one")
        each = [s / r for s, r in zip(streamed.seconds, resident.seconds, strict=True)]
        rows.append(
            (
                tokens,
                layers,
                resident.median_s,
                streamed.median_s,
                ratio,
                f"{min(each):.2f} to {max(each):.2f}",
                target,
                f"{streamed.waiting_share:.2%}",
            )
        )
    columns = ("tokens", "layers", "resident s", "streamed s", "ratio", "pair by pair", "at most", "waiting for layers")
    bench.table(columns, rows)
    return bench.finish()


def _measure(bench: Bench, options: Any, tokens: int, length: int, micro_batch: int, layers: int) -> dict[str, Any]:
    torch.set_num_threads(1 if bench.quick else bench.threads)
    device = choose_device(options.device)
    shape = Shape(64, layers, 128, 4, 2, 512) if bench.quick else Shape(2048, layers, 5632, 32, 4, 32000)
    with OpenModel.open(write_store(bench.directory / f"store-{layers}", shape), device) as model:
        batches = model.batches(tokens=tokens, length=length, micro_batch_tokens=micro_batch)
        with model.resident(layers, dequantize=False) as resident, model.streamed(layers) as streamed:
            timings = alternate({"resident": resident, "streamed": streamed}, batches, device, options.repeats)
    return {name: asdict(timing) for name, timing in timings.items()}


if __name__ == "__main__":
    sys.exit(main())
