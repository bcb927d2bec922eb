"""Making logits: at answer positions only, in chunks of tokens.

Logits are the largest activation of a language model (tokens x vocabulary, in float32 for the loss).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.data.dataset import IGNORED

#: Logits that are worked on in float32 at once, or one token's. On a CPU they stay in its cache.
_CPU_PIECE = 2**18
_PIECE = 2**20


def token_chunks(skeleton: Skeleton, tokens: int, rows: int, logit_elements: int) -> Iterator[slice]:
    """Chunks of answer tokens: neither a chunk's logits (``rows`` each) nor its hidden states exceed the limit."""
    size = max(1, logit_elements // max(rows, skeleton.hidden_size))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def pair_chunks(skeleton: Skeleton, tokens: int, rows: int, logit_elements: int) -> Iterator[slice]:
    """Half as large, for what makes two models' logits of a chunk at once. (One token's are always made at once.)"""
    return token_chunks(skeleton, tokens, rows, logit_elements // 2)


def answers(output: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [n, hidden] and labels [n] at answer positions."""
    mask = targets != IGNORED
    return output[mask], targets[mask]


def send_back(output: torch.Tensor, *parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Send gradients back through ``output``'s graph, all at once; where there are none, nothing happens.

    Parameters
    ----------
    output:
        [rows, tokens, hidden], attached to the graph.
    parts:
        Masks bool [rows, tokens], each with the gradients [n, hidden] at its positions. Where masks overlap, gradients
        add up.
    """
    present = [(mask, gradient) for mask, gradient in parts if len(gradient)]
    if not present:
        return
    whole = torch.zeros_like(output)
    (mask, gradient), *others = present
    whole[mask] = gradient
    for mask, gradient in others:
        whole[mask] += gradient
    output.backward(whole)


def own_logits(skeleton: Skeleton, hidden: torch.Tensor) -> tuple[torch.Tensor, GradientEdge | None]:
    """Logits in the compute dtype [tokens, rows], free to be overwritten, and where their gradient goes in.

    They are the model's own output. Were it something that the model's backward pass needs (the output of a last tanh,
    say; no known model is like that), autograd would refuse the gradient.
    """
    logits = skeleton.logits(hidden)
    edge = get_gradient_edge(logits) if logits.requires_grad else None
    return logits.detach(), edge


def make_logits(skeleton: Skeleton, hidden: torch.Tensor) -> tuple[torch.Tensor, GradientEdge | None]:
    """As :func:`own_logits`, in float32."""
    logits, edge = own_logits(skeleton, hidden)
    return logits.float(), edge


def pieces(logits: torch.Tensor) -> Iterator[slice]:
    """Tokens of ``logits`` [tokens, rows] whose float32 values are worked on at once, in a few temporary tensors."""
    size = max(1, (_CPU_PIECE if logits.device.type == "cpu" else _PIECE) // logits.shape[1])
    for start in range(0, len(logits), size):
        yield slice(start, start + size)


def total(losses: torch.Tensor) -> float:
    """The sum, in float64 whatever the device can."""
    return float(losses.cpu().double().sum())
