"""lopt-lite beside the usual ways of tuning an adapter on 4-bit weights end to end.

(a) TRL's SFTTrainer with PEFT's QLoRA and gradient checkpointing, as TRL's documentation shows it; (b) a plain PEFT
loop, tuned for speed: parts of similar length, nothing recomputed, loss at answer tokens only; (c) lopt-lite.

All get the same token ids, batch size, epochs, adapter (rank 16, alpha 32, all linear layers), cosine schedule with 3 %
warm-up and clipping, and the loss of answer tokens. (a) and (b) are run with every learning rate of the grid and shown
with the one that ends with the lowest held-out loss. Held-out loss, exact matches and retention (loss on unrelated
instructions) are measured for everyone by the same functions, on transformers' NF4 model with the adapter on it, after
training. On a CPU without instructions for bfloat16 products, (a), (b) and these measurements compute in float32, which
is many times faster there with these libraries; lopt-lite computes in bfloat16, its default, and has products made in
float32. Time to (a)'s loss is read off straight lines between measurements: for (a) and (b) of adapters put aside
while training, for lopt-lite of its own validation, counted from its last block's beginning. What measuring and putting
aside took is taken off everywhere. Peaks are those of whole processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.contenders import BASELINES, PEFT, TRL, Study, numbers
from benchmarks.loss_picture import Curve, draw, seconds_to
from benchmarks.questions import DEMO_MODEL, HELD_OUT, INSTRUCTIONS, TRAIN
from benchmarks.report import MIB, RESULTS, Bench, parser
from lopt_lite import files

NAME = "vs_end_to_end"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, draw the picture; 1 when lopt-lite is not as much faster or smaller as it should be."""
    options = _options().parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    if bench.write and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("the picture needs matplotlib: pip install -c constraints.txt -e '.[benchmarks]'")
    study = Study(bench, options)
    untouched = study.figures("untouched model", None)
    entries = [study.baseline(name) for name in BASELINES if study.can_run(name)]
    counts = [2] if bench.quick else numbers(int, options.blocks)
    entries += [study.lopt_lite(blocks) for blocks in counts]
    if options.longer:
        entries += [study.lopt_lite(blocks, epochs=options.longer) for blocks in counts]
    _report(bench, untouched, entries)
    return bench.finish()


def _options() -> argparse.ArgumentParser:
    made = parser(NAME, __doc__)
    made.add_argument("--model", default=str(DEMO_MODEL), help="a Hugging Face checkpoint's directory (the demo's)")
    made.add_argument("--data", default=str(TRAIN), help="examples to train on (GSM8K's)")
    made.add_argument("--held-out", default=str(HELD_OUT), help="held-out examples (GSM8K's)")
    made.add_argument("--retention", default=str(INSTRUCTIONS), help="unrelated examples")
    made.add_argument("--examples", type=int, default=0, help="train on so many, the first ones (all)")
    made.add_argument("--held-out-examples", type=int, default=0, help="measure on so many, the first ones (all)")
    made.add_argument("--epochs", type=int, default=3)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--max-length", type=int, default=1024)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--grid", default="2e-4,4e-4,8e-4", help="learning rates of (a) and (b) (2e-4,4e-4,8e-4)")
    made.add_argument("--lr-trl", type=float, help="only this learning rate for (a)")
    made.add_argument("--lr-peft", type=float, help="only this learning rate for (b)")
    made.add_argument("--lr-lopt", type=float, help="lopt-lite's learning rate (its default)")
    made.add_argument("--blocks", default="2,4,1", help="lopt-lite's numbers of blocks (2,4,1)")
    made.add_argument("--longer", type=int, help="lopt-lite once more, with so many epochs in the time it spares")
    made.add_argument("--memory", default="auto", help="lopt-lite's budget (auto)")
    made.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another option of lopt-lite's train"
    )
    made.add_argument("--points", type=int, default=4, help="measurements per epoch of (a) and (b) for the picture (4)")
    made.add_argument("--generate", type=int, default=40, help="held-out questions to answer (40; 0: none)")
    return made


