"""Optimisers, learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lopt_lite.seeds import derive_seed

WARM_UP_FRACTION = 0.03
CLIP_NORM = 1.0
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``: 3 % linear warm-up to ``peak``, then cosine to 0.

    The first step already learns: with w warm-up steps it has peak / w.
    """
    warm_up = math.ceil(WARM_UP_FRACTION * steps)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(parameters: Iterable[nn.Parameter], *, eight_bit: bool = False) -> torch.optim.Optimizer:
    """AdamW with PyTorch's betas and epsilon and no weight decay; the learning rate is set before each step.

    With ``eight_bit`` bitsandbytes' block-wise quantised moments (Dettmers et al., arXiv:2110.02861): parameters of
    fewer than 4,096 elements keep float32 ones.
    """
    if eight_bit:
        import bitsandbytes as bnb

        optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(
            list(parameters), lr=0.0, betas=_BETAS, eps=_EPSILON, weight_decay=0.0
        )
        return optimizer
    return torch.optim.AdamW(list(parameters), lr=0.0, betas=_BETAS, eps=_EPSILON, weight_decay=0.0)


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What ``optimizer`` remembers of ``parameter``, as tensors; empty before its first step."""
    state = optimizer.state.get(parameter, {})
    return {key: torch.as_tensor(value) for key, value in state.items() if not key.startswith("qmap")}


def set_optimizer_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, torch.Tensor]
) -> None:
    """Make ``optimizer`` remember what :func:`optimizer_state` gave."""
    values: dict[str, Any] = {}
    fill_maps = getattr(optimizer, "fill_qmap", None)
    for key, value in state.items():
        if key == "step":
            # AdamW keeps its step count on the CPU, bitsandbytes keeps a number.
            values[key] = value.cpu() if fill_maps is None else int(value)
        else:
            values[key] = value.to(parameter.device)
    if fill_maps is not None and "absmax1" in values:
        fill_maps()
        values["qmap1"] = optimizer.name2qmap["dynamic"].to(parameter.device)
        values["qmap2"] = optimizer.name2qmap["udynamic"].to(parameter.device)
    optimizer.state[parameter] = values


def gradient_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of each gradient, float32 [number of gradients]."""
    return torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])


def rounded_step(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    *,
    norm: torch.Tensor,
    lr: float,
    seed: int,
) -> None:
    """As :func:`clipped_step` for bfloat16 parameters: each is updated in float32 and rounded up or down at random.

    A small learning rate moves a bfloat16 weight by less than half of its last bit, which rounding to the nearest
    would undo; rounded with probabilities that match the distances, it moves as far on average. One parameter at a time
    is in float32. The random numbers depend on ``seed`` and the parameter's name alone.
    """
    scale = (CLIP_NORM / (norm + 1e-6)).clamp(max=1.0)
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    for group in optimizer.param_groups:
        group["lr"] = lr
    for name, parameter in parameters.items():
        gradient, values = gradients.pop(name), parameter.data
        if gradient is None:
            continue
        parameter.data = values.float()
        parameter.grad = gradient.float() * scale.to(gradient.device)
        optimizer.step()
        generator = torch.Generator(values.device).manual_seed(derive_seed("rounding", seed, name))
        values.copy_(round_at_random(parameter.data, generator))
        parameter.grad = None
        parameter.data = values


def round_at_random(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 to bfloat16, up or down with probabilities that make the expected value that of ``values``."""
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    # bfloat16 is the upper half of a float32's bits, so a carry out of the lower half rounds away from zero.
    return ((values.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def clipped_step(optimizer: torch.optim.Optimizer, *, norm: torch.Tensor, lr: float) -> None:
    """Scale the gradients as clipping a total norm of ``norm`` to 1.0 does, and step with ``lr``."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    nn.utils.clip_grads_with_norm_(parameters, CLIP_NORM, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
