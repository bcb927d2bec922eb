"""Text on a terminal, and JSON documents."""

from __future__ import annotations

import json
from typing import Any

from lopt_lite import files
from lopt_lite.text import one_line, plain

__all__ = ["json_document", "json_line", "one_line", "plain"]


def json_document(value: Any) -> str:
    """``value`` as one JSON document in ASCII, so that no terminal or encoding can trip over it.

    JSON has no infinity and no NaN: they become null.
    """
    return json.dumps(files.as_json(value), indent=2, ensure_ascii=True, allow_nan=False)


def json_line(value: Any) -> str:
    """As :func:`json_document`, on one line."""
    return json.dumps(files.as_json(value), ensure_ascii=True, allow_nan=False)
