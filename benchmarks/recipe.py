"""What to train, how fast, and held by what: recipes on several tasks.

Worked solutions: questions of GSM8K with their worked solutions as answers. Bare numbers: the same questions with
nothing but the final number, a narrow task that makes a model forget; what it knew is the loss on worked solutions,
which it is not shown, and on unrelated instructions. Capitals, backwards: the worked solutions written in such a way.

Losses are nats per answer token of held-out examples, as 'lopt-lite evaluate' measures them. Several seeds give mean ±
standard deviation. Seconds are those of training, without loading and preparing weights.

"default" is what lopt-lite does when nothing is said, and "default-half" what it does with a last block of half the
layers. The other names say what is trained, and its learning rate: "end-to-end" all layers at once, "frozen" the second
half of them and "larger" the last three quarters, with the others left as they are. Then they may say: "longer", half
as many passes again over the data (rounded down); and what the last block is held by, nothing unless it is said:
"anchor", the default anchor; "retain", one of the weight that follows, or 1; "tokens-8", of at most so many tokens an
example; "answers", on the untouched model's own answers. "steps-69" at the end of any name: so many optimiser steps, in
place of passes over the data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.questions import (
    DEMO_MODEL,
    HELD_OUT,
    INSTRUCTIONS,
    TRAIN,
    bare_numbers,
    first_lines,
    require_model,
    rewritten,
    tiny_model,
    tiny_questions,
)
from benchmarks.report import Bench, parser
from lopt_lite import TrainSettings, files

NAME = "recipe"

_FULL = {"tune": "full", "lr": 2e-5}
_PLAIN: dict[str, dict[str, Any]] = {
    "end-to-end-1e-4": {"blocks": 1, "lr": 1e-4},
    "end-to-end-2e-4": {"blocks": 1, "lr": 2e-4},
    "end-to-end-4e-4": {"blocks": 1, "lr": 4e-4},
    "end-to-end-8e-4": {"blocks": 1, "lr": 8e-4},
    "end-to-end-13e-4": {"blocks": 1, "lr": 13e-4},
    "end-to-end-16e-4": {"blocks": 1, "lr": 16e-4},
    "end-to-end-26e-4": {"blocks": 1, "lr": 26e-4},
    "end-to-end-40e-4": {"blocks": 1, "lr": 40e-4},
    "frozen-4e-4": {"objective": "none", "lr": 4e-4, "last_share": 1 / 2},
    "frozen-8e-4": {"objective": "none", "lr": 8e-4, "last_share": 1 / 2},
    "frozen-13e-4": {"objective": "none", "lr": 13e-4, "last_share": 1 / 2},
    "frozen-16e-4": {"objective": "none", "lr": 16e-4, "last_share": 1 / 2},
    "larger-4e-4": {"objective": "none", "lr": 4e-4, "last_share": 3 / 4},
    "larger-8e-4": {"objective": "none", "lr": 8e-4, "last_share": 3 / 4},
    "larger-13e-4": {"objective": "none", "lr": 13e-4, "last_share": 3 / 4},
    "larger-16e-4": {"objective": "none", "lr": 16e-4, "last_share": 3 / 4},
    "larger-26e-4": {"objective": "none", "lr": 26e-4, "last_share": 3 / 4},
    "reconstruct-4e-4": {"objective": "reconstruct", "lr": 4e-4},
    "reconstruct-8e-4": {"objective": "reconstruct", "lr": 8e-4},
    "match-4e-4": {"objective": "match", "lr": 4e-4, "lr_early": 4e-4},
    "joint-2e-4": {"schedule": "joint", "objective": "reconstruct", "lr": 2e-4},
    "full-end-to-end": {"blocks": 1, **_FULL},
    "full-frozen": {"objective": "none", "last_share": 1 / 2, **_FULL},
    "full-reconstruct": {"objective": "reconstruct", **_FULL},
    "full-joint": {"schedule": "joint", "objective": "reconstruct", **_FULL},
}

#: Trains the LM head itself, through which the anchor compares.
_NO_ANCHOR = ("full-joint",)
_ANCHORS: dict[str, dict[str, Any]] = {
    "": {"retain": 0.0},
    "-anchor": {},
    "-anchor-tokens-8": {"retain_tokens": 8},
    "-retain-0.3": {"retain": 0.3},
    "-retain": {"retain": 1.0},
    "-retain-3": {"retain": 3.0},
    "-retain-3-tokens-8": {"retain": 3.0, "retain_tokens": 8},
    "-retain-6": {"retain": 6.0},
    "-answers-0.3": {"retain": 0.3, "retain_answers": 64},
    "-answers": {"retain": 1.0, "retain_answers": 64},
}

#: Ending of a recipe's name -> the passes over the data, for one of the others.
_PASSES = {"": 1.0, "-longer": 1.5}

#: Name -> options of ``lopt-lite train``, and ``passes``; ``last_share`` is the last block's share of the layers.
RECIPES: dict[str, dict[str, Any]] = {
    f"{name}{longer}{anchor}": {**options, **weight, "passes": passes}
    for longer, passes in _PASSES.items()
    for anchor, weight in _ANCHORS.items()
    for name, options in _PLAIN.items()
    # By default, these have no anchor.
    if not ("retain" not in weight and name.startswith(("end-to-end", "joint", "full-end-to-end")))
    if not (weight.get("retain") != 0 and name in _NO_ANCHOR)
}
_DEFAULTS: dict[str, dict[str, Any]] = {"default": {}, "default-half": {"last_share": 1 / 2}}
RECIPES |= {
    f"{name}{longer}": {**options, "passes": passes}
    for longer, passes in _PASSES.items()
    for name, options in _DEFAULTS.items()
}
_NAMES = (
    f"{', '.join((*_DEFAULTS, *_PLAIN))}, each with {' or '.join(e for e in _PASSES if e)}, then (but for the "
    f"defaults) with {' or '.join(e for e in _ANCHORS if e)}, and then with -steps-N at its end"
)
#: What comes before a number of steps at the end of a name.
_STEPS = "-steps-"
_QUICK = ("end-to-end-4e-4", "frozen-8e-4", "default-half-steps-3")


@dataclass(frozen=True)
class Probe:
    """A task, and what is measured after training on it.

    Attributes
    ----------
    epochs:
        Passes over the data, where the command line does not say.
    train:
        The data set to train on.
    measured:
        Column of the table, and the data set whose loss it shows; the first is the task.
    """

    title: str
    epochs: int
    train: str
    measured: dict[str, str]


_UNRELATED = {"instructions": "instructions"}
_KNOWN = {"worked solutions": "held-out-worked", **_UNRELATED}
PROBES = {
    "worked": Probe("Worked solutions", 2, "worked", {"task": "held-out-worked", **_UNRELATED}),
    "numbers": Probe("Bare numbers", 3, "numbers", {"task": "held-out-numbers", **_KNOWN}),
    "capitals": Probe("Solutions in capitals", 2, "capitals", {"task": "held-out-capitals", **_KNOWN}),
    "backwards": Probe("Solutions backwards", 2, "backwards", {"task": "held-out-backwards", **_KNOWN}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one table per probe."""
    options = _options().parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    recipes = _QUICK if bench.quick else options.recipes.split(",") if options.recipes else ("default", *_PLAIN)
    for name in recipes:
        if _recipe(name) is None:
            raise SystemExit(f"there is no recipe {name!r}; there are {_NAMES}")
    grid = _Grid(bench, options)
    for name in options.probe.split(","):
        if name not in PROBES:
            raise SystemExit(f"there is no probe {name!r}; there are {', '.join(PROBES)}")
        grid.table(PROBES[name], recipes)
    return bench.finish()


