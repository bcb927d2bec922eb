"""What makes a layer's training steps faster than its modules by themselves, all together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lopt_lite.residency.rms_norm import fused_norms
from lopt_lite.residency.short_attention import short_attention
from lopt_lite.training.low_rank import fused_adapters


@contextmanager
def fast_layers(device: torch.device) -> Iterator[None]:
    """Within the context, layers on ``device`` that have an adapter compute in fewer passes over memory."""
    with short_attention(device), fused_norms(), fused_adapters():
        yield
