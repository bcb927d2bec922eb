"""Log-probabilities of chosen tokens, and whether they are the likeliest: what an evaluation harness asks of a head.

The head is whole, or in slices of the vocabulary that are streamed from the store's file. Either way only one chunk's
logits of one slice ever exist; what is kept of each token as slices pass is the largest logit seen and whose it is, the
sum of exponentials relative to it, and the logits of the tokens asked about.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.residency.logits import make_logits, token_chunks
from lopt_lite.residency.slabs import ShardStream


class ScoringHead:
    """The model's final norm and LM head, asked about single tokens. To be closed by the caller.

    Parameters
    ----------
    logit_elements:
        Most logits to make at once. (One token's are always made at once.)
    slice_rows:
        Rows of the head (tokens of the vocabulary) on the device at once; None for all of them, kept there.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        store: Store,
        *,
        device: torch.device,
        logit_elements: int,
        slice_rows: int | None,
    ) -> None:
        rows = skeleton.vocabulary_rows
        step = rows if slice_rows is None else slice_rows
        self._skeleton = skeleton
        self._logit_elements = logit_elements
        self._bounds = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        self._stream: ShardStream | None = None
        if slice_rows is None:
            weight, bias = store.head(skeleton)
            self._weight = weight.to(device, skeleton.dtype)
        else:
            bias = store.head_bias(skeleton)
            views = {number: store.head_view(skeleton, *bounds) for number, bounds in enumerate(self._bounds)}
            self._stream = ShardStream(views, device=device)
        self._bias = None if bias is None else bias.to(device, skeleton.dtype)

    @torch.no_grad()
    def score(
        self, hidden: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rate tokens after hidden states; one hidden state may be asked about several.

        Parameters
        ----------
        hidden:
            [states, hidden], outputs of the last layer.
        places, tokens:
            int64 [questions] on the CPU: which hidden state, and the token that may follow it.

        Returns
        -------
        tuple of torch.Tensor
            On the CPU: the tokens' log-probabilities in nats, float64 [questions], and whether each is the likeliest,
            bool [questions].
        """
        highest = hidden.new_full((len(hidden),), -math.inf, dtype=torch.float32)
        best = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        sums = torch.zeros_like(highest)
        asked = hidden.new_full((len(places),), math.nan, dtype=torch.float32)
        for number, (start, end) in enumerate(self._bounds):
            with self._placed(number):
                for chunk in token_chunks(self._skeleton, len(hidden), end - start, self._logit_elements):
                    values, _ = make_logits(self._skeleton, hidden[chunk])
                    inside = (places >= chunk.start) & (places < chunk.stop) & (tokens >= start) & (tokens < end)
                    numbers = torch.nonzero(inside).flatten()
                    rows, columns = places[numbers] - chunk.start, tokens[numbers] - start
                    asked[numbers.to(hidden.device)] = values[rows.to(hidden.device), columns.to(hidden.device)]
                    largest, where = values.max(1)
                    before = highest[chunk]
                    # Of equal logits the first one counts, as for argmax over the whole vocabulary.
                    best[chunk] = torch.where(largest > before, where + start, best[chunk])
                    largest = torch.maximum(before, largest)
                    # Where nothing but -inf was seen there is nothing to scale, and inf - inf would make it NaN.
                    base = torch.where(largest == -math.inf, 0.0, largest)
                    fresh = values.sub_(base[:, None]).exp_().sum(1)
                    sums[chunk] = sums[chunk] * torch.exp(before - base) + fresh
                    highest[chunk] = largest
        totals = (highest + sums.log()).cpu().double()
        return asked.cpu().double() - totals[places], best.cpu()[places] == tokens

    def close(self) -> None:
        """Take the head off the device."""
        self._skeleton.place_head(None)
        if self._stream is not None:
            self._stream.close()

    @contextlib.contextmanager
    def _placed(self, number: int) -> Iterator[None]:
        """Slice ``number`` of the head is in the model."""
        start, end = self._bounds[number]
        bias = None if self._bias is None else self._bias[start:end]
        if self._stream is None:
            self._skeleton.place_head(self._weight, bias)
            yield
            return
        with self._stream.item(number, [(number + 1) % len(self._bounds)]) as tensors:
            self._skeleton.place_head(tensors["weight"].to(self._skeleton.dtype), bias)
            try:
                yield
            finally:
                self._skeleton.place_head(None)
