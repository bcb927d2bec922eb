"""Numbers as people read them, and as they write them."""

from __future__ import annotations

import datetime
import math
import re

from lopt_lite.errors import SettingsError

_DURATION_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_text(count: int) -> str:
    """Bytes in binary units: ``812 MiB``, ``3.21 GiB``."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB" if count >= 2**10 else f"{count} bytes"
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**30:.2f} GiB"


def gib_text(count: int) -> str:
    """Bytes in GiB with two digits: ``0.03 GiB``, ``12.50 GiB``."""
    return f"{count / 2**30:.2f} GiB"


def residence_text(mode: str, resident: int, layers: int) -> str:
    """Where a block's layers are while it is worked on."""
    block = counted(layers, "layer")
    return {
        "dequantised": f"a block ({block}) stays in memory, its 4-bit weights turned into the compute type once",
        "resident": f"a block ({block}) stays in memory",
        "recomputed": f"a block ({block}) stays in memory, its activations do not",
        "partly streamed": f"{resident} of a block's {block} stay in memory, the others are streamed from disk",
        "streamed": f"all {block} of a block are streamed from disk through the memory of two",
    }[mode]


def duration_text(seconds: float) -> str:
    """Seconds as ``0.4 s``, ``12 s``, ``3m 05s`` or ``2h 07m``."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}h {minutes % 60:02}m"


def loss_text(loss: float) -> str:
    """A loss with as many digits as tell losses apart: ``1.2345``, ``3.21e-05``."""
    if loss == 0 or not math.isfinite(loss) or abs(loss) >= 1e-3:
        return f"{loss:.4f}"
    return f"{loss:.2e}"


def counted(count: int, one: str, many: str | None = None) -> str:
    """``1 example``, ``1,200 examples``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def parse_bytes(text: str, flag: str) -> int:
    """Bytes of ``6GiB``, ``800MiB`` or ``8GB`` (which is 8 * 10**9).

    Raises
    ------
    SettingsError
        Anything else, naming ``flag``.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|B)\s*", text.upper())
    number = math.inf if match is None else float(match[1])
    if match is None or not math.isfinite(number * _BYTE_UNITS[match[2]]):
        raise SettingsError(f"{flag} is {text!r}", expected="a size such as 6GiB, 800MiB or 8GB")
    return int(number * _BYTE_UNITS[match[2]])


def parse_memory(text: str) -> int | None:
    """The bytes of a ``--memory`` value, None for ``auto``."""
    return None if text == "auto" else parse_bytes(text, "--memory")


def parse_duration_s(text: str, flag: str) -> float:
    """Seconds of ``30s``, ``5m``, ``1.5h`` or a bare number of seconds.

    Raises
    ------
    SettingsError
        Anything else, naming ``flag``.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|m|h|)\s*", text)
    if match is None:
        raise SettingsError(f"{flag} is {text!r}", expected="a time such as 30s, 5m or 1h")
    return float(match[1]) * _DURATION_UNITS_S[match[2]]


def parse_time_of_day(text: str, flag: str) -> datetime.time:
    """The time of day of ``HH:MM``.

    Raises
    ------
    SettingsError
        Anything else, naming ``flag``.
    """
    match = re.fullmatch(r"\s*(\d{1,2}):(\d{2})\s*", text)
    if match is None or int(match[1]) > 23 or int(match[2]) > 59:
        raise SettingsError(f"{flag} is {text!r}", expected="a time of day, HH:MM, such as 07:30")
    return datetime.time(int(match[1]), int(match[2]))
