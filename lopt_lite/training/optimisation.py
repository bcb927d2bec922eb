"""Optimiser, learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

WARM_UP_FRACTION = 0.03
CLIP_NORM = 1.0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``: 3 % linear warm-up to ``peak``, then cosine to 0.

    The first step already learns: with w warm-up steps it has peak / w.
    """
    warm_up = math.ceil(WARM_UP_FRACTION * steps)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with PyTorch's betas and epsilon and no weight decay; the learning rate is set before each step."""
    return torch.optim.AdamW(list(parameters), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def optimizer_step(optimizer: torch.optim.AdamW, *, lr: float) -> float:
    """Clip the gradients at norm 1.0, step with ``lr``, clear the gradients; returns the norm before clipping.

    A norm that is not finite leaves the parameters untouched.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, CLIP_NORM))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
