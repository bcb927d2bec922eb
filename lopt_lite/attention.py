"""Calls of PyTorch's attention: what layers ask of it, and something else in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

#: ``torch.nn.functional.scaled_dot_product_attention``, whatever is in its place.
ATTENTION = nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call, under PyTorch's names.

    Attributes
    ----------
    query, key, value:
        [rows, heads, tokens, width]; other shapes are PyTorch's affair.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def of_heads(self) -> bool:
        """Whether rows and heads are dimensions of their own."""
        return self.query.dim() == self.key.dim() == self.value.dim() == 4

    def run(self, attention: Callable[..., torch.Tensor] = ATTENTION) -> torch.Tensor:
        """What PyTorch's attention, or another with its arguments, makes of it."""
        return attention(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )


#: What attention would have been without a replacement.
Before = Callable[[AttentionCall], torch.Tensor]


@contextmanager
def replaced_attention(attend: Callable[[AttentionCall, Before], torch.Tensor]) -> Iterator[None]:
    """Within the context, ``attend`` makes what is asked of attention; it is told how it was made before."""
    before = nn.functional.scaled_dot_product_attention

    def as_before(call: AttentionCall) -> torch.Tensor:
        return call.run(before)

    def asked(*args: object, **kwargs: object) -> torch.Tensor:
        return attend(AttentionCall(*args, **kwargs), as_before)  # type: ignore[arg-type]

    nn.functional.scaled_dot_product_attention = asked
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = before
