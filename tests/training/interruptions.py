"""Runs that are cut off again and again: ``python -m tests.training.interruptions``, given jobs on standard input.

Starting Python with torch takes seconds, a tiny run hardly more than one. So that a cut falls into the run and not into
the imports, this process imports everything once, and each attempt is a fork of it that gives the command line to
``main``. A line of input names a job's file; when the job is done, ``outcome.json`` lies beside it and a line is
written. The job says how to cut:

``kill``        SIGKILL from outside after a random time.
``SIGINT``, ``SIGTERM``
                that signal from outside after a random time.

Or an operation on files (see ``operations.py``) is a process's last, or fails: :func:`run_tries`.

Every run that ends is compared by the test that wrote the job; here nothing is judged.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lopt_lite_cli.main import main

from lopt_lite.training import activation_cache, memory_choice
from tests.rig import residence
from tests.training.operations import Operation, fail_at, kill_at, record, recorded, watch

#: Options of the small runs that are interrupted, and more for each kind of run.
RECIPE = ["--blocks", "3", "--epochs", "2", "--batch-size", "4", "--validation", "0.2"]
#: Options of those that are disturbed at single operations on files, many times over.
SHORT_RECIPE = ["--blocks", "3", "--batch-size", "4", "--validation", "0.2"]
NF4 = [
    "--quantize",
    "nf4",
    "--dtype",
    "bfloat16",
    "--objective",
    "match,reconstruct",
    "--lora-dropout",
    "0.1",
    "--retain",
    "0",
]
FLOAT = [
    "--quantize",
    "none",
    "--dtype",
    "float32",
    "--objective",
    "none,reconstruct",
    "--lora-dropout",
    "0.1",
    "--retain",
    "0",
]
JOINT = ["--quantize", "nf4", "--schedule", "joint", "--retain", "1", "--retain-tokens", "4"]
FULL = [
    "--tune",
    "full",
    "--dtype",
    "bfloat16",
    "--objective",
    "none,reconstruct",
    "--lr",
    "1e-3",
    "--retain-tokens",
    "4",
]

#: What an error of an operation has to lead to: the exit code, and words of the message.
FAULTS = {"ENOSPC": (4, "the disk is full"), "EIO": (5, "Input/output error"), "EROFS": (5, "Read-only file system")}

#: Attempts per cut that the job wants, before it is given up.
_ATTEMPTS_PER_CUT = 6
_KILLS = ("before", "after")


def make_everything_small(mode: str) -> None:
    """Several micro-batches a step and several shards a cache for a tiny model too; layers where ``mode`` says."""
    activation_cache._SHARD_BYTES = 12 << 10
    chosen = residence(mode, micro_batch_tokens=80)
    memory_choice.choose_residence = lambda *args, **kwargs: chosen


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
        cut: Callable[[int], None] = nothing
        if cuts < job["cuts"]:
            number = signal.SIGKILL if job["how"] == "kill" else getattr(signal, job["how"])
            cut = signal_later(number)
        code = attempt([*arguments, "--output", str(directory)], work / "log", prepare=nothing, cut=cut)
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


@dataclass(frozen=True)
class Try:
    """A run whose first process was ended by, or failed at, an operation, and which then was started again.

    ``said``: what the first process printed. ``codes``: exit codes (or minus the signal) of both.
    """

    operation: Operation
    how: str
    run: Path
    codes: tuple[int, int]
    said: str


def reference_operations(arguments: list[str], work: Path) -> list[Operation]:
    """Do the uninterrupted run, ``work``/reference; returns what it did to files."""
    run, into = work / "reference", work / "operations"
    code = attempt(
        [*arguments, "--output", str(run)], work / "log", prepare=lambda: watch(run, record(into)), cut=nothing
    )
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with {code}: {(work / 'log').read_text()}")
    return recorded(into)


def some_of_each_kind(
    operations: list[Operation], count: int, rng: random.Random, *, most_of_a_kind: int | None = None
) -> list[Operation]:
    """``count`` operations, of as many kinds as can be."""
    kinds: dict[str, list[Operation]] = {}
    for operation in rng.sample(operations, len(operations)):
        of_kind = kinds.setdefault(operation.kind, [])
        if most_of_a_kind is None or len(of_kind) < most_of_a_kind:
            of_kind.append(operation)
    rounds = zip_longest(*rng.sample(list(kinds.values()), len(kinds)))
    return [operation for round_ in rounds for operation in round_ if operation is not None][:count]


def try_operation(arguments: list[str], run: Path, operation: Operation, how: str) -> Try:
    """One run: disturbed at ``operation``, then started again.

    ``how`` is ``before`` or ``after`` (the process is killed there), or the name of an error that the operation fails
    with: ``ENOSPC``, ``EIO``, ``EROFS``.
    """
    log = run.with_name(f"{run.name}.log")
    around = kill_at(operation, after=how == "after") if how in _KILLS else fail_at(operation, getattr(errno, how))
    arguments = [*arguments, "--output", str(run)]
    first = attempt(arguments, log, prepare=lambda: watch(run, around), cut=nothing)
    said = log.read_text()
    return Try(operation, how, run, (first, attempt(arguments, log, prepare=nothing, cut=nothing)), said)


def is_harmless(operation: Operation, how: str) -> bool:
    """Whether a failing ``operation`` need not end a run.

    Making a directory that is there already, and forgetting whose a lock was that nobody holds any more.
    """
    made_before = how == "EIO" and operation.name == "mkdir" and operation.times > 0
    return made_before or (operation.name == "unlink" and Path(operation.path).name == "lock.pid")


def run_tries(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Do the uninterrupted run, then ``tries`` runs disturbed at operations of as many kinds as can be."""
    rng = random.Random(job["seed"])
    operations = reference_operations(job["arguments"], work)
    tries = []
    for number, operation in enumerate(some_of_each_kind(operations, job["tries"], rng)):
        how = job["how"][number % len(job["how"])]
        tries.append(try_operation(job["arguments"], work / f"run-{number}", operation, how))
    return {"operations": len(operations), "tries": [{**asdict(one), "run": str(one.run)} for one in tries]}


def do_jobs(job_paths: Iterable[str], tell: Callable[[str], object]) -> None:
    """Read each job, do it, write what came of it beside it, and tell."""
    torch.set_num_threads(1)
    for line in job_paths:
        path = Path(line.strip())
        job = json.loads(path.read_text())
        make_everything_small(job["mode"])
        outcome = run_tries(job, path.parent) if "tries" in job else run_job(job, path.parent)
        (path.parent / "outcome.json").write_text(json.dumps(outcome))
        tell("done")


if __name__ == "__main__":
    do_jobs(sys.stdin, partial(print, flush=True))
