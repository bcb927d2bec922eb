"""Reasons to stop: signals, a number of hours, a time of day."""

from __future__ import annotations

import datetime
import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from lopt_lite.errors import StoppedError
from lopt_lite.training import stopping
from lopt_lite.training.stopping import Stopper


@pytest.fixture(autouse=True)
def a_terminal_that_can_hang_up() -> Iterator[None]:
    """The suite may itself run under ``nohup``, where SIGHUP is ignored and rightly stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class _Clock:
    """A monotonic clock that the test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: self.now_s))


class _Wall:
    """A wall clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: str) -> None:
        self.set(now)
        wall = self

        class FakeDatetime(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return wall.now

        fake = SimpleNamespace(datetime=FakeDatetime, timedelta=datetime.timedelta, time=datetime.time)
        monkeypatch.setattr(stopping, "datetime", fake)

    def set(self, now: str) -> None:
        self.now = datetime.datetime.fromisoformat(now)


def test_without_limits_and_signals_there_is_no_reason():
    with Stopper() as stop:
        assert stop.reason(needed_s=1e9) is None
        stop.check()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop_and_is_named(number):
    with Stopper() as stop:
        os.kill(os.getpid(), number)
        assert stop.reason() == f"stopped by {number.name}"
        with pytest.raises(StoppedError, match=number.name) as caught:
            stop.check()
    assert caught.value.exit_code == 75
    assert "same command" in caught.value.fix


def test_a_second_ctrl_c_interrupts_at_once():
    with Stopper() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason() == "stopped by SIGINT"


def test_a_second_sigterm_changes_nothing():
    with Stopper() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason() == "stopped by SIGTERM"


def test_handlers_are_put_back_also_after_an_error():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(ValueError), Stopper():
        assert all(signal.getsignal(n) != handler for n, handler in before.items())
        raise ValueError
    assert {n: signal.getsignal(n) for n in before} == before


def test_nohup_is_respected():
    """``nohup`` starts a program with SIGHUP ignored: the run must outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopper() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason() is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with Stopper(max_hours=1) as stop:
            seen.append((stop.reason(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_max_hours_counts_from_the_start(monkeypatch):
    clock = _Clock(monkeypatch)
    stop = Stopper(max_hours=1.5)
    clock.now_s += 1.5 * 3600 - 1
    assert stop.reason() is None
    assert stop.reason(needed_s=0.5) is None
    assert stop.reason(needed_s=2) == "stopped after --max-hours 1.5", "what would end too late must not begin"
    clock.now_s += 1
    with pytest.raises(StoppedError, match=r"--max-hours 1\.5"):
        stop.check()


def test_a_deadline_later_today_is_todays(monkeypatch):
    wall = _Wall(monkeypatch, "2026-03-04 01:00:00")
    stop = Stopper(deadline="07:30")
    wall.set("2026-03-04 07:29:50")
    assert stop.reason() is None
    assert stop.reason(needed_s=20) == "stopped for --deadline 07:30"
    wall.set("2026-03-04 07:30:00")
    assert stop.reason() == "stopped for --deadline 07:30"


@pytest.mark.parametrize("started", ["2026-03-04 23:00:00", "2026-03-04 07:30:00"])
def test_a_deadline_that_has_passed_is_tomorrows(monkeypatch, started):
    wall = _Wall(monkeypatch, started)
    stop = Stopper(deadline="07:30")
    assert stop.reason() is None
    wall.set("2026-03-05 07:29:00")
    assert stop.reason() is None
    wall.set("2026-03-05 07:31:00")
    assert stop.reason() == "stopped for --deadline 07:30"


def test_the_first_limit_that_comes_stops(monkeypatch):
    clock, wall = _Clock(monkeypatch), _Wall(monkeypatch, "2026-03-04 01:00:00")
    stop = Stopper(max_hours=2, deadline="07:30")
    clock.now_s += 2 * 3600
    wall.set("2026-03-04 03:00:00")
    assert "--max-hours" in stop.reason()
