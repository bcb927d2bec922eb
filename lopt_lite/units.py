"""Numbers as people read them."""

from __future__ import annotations

import math


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
