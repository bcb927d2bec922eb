"""What a run directory says of itself. Reads only, takes no lock, loads no model: safe while the run trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lopt_lite.journal import Fact, read_facts
from lopt_lite.locks import holder_pid
from lopt_lite.outcomes import BlockStatus, StatusOutcome
from lopt_lite.training.metrics import read_metrics
from lopt_lite.training.run_directory import RESULT_FACTS, RunPaths, read_settings

_RECENT_STEPS = 20


def status(run: str | Path) -> StatusOutcome:
    """What is done, what is next, and about how long is left (``lopt-lite status``).

    Raises
    ------
    RunDirectoryError
        The directory is no run.
    """
    paths = RunPaths(Path(run))
    content = read_settings(paths)
    facts, _ = read_facts(paths.journal)
    metrics = read_metrics(paths.metrics)
    pid = holder_pid(paths.root)
    finished = any(_last(facts, name) is not None for name in RESULT_FACTS)
    blocks = _blocks(content["settings"], facts, metrics)
    result = "model" if content["settings"].get("tune") == "full" else "adapter"
    before = _last(facts, "validation", epoch=0)
    after = _last(facts, "validation", epoch=content["settings"]["epochs"])
    losses = [m["loss"] for m in metrics if m.get("phase") == "train"]
    return StatusOutcome(
        run=str(run),
        state="done" if finished else "running" if pid is not None else "stopped",
        pid=pid,
        model=str(content["model"]["given"]),
        data=str(content["data"]["given"]),
        store_done=_last(facts, "store-ready") is not None,
        blocks=tuple(blocks),
        next="nothing, the run is done" if finished else _next(blocks, facts, result),
        last_loss=losses[-1] if losses else None,
        loss_before=before["loss"] if before else None,
        loss_after=after["loss"] if after else None,
        seconds_left=0.0 if finished else _seconds_left(blocks, metrics),
    )


def _last(facts: list[Fact], name: str, **match: Any) -> Fact | None:
    return next(
        (f for f in reversed(facts) if f["fact"] == name and all(f.get(k) == v for k, v in match.items())), None
    )


def _blocks(settings: dict[str, Any], facts: list[Fact], metrics: list[dict[str, Any]]) -> list[BlockStatus]:
    early = [name.strip() for name in str(settings["objective"]).split(",")]
    count = int(settings["blocks"])
    objectives = [*(early * (count - 1) if len(early) == 1 else early)[: count - 1], "task"]
    started = _last(facts, "started")
    per_epoch = math.ceil(started["examples"] / settings["batch_size"]) if started else 0
    blocks = []
    for index, objective in enumerate(objectives):
        fit_steps = per_epoch * settings["head_fit_epochs"] if objective == "reconstruct" else 0
        steps = 0 if objective == "none" else fit_steps + per_epoch * settings["epochs"]
        mine = [m for m in metrics if m.get("block") == index]
        step = mine[-1]["step"] + (fit_steps if mine[-1]["phase"] == "train" else 0) if mine else 0
        done = _last(facts, "block", block=index) is not None
        state = "done" if done else "training" if mine else "waiting"
        blocks.append(BlockStatus(block=index, objective=objective, state=state, step=step, steps=steps))
    return blocks


def _next(blocks: list[BlockStatus], facts: list[Fact], result: str) -> str:
    if _last(facts, "store-ready") is None:
        return "prepare the weights"
    for block in blocks:
        name = f"block {block.block + 1} of {len(blocks)}"
        if block.state != "done":
            return f"train {name} ({block.objective}), step {block.step} of {block.steps}"
        if block.block < len(blocks) - 1 and _last(facts, "cache", block=block.block + 1) is None:
            return f"cache the outputs of {name}"
    return f"write the {result}"


def _seconds_left(blocks: list[BlockStatus], metrics: list[dict[str, Any]]) -> float | None:
    """Steps still to do, at the pace of the newest ones."""
    recent = metrics[-_RECENT_STEPS:]
    if not recent:
        return None
    seconds = sum(m["tokens"] / m["tokens_per_s"] for m in recent) / len(recent)
    return seconds * sum(b.steps - b.step for b in blocks if b.state != "done")