def _options() -> argparse.ArgumentParser:
    made = parser(NAME, __doc__)
    made.add_argument("--model", default=str(DEMO_MODEL), help="the model (the demo's)")
    made.add_argument("--data", default=str(TRAIN), help="GSM8K examples to train on (the repository's)")
    made.add_argument("--held-out", default=str(HELD_OUT), help="held-out GSM8K examples (the repository's)")
    made.add_argument("--instructions", default=str(INSTRUCTIONS), help="unrelated examples (the repository's)")
    made.add_argument("--recipes", default="", help=f"names separated by commas: {_NAMES} (those without endings)")
    made.add_argument("--seeds", default="0", help="separated by commas (0)")
    made.add_argument("--examples", type=int, default=320, help="train on so many, the first ones (320)")
    made.add_argument("--held-out-examples", type=int, default=0, help="measure on so many, the first ones (all)")
    made.add_argument("--epochs", type=int, help="passes over the data (2 for worked solutions, 3 for bare numbers)")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--memory", default="auto", help="budget (auto)")
    made.add_argument(
        "--probe", default="worked,numbers", help=f"separated by commas: {', '.join(PROBES)} (worked,numbers)"
    )
    return made


def _recipe(name: str) -> dict[str, Any] | None:
    """Options of ``lopt-lite train``, and ``passes``; None for a name without meaning."""
    known, _, steps = name.partition(_STEPS)
    if known not in RECIPES or (_STEPS in name and not (steps.isdecimal() and int(steps))):
        return None
    return {**RECIPES[known], **({"max_steps": int(steps)} if steps else {})}


