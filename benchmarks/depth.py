"""Peak memory against the budget as depth grows: 8, 16, 32 and 64 layers (hidden 1024).

    python -m benchmarks.depth [--directory DIR]

Each run gets the smallest budget that it says it can work with, plus 5 %. Runs on the CPU; the peak is the process's.
What still grows with depth are the block's adapters with their optimiser state, and its boundary activations.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks.shapes import Shape, run_alone, write_data, write_model
from lopt_lite import QuantizeSettings, quantize

MIB = 2**20
LENGTH_TOKENS = 128


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default="runs/benchmark-depth")
    parser.add_argument("--layers", default="8,16,32,64")
    chosen = parser.parse_args()
    directory = Path(chosen.directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = write_data(directory / "data.jsonl", 8, LENGTH_TOKENS)
    depths = [int(layers) for layers in chosen.layers.split(",")]
    for layers in depths:
        store = directory / f"store-{layers}"
        if not (store / "model.safetensors.index.json").exists():
            model = write_model(directory / f"model-{layers}", Shape(1024, layers, 4096, 16, 4, 8192))
            quantize(QuantizeSettings(model=str(model), store=str(store)))

    print(
        f"{'layers':>6} {'blocks':>6} {'mode':>12} {'budget MiB':>10} {'predicted':>10} {'train peak':>10} "
        f"{'evaluate peak':>13}"
    )
    for blocks in (2, 1):
        for layers in depths:
            budget = _smallest_mib(directory, layers, blocks, data)
            trained = _train(directory, layers, blocks, data, f"{budget}MiB")
            evaluated = run_alone(
                "evaluate", run=str(_run(directory, layers, blocks)), data=str(data), memory=f"{budget}MiB"
            )
            print(
                f"{layers:>6} {blocks:>6} {trained['mode']:>12} {budget:>10} {trained['predicted_bytes'] // MIB:>10} "
                f"{trained['peak_bytes'] // MIB:>10} {evaluated['peak_bytes'] // MIB:>13}",
                flush=True,
            )


def _run(directory: Path, layers: int, blocks: int) -> Path:
    return directory / f"run-{layers}-{blocks}"


def _train(directory: Path, layers: int, blocks: int, data: Path, memory: str) -> dict[str, Any]:
    return run_alone(
        "train",
        model=str(directory / f"store-{layers}"),
        data=str(data),
        output=str(_run(directory, layers, blocks)),
        blocks=blocks,
        max_length=LENGTH_TOKENS,
        batch_size=4,
        memory=memory,
        fresh=True,
    )


def _smallest_mib(directory: Path, layers: int, blocks: int, data: Path) -> int:
    """The smallest budget that a run says it can work with, plus 5 %."""
    try:
        _train(directory, layers, blocks, data, "1MiB")
    except RuntimeError as error:
        found = re.search(r"at least --memory (\d+)MiB", str(error))
        if found is None:
            raise
        return int(int(found[1]) * 1.05)
    raise RuntimeError("a budget of 1 MiB was accepted")


if __name__ == "__main__":
    main()
