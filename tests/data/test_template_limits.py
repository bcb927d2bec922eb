"""Templates that take too long or put out too much; the limits leave a process's own timer as it was."""

from __future__ import annotations

import signal
import time

import pytest

from lopt_lite.data import template_limits
from lopt_lite.data.template_limits import limited_time
from lopt_lite.errors import ModelError


def test_what_runs_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.05)
    with pytest.raises(ModelError, match="ran for"), limited_time():
        while True:
            pass


def test_another_error_that_comes_of_stopping_does_not_hide_why(monkeypatch):
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.05)
    with pytest.raises(ModelError, match="ran for"), limited_time():
        try:
            while True:
                pass
        except ModelError:
            raise TypeError("no line in the template") from None


def test_an_error_within_the_time_is_passed_on():
    with pytest.raises(TypeError, match="mine"), limited_time():
        raise TypeError("mine")


@pytest.mark.parametrize("seconds", [0.0, 50.0])
def test_somebodys_own_timer_goes_on(seconds):
    left_s, every_s = signal.getitimer(signal.ITIMER_REAL)
    handler = signal.getsignal(signal.SIGALRM)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with limited_time():
            time.sleep(0.02)
        after_s, _ = signal.getitimer(signal.ITIMER_REAL)
        assert signal.getsignal(signal.SIGALRM) is handler
        assert (after_s == 0) if not seconds else (seconds - 5 < after_s < seconds - 0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, left_s, every_s)
