"""The contenders of the comparison with end-to-end tuning: the same inputs for all, and what each makes of them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.baselines import measure, peft_loop, trl_sft
from benchmarks.baselines.common import Job, write_tokens
from benchmarks.questions import first_lines, require_model, tiny_model, tiny_questions
from benchmarks.report import Bench
from lopt_lite import files
from lopt_lite.journal import last_fact, read_facts
from lopt_lite.training.run_directory import RunPaths

TRL, PEFT = "(a) TRL SFTTrainer, QLoRA", "(b) plain PEFT loop"
BASELINES = {TRL: trl_sft.train, PEFT: peft_loop.train}

#: How close lopt-lite's own held-out losses must be to those that are measured for everyone.
_AGREEMENT = 0.02


class Study:
    """The shared inputs, and what each contender does with them."""

    def __init__(self, bench: Bench, options: argparse.Namespace) -> None:
        self._bench, self._options = bench, options
        if bench.quick:
            data = tiny_questions(bench.directory / "tiny.jsonl")
            options.model, options.epochs, options.batch_size = tiny_model(bench.directory / "model"), 1, 4
            options.data, options.held_out, options.retention = data, data, data
        require_model(options.model)
        self._jsonl = {
            "train": first_lines(options.data, options.examples, bench.directory / "train.jsonl"),
            "held-out": first_lines(options.held_out, options.held_out_examples, bench.directory / "held-out.jsonl"),
            "retention": first_lines(options.retention, 0, bench.directory / "retention.jsonl"),
        }
        self._tokens, self._same = self._tokenise()

    def _tokenise(self) -> tuple[dict[str, str], str]:
        """Files of token ids by lopt-lite's own loader, and what tells these inputs from others."""
        from transformers import AutoTokenizer

        from lopt_lite.data.load import load_dataset

        options, tokens, prints = self._options, {}, []
        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        for name, path in self._jsonl.items():
            dataset, _ = load_dataset(
                path, tokenizer, max_length=options.max_length, skip_bad_lines=False, on_event=lambda event: None
            )
            tokens[name] = write_tokens(path.with_suffix(".safetensors"), dataset)
            prints.append(dataset.fingerprint())
            if name == "train":
                self._examples, self._train_tokens = len(dataset), int(dataset.lengths.sum())
                self._answer_tokens = int(dataset.target_counts.sum())
            if name == "held-out":
                self._held_out_examples = len(dataset)
        shared = (Path(options.model).name, options.epochs, options.batch_size, options.seed, options.points, prints)
        self._bench.text(
            f"{Path(options.model).name}; {options.epochs} epochs of {self._examples} examples "
            f"({self._train_tokens:,} tokens, {self._answer_tokens:,} of them answers) in batches of "
            f"{options.batch_size}; {self._held_out_examples} held-out examples."
        )
        return tokens, hashlib.sha256(repr(shared).encode()).hexdigest()[:8]

    def can_run(self, name: str) -> bool:
        """Whether a baseline's library is there; the report says so if not."""
        if name != TRL or importlib.util.find_spec("trl") is not None:
            return True
        self._bench.text("(a) is left out: TRL is not installed (the extra 'benchmarks' has it).")
        return False

    def baseline(self, name: str) -> dict[str, Any]:
        """Train a baseline with each learning rate, and measure the best one thoroughly."""
        options = self._options
        fixed = options.lr_trl if name == TRL else options.lr_peft
        grid = [fixed] if fixed is not None else numbers(float, options.grid)
        grid = grid[:1] if self._bench.quick else grid
        tried: dict[float, dict[str, Any]] = {}
        for lr in grid:
            what = f"{name}, {lr:g}"
            trained = self._bench.measure(f"{what}, trained, {self._same}", partial(self._train, name, lr))
            tried[lr] = {**trained, "final": self._losses(what, [trained["points"][-1]["adapter"]])[0]}
        best = min(tried, key=lambda lr: tried[lr]["final"]["held-out"])
        trained, what = tried[best], f"{name}, {best:g}"
        measured = self._losses(f"{what}, on its way", [point["adapter"] for point in trained["points"]])
        curve = [
            (point["seconds"], found["held-out"]) for point, found in zip(trained["points"], measured, strict=True)
        ]
        figures = self.figures(what, trained["points"][-1]["adapter"])
        return {
            "name": name,
            "lr": best,
            "training_s": trained["seconds"],
            "total_s": trained["total_s"],
            "peak_bytes": trained["peak_bytes"],
            "curve": curve,
            "grid": {f"{lr:g}": run["final"]["held-out"] for lr, run in tried.items()},
            **figures,
        }

    def _train(self, name: str, lr: float) -> dict[str, Any]:
        options = self._options
        output = self._bench.directory / "runs" / f"{'trl' if name == TRL else 'peft'}-{lr:g}-{self._same}"
        files.remove_tree(output)
        job = Job(
            model=options.model,
            tokens=self._tokens["train"],
            output=str(output),
            lr=lr,
            epochs=options.epochs,
            batch_size=options.batch_size,
            max_length=options.max_length,
            seed=options.seed,
            points=1 if self._bench.quick else options.points,
        )
        return self._bench.alone.call(BASELINES[name], job=job)

    def lopt_lite(self, blocks: int, *, epochs: int | None = None) -> dict[str, Any]:
        """Train with lopt-lite, and measure the adapter; ``epochs``: other than the others' number."""
        options = self._options
        settings: dict[str, Any] = {
            "model": options.model,
            "data": str(self._jsonl["train"]),
            "validation": str(self._jsonl["held-out"]),
            "blocks": blocks,
            "epochs": epochs or options.epochs,
            "batch_size": options.batch_size,
            "max_length": options.max_length,
            "seed": options.seed,
            "memory": options.memory,
            "device": "cpu",
            **dict(map(_setting, options.set)),
        }
        if options.lr_lopt is not None:
            settings["lr"] = options.lr_lopt
        changed = [*([f"{epochs} epochs"] if epochs else []), *options.set]
        what = ", ".join([f"lopt-lite K={blocks}", f"memory {options.memory}", *changed])
        what += f", {options.lr_lopt:g}" if options.lr_lopt is not None else ""
        key = f"{what}, trained, {self._same}"
        output = self._bench.directory / "runs" / f"lopt-lite-{blocks}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        found = self._bench.measure(
            key, lambda: self._bench.alone.run("train", output=str(output), fresh=True, quiet=True, **settings)
        )
        decided = json.loads((output / "settings.json").read_text())["settings"]
        timeline = found["timeline"]
        ready_s, held_out = timeline["ready_s"], timeline["held_out"]
        total_s = found["seconds"] - timeline["measuring_s"]
        curve = [(timeline["last_block_s"] - ready_s, held_out[0]["loss"])]
        curve += [(point["seconds"] - ready_s, point["loss"]) for point in held_out[1:]]
        figures = self.figures(what, str(output / "adapter"))
        own, common = held_out[-1]["loss"], figures["held-out"]
        self._bench.expect(abs(own - common) <= _AGREEMENT, f"{what} says its loss is {own:.3f}, not {common:.3f}")
        return {
            "name": ", ".join([f"lopt-lite K={blocks}", *changed]),
            "blocks": blocks,
            "lr": _decided(output, "learning-rate", "lr", decided["lr"] or 0.0),
            "retain": _decided(output, "anchor-weight", "weight", decided["retain"] or 0.0),
            "training_s": total_s - ready_s,
            "total_s": total_s,
            "peak_bytes": found["peak_bytes"],
            "curve": curve,
            "residence": found["residence"],
            "steps": found["steps"],
            **figures,
        }

    def figures(self, what: str, adapter: str | None) -> dict[str, Any]:
        """Held-out loss, retention loss and exact matches of an adapter."""
        options, count = self._options, 2 if self._bench.quick else self._options.generate
        found: dict[str, Any] = dict(self._losses(what, [adapter], "held-out", "retention")[0])
        if count:
            asked = self._bench.measure(
                f"{what}, {count} questions, {self._same}",
                lambda: self._bench.alone.call(
                    measure.exact_matches,
                    model=options.model,
                    adapter=adapter,
                    data=str(self._jsonl["held-out"]),
                    questions=count,
                    max_new_tokens=8 if self._bench.quick else 256,
                ),
            )
            found["questions"], found["correct"] = asked["questions"], asked["correct"]
        return found

    def _losses(self, what: str, adapters: Sequence[str | None], *names: str) -> list[dict[str, float]]:
        tokens = {name: self._tokens[name] for name in names or ("held-out",)}
        found = self._bench.measure(
            f"{what}, loss on {' and '.join(tokens)}, {self._same}",
            lambda: self._bench.alone.call(
                measure.losses, model=self._options.model, adapters=list(adapters), tokens=tokens
            ),
        )
        losses: list[dict[str, float]] = found["losses"]
        return losses


def _decided(run: Path, fact: str, name: str, settled: float) -> float:
    """What the run found out before its first step, if it did; else what was settled before."""
    found = last_fact(read_facts(RunPaths(run).journal)[0], fact)
    return settled if found is None else float(found[name])


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise SystemExit(f"--set takes NAME=VALUE, not {text!r}")
    parsed = yaml.safe_load(value)
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):
            parsed = float(parsed)  # YAML takes 4e-4 for text
    return name.replace("-", "_"), parsed


def numbers(kind: Any, text: str) -> list[Any]:
    """The numbers of a list separated by commas."""
    return [kind(part) for part in text.split(",")]
