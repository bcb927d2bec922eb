"""What is remembered between commands, in the user's cache directory: facts that can be found out again at any time.

Nothing here can make an operation fail: what cannot be read is found out anew, and what cannot be written is used for
this once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from lopt_lite import files
from lopt_lite.errors import LoptError

#: Names the directory, whatever the system's customs are.
VARIABLE = "LOPT_LITE_CACHE"

#: Entries that one file keeps; the oldest go first.
_KEPT = 32


def user_cache_directory() -> Path | None:
    """``LOPT_LITE_CACHE``, else the system's place for caches: ``~/Library/Caches`` on macOS, else XDG's.

    None for a user without a home directory.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification wants a relative path ignored.
    if sys.platform != "darwin" and xdg and Path(xdg).is_absolute():
        return Path(xdg) / "lopt-lite"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "lopt-lite"


def recall(name: str, key: str) -> Any:
    """What :func:`remember` kept under ``key`` in the file ``name``; None when there is nothing readable."""
    return _entries(name).get(key)


def remember(name: str, key: str, value: Any) -> bool:
    """Keep a JSON value; returns whether it could be written."""
    entries = _entries(name)
    entries.pop(key, None)
    entries[key] = value
    newest = dict(list(entries.items())[-_KEPT:])
    directory = user_cache_directory()
    if directory is None:
        return False
    try:
        files.make_directory(directory)
        files.write_json(directory / name, newest)
    except LoptError:
        return False
    return True


def _entries(name: str) -> dict[str, Any]:
    directory = user_cache_directory()
    if directory is None:
        return {}
    try:
        content = files.read_json(directory / name, what="the cache", error=LoptError)
    except LoptError:
        return {}
    return content if isinstance(content, dict) else {}
