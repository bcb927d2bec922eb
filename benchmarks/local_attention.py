"""Attention of layers with a sliding window over longer rows: part by part, and given the dense mask.

Forward and backward in bfloat16, in one process, alternating, medians. "Kept" is what one layer keeps for its backward
pass, queries, keys and values included. A dense mask is made once for all layers; PyTorch's attention keeps a copy of
it in its own dtype for each layer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.report import MIB, Bench, parser
from lopt_lite.checkpoints.local_mask import LocalMask
from lopt_lite.devices import backend, choose_device

NAME = "local_attention"

#: (model, heads, width of a head, window, tokens of a row).
CASES = [
    ("Gemma 3 1B", 4, 256, 512, 1024),
    ("Gemma 3 1B", 4, 256, 512, 2048),
    ("Gemma 3 1B", 4, 256, 512, 4096),
    ("Gemma 3 1B", 4, 256, 512, 8192),
    ("Mistral 7B v0.1", 32, 128, 4096, 8192),
]
TINY = [("tiny", 2, 8, 16, 64)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when parts are much slower."""
    made = parser(NAME, __doc__)
    made.add_argument("--repeats", type=int, default=3, help="times that each is done (3)")
    made.add_argument("--device", default="cpu", help="cpu, cuda or mps (cpu)")
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    rows = []
    for model, heads, width, window, tokens in TINY if bench.quick else CASES:
        key = f"{model} {tokens} tokens {options.device} {options.repeats} repeats"
        found = bench.measure(key, partial(_measure, bench, options, heads, width, window, tokens))
        gain = found["dense"]["s"] / found["parts"]["s"]
        bench.expect(gain >= 0.8, f"{model} at {tokens} tokens is {1 / gain:.2f} times slower")
        kept = [found[way]["bytes"] / MIB for way in ("dense", "parts")]
        times = [1000 * found[way]["s"] for way in ("dense", "parts")]
        rows.append((model, window, tokens, *times, float(gain), *kept))
    columns = ("model", "window", "tokens", "dense ms", "parts ms", "times faster", "dense kept MiB", "parts kept MiB")
    bench.table(columns, rows)
    return bench.finish()


def _measure(bench: Bench, options: Any, heads: int, width: int, window: int, tokens: int) -> dict[str, Any]:
    torch.set_num_threads(1 if bench.quick else bench.threads)
    device = choose_device(options.device)
    local = LocalMask(torch.Size((1, 1, tokens, tokens)), window, chunked=False, device=device)
    masks = {"dense": local.dense(), "parts": local}
    inputs = [
        torch.randn(1, heads, tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3)
    ]
    times: dict[str, list[float]] = {way: [] for way in masks}
    kept: dict[str, int] = {}
    for number in range(1 + options.repeats):
        for way, mask in masks.items():
            storages: dict[int, int] = {}

            def note(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
                return tensor

            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                output = nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
            torch.autograd.grad(output, inputs, torch.ones_like(output))
            backend(device).synchronize()
            if number:
                times[way].append(time.perf_counter() - start)
            kept[way] = sum(storages.values())
    return {way: {"s": median(times[way]), "bytes": kept[way]} for way in masks}


if __name__ == "__main__":
    sys.exit(main())
