"""What holds a model to what it knew: the divergence of its predictions from the untouched model's, at chosen tokens.

With p the untouched model's probabilities, q the tuned model's, and x = log q - log p::

    KL(p || q) = sum p (-x) = sum (q - p - p x)        gradient with respect to the tuned model's logits = q - p

The second form of the sum has no negative terms, so none cancel where the models are close; and q - p is made from x,
as plus or minus max(p, q) (1 - exp -|x|), so that it is as good as x itself and no exponential can overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lopt_lite.residency.logits import pieces


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


def compare(base: torch.Tensor, tuned: torch.Tensor, weight: float) -> torch.Tensor:
    """The divergence of two models' predictions.

    Parameters
    ----------
    base, tuned:
        Logits [tokens, vocabulary] in one dtype. ``tuned`` becomes the gradient: q - p, times the weight.
    weight:
        What a token's divergence counts for.

    Returns
    -------
    torch.Tensor
        As :func:`diverge` gives.
    """
    kl = tuned.new_empty(len(tuned), dtype=torch.float32)
    for piece in pieces(tuned):
        p, q = (torch.log_softmax(logits[piece].float(), 1) for logits in (base, tuned))
        kl[piece] = diverge(p, q)
        tuned[piece] = q.mul_(weight)
    return kl


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
    for piece in pieces(tuned):
        p, x = base[piece], tuned[piece] - base[piece]
        larger = torch.maximum(p, tuned[piece]).exp_()
        difference = x.abs().neg_().expm1_().neg_().mul_(larger).copysign_(x)
        tuned[piece] = difference
        kl[piece] = difference.sub_(x.mul_(p.exp())).sum(1)
    return kl
