"""LM head and cross-entropy at answer positions only, in chunks of tokens.

Logits are the largest activation of a language model (tokens x vocabulary, in float32 for the loss). They are made for
a chunk of answer tokens at a time and their gradient is taken at once, so only one chunk's logits ever exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store


def place_head(skeleton: Skeleton, store: Store, device: torch.device) -> None:
    """Put the LM head on ``device`` in the compute dtype."""
    weight, bias = store.head(skeleton)
    skeleton.place_head(weight.to(device, skeleton.dtype), None if bias is None else bias.to(device, skeleton.dtype))


def _chunks(skeleton: Skeleton, tokens: int, logit_elements: int) -> Iterator[slice]:
    size = max(1, logit_elements // skeleton.vocabulary_rows)
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def answer_loss_backward(
    skeleton: Skeleton, output: torch.Tensor, targets: torch.Tensor, *, answer_tokens: int, logit_elements: int
) -> float:
    """Cross-entropy at answer positions, and its gradient into ``output``.

    Parameters
    ----------
    output:
        [rows, tokens, hidden], the last layer's output, attached to the graph that is to receive the gradient.
    targets:
        int64 [rows, tokens]; the token to predict at each position, -100 where there is none.
    answer_tokens:
        What the sum is divided by: answer tokens of the whole optimiser step, so that micro-batches add up to the mean
        over the step's answer tokens whatever their sizes.
    logit_elements:
        Most float32 logits to make at once.

    Returns
    -------
    float
        This micro-batch's share of the step's mean loss, in nats.
    """
    mask = targets != -100
    hidden = output[mask]
    labels = targets[mask]
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    for chunk in _chunks(skeleton, leaf.shape[0], logit_elements):
        logits = skeleton.logits(leaf[chunk]).float()
        loss = functional.cross_entropy(logits, labels[chunk], reduction="sum") / answer_tokens
        loss.backward()
        total += float(loss.detach())
    if leaf.grad is not None:
        hidden.backward(leaf.grad)
    return total


@torch.no_grad()
def answer_loss_sum(skeleton: Skeleton, output: torch.Tensor, targets: torch.Tensor, *, logit_elements: int) -> float:
    """Summed cross-entropy at answer positions, in nats; arguments as :func:`answer_loss_backward`."""
    mask = targets != -100
    hidden, labels = output[mask], targets[mask]
    total = 0.0
    for chunk in _chunks(skeleton, hidden.shape[0], logit_elements):
        logits = skeleton.logits(hidden[chunk]).float()
        total += float(functional.cross_entropy(logits, labels[chunk], reduction="sum"))
    return total