class _Grid:
    """The data of the probes, and the runs."""

    def __init__(self, bench: Bench, options: argparse.Namespace) -> None:
        self._bench, self._options = bench, options
        self._seeds = [int(seed) for seed in options.seeds.split(",")]
        if bench.quick:
            data = tiny_questions(bench.directory / "tiny.jsonl")
            options.model, options.epochs = tiny_model(bench.directory / "model"), 1
            options.data, options.held_out, options.instructions = data, data, data
        require_model(options.model)
        self._layers = int(json.loads((Path(options.model) / "config.json").read_text())["num_hidden_layers"])
        self._data, self._same = self._write_data()

    def _write_data(self) -> tuple[dict[str, Path], str]:
        """The data sets by name, and what tells them from others."""
        options, directory = self._options, self._bench.directory
        train = first_lines(options.data, options.examples, directory / "train.jsonl")
        held_out = first_lines(options.held_out, options.held_out_examples, directory / "held-out.jsonl")
        instructions = first_lines(options.instructions, 0, directory / "instructions.jsonl")
        data = {"instructions": instructions, "worked": train, "held-out-worked": held_out}
        for part, source in (("", train), ("held-out-", held_out)):
            data[f"{part}numbers"] = bare_numbers(source, directory / f"{part or 'train-'}numbers.jsonl")
            for name, write in (("capitals", str.upper), ("backwards", lambda answer: answer[::-1])):
                data[f"{part}{name}"] = rewritten(source, write, directory / f"{part or 'train-'}{name}.jsonl")
        digest = hashlib.sha256(Path(options.model).name.encode())
        for path in data.values():
            digest.update(path.read_bytes())
        return data, digest.hexdigest()[:8]

    def table(self, probe: Probe, recipes: Sequence[str]) -> None:
        """Run what has not been run yet, and add the probe's table to the report."""
        options = self._options
        epochs = options.epochs or probe.epochs
        untouched: dict[str, tuple[object, ...]] = {}
        rows: list[tuple[object, ...]] = []
        for name in recipes:
            found = [self._run(probe, name, seed, epochs) for seed in self._seeds]
            # Weights in 4 bits and whole ones are two models, with losses of their own before training.
            stored, before = found[0]["stored"], found[0]["before"]
            untouched[stored] = (f"untouched model, {stored}", *(f"{before[c]:.3f}" for c in probe.measured), "-")
            losses = [_mean_and_spread([run["after"][column] for run in found], 3) for column in probe.measured]
            rows.append((name, *losses, _mean_and_spread([run["seconds"] for run in found], 0)))
        self._bench.text(
            f"{probe.title}, {Path(options.model).name}: {epochs} epochs of at most {options.examples} examples, "
            f"batch {options.batch_size}, {len(self._seeds)} seed(s)."
        )
        self._bench.table(("recipe", *probe.measured, "s"), [*untouched.values(), *rows])

    def _run(self, probe: Probe, name: str, seed: int, epochs: int) -> dict[str, Any]:
        """One recipe on one probe with one seed: ``before`` and ``after`` by column, and ``seconds``."""
        options, recipe = self._options, _recipe(name)
        assert recipe is not None
        epochs = int(epochs * recipe.pop("passes"))
        duration = f"{recipe['max_steps']} steps" if "max_steps" in recipe else f"{epochs} epochs"
        if "last_share" in recipe:
            recipe["last_layers"] = int(self._layers * recipe.pop("last_share"))
        settings: dict[str, Any] = {
            "model": options.model,
            "data": str(self._data[probe.train]),
            **({} if "max_steps" in recipe else {"epochs": epochs}),
            "batch_size": options.batch_size,
            "memory": options.memory,
            "device": "cpu",
            "seed": seed,
            **recipe,
        }
        # The recipe itself is in the key: a name may come to mean something else.
        means = hashlib.sha256(repr(sorted(recipe.items())).encode()).hexdigest()[:8]
        key = f"{probe.title}, {name} {means}, seed {seed}, {duration}, batch {options.batch_size}, {self._same}"
        return self._bench.measure(key, lambda: self._train_and_evaluate(probe, settings))

    def _train_and_evaluate(self, probe: Probe, settings: dict[str, Any]) -> dict[str, Any]:
        bench, run = self._bench, self._bench.directory / "run"
        # All runs share the prepared weights; of each model and kind there is one store.
        quantize = TrainSettings(**settings).quantize
        store = bench.directory / f"store-{Path(settings['model']).name}-{quantize}"
        trained = bench.alone.run("train", output=str(run), store=str(store), fresh=True, quiet=True, **settings)
        before, after = {}, {}
        for column, name in probe.measured.items():
            outcome = bench.alone.run(
                "evaluate", run=str(run), data=str(self._data[name]), memory=settings["memory"], device="cpu"
            )["outcome"]
            before[column], after[column] = outcome["base_loss"], outcome["tuned_loss"]
        files.remove_tree(run)
        return {
            "before": before,
            "after": after,
            "stored": "nf4" if quantize == "nf4" else "not quantised",
            "seconds": trained["seconds"] - trained["timeline"]["ready_s"],
            "peak_bytes": trained["peak_bytes"],
            "settings": settings,
            "final_train_loss": trained["outcome"]["final_train_loss"],
        }


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