def _report(bench: Bench, untouched: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    reference = next((entry for entry in entries if entry["name"] == TRL), None)
    target = None if reference is None else reference["held-out"]
    for entry in entries:
        curve = Curve(entry["name"], _from_untouched(entry["curve"], untouched["held-out"]))
        entry["curve"] = curve.points
        entry["to_target_s"] = None if target is None else seconds_to(curve, target)
    rows = [_row(entry, reference) for entry in entries]
    rows.append(("untouched model", *["-"] * 6, *_merits(untouched)))
    columns = ("what", "lr", "training s", "of (a)", "with loading s", "s to (a)'s loss", "peak MiB")
    bench.table((*columns, "held-out loss", "exact matches", "retention loss"), rows)
    for entry in entries:
        if "grid" in entry and len(entry["grid"]) > 1:
            losses = ", ".join(f"{lr}: {loss:.3f}" for lr, loss in entry["grid"].items())
            bench.text(f"Final held-out loss of {entry['name']} by learning rate: {losses}.")
    anchors = ", ".join(f"{entry['retain']:g} for {entry['name']}" for entry in entries if "retain" in entry)
    bench.text(f"Weights of lopt-lite's anchor (--retain): {anchors}.")
    _judge(bench, {entry["name"]: entry for entry in entries})
    _keep(bench, {"untouched": untouched, "entries": entries}, entries, target)


def _row(entry: dict[str, Any], reference: dict[str, Any] | None) -> tuple[object, ...]:
    reached = entry["to_target_s"]
    return (
        entry["name"],
        f"{entry['lr']:g}",
        f"{entry['training_s']:.1f}",
        "-" if reference is None else f"{entry['training_s'] / reference['training_s']:.2f}",
        f"{entry['total_s']:.1f}",
        "-" if reference is None else "never" if reached is None else f"{reached:.1f}",
        str(entry["peak_bytes"] // MIB),
        *_merits(entry),
    )


def _merits(figures: dict[str, Any]) -> tuple[str, str, str]:
    matches = f"{figures['correct']} of {figures['questions']}" if "questions" in figures else "-"
    return f"{figures['held-out']:.3f}", matches, f"{figures['retention']:.3f}"


def _judge(bench: Bench, entries: dict[str, dict[str, Any]]) -> None:
    """What lopt-lite should come to: two blocks in as many epochs, and any of it in as few seconds as it takes."""
    own = [entry for entry in entries.values() if "blocks" in entry]
    two = [entry for entry in own if entry["blocks"] == 2]
    if not two:
        return
    soonest = min(own, key=lambda entry: math.inf if entry["to_target_s"] is None else entry["to_target_s"])
    limits = [(two[0], TRL, "training_s", 0.30), (two[0], PEFT, "training_s", 0.60), (two[0], TRL, "peak_bytes", 0.50)]
    for ours, name, figure, limit in [*limits, (soonest, TRL, "to_target_s", 0.30)]:
        if name not in entries:
            continue
        theirs = entries[name][figure]
        share = None if ours[figure] is None or not theirs else ours[figure] / theirs
        text = "is never reached" if share is None else f"is {share:.2f} times that of {name}, not at most {limit}"
        bench.expect(share is not None and share <= limit, f"{figure} of {ours['name']} {text}")


def _keep(bench: Bench, figures: dict[str, Any], entries: list[dict[str, Any]], target: float | None) -> None:
    """Write the raw figures, and the picture where it can be drawn."""
    files.write_json(bench.directory / f"{NAME}.json", figures)
    if importlib.util.find_spec("matplotlib") is None:
        bench.say("no picture: matplotlib is not installed")
        return
    picture = bench.directory / f"{NAME}.png"
    draw(picture, [Curve(entry["name"], entry["curve"]) for entry in entries], target)
    bench.say(f"picture and raw figures: {picture}, {NAME}.json beside it")
    if bench.write:
        RESULTS.mkdir(exist_ok=True)
        files.copy_file(picture, RESULTS / picture.name)
        files.write_json(RESULTS / f"{NAME}.json", figures)
        bench.text(f"![Held-out loss against time]({picture.name}) Raw figures: [{NAME}.json]({NAME}.json).")


def _from_untouched(points: Sequence[Sequence[float]], loss: float) -> list[tuple[float, float]]:
    """A curve that begins with the untouched model at time 0."""
    return [(0.0, loss), *((float(seconds), float(found)) for seconds, found in points)]


if __name__ == "__main__":
    sys.exit(main())
