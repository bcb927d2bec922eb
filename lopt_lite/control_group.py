"""What a control group (cgroup) leaves this process of the machine's memory: in containers, and under batch systems.

The kernel ends processes that take more, whatever the machine has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


class _Names(NamedTuple):
    """Files of one version: limits, use, and the entry of memory.stat that is given back on demand."""

    limits: tuple[str, ...]
    use: str
    reclaimable: str


#: https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/memory.html.
_V2 = _Names(("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def left_bytes() -> int | None:
    """Memory that this process could still take within its control groups, in bytes; None where nothing limits it.

    File caches that the kernel would give up first count as free. Groups limit all that is below them, so the one with
    the least left counts.
    """
    found = [left for directory, names in _groups() for left in _left(directory, names)]
    return max(0, min(found)) if found else None


def _groups() -> Iterator[tuple[Path, _Names]]:
    """The control groups of this process that may limit memory, and those that they are in."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            root, names = _MOUNT, _V2
        elif "memory" in controllers.split(","):
            root, names = _MOUNT / "memory", _V1
        else:
            continue
        # In a container the path may be the host's, of which only the container's own group is to be seen, as the root.
        below = root / path.lstrip("/")
        yield from ((directory, names) for directory in (below, *below.parents) if directory.is_relative_to(root))


def _left(directory: Path, names: _Names) -> Iterator[int]:
    """What is left below each limit of one group."""
    try:
        used = int((directory / names.use).read_text())
        stat = dict(line.split(maxsplit=1) for line in (directory / "memory.stat").read_text().splitlines())
        used -= min(used, int(stat.get(names.reclaimable, 0)))
    except (OSError, ValueError):
        return  # the root of all groups, or one that is not to be seen, says nothing
    for name in names.limits:
        try:
            limit = int((directory / name).read_text())
        except (OSError, ValueError):
            continue  # "max": none
        yield limit - used
