"""The anchor's own part of the LM head: the rows of the tokens among which predictions are compared.

An LM head of many rows outweighs the layers of a small model, and the anchor would need it three times for each of its
tokens. Some thousands of rows hold nearly all of what a model predicts in texts of one kind (docs/recipe.md).
"""

from __future__ import annotations

import torch

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.residency.anchors import Anchors, compare
from lopt_lite.residency.logits import own_logits, pair_chunks, total


class AnchorHead:
    """Rows of the head on the device all the time, wherever the head itself is.

    Parameters
    ----------
    tokens:
        int64 [rows]: tokens of the vocabulary, whose rows these are.
    logit_elements:
        Most logits to make at once, of both models together. (One token's are always made at once.)
    """

    def __init__(
        self, skeleton: Skeleton, store: Store, *, device: torch.device, tokens: torch.Tensor, logit_elements: int
    ) -> None:
        self._skeleton, self._logit_elements = skeleton, logit_elements
        bias = store.head_bias(skeleton)
        self._weight = store.head_rows(skeleton, tokens).to(device, skeleton.dtype)
        self._bias = None if bias is None else bias[tokens].to(device, skeleton.dtype)

    def compare(self, hidden: torch.Tensor, anchors: Anchors) -> tuple[float, torch.Tensor]:
        """What anchored tokens diverge.

        Parameters
        ----------
        hidden:
            [n, hidden]: what :meth:`Anchors.tuned` gives.

        Returns
        -------
        tuple[float, torch.Tensor]
            Share of the step's mean divergence (without its weight), in nats; and the gradient [n, hidden] of its part
            in the step's loss.
        """
        if not len(hidden):
            return 0.0, hidden
        divergences = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden)
        with self._skeleton.other_head(self._weight, self._bias):
            for chunk in pair_chunks(self._skeleton, len(hidden), len(self._weight), self._logit_elements):
                with torch.no_grad():
                    base, _ = own_logits(self._skeleton, anchors.base[chunk])
                leaf = hidden[chunk].detach().requires_grad_()
                logits, edge = own_logits(self._skeleton, leaf)
                divergences[chunk] = compare(base, logits, anchors.share)
                del base
                gradient[chunk] = torch.autograd.grad(edge, leaf, logits)[0]
                del logits, edge, leaf  # before the next chunk's are made
        return total(divergences) / anchors.tokens, gradient
