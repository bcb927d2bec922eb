"""Speed of a resident NF4 block with its matrices dequantised once, and with each product dequantising.

Forward and backward with adapters on the first layers of SmolLM2-135M-Instruct (from 'make demo-model') and of a 1B
shape (hidden 2048, random weights), both forms in one process, alternating, medians. The numbers computed are the same
bits; LM head and optimiser are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.pools import DEMO_MODEL, ONE_B, SMOLLM2, OpenModel, Timing, alternate, model_store
from benchmarks.report import Bench, parser
from lopt_lite.devices import choose_device

NAME = "dequantise_once"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when dequantising once makes a step slower."""
    made = parser(NAME, __doc__)
    made.add_argument("--tokens", default="256,1024,4096", help="tokens per step, separated by commas (256,1024,4096)")
    made.add_argument("--repeats", type=int, default=5, help="steps of each kind (5)")
    made.add_argument("--device", default="cpu", help="cpu, cuda or mps (cpu)")
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    models = {SMOLLM2: 15, ONE_B: 4}
    if bench.quick:
        models = {"tiny": 2}
    elif not DEMO_MODEL.is_dir():
        bench.text(f"{SMOLLM2} is left out: 'make demo-model' has not been run.")
        del models[SMOLLM2]
    rows = []
    for name, layers in models.items():
        for tokens in [32] if bench.quick else [int(n) for n in options.tokens.split(",")]:
            found = bench.measure(
                f"{name}, {layers} layers, {tokens} tokens, {options.device}, {options.repeats} repeats",
                partial(_measure, bench, options, name, layers, tokens),
            )
            each, once = Timing(**found["in each product"]), Timing(**found["once"])
            gain = each.median_s / once.median_s
            bench.expect(gain >= 1, f"{name} at {tokens} tokens is {1 / gain:.2f} times slower")
            rows.append((name, layers, tokens, 1000 * each.median_s, 1000 * once.median_s, gain))
    columns = ("model", "layers", "tokens per step", "in each product ms", "once ms", "times faster")
    bench.table(columns, rows)
    return bench.finish()


def _measure(bench: Bench, options: Any, name: str, layers: int, tokens: int) -> dict[str, Any]:
    torch.set_num_threads(1 if bench.quick else bench.threads)
    device = choose_device(options.device)
    length = min(tokens, 256)
    with OpenModel.open(model_store(bench.directory, name, layers), device) as model:
        batches = model.batches(tokens=tokens, length=length, micro_batch_tokens=1024)
        with (
            model.resident(layers, dequantize=False) as each,
            model.resident(layers, dequantize=True) as once,
        ):
            timings = alternate({"in each product": each, "once": once}, batches, device, options.repeats)
    return {kind: asdict(timing) for kind, timing in timings.items()}


if __name__ == "__main__":
    sys.exit(main())
