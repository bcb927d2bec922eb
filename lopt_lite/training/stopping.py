"""When to stop: signals, ``--max-hours`` and ``--deadline``."""

from __future__ import annotations

import datetime
import signal
import threading
import time
from types import FrameType

from lopt_lite.errors import StoppedError
from lopt_lite.units import parse_time_of_day

_SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n))
_HANG_UP = getattr(signal, "SIGHUP", None)


class Stopper:
    """Collects reasons to stop; the work asks between its steps.

    Used as a context manager, it turns the first SIGINT, SIGTERM or SIGHUP into a request to stop at the next safe
    place, and a second SIGINT into KeyboardInterrupt at once (the last checkpoint stands). Handlers are put back on
    exit. Outside the main thread signals are left alone, and so is a SIGHUP that ``nohup`` has turned off.

    Parameters
    ----------
    max_hours:
        Hours from now, by a clock that does not jump.
    deadline:
        Time of day ``HH:MM``, by the wall clock; tomorrow's if today's has passed.
    """

    def __init__(self, *, max_hours: float | None = None, deadline: str | None = None) -> None:
        self._ends_at_s = None if max_hours is None else time.monotonic() + max_hours * 3600
        self._max_hours = max_hours
        self._deadline: datetime.datetime | None = None
        if deadline is not None:
            now = datetime.datetime.now()
            moment = datetime.datetime.combine(now.date(), parse_time_of_day(deadline, "--deadline"))
            self._deadline = moment if moment > now else moment + datetime.timedelta(days=1)
        self._signal: str | None = None
        self._previous: dict[int, object] = {}

    def reason(self, *, needed_s: float = 0.0) -> str | None:
        """Why to stop now, or None. ``needed_s``: how long the next piece of work would take."""
        if self._signal is not None:
            return f"stopped by {self._signal}"
        if self._ends_at_s is not None and time.monotonic() + needed_s >= self._ends_at_s:
            return f"stopped after --max-hours {self._max_hours:g}"
        needed = datetime.timedelta(seconds=needed_s)
        if self._deadline is not None and datetime.datetime.now() + needed >= self._deadline:
            return f"stopped for --deadline {self._deadline:%H:%M}"
        return None

    def check(self) -> None:
        """Raise when there is a reason to stop; for work whose finished pieces are durable by themselves.

        Raises
        ------
        StoppedError
        """
        reason = self.reason()
        if reason is not None:
            raise stopped(reason)

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number == _HANG_UP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name


def stopped(reason: str) -> StoppedError:
    """The error that ends a stopped run."""
    return StoppedError(
        reason, fix="give the same command again (without --fresh) to continue; everything finished so far is kept"
    )
