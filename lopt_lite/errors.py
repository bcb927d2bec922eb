"""What can go wrong, as types a caller can act on.

Each class carries the exit code of the command line (``exit_code``). A message has up to three parts: what was found,
what was expected, and what to change; :class:`LoptError` joins them so that no caller formats errors by hand.
"""

from __future__ import annotations

import sys


class LoptError(Exception):
    """Base of every error lopt-lite raises on purpose.

    Parameters
    ----------
    found:
        What is wrong, naming the file, line, option or tensor concerned.
    expected:
        What would have been right, if that is not obvious.
    fix:
        What the user can change.
    """

    exit_code = 1

    def __init__(self, found: str, *, expected: str | None = None, fix: str | None = None) -> None:
        self.found = found
        self.expected = expected
        self.fix = fix
        parts = [found]
        if expected:
            parts.append(f"Expected: {expected}")
        if fix:
            parts.append(f"To fix: {fix}")
        super().__init__("\n".join(parts))


class SettingsError(LoptError):
    """An option has a value that cannot be used (exit code 2)."""

    exit_code = 2


class ModelError(LoptError):
    """The model's files are missing, broken, unsafe or of an unsupported kind (exit code 3)."""

    exit_code = 3


class DataError(LoptError):
    """The data file is missing, broken or holds nothing to train on (exit code 3)."""

    exit_code = 3


class DoesNotFitError(LoptError):
    """Not enough memory or disk for what was asked (exit code 4)."""

    exit_code = 4


class RunDirectoryError(LoptError):
    """The run directory or store is in use, unreadable, or belongs to other settings (exit code 5)."""

    exit_code = 5


class DivergedError(LoptError):
    """The loss stopped being a finite number (exit code 6)."""

    exit_code = 6


class StoppedError(LoptError):
    """Stopped on time or by a signal; the same command again continues (exit code 75)."""

    exit_code = 75


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "Invalid buffer size",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is what Python, PyTorch or a device raises when memory runs out."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    # The others have no exception class of their own: the CPU's allocator, CUDA's driver and libraries, Metal.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
