"""Tiny trainings that are killed, or whose disk fails, at every operation on files and at random moments.

Each training is first run undisturbed, and what it does to files below its directory is recorded: each file opened to
be written, write, fsync, rename, directory made, file or directory deleted. Then one training is killed (SIGKILL)
just before and one just after each of these operations (of writes, a few of each kind); of the trainings after the
first, one operation of each kind. One operation of each kind also fails with each error (of the trainings after the
first, with one of them; disk full: what still fits is written first). Others are killed at random times. Each is
started again with the same command, and what it leaves is compared with the undisturbed one: bytes of adapter or model
and of the store, losses, facts of the journal, files. A failing operation must also lead to the right exit code and
message.

    python -m benchmarks.crash                 # an hour
    python -m benchmarks.crash --most 1000     # all operations of all trainings: two hours
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import Bench, parser

NAME = "crash"
#: Kinds of training, by name: options and way of working, see tests/training/interruptions.py.
CASES = ("lora", "lora in float32", "full", "joint, anchored")
_MOST_WRITES, _MOST_FAULTS, _MOST_OF_OTHERS = 6, 1, 1
#: Tries that one measurement makes, so that a start that is cut off loses few of them.
_PORTION = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when anything came out otherwise."""
    made = parser(NAME, __doc__)
    made.add_argument("--cases", default=";".join(CASES), help="kinds of training, separated by semicolons (all)")
    made.add_argument("--most", type=int, help="kill at most at so many operations of a kind")
    made.add_argument("--random", type=int, default=50, help="kills at random times for each kind of training (50)")
    options = made.parse_args(arguments)
    bench = Bench.start(NAME, __doc__, options, arguments)
    cases = [CASES[1]] if bench.quick else options.cases.split(";")
    most = 1 if bench.quick else options.most
    kills = 1 if bench.quick else options.random
    rows = []
    for case in cases:
        undisturbed = partial(bench.alone.call, _reference, directory=str(bench.directory), case=case)
        operations = bench.measure(f"{case}, undisturbed", undisturbed)["operations"]
        thorough = case == CASES[0] or most is not None
        most_of_case = most if thorough else _MOST_OF_OTHERS
        for what, tries in _tries(operations, most_of_case, every_fault=thorough, quick=bench.quick).items():
            found: Counter[str] = Counter()
            for begin in range(0, len(tries), _PORTION):
                portion = tries[begin : begin + _PORTION]
                key = f"{case}, {what}, {begin} to {begin + len(portion)} of {len(tries)}"
                found += _judged(bench, key, _try, case=case, tries=portion)
            rows.append(_row(case, what, len({operation.kind for operation, _ in tries}), found))
        found = _judged(bench, f"{case}, {kills} random kills", _kill, case=case, kills=kills)
        rows.append(_row(case, "killed at random times", "any", found))
    bench.table(("training", "disturbed", "kinds of places", "tries", "cut off", "came out otherwise"), rows)
    return bench.finish()


def _row(case: str, what: str, kinds: object, found: Counter[str]) -> tuple[object, ...]:
    return case, what, kinds, found["tries"], found["cut"], found["wrong"]


def _judged(bench: Bench, key: str, function: Callable[..., dict[str, Any]], **arguments: Any) -> Counter[str]:
    result = bench.measure(key, partial(bench.alone.call, function, directory=str(bench.directory), **arguments))
    for problem in result["problems"]:
        bench.expect(False, problem)
    return Counter(tries=result["tries"], cut=result["cut"], wrong=len(result["problems"]))


