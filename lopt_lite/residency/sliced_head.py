"""The LM head in slices of the vocabulary: exact loss and gradient with only some rows on the device at once.

Slices are read from the store's file one after the other, and one pass over them gives loss and gradient. With l the
logits of a token, t its target, h its hidden state, and sums over all j but t::

    m = max l_j     s = sum exp(l_j - m)     A = sum exp(l_j - m) dl_j/dh     z = m + log s - l_t
    loss = log(1 + exp z)                    gradient = sigmoid(z) (A / s - dl_t/dh)

m, s and A are kept as slices pass (s and A are scaled down when m grows). That the target stays out of the sums is what
makes low precision safe: with it in them, a confidently predicted target would cancel out of two large rounded numbers.
Anchored tokens take no part in it: their rows of the head stay on the device (:mod:`lopt_lite.residency.anchor_head`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.data.dataset import IGNORED
from lopt_lite.residency.anchor_head import AnchorHead
from lopt_lite.residency.anchors import Anchors
from lopt_lite.residency.logits import answers, make_logits, send_back, token_chunks, total
from lopt_lite.residency.slabs import ShardStream

#: Tokens whose targets' rows are gathered at once. Always so many, since every new shape of a product costs time and
#: memory on the CPU, where kernels are compiled for it and kept.
_PULLED_TOKENS = 64


class SlicedHead:
    """The head's weight in the store's file, slices of it on the device while they are worked with.

    Every loss reads each slice once, always in the same order, so that results do not depend on what was done before.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        store: Store,
        anchor: AnchorHead | None = None,
        *,
        device: torch.device,
        logit_elements: int,
        slice_rows: int,
        prefetch: bool = True,
    ) -> None:
        if slice_rows < 1:
            raise ValueError(f"slices of {slice_rows} rows")
        rows = skeleton.vocabulary_rows
        self._skeleton, self._anchor = skeleton, anchor
        self._logit_elements = logit_elements
        self._bounds = [(start, min(start + slice_rows, rows)) for start in range(0, rows, slice_rows)]
        bias = store.head_bias(skeleton)
        self._bias = None if bias is None else bias.to(device, skeleton.dtype)
        views = {number: store.head_view(skeleton, *bounds) for number, bounds in enumerate(self._bounds)}
        self._stream = ShardStream(views, device=device, prefetch=prefetch)

    @property
    def loads(self) -> int:
        """Slices read so far."""
        return self._stream.loads

    def loss_backward(self, output: torch.Tensor, targets: torch.Tensor, *, answer_tokens: int) -> float:
        """See :meth:`~lopt_lite.residency.head.AnswerHead.loss_backward`."""
        loss, gradient = self._predict(output, targets, answer_tokens)
        send_back(output, (targets != IGNORED, gradient))
        return loss

    def anchored_loss_backward(
        self, output: torch.Tensor, targets: torch.Tensor, anchors: Anchors, *, answer_tokens: int
    ) -> tuple[float, float]:
        """See :meth:`~lopt_lite.residency.head.AnswerHead.anchored_loss_backward`."""
        assert self._anchor is not None
        loss, gradient = self._predict(output, targets, answer_tokens)
        kl, anchored_gradient = self._anchor.compare(anchors.tuned(output), anchors)
        send_back(output, (targets != IGNORED, gradient), (anchors.mask, anchored_gradient))
        return loss, kl

    def train(self, parameters: Sequence[nn.Parameter]) -> None:
        """See :meth:`~lopt_lite.residency.head.AnswerHead.train`."""
        if parameters:
            raise ValueError(f"{len(parameters)} parameters to be trained with an LM head that is read in slices")

    @torch.no_grad()
    def loss_sum(self, output: torch.Tensor, targets: torch.Tensor) -> float:
        """See :meth:`~lopt_lite.residency.head.AnswerHead.loss_sum`."""
        sums = _Sums(*answers(output, targets), with_gradient=False)
        if len(sums.labels):
            self._pass_slices(partial(self._add_answers, sums))
        return total(sums.losses())

    def place_for_generation(self) -> None:
        """See :meth:`~lopt_lite.residency.head.AnswerHead.place_for_generation`. No loss can be made afterwards."""
        self._skeleton.replace_head(_SlicedLinear(self))

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head alone, without norm: [..., hidden] -> [..., vocabulary]. No gradient."""
        logits = hidden.new_empty(*hidden.shape[:-1], self._bounds[-1][1])
        for number, (start, end) in enumerate(self._bounds):
            with self._stream.item(number, self._upcoming(number)) as tensors:
                weight = tensors["weight"].to(hidden.dtype)
                logits[..., start:end] = functional.linear(hidden, weight, self._bias_of(number))
        return logits

    def close(self) -> None:
        """See :meth:`~lopt_lite.residency.head.AnswerHead.close`."""
        self._anchor = None
        self._skeleton.place_head(None)
        self._stream.close()

    def _upcoming(self, number: int) -> list[int]:
        # After the last slice the first: it will be there when the next loss is asked for.
        return [(number + 1) % len(self._bounds)]

    def _predict(self, output: torch.Tensor, targets: torch.Tensor, answer_tokens: int) -> tuple[float, torch.Tensor]:
        """Share of the step's loss, and its gradient at answer positions."""
        sums = _Sums(*answers(output.detach(), targets), with_gradient=True)
        if not len(sums.labels):
            return 0.0, sums.hidden
        self._pass_slices(partial(self._add_answers, sums))
        return total(sums.losses()) / answer_tokens, sums.gradient(answer_tokens)

    def _bias_of(self, number: int) -> torch.Tensor | None:
        start, end = self._bounds[number]
        return None if self._bias is None else self._bias[start:end]

    def _place(self, number: int, weight: torch.Tensor) -> None:
        self._skeleton.place_head(weight, self._bias_of(number))

    def _pass_slices(self, visit: Callable[[int, torch.Tensor], None]) -> None:
        """Call ``visit`` with every slice's number and weight, in the compute dtype."""
        for number in range(len(self._bounds)):
            with self._stream.item(number, self._upcoming(number)) as tensors:
                try:
                    visit(number, tensors["weight"].to(self._skeleton.dtype))
                finally:
                    self._skeleton.place_head(None)

    def _add_answers(self, sums: _Sums, number: int, weight: torch.Tensor) -> None:
        start, end = self._bounds[number]
        bias = self._bias_of(number)
        for chunk in token_chunks(self._skeleton, len(sums.labels), end - start, self._logit_elements):
            self._place(number, weight)
            self._pass_chunk(chunk, start, end, sums)
            if not sums.with_gradient:
                continue
            places, columns = sums.targets_within(chunk, start, end)
            for first in range(0, len(places), _PULLED_TOKENS):
                some = slice(first, first + _PULLED_TOKENS)
                self._pull_to_targets(chunk, places[some], columns[some], weight, bias, sums)

    def _pass_chunk(self, chunk: slice, start: int, end: int, sums: _Sums) -> None:
        leaf = sums.hidden[chunk].detach().requires_grad_(sums.with_gradient)
        values, edge = make_logits(self._skeleton, leaf)
        shrink = sums.add(chunk, values, start, end)
        if edge is not None:
            values = values.to(leaf.dtype)  # frees those in float32 before gradients are made
            sums.add_pull(chunk, shrink, torch.autograd.grad(edge, leaf, values)[0])

    def _pull_to_targets(
        self,
        chunk: slice,
        places: torch.Tensor,
        columns: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sums: _Sums,
    ) -> None:
        """Note the gradients of the target logits of tokens ``places`` of ``chunk``, by just their targets' rows."""
        count = len(places)
        padding = torch.zeros(_PULLED_TOKENS - count, dtype=torch.long)
        places, columns = (torch.cat([found, padding]).to(weight.device) for found in (places, columns))
        self._skeleton.place_head(weight[columns], None if bias is None else bias[columns])
        leaf = sums.hidden[chunk][places].detach().requires_grad_()
        own = self._skeleton.logits(leaf).diagonal()
        pull = torch.autograd.grad(own, leaf, torch.ones_like(own))[0]
        sums.target_pull[chunk][places[:count]] = pull[:count]


