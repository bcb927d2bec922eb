"""How large this process counts as when a budget is shared out.

What a run computes in one go follows from what the budget leaves, and the size of a process differs by some 100 KiB
from start to start: at the edge between two ways of working, equal runs would now work one way, now the other, and
their results would differ in the last bits. So a size that was seen before stands for those close to it.
"""

from __future__ import annotations

import platform

import torch

from lopt_lite import user_cache

FILE_NAME = "process-sizes.json"

_MIB = 1 << 20
#: A remembered size stands for sizes from this much below it, in bytes,
_BELOW = 6 * _MIB
#: to this much above it: less than the margin that predictions keep to the budget.
_ABOVE = 1 * _MIB


def steady_size(measured: int) -> int:
    """The size, in bytes, that ``measured`` counts as: the one remembered for it, or a new one, in whole MiB."""
    key = f"torch {torch.__version__} | {platform.machine()} {platform.node()}"
    known = user_cache.recall(FILE_NAME, key)
    sizes = [size for size in known if isinstance(size, int)] if isinstance(known, list) else []
    for size in sizes:
        if size - _BELOW <= measured <= size + _ABOVE:
            return size
    size = (-(-measured // _MIB) + 1) * _MIB
    user_cache.remember(FILE_NAME, key, [*sizes[-31:], size])
    return size
