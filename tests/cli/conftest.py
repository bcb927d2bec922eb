"""The command line with stand-ins for the package's operations."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from lopt_lite_cli.main import main

import lopt_lite
from lopt_lite import outcomes


class Result(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as one JSON document (an error if it is anything else)."""
        return json.loads(self.out)


@pytest.fixture
def lopt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run ``lopt-lite`` in this process."""

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Replace an operation; the list returned collects the settings that it is called with."""

    def install(name: str, outcome: Any = None, events: tuple[Any, ...] = (), error: Any = None) -> list[Any]:
        calls: list[Any] = []

        def operation(settings: Any, on_event: Any = lambda event: None) -> Any:
            calls.append(settings)
            for event in events:
                on_event(event)
            if error is not None:
                raise error
            return outcome

        monkeypatch.setitem(lopt_lite.__dict__, name, operation)
        return calls

    return install


@pytest.fixture
def trained() -> outcomes.TrainOutcome:
    """The outcome of a run with validation."""
    return outcomes.TrainOutcome(
        run="runs/my demo",
        adapter="runs/my demo/adapter",
        already_done=False,
        examples=320,
        steps=80,
        loss_before=1.5,
        loss_after=1.25,
        final_train_loss=1.2,
        seconds=75.0,
        device_peak_bytes=3 * 2**29,
        predicted_bytes=0,
    )
