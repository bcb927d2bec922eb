"""Files as a failing disk leaves them."""

from __future__ import annotations

import os
from pathlib import Path


def flip_a_byte(path: Path, at: int = -1) -> None:
    """Turn all bits of one byte around, the file's last by default; its time of change is a later one."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    changed_ns = path.stat().st_mtime_ns + 10**9
    path.write_bytes(content)
    os.utime(path, ns=(changed_ns, changed_ns))
