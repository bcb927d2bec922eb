"""What the LM head and the loss cost in device memory, from shapes alone. A test counts the tensors and agrees."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

#: Tokens of the vocabulary among which the anchor compares predictions, at most.
COMPARED_TOKENS = 8192


@dataclass(frozen=True)
class HeadShapes:
    """An LM head, and what the architecture does to its logits.

    Attributes
    ----------
    rows, hidden:
        Shape of its weight.
    stored, compute:
        The type it is stored in, and the type of hidden states and logits.
    scaled, capped:
        Whether logits are multiplied by a number, or soft-capped (divided, tanh, multiplied): each keeps, or for a
        moment needs, tensors as large as the logits.
    """

    rows: int
    hidden: int
    stored: torch.dtype
    compute: torch.dtype
    scaled: bool
    capped: bool

    @property
    def compared(self) -> HeadShapes:
        """The rows that the anchor has to itself, in the compute dtype."""
        return dataclasses.replace(self, rows=min(self.rows, COMPARED_TOKENS), stored=self.compute)

    @classmethod
    def of(cls, config: Any, *, stored: torch.dtype, compute: torch.dtype) -> HeadShapes:
        """Those of a transformers config."""
        return cls(
            rows=int(config.vocab_size),
            hidden=int(config.hidden_size),
            stored=stored,
            compute=compute,
            scaled=any(getattr(config, name, None) is not None for name in ("logits_scaling", "logit_scale")),
            capped=getattr(config, "final_logit_softcapping", None) is not None,
        )


def head_bytes(head: HeadShapes, slice_rows: int | None) -> int:
    """The weight: whole in the compute dtype (None), or two slabs of slices and one slice cast where types differ.

    On CUDA the slabs exist once more in pinned host memory. While a whole head is placed it is for a moment in host
    memory as stored.
    """
    if slice_rows is None:
        return head.rows * head.hidden * head.compute.itemsize
    rows = min(slice_rows, head.rows)
    cast = 0 if head.stored == head.compute else head.compute.itemsize
    return rows * head.hidden * (2 * head.stored.itemsize + cast)


def logit_bytes(head: HeadShapes, logit_elements: int, slice_rows: int | None, *, gradient: bool) -> int:
    """Peak of what one chunk of ``logit_elements`` logits needs.

    Plain logits exist once, in the compute dtype, and become their gradient where they lie; with slices, what is seen
    of each is kept in float32, so that they exist in both (in float32: once). A scaled logit exists before and after. A
    soft-capped one keeps its tanh for the gradient, whose passing through it makes two more. Anchored tokens need no
    more, of the head's :attr:`~HeadShapes.compared` part: their chunks are half as large, and the untouched model's
    logits are as many again. (Pieces of them in float32, of a few MiB, are not counted.)
    """
    item = head.compute.itemsize
    factor = item if item == 4 or slice_rows is None else item + 4
    if head.scaled or head.capped:
        factor = max(factor, 2 * item)
    if head.capped and gradient:
        factor = max(factor, 4 * item)
    return logit_elements * factor


def norm_bytes(head: HeadShapes, logit_elements: int, slice_rows: int | None, *, gradient: bool) -> int:
    """An estimate of what the final norm needs beside the logits of one chunk: float32 copies of its hidden states."""
    rows = head.rows if slice_rows is None else min(slice_rows, head.rows)
    tokens = logit_elements // max(rows, head.hidden)
    return tokens * head.hidden * (2 * head.compute.itemsize + (12 if gradient else 8))


def answer_bytes(head: HeadShapes, answer_tokens: int, slice_rows: int | None, *, gradient: bool) -> int:
    """What is kept of a micro-batch's answer tokens while their losses are made: hidden states and gradients.

    The gradient of the block's whole output, which is made last, is not in it.
    """
    item = head.compute.itemsize
    if not gradient:
        return answer_tokens * head.hidden * item
    if slice_rows is None:
        return answer_tokens * head.hidden * 2 * item
    # Hidden states, gradients of the target logits, the float32 sum, and its copy in the compute dtype at the end.
    return answer_tokens * head.hidden * (2 * item + 4 + (item if item != 4 else 0))


def anchor_bytes(head: HeadShapes, anchored_tokens: int) -> int:
    """What is kept of a micro-batch's anchored tokens while they are compared, beside their logits.

    Both models' hidden states, and the gradient.
    """
    return anchored_tokens * head.hidden * 3 * head.compute.itemsize
