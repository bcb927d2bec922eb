"""Whether modules that have been made ready for it compute in one operation what takes them several.

Sums round in other places then, so it is for training alone: evaluation and generation give the bits of the libraries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_in_use = False


@contextmanager
def fused_modules() -> Iterator[None]:
    """Within the context, modules made ready (norms, linear modules with an adapter) compute in one operation."""
    global _in_use
    before, _in_use = _in_use, True
    try:
        yield
    finally:
        _in_use = before


def in_use() -> bool:
    """Whether the code that asks runs within :func:`fused_modules`."""
    return _in_use
