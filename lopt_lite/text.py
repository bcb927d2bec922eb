"""Text from outside (data, model names, answers, exceptions) made safe to show."""

from __future__ import annotations

import re

#: Control characters (C0 but tab and newline, DEL, C1), line separators, marks that turn
#: the direction of text, and halves of surrogate pairs (which no file or terminal can hold).
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: str) -> str:
    """``text`` with everything that could steer a terminal written out visibly, as ``\\x1b``; lines are kept."""
    return _UNSAFE.sub(_escape, text)


def one_line(text: str) -> str:
    """Like :func:`plain`, and on one line."""
    return " ".join(plain(text).split())


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
