"""Runs that are cut off again and again: ``python -m tests.training.interruptions JOB.json OUTCOME.json``.

Starting Python with torch takes seconds, a tiny run hardly more than one. So that a cut falls into the run and not into
the imports, this process imports everything once, and each attempt is a fork of it that gives the command line to
``main``. The job says how to cut:

``kill``        SIGKILL from outside after a random time.
``SIGINT``, ``SIGTERM``
                that signal from outside after a random time.
``operations``  SIGKILL by itself just before or just after a random one of the calls that make files durable.

Every run that ends is compared by the test that wrote the job; here nothing is judged.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lopt_lite_cli.main import main

from lopt_lite.training import activation_cache
from lopt_lite.training import run as training_run
from tests.rig import residence

#: Attempts per cut that the job wants, before it is given up.
_ATTEMPTS_PER_CUT = 6


def make_everything_small(mode: str) -> None:
    """Several micro-batches a step and several shards a cache for a tiny model too; layers where ``mode`` says."""
    activation_cache._SHARD_BYTES = 12 << 10
    chosen = residence(mode, micro_batch_tokens=80)
    training_run.choose_residence = lambda *args, **kwargs: chosen


def attempt(arguments: list[str], log: Path, *, prepare: Callable[[], None], cut: Callable[[int], None]) -> int:
    """Fork a process that runs ``lopt-lite`` with ``arguments``; returns its exit code, or minus the signal.

    ``prepare`` is called in the child before it starts, ``cut`` in the parent, with the child's process id, when the
    child is about to start.
    """
    ready_reader, ready_writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 97
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            prepare()
            os.write(ready_writer, b"x")
            code = main(arguments)
        finally:
            os._exit(code)
    os.close(ready_writer)
    os.read(ready_reader, 1)
    os.close(ready_reader)
    cut(child)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def kill_at_operation(number: int, *, after: bool) -> None:
    """Let this process kill itself at call ``number`` of those that change durable state."""
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    for module, name in (
        (os, "fsync"),
        (os, "replace"),
        (os, "unlink"),
        (os, "mkdir"),
        (os, "rmdir"),
        (shutil, "rmtree"),
    ):
        setattr(module, name, counted(getattr(module, name)))


def lines(path: Path) -> int:
    """Whole lines of a file that may not be there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def nothing(*arguments: object) -> None:
    """Does nothing."""


def run_job(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Do the uninterrupted run, then runs with ``cuts`` cuts in all, each started again until it ends."""
    rng = random.Random(job["seed"])
    arguments = list(job["arguments"])
    started = time.monotonic()
    begun_s = 0.0

    def watch(child: int) -> None:
        nonlocal begun_s
        while lines(work / "reference" / "metrics.jsonl") == 0 and time.monotonic() - started < 60:
            time.sleep(0.002)
        begun_s = time.monotonic() - started

    code = attempt([*arguments, "--output", str(work / "reference")], work / "log", prepare=nothing, cut=watch)
    whole_s = time.monotonic() - started
    outcome: dict[str, Any] = {"reference": code, "seconds": whole_s, "runs": [], "codes": [], "places": []}

    def signal_later(number: int) -> Callable[[int], None]:
        # Mostly while it trains: a start takes long beside so short a run, and a resumed one starts faster.
        earliest_s = 0.01 if rng.random() < 0.25 else 0.5 * begun_s
        delay_s = rng.uniform(earliest_s, 0.95 * whole_s)

        def send(child: int) -> None:
            time.sleep(delay_s)
            os.kill(child, number)

        return send

    cuts, run = 0, 0
    for _ in range(job["cuts"] * _ATTEMPTS_PER_CUT):
        directory = work / f"run-{run}"
        prepare, cut = nothing, nothing
        if cuts < job["cuts"]:
            if job["how"] == "operations":
                number, after = rng.randint(1, job["most_operations"]), rng.random() < 0.5
                prepare = lambda number=number, after=after: kill_at_operation(number, after=after)  # noqa: E731
            else:
                number = signal.SIGKILL if job["how"] == "kill" else getattr(signal, job["how"])
                cut = signal_later(number)
        code = attempt([*arguments, "--output", str(directory)], work / "log", prepare=prepare, cut=cut)
        outcome["codes"].append(code)
        if code == 0:
            outcome["runs"].append(str(directory))
            run += 1
            if cuts >= job["cuts"]:
                break
        else:
            cuts += 1
            outcome["places"].append([lines(directory / name) for name in ("journal.jsonl", "metrics.jsonl")])
    outcome["cuts"] = cuts
    return outcome


def main_of_jobs(job_path: Path, outcome_path: Path) -> None:
    """Read the job, do it, write what came of it."""
    torch.set_num_threads(1)
    job = json.loads(job_path.read_text())
    make_everything_small(job["mode"])
    outcome_path.write_text(json.dumps(run_job(job, outcome_path.parent)))


if __name__ == "__main__":
    main_of_jobs(Path(sys.argv[1]), Path(sys.argv[2]))
