"""How much of the machine's matrix-product peak training a block uses.

Forward and backward of resident layers with adapters, their matrices dequantised once, beside products of two large
bfloat16 matrices in the same process, alternating, medians. Counted are the products that the algorithm needs: 2
operations per frozen weight and token forward, 2 for the gradient of the layer's input, 6 per adapter weight, and
attention's scores and sums over half of all pairs of tokens (causal), once forward and twice backward. Neither
recomputing nor anything elementwise counts. LM head and optimiser are left out. Where a CPU has no instructions for
bfloat16 products, lopt-lite makes them in float32, and the peak is that of float32.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.pools import DEMO_MODEL, ONE_B, SMOLLM2, OpenModel, model_store, step
from benchmarks.report import Bench, parser
from lopt_lite import devices, float32_products
from lopt_lite.training.adapters import adapter_parameters

NAME = "utilisation"
ROWS = 8
#: Share of the peak that is wanted.
WANTED = 0.6
_PEAK_SIZE = 2048
#: Steps in which the process comes by the memory that later ones use again.
_WARM_UP = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when less of the peak is used than is wanted."""
    made = parser(NAME, __doc__)
    made.add_argument("--lengths", default="256", help="tokens per row, separated by commas (256)")
    made.add_argument("--repeats", type=int, default=5, help="steps (5)")
    made.add_argument("--device", default="cpu", help="cpu, cuda or mps (cpu)")
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    models = {"tiny": 2} if bench.quick else {SMOLLM2: 15, ONE_B: 4}
    if not bench.quick and not DEMO_MODEL.is_dir():
        bench.text(f"{SMOLLM2} is left out: 'make demo-model' has not been run.")
        del models[SMOLLM2]
    rows = []
    for name, layers in models.items():
        for length in [16] if bench.quick else [int(n) for n in options.lengths.split(",")]:
            what = f"{name}, {layers} layers, {ROWS} x {length} tokens, {options.device}, {options.repeats} repeats"
            found = bench.measure(what, partial(_measure, bench, options, name, layers, length))
            step_s, peak = statistics.median(found["step_s"]), statistics.median(found["peak_flops"])
            share = found["operations"] / step_s / peak
            bench.expect(
                bench.quick or share >= WANTED, f"{name} uses {share:.0%} of the peak, {WANTED:.0%} are wanted"
            )
            rows.append((name, layers, f"{ROWS} x {length}", step_s, found["operations"] / 1e9, peak / 1e9, share))
    columns = ("model", "layers", "tokens", "step s", "billion operations", "peak, billion per s", "used")
    bench.table(columns, [(*row[:-1], f"{row[-1]:.0%}") for row in rows])
    return bench.finish()


def _measure(bench: Bench, options: Any, name: str, layers: int, length: int) -> dict[str, Any]:
    torch.set_num_threads(1 if bench.quick else bench.threads)
    device = devices.choose_device(options.device)
    tokens = ROWS * length
    with OpenModel.open(model_store(bench.directory, name, layers), device) as model:
        batches = model.batches(tokens=tokens, length=length, micro_batch_tokens=tokens)
        with model.resident(layers, dequantize=True) as pool:
            weights = sum(
                torch.Size(shape).numel()
                for index in range(layers)
                for shape in model.skeleton.layer_parameters(index).values()
                if len(shape) > 1
            )
            adapters = sum(p.numel() for layer in pool.layers for p in adapter_parameters(layer).values())
            pairs = ROWS * length * length / 2
            attention = 3 * 2 * 2 * pairs * model.skeleton.hidden_size * layers
            for _ in range(_WARM_UP):
                step(pool, batches)
            step_s, peak_flops = [], []
            for _ in range(options.repeats):
                peak_flops.append(_peak_flops(device, 64 if bench.quick else _PEAK_SIZE))
                step_s.append(_timed(partial(step, pool, batches), device))
    operations = 4.0 * weights * tokens + 6.0 * adapters * tokens + attention
    return {"operations": operations, "step_s": step_s, "peak_flops": peak_flops}


def _peak_flops(device: torch.device, size: int) -> float:
    """Operations per second of a product of two square matrices, in the type that the layers' products are made in."""
    dtype = torch.float32 if float32_products.needed(device) else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    seconds = min(_timed(lambda: a @ b, device) for _ in range(5))
    return 2 * size**3 / seconds


def _timed(work: Any, device: torch.device) -> float:
    devices.synchronize(device)
    started = time.perf_counter()
    work()
    devices.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
