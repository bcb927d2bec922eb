"""Operations of lopt-lite (and other functions) in a process of their own, with its true peak of resident memory.

The peak is the system's own (``VmHWM``), read before each time that the run itself begins it anew: ``ru_maxrss`` would
also count the process that started this one. Where the system keeps none, it is the largest size seen at events.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lopt_lite.events import Event

#: What a quick run's processes share by being forked from one that has imported it.
_PRELOADED = ["benchmarks.alone", "lopt_lite.training.run", "lopt_lite.results.evaluate", "transformers", "peft"]


class FailedAlone(RuntimeError):
    """The operation raised an error, or its process died; the message is what it said."""


class Refused(FailedAlone):
    """The budget is too small. ``needs_mib`` is the smallest that the run says it can work with."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        found = re.search(r"at least --memory ([\d,]+) ?MiB", message)
        if found is None:
            raise ValueError(f"the refusal names no budget: {message}")
        self.needs_mib = int(found[1].replace(",", ""))


class Killed(FailedAlone):
    """The process killed itself, as it was told to."""


@dataclass(frozen=True)
class Alone:
    """How processes are made.

    Attributes
    ----------
    threads:
        Threads that PyTorch computes with.
    warm:
        Fork them from one process that has imported everything (quick: for trying the scripts) instead of starting
        each anew. Forked processes share pages, so peaks and predictions are a little off.
    """

    threads: int = 2
    warm: bool = False

    def run(self, operation: str, *, kill_after_step: int | None = None, **settings: Any) -> dict[str, Any]:
        """Run ``lopt_lite.OPERATION`` to its end.

        Parameters
        ----------
        kill_after_step:
            Let a training process kill itself (SIGKILL) as soon as a checkpoint of the last block at or after this
            step is durable.

        Returns
        -------
        dict
            ``peak_bytes`` of resident memory, ``start_bytes`` of it once everything was imported, ``seconds``,
            ``outcome``, ``steps`` (of ``block``, ``phase``, ``seconds``, ``loss``), and for a training ``residence``,
            the journal's fact, and ``timeline``, see :class:`_Timeline`.

        Raises
        ------
        Refused, Killed, FailedAlone
            See there.
        """
        return self._start(operation, settings, {"kill_after_step": kill_after_step})

    def decide(self, **settings: Any) -> dict[str, Any]:
        """What a training with these settings decides on (the journal's fact ``residence``), without training.

        Raises
        ------
        Refused, FailedAlone
            See there.
        """
        found: dict[str, Any] = self._start("train", settings, {"only_decide": True})["residence"]
        return found

    def call(self, function: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
        """What ``function``, which a module defines at its top, returns for ``arguments`` in a process of its own.

        Raises
        ------
        FailedAlone
            It raised an error (which the process has printed).
        """
        return self._start("call", arguments, {"function": function})

    def smallest_mib(self, **settings: Any) -> int:
        """The smallest budget that a training with these settings says it can work with, in MiB."""
        try:
            self.decide(**{**settings, "memory": "1MiB"})
        except Refused as refusal:
            return refusal.needs_mib
        raise FailedAlone("a budget of 1 MiB was accepted")

    def _start(self, operation: str, settings: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
        context: Any = multiprocessing.get_context("forkserver" if self.warm else "spawn")
        if self.warm:
            context.set_forkserver_preload(_PRELOADED)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, operation, settings, self.threads, how))
        process.start()
        sender.close()
        try:
            answer: dict[str, Any] = receiver.recv()
        except EOFError:
            answer = {}
        finally:
            receiver.close()
            process.join()
        if process.exitcode == -signal.SIGKILL and how.get("kill_after_step") is not None:
            raise Killed("killed after a checkpoint")
        if not answer:
            raise FailedAlone(f"the process ended with exit code {process.exitcode} and no answer")
        if "error" in answer:
            raise (Refused if answer["error"] == "DoesNotFitError" else FailedAlone)(answer["message"])
        return answer


class _Decided(BaseException):
    """Everything is decided, and nothing is trained yet."""