def _tries(operations: list[list[Any]], most: int | None, *, every_fault: bool, quick: bool) -> dict[str, list[Any]]:
    """(operation, how to disturb it) for each group of tries.

    ``every_fault``: each operation that fails does so with every error, else with one of them in turn.
    """
    from tests.training.interruptions import FAULTS, some_of_each_kind
    from tests.training.operations import Operation

    known = [Operation(*values) for values in operations]
    if quick:
        known = known[:: len(known) // 2]
    rng = random.Random(0)
    boundaries = [operation for operation in known if operation.name != "write"]
    writes = [operation for operation in known if operation.name == "write"]
    chosen = some_of_each_kind(boundaries, len(boundaries), rng, most_of_a_kind=most)
    most_writes = _MOST_WRITES if most is None else min(most, _MOST_WRITES)
    chosen += some_of_each_kind(writes, len(writes), rng, most_of_a_kind=most_writes)
    failing = some_of_each_kind(known, len(known), rng, most_of_a_kind=_MOST_FAULTS)
    errors = list(FAULTS)
    return {
        "killed before and after": [(operation, how) for operation in chosen for how in ("before", "after")],
        "failing": [
            (operation, how)
            for number, operation in enumerate(failing)
            for how in (errors if every_fault else [errors[number % len(errors)]])
        ],
    }


def _prepare(directory: str, case: str) -> tuple[list[str], Path]:
    """The command's arguments, and a directory to work in; this process is made ready to fork such trainings."""
    import torch

    from tests.tiny_models import make_data, make_model
    from tests.training import interruptions as runs

    ways = {
        "lora": (runs.NF4, "streamed"),
        "lora in float32": (runs.FLOAT, "resident"),
        "full": (runs.FULL, "offloaded"),
        "joint, anchored": (runs.JOINT, "streamed"),
    }
    options, mode = ways[case]
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    runs.make_everything_small(mode)
    model, data = Path(directory, "model"), Path(directory, "data.jsonl")
    if not data.exists():
        make_model(model, "llama", dtype=torch.bfloat16)
        # Few, so that every operation can be tried; two of them are held out.
        make_data(data, 10)
    work = Path(directory) / case.replace(" ", "-").replace(",", "")
    work.mkdir(exist_ok=True)
    return ["train", str(model), str(data), *runs.SHORT_RECIPE, *options, "--checkpoint-every", "0s"], work


def _reference(directory: str, case: str) -> dict[str, Any]:
    from lopt_lite import files
    from tests.training.interruptions import reference_operations

    arguments, work = _prepare(directory, case)
    files.remove_tree(work)
    work.mkdir()
    operations = reference_operations(arguments, work)
    return {"operations": [[one.name, one.path, one.times] for one in operations]}


def _try(directory: str, case: str, tries: list[tuple[Any, str]]) -> dict[str, Any]:
    from lopt_lite import files
    from tests.training.interruptions import FAULTS, is_harmless, try_operation
    from tests.training.same_runs import differences

    arguments, work = _prepare(directory, case)
    problems, cut = [], 0
    for operation, how in tries:
        files.remove_tree(work / "run")
        (work / "run.log").unlink(missing_ok=True)
        one = try_operation(arguments, work / "run", operation, how)
        cut += one.codes[0] != 0
        wrong = differences(one.run, work / "reference") if one.codes[1] == 0 else [f"exit codes {one.codes}"]
        if how in FAULTS and not (one.codes[0] == 0 and is_harmless(operation, how)):
            code, words = FAULTS[how]
            if one.codes[0] != code or words not in one.said or "Traceback" in one.said:
                wrong.append(f"exit code {one.codes[0]}, saying {one.said[-300:]!r}")
        elif how not in FAULTS and one.codes[0] not in (0, -signal.SIGKILL):
            wrong.append(f"exit code {one.codes[0]}")
        problems += [f"{case}, {how} at {operation}: {'; '.join(wrong)}"] if wrong else []
    return {"tries": len(tries), "cut": cut, "problems": problems}


def _kill(directory: str, case: str, kills: int) -> dict[str, Any]:
    from lopt_lite import files
    from tests.training.interruptions import run_job
    from tests.training.same_runs import differences

    arguments, work = _prepare(directory, case)
    files.remove_tree(work / "random")
    (work / "random").mkdir()
    job = {"arguments": arguments, "how": "kill", "cuts": kills, "seed": 0}
    outcome = run_job(job, work / "random")
    problems = [
        f"{case}, killed at random: {run} has {wrong}"
        for run in map(Path, outcome["runs"])
        if (wrong := differences(run, work / "random" / "reference"))
    ]
    problems += [f"{case}: exit code {code}" for code in outcome["codes"] if code not in (0, -signal.SIGKILL)]
    files.remove_tree(work / "random")
    return {"tries": len(outcome["codes"]), "cut": outcome["cuts"], "problems": problems}


if __name__ == "__main__":
    sys.exit(main())