class _SlicedLinear(nn.Module):
    """Stands in for the LM head in transformers' own code."""

    def __init__(self, head: SlicedHead) -> None:
        super().__init__()
        self._project = head.project

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._project(hidden)


class _Sums:
    """What has been seen of each answer token's logits, as slices pass: the module's m, s, A, l_t and dl_t/dh."""

    def __init__(self, hidden: torch.Tensor, labels: torch.Tensor, *, with_gradient: bool) -> None:
        self.hidden, self.labels, self.with_gradient = hidden, labels, with_gradient
        # Looked up on the host, so that the device need not be waited for.
        self._labels_on_host = labels.cpu()
        self._highest = hidden.new_full((len(labels),), -math.inf, dtype=torch.float32)
        self._sum = torch.zeros_like(self._highest)
        self._target = torch.full_like(self._highest, math.nan)
        self._pull = torch.zeros_like(hidden, dtype=torch.float32) if with_gradient else hidden.new_empty(0)
        self.target_pull = torch.zeros_like(hidden) if with_gradient else hidden.new_empty(0)

    def targets_within(self, chunk: slice, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of ``chunk`` with their target in rows ``start`` to ``end``, and in which of these; on the host."""
        labels = self._labels_on_host[chunk]
        places = torch.nonzero((labels >= start) & (labels < end)).flatten()
        return places, labels[places] - start

    def add(self, chunk: slice, values: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Add logits of rows ``start`` to ``end``, float32 [tokens, rows], which become exp(l_j - m), 0 for targets.

        Returns
        -------
        torch.Tensor
            By what earlier sums were scaled, [tokens].
        """
        places, columns = (found.to(values.device) for found in self.targets_within(chunk, start, end))
        self._target[chunk][places] = values[places, columns]
        values[places, columns] = -math.inf
        before = self._highest[chunk]
        highest = torch.maximum(before, values.amax(1))
        # Where nothing but -inf was seen there is nothing to scale, and inf - inf would make it NaN.
        base = torch.where(highest == -math.inf, 0.0, highest)
        values.sub_(base[:, None]).exp_()
        shrink = torch.exp(before - base)
        self._sum[chunk] = self._sum[chunk] * shrink + values.sum(1)
        self._highest[chunk] = highest
        return shrink

    def add_pull(self, chunk: slice, shrink: torch.Tensor, pull: torch.Tensor) -> None:
        """Add a slice's share of A, [tokens, hidden]."""
        self._pull[chunk].mul_(shrink[:, None]).add_(pull)

    def losses(self) -> torch.Tensor:
        """Loss of each token in nats, float32 [tokens]."""
        return functional.softplus(self._z())

    def gradient(self, answer_tokens: int) -> torch.Tensor:
        """Gradient of the losses' sum / ``answer_tokens``, [tokens, hidden] in the type of ``hidden``. Call once."""
        pull = self._pull.div_(self._sum[:, None]).sub_(self.target_pull)
        return pull.mul_(torch.sigmoid(self._z())[:, None] / answer_tokens).to(self.hidden.dtype)

    def _z(self) -> torch.Tensor:
        z = (self._highest - self._target) + self._sum.log()
        # A target of +inf is not a perfect prediction; the plain formula gives NaN.
        return torch.where(self._target == math.inf, math.nan, z)
