"""The LM head and the loss at answer positions: one way of asking, wherever the head's weight is.

Only one chunk's logits ever exist (see :mod:`lopt_lite.residency.logits`): the gradient of a chunk of answer tokens is
taken as soon as its logits are made, and they are turned into that gradient where they lie, piece by piece in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.data.dataset import IGNORED
from lopt_lite.residency.anchor_head import AnchorHead
from lopt_lite.residency.anchors import Anchors
from lopt_lite.residency.logits import answers, own_logits, pieces, send_back, token_chunks, total
from lopt_lite.residency.sliced_head import SlicedHead


class AnswerHead(Protocol):
    """The model's final norm, LM head and loss, wherever the head's weight is."""

    def loss_backward(self, output: torch.Tensor, targets: torch.Tensor, *, answer_tokens: int) -> float:
        """Cross-entropy at answer positions, and its gradient into ``output``.

        Parameters
        ----------
        output:
            [rows, tokens, hidden], the last layer's output, attached to the graph that is to receive the gradient.
        targets:
            int64 [rows, tokens] on the same device; the token to predict at each position, -100 where there is none.
        answer_tokens:
            What the sum is divided by: answer tokens of the whole optimiser step, so that micro-batches add up to the
            mean over the step's answer tokens whatever their sizes.

        Returns
        -------
        float
            This micro-batch's share of the step's mean loss, in nats; not finite where a logit is not.
        """

    def anchored_loss_backward(
        self, output: torch.Tensor, targets: torch.Tensor, anchors: Anchors, *, answer_tokens: int
    ) -> tuple[float, float]:
        """As :meth:`loss_backward`, and the divergence from the untouched model at anchored positions with it.

        Only of a head that was opened with the tokens to compare. Answers or anchored positions may be missing (then
        ``answer_tokens`` may be 0); where positions are both, gradients add up.

        Returns
        -------
        tuple[float, float]
            This micro-batch's share of the step's mean loss, and of the step's mean divergence (without its weight), in
            nats.
        """

    def train(self, parameters: Sequence[nn.Parameter]) -> None:
        """From now on, add to the gradients of these of :func:`output_parameters` too, as losses are made.

        Raises
        ------
        ValueError
            The head is not on the device as a whole, or was opened with tokens to compare.
        """

    def loss_sum(self, output: torch.Tensor, targets: torch.Tensor) -> float:
        """Summed cross-entropy at answer positions, in nats; arguments as :meth:`loss_backward`."""

    def place_for_generation(self) -> None:
        """Let the whole model, as :meth:`Skeleton.with_layers` gives it, make its logits with this head."""

    def close(self) -> None:
        """Take the head off the device."""


def open_head(
    skeleton: Skeleton,
    store: Store,
    *,
    device: torch.device,
    logit_elements: int,
    slice_rows: int | None,
    compared: torch.Tensor | None = None,
    prefetch: bool = True,
) -> AnswerHead:
    """The LM head, ready to make losses. To be closed by the caller.

    Parameters
    ----------
    logit_elements:
        Most logits to make at once. (One token's are always made at once.)
    slice_rows:
        Rows of the head (tokens of the vocabulary) on the device at once; None for all of them, kept there.
    compared:
        int64: tokens of the vocabulary among which the anchor compares predictions; None without an anchor.
    prefetch:
        Read the next slice while this one is in use.
    """
    anchor = None
    if compared is not None:
        anchor = AnchorHead(skeleton, store, device=device, tokens=compared, logit_elements=logit_elements)
    if slice_rows is None:
        place_head(skeleton, store, device)
        return WholeHead(skeleton, anchor, logit_elements=logit_elements)
    return SlicedHead(
        skeleton,
        store,
        anchor,
        device=device,
        logit_elements=logit_elements,
        slice_rows=slice_rows,
        prefetch=prefetch,
    )


def place_head(skeleton: Skeleton, store: Store, device: torch.device) -> None:
    """Put the whole LM head on ``device`` in the compute dtype."""
    weight, bias = store.head(skeleton)
    skeleton.place_head(weight.to(device, skeleton.dtype), None if bias is None else bias.to(device, skeleton.dtype))


def output_parameters(skeleton: Skeleton) -> dict[str, nn.Parameter]:
    """The parameters that make logits of the last layer's output (final norm, LM head), by their full names.

    They are found by asking which get a gradient, whatever the architecture. All must be in their places, the head as
    a whole.
    """
    candidates = {name: p for name, p in skeleton.model.named_parameters() if p.is_floating_point()}
    before = {name: parameter.requires_grad for name, parameter in candidates.items()}
    hidden = torch.zeros(1, skeleton.hidden_size, dtype=skeleton.dtype, device=skeleton.root_device)
    try:
        for parameter in candidates.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            logits = skeleton.logits(hidden)
        gradients = torch.autograd.grad(logits, list(candidates.values()), torch.ones_like(logits), allow_unused=True)
    finally:
        for name, parameter in candidates.items():
            parameter.requires_grad_(before[name])
    return {name: p for (name, p), gradient in zip(candidates.items(), gradients, strict=True) if gradient is not None}


class WholeHead:
    """The head's weight on the device all the time, where :func:`place_head` has put it."""

    def __init__(self, skeleton: Skeleton, anchor: AnchorHead | None = None, *, logit_elements: int) -> None:
        self._skeleton, self._anchor = skeleton, anchor
        self._logit_elements = logit_elements
        self._trained: list[nn.Parameter] = []

    def loss_backward(self, output: torch.Tensor, targets: torch.Tensor, *, answer_tokens: int) -> float:
        """See :meth:`AnswerHead.loss_backward`."""
        loss, gradient = self._predict(*answers(output.detach(), targets), answer_tokens=answer_tokens)
        send_back(output, (targets != IGNORED, gradient))
        return loss

    def anchored_loss_backward(
        self, output: torch.Tensor, targets: torch.Tensor, anchors: Anchors, *, answer_tokens: int
    ) -> tuple[float, float]:
        """See :meth:`AnswerHead.anchored_loss_backward`."""
        assert self._anchor is not None
        loss, gradient = self._predict(*answers(output.detach(), targets), answer_tokens=answer_tokens)
        kl, anchored_gradient = self._anchor.compare(anchors.tuned(output), anchors)
        send_back(output, (targets != IGNORED, gradient), (anchors.mask, anchored_gradient))
        return loss, kl

    def train(self, parameters: Sequence[nn.Parameter]) -> None:
        """See :meth:`AnswerHead.train`."""
        if parameters and self._anchor is not None:
            raise ValueError("an LM head that is compared through cannot be trained: the untouched model needs it")
        self._trained = list(parameters)

    @torch.no_grad()
    def loss_sum(self, output: torch.Tensor, targets: torch.Tensor) -> float:
        """See :meth:`AnswerHead.loss_sum`."""
        hidden, labels = answers(output, targets)
        losses = torch.empty(len(labels), device=hidden.device)
        for chunk in self._chunks(len(labels)):
            logits, _ = own_logits(self._skeleton, hidden[chunk])
            for piece in pieces(logits):
                losses[chunk][piece] = _exponentials(logits[piece].float(), labels[chunk][piece])[0]
            del logits  # before the next chunk's are made
        return total(losses)

    def place_for_generation(self) -> None:
        """See :meth:`AnswerHead.place_for_generation`: the weight is in its place already."""

    def close(self) -> None:
        """See :meth:`AnswerHead.close`."""
        self._trained, self._anchor = [], None
        self._skeleton.place_head(None)

    def _predict(self, hidden: torch.Tensor, labels: torch.Tensor, *, answer_tokens: int) -> tuple[float, torch.Tensor]:
        """Share of the step's loss of ``labels``, and its gradient into ``hidden``."""
        if not len(labels):
            return 0.0, hidden
        losses = torch.empty(len(labels), device=hidden.device)
        gradient = torch.empty_like(hidden)
        for chunk in self._chunks(len(labels)):
            leaf = hidden[chunk].detach().requires_grad_()
            logits, edge = own_logits(self._skeleton, leaf)
            for piece in pieces(logits):
                losses[chunk][piece] = _learn(logits[piece], labels[chunk][piece], answer_tokens)
            gradient[chunk] = self._pull(edge, leaf, logits)
            del logits, edge, leaf  # before the next chunk's are made
        return total(losses) / answer_tokens, gradient

    def _pull(self, edge: GradientEdge | None, leaf: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The gradient into ``leaf`` of logits with the gradient ``values``; trained parameters get theirs."""
        pull, *others = torch.autograd.grad(edge, [leaf, *self._trained], values)
        for parameter, gradient in zip(self._trained, others, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return pull

    def _chunks(self, tokens: int) -> Iterator[slice]:
        return token_chunks(self._skeleton, tokens, self._skeleton.vocabulary_rows, self._logit_elements)


def _learn(logits: torch.Tensor, labels: torch.Tensor, answer_tokens: int) -> torch.Tensor:
    """Losses, float32 [tokens], of logits that become the gradient of their sum divided by ``answer_tokens``."""
    values = logits.float()
    losses, sums = _exponentials(values, labels)
    values.div_(sums[:, None] * answer_tokens)
    values.scatter_add_(1, labels[:, None], values.new_full((len(values), 1), -1 / answer_tokens))
    if values.dtype != logits.dtype:
        logits.copy_(values)
    return losses


def _exponentials(values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [tokens] of float32 logits, which become exp(l_j - max), and the sums of these [tokens]."""
    highest = values.amax(1)
    target = values.gather(1, labels[:, None])[:, 0]
    sums = values.sub_(highest[:, None]).exp_().sum(1)
    return (highest - target) + sums.log(), sums
