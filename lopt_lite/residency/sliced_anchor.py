"""The anchor with the head in slices of the vocabulary: two passes over them, exact.

The first pass finds what both models' predictions are normalised with; the second compares them, slice by slice, and
takes the gradient. One pass would do for the gradient too, as the difference of two sums over the vocabulary; but these
are nearly equal and rounded, and their difference would be noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.residency.anchors import Anchors, diverge
from lopt_lite.residency.logits import make_logits, pair_chunks


class SlicedAnchor:
    """What has been seen of a micro-batch's anchored tokens, as slices pass.

    Each slice must have been put in its place in the skeleton when it is shown: all of them to :meth:`normalise`, then
    all of them to :meth:`compare`.
    """

    def __init__(self, skeleton: Skeleton, output: torch.Tensor, anchors: Anchors, *, logit_elements: int) -> None:
        self._skeleton, self._anchors, self._logit_elements = skeleton, anchors, logit_elements
        self._hidden = anchors.tuned(output)
        self._base_sums = _LogSums(len(self._hidden), self._hidden.device)
        self._tuned_sums = _LogSums(len(self._hidden), self._hidden.device)
        self._kl = torch.zeros(len(self._hidden), device=self._hidden.device)
        self._gradient = torch.zeros_like(self._hidden, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self._hidden)

    @torch.no_grad()
    def normalise(self, rows: int) -> None:
        """See a slice of ``rows`` rows for the first time."""
        for chunk in self._chunks(rows):
            self._base_sums.add(chunk, make_logits(self._skeleton, self._anchors.base[chunk])[0])
            self._tuned_sums.add(chunk, make_logits(self._skeleton, self._hidden[chunk])[0])

    def compare(self, rows: int) -> None:
        """See a slice of ``rows`` rows for the second time."""
        for chunk in self._chunks(rows):
            with torch.no_grad():
                base, _ = make_logits(self._skeleton, self._anchors.base[chunk])
            leaf = self._hidden[chunk].detach().requires_grad_()
            values, edge = make_logits(self._skeleton, leaf)
            self._base_sums.normalise(chunk, base)
            self._tuned_sums.normalise(chunk, values)
            self._kl[chunk] += diverge(base, values)
            del base
            values = values.to(leaf.dtype)
            self._gradient[chunk] += torch.autograd.grad(edge, leaf, values)[0]
            del values, edge, leaf  # before the next chunk's are made

    def divergences(self) -> torch.Tensor:
        """Of each token, in nats, float32 [tokens]."""
        return self._kl

    def gradient(self) -> torch.Tensor:
        """Gradient of their part in the step's loss, [tokens, hidden] in the compute dtype. Call once."""
        if not len(self):
            return self._hidden
        return self._gradient.mul_(self._anchors.share).to(self._hidden.dtype)

    def _chunks(self, rows: int) -> Iterator[slice]:
        return pair_chunks(self._skeleton, len(self), rows, self._logit_elements)


class _LogSums:
    """Largest logit m and sum of exp(l - m) of each token, as slices pass."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._highest = torch.full((tokens,), -math.inf, device=device)
        self._sum = torch.zeros(tokens, device=device)

    def add(self, chunk: slice, values: torch.Tensor) -> None:
        """Add logits, float32 [tokens, rows], which are overwritten."""
        before = self._highest[chunk]
        highest = torch.maximum(before, values.amax(1))
        # Where nothing but -inf was seen there is nothing to scale, and inf - inf would make it NaN.
        base = torch.where(highest == -math.inf, 0.0, highest)
        self._sum[chunk] = self._sum[chunk] * torch.exp(before - base) + values.sub_(base[:, None]).exp_().sum(1)
        self._highest[chunk] = highest

    def normalise(self, chunk: slice, values: torch.Tensor) -> None:
        """Turn logits [tokens, rows] into log-probabilities where they lie, once all have been added."""
        values.sub_(self._highest[chunk, None]).sub_(self._sum[chunk, None].log())