def _child(sender: Connection, operation: str, settings: dict[str, Any], threads: int, how: dict[str, Any]) -> None:
    # Imported here: the parent of these processes needs none of it.
    import torch

    import lopt_lite
    from lopt_lite.errors import LoptError

    # Progress bars of libraries are nobody's business here.
    os.environ.setdefault("TQDM_DISABLE", "1")
    torch.set_num_threads(threads)
    if operation == "call":
        with contextlib.closing(sender):
            sender.send(how["function"](**settings))
        return
    kind = {"train": lopt_lite.TrainSettings, "evaluate": lopt_lite.EvaluateSettings}[operation]
    run = getattr(lopt_lite, operation)
    try:
        sender.send(_measured(run, kind(**settings), settings, how))
    except LoptError as error:
        sender.send({"error": type(error).__name__, "message": str(error)})
    finally:
        sender.close()


def _measured(run: Callable[..., Any], settings: Any, given: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    from lopt_lite.events import CheckpointSaved, RunStarted, Step

    peak = _Peak()
    steps: list[dict[str, Any]] = []
    last_block = given.get("blocks", 2) - 1
    timeline = _Timeline(last_block)
    kill_after_step = how.get("kill_after_step")

    def listen(event: Event) -> None:
        peak.look()
        timeline.note(event, time.monotonic() - started)
        if isinstance(event, RunStarted) and how.get("only_decide"):
            raise _Decided
        if isinstance(event, Step):
            took_s = event.tokens / event.tokens_per_s
            steps.append({"block": event.block, "phase": event.phase, "seconds": took_s, "loss": event.loss})
        if isinstance(event, CheckpointSaved) and kill_after_step is not None:
            in_training = bool(steps) and steps[-1]["phase"] == "train"
            if event.block == last_block and in_training and event.step >= kill_after_step:
                os.kill(os.getpid(), signal.SIGKILL)

    start_bytes = peak.look()
    started = time.monotonic()
    try:
        outcome = run(settings, listen).to_json()
    except _Decided:
        outcome = None
    result: dict[str, Any] = {
        "peak_bytes": peak.look(),
        "start_bytes": start_bytes,
        "seconds": time.monotonic() - started,
        "steps": steps,
        "outcome": outcome,
    }
    if "output" in given:
        result["residence"] = _residence(Path(given["output"]))
        result["timeline"] = timeline.to_json()
    return result


def _residence(run: Path) -> dict[str, Any]:
    from lopt_lite.journal import read_facts

    facts, _ = read_facts(run / "journal.jsonl")
    return next(fact for fact in facts if fact["fact"] == "residence")


class _Timeline:
    """When a training did what: seconds from its start, without those in which held-out loss was measured.

    ``ready_s``: model and data were loaded, and weights prepared. ``last_block_s``: the last block's training began.
    ``held_out``: ``epoch``, ``loss`` and ``seconds`` of each measurement. ``measuring_s``: what they took together.
    """

    def __init__(self, last_block: int) -> None:
        self._last_block = last_block
        self._values: dict[str, Any] = {"ready_s": 0.0, "last_block_s": None, "held_out": [], "measuring_s": 0.0}
        self._training_until_s = 0.0

    def note(self, event: Event, now_s: float) -> None:
        """Take an event into account that came ``now_s`` seconds after the start."""
        from lopt_lite.events import BlockStarted, Progress, RunStarted, Validation

        values = self._values
        if isinstance(event, Progress) and event.task.startswith("held-out loss"):
            return
        if isinstance(event, Validation):
            values["measuring_s"] += now_s - self._training_until_s
            seconds = now_s - values["measuring_s"]
            values["held_out"].append({"epoch": event.epoch, "loss": event.loss, "seconds": seconds})
        elif isinstance(event, RunStarted):
            values["ready_s"] = now_s
        elif isinstance(event, BlockStarted) and event.block == self._last_block and values["last_block_s"] is None:
            values["last_block_s"] = now_s - values["measuring_s"]
        self._training_until_s = now_s

    def to_json(self) -> dict[str, Any]:
        """The plain values."""
        return self._values


class _Peak:
    """The largest resident size of this process, whoever lets the system forget it."""

    def __init__(self) -> None:
        from lopt_lite import host_memory

        self._read = host_memory.peak_rss_bytes
        self._bytes = 0
        forget = host_memory.forget_peak

        def note_and_forget() -> None:
            self.look()
            forget()

        host_memory.forget_peak = note_and_forget

    def look(self) -> int:
        """Read the peak now; returns the largest so far."""
        self._bytes = max(self._bytes, self._read())
        return self._bytes
