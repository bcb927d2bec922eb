"""What checkpoints cost, what a kill loses, and how soon a resumed run is at work again.

SmolLM2-135M-Instruct (from 'make demo-model') trains on the maths problems in examples/ without a budget, with a
checkpoint every few seconds. It is killed (SIGKILL) in its last block, just before the next checkpoint is
due, and started again. Lost is the time from the last checkpoint to the kill; the start takes from the command to the
end of the first step, imports and tokenisation included. Everything is read from the events that 'train --json' writes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import Bench, parser
from benchmarks.shapes import Shape, write_data, write_store

NAME = "interruption"
MODEL = Path(".demo/SmolLM2-135M-Instruct/model.safetensors")
TRAIN = Path("examples/gsm8k_train.jsonl")
#: Seconds between checkpoints (far fewer than by default), and how much of the time they may cost.
EVERY_S = (10, 30)
COST = 0.02
START_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when checkpoints cost, or a start takes, more than they may."""
    made = parser(NAME, __doc__)
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    if not bench.quick and not MODEL.is_file():
        print(f"{MODEL} is not here: run 'make demo-model' first, and this from the repository's root", file=sys.stderr)
        return 2
    rows = []
    for every_s in (1,) if bench.quick else EVERY_S:
        found = bench.measure(f"a checkpoint every {every_s} s", partial(_measure, bench, every_s))
        cost = found["saving_s"] / found["training_s"]
        rows.append(
            (
                every_s,
                found["checkpoints"],
                f"{cost:.2%}",
                float(found["lost_s"]),
                found["steps_again"],
                float(found["start_s"]),
            )
        )
        longest_s = every_s + found["longest_step_s"]
        bench.expect(cost <= COST, f"checkpoints every {every_s} s cost {cost:.1%} of the time")
        bench.expect(
            found["lost_s"] <= longest_s, f"{found['lost_s']:.1f} s were lost with checkpoints every {every_s} s"
        )
        bench.expect(found["start_s"] <= START_S, f"the resumed run took {found['start_s']:.1f} s to its first step")
    bench.table(
        ("checkpoint every s", "checkpoints", "their cost", "lost s", "steps done again", "start to first step s"),
        rows,
    )
    return bench.finish()


def _measure(bench: Bench, every_s: int) -> dict[str, Any]:
    output = bench.directory / f"run-{every_s}"
    command = [sys.executable, "-c", "from lopt_lite_cli.main import run; run()", "train", *_what(bench)]
    command += ["--store", str(bench.directory / "store"), "--output", str(output), "--device", "cpu", "--json"]
    command += ["--checkpoint-every", f"{every_s}s"]
    saving_s = last_s = lost_s = longest_step_s = 0.0
    checkpoints, newest = 0, 0
    began_s = ended_s = 0.0
    first = _start([*command, "--fresh"])
    for event, at_s in _events(first):
        if event["event"] == "BlockStarted" and event["block"] == 1:
            began_s = last_s = at_s
        if not began_s:
            continue
        if event["event"] == "CheckpointSaved":
            saving_s, checkpoints, last_s = saving_s + event["seconds"], checkpoints + 1, at_s
        if event["event"] == "Step":
            longest_step_s = max(longest_step_s, event["tokens"] / event["tokens_per_s"])
            newest, ended_s = event["step"], at_s
            nearly_due = at_s - last_s + longest_step_s > every_s
            late = event["step"] >= 0.8 * event["steps"]
            if late and (nearly_due or event["step"] == event["steps"] - 1):
                lost_s = at_s - last_s
                first.send_signal(signal.SIGKILL)
                break
    first.wait()
    started_s = time.monotonic()
    second = _start(command)
    first_step, start_s = 0, 0.0
    for event, at_s in _events(second):
        if event["event"] == "Step":
            first_step, start_s = event["step"], at_s - started_s
            break
    second.send_signal(signal.SIGKILL)
    second.wait()
    return {
        "saving_s": saving_s,
        "training_s": ended_s - began_s,
        "checkpoints": checkpoints,
        "lost_s": lost_s,
        "longest_step_s": longest_step_s,
        "steps_again": newest - first_step + 1,
        "start_s": start_s,
    }


def _what(bench: Bench) -> list[str]:
    if bench.quick:
        model = write_store(bench.directory / "model", Shape(64, 4, 128, 4, 2, 512))
        return [str(model), str(write_data(bench.directory / "data.jsonl", 64, 32)), "--epochs", "8"]
    return [str(MODEL), str(TRAIN), "--max-length", "384", "--epochs", "6", "--objective", "none"]


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _events(process: subprocess.Popen[str]) -> Iterator[tuple[dict[str, Any], float]]:
    """The events that a training writes, each with the time at which it came."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("{"):
            yield json.loads(line), time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
