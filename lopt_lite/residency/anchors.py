"""What holds a model to what it knew: the divergence of its predictions from the untouched model's, at chosen tokens.

With p the untouched model's probabilities, q the tuned model's, and x = log q - log p::

    KL(p || q) = sum p (-x) = sum (q - p - p x)        gradient with respect to the tuned model's logits = q - p

The second form of the sum has no negative terms, so none cancel where the models are close; and q - p is made from x,
as plus or minus max(p, q) (1 - exp -|x|), so that it is as good as x itself and no exponential can overflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

#: Elements that are worked on at once where temporary tensors are made, or one token's. They fit a processor's cache.
_PIECE_ELEMENTS = 2**18


@dataclass(frozen=True)
class Anchors:
    """The anchored tokens of a micro-batch.

    Attributes
    ----------
    mask:
        bool [rows, tokens]; True at anchored positions.
    base:
        [n, hidden] in the compute dtype: the untouched model's last layer's output (before the final norm) at these
        positions, in row-major order of ``mask``.
    tokens:
        Anchored tokens of the whole optimiser step: what the sum of divergences is divided by.
    weight:
        What their mean counts for, beside the task's mean loss.
    """

    mask: torch.Tensor
    base: torch.Tensor
    tokens: int
    weight: float

    @property
    def share(self) -> float:
        """What one token's divergence counts for in the step's loss."""
        return self.weight / self.tokens

    def tuned(self, output: torch.Tensor) -> torch.Tensor:
        """The tuned model's hidden states [n, hidden] at anchored positions of ``output``, without their graph.

        Raises
        ------
        ValueError
            ``base`` is not for as many positions.
        """
        hidden = output.detach()[self.mask]
        if hidden.shape != self.base.shape:
            raise ValueError(f"base states of shape {list(self.base.shape)} for anchored ones of {list(hidden.shape)}")
        return hidden


def to_log_probabilities(values: torch.Tensor) -> None:
    """Turn float32 logits [tokens, vocabulary] into log-probabilities where they lie."""
    for piece in _pieces(values):
        values[piece] = torch.log_softmax(values[piece], 1)


def diverge(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """The divergence of two predictions, or the share that some columns have in it.

    Parameters
    ----------
    base, tuned:
        float32 [tokens, columns], log-probabilities. ``tuned`` becomes q - p.

    Returns
    -------
    torch.Tensor
        KL(base || tuned) in nats, float32 [tokens]; not finite where a log-probability is not. Exactly zero, as the
        gradient is, where both are the same.
    """
    kl = tuned.new_empty(len(tuned))
    for piece in _pieces(tuned):
        p, x = base[piece], tuned[piece] - base[piece]
        larger = torch.maximum(p, tuned[piece]).exp_()
        difference = x.abs().neg_().expm1_().neg_().mul_(larger).copysign_(x)
        tuned[piece] = difference
        kl[piece] = difference.sub_(x.mul_(p.exp())).sum(1)
    return kl


def _pieces(values: torch.Tensor) -> Iterator[slice]:
    size = max(1, _PIECE_ELEMENTS // values.shape[1])
    for start in range(0, len(values), size):
        yield slice(start, start + size)
