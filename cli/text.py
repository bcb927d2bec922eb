"""Text on a terminal, and JSON documents."""

from __future__ import annotations

import json
import math
from typing import Any

from lopt_lite.text import one_line, plain

__all__ = ["json_document", "json_line", "one_line", "plain"]


def json_document(value: Any) -> str:
    """``value`` as one JSON document in ASCII, so that no terminal or encoding can trip over it.

    JSON has no infinity and no NaN: they become null.
    """
    return json.dumps(_finite(value), indent=2, ensure_ascii=True, allow_nan=False)


def json_line(value: Any) -> str:
    """As :func:`json_document`, on one line."""
    return json.dumps(_finite(value), ensure_ascii=True, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
