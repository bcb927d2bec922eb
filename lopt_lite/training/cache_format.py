"""How one token's activation is stored in the cache: as it is, or in 8 bits per value.

The 8-bit format is symmetric and per token: a token's values are divided by its scale, its largest magnitude / 127,
and rounded. A token with huge values coarsens itself alone. What that costs is measured while the cache is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lopt_lite.checkpoints.shard_writer import TensorSpec, aligned_order
from lopt_lite.settings import Cache

_LARGEST = 127
#: Values that are brought into 8 bits at once, in float32: bounds the memory that takes.
_CHUNK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class StoredError:
    """How far what is stored is from what came out.

    Each token counts alike, with its squared error over its squared length: the layers that read it normalise it. The
    first token of a text can be a hundred times as long as the others, and would otherwise be all that is measured.

    Attributes
    ----------
    relative_squares:
        Sum of the tokens' squared relative errors.
    tokens:
        Number of tokens. Those that are not finite are left out: they come back as not-a-number.
    """

    relative_squares: float = 0.0
    tokens: int = 0

    def __add__(self, other: StoredError) -> StoredError:
        return StoredError(self.relative_squares + other.relative_squares, self.tokens + other.tokens)

    @property
    def relative(self) -> float:
        """Root mean square of the tokens' relative errors; 0 where there are none."""
        return math.sqrt(self.relative_squares / self.tokens) if self.tokens else 0.0

    def to_json(self) -> dict[str, float]:
        """The sums, for the journal."""
        return {"relative_squares": self.relative_squares, "tokens": self.tokens}

    @staticmethod
    def total(facts: Iterable[Mapping[str, Any]]) -> StoredError:
        """The sum of what :meth:`to_json` made."""
        parts = [(float(fact["relative_squares"]), int(fact["tokens"])) for fact in facts]
        return StoredError(math.fsum(squares for squares, _ in parts), sum(tokens for _, tokens in parts))


@dataclass(frozen=True)
class CacheFormat:
    """A way of storing tokens.

    Attributes
    ----------
    name:
        ``"exact"``: one tensor ``hidden`` [tokens, hidden] in ``dtype``. ``"int8"``: ``hidden`` in int8 and ``scale``
        [tokens] in float32.
    hidden_size, dtype:
        Shape and type of one token's activation as it is computed with.
    """

    name: Cache
    hidden_size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one stored token."""
        return sum(spec.nbytes for spec in self.specs(1))

    def specs(self, tokens: int) -> list[TensorSpec]:
        """The tensors that ``tokens`` tokens are stored as, in file order."""
        if self.name == "exact":
            return [TensorSpec("hidden", self.dtype, (tokens, self.hidden_size))]
        values = TensorSpec("hidden", torch.int8, (tokens, self.hidden_size))
        return aligned_order([values, TensorSpec("scale", torch.float32, (tokens,))])

    def empty(self, tokens: int) -> dict[str, torch.Tensor]:
        """Room for ``tokens`` stored tokens on the CPU."""
        return {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in self.specs(tokens)}

    @torch.no_grad()
    def encode(self, hidden: torch.Tensor, into: Mapping[str, torch.Tensor]) -> StoredError:
        """Store ``hidden`` [tokens, hidden], on any device, in tensors shaped as :meth:`empty` makes them."""
        if self.name == "exact":
            into["hidden"].copy_(hidden)
            return StoredError()
        error = StoredError()
        for begin, end in _chunks(*hidden.shape):
            # Rounded to the compute dtype first: that is what came out.
            wide = hidden[begin:end].to(self.dtype).float()
            values, scale = _quantise(wide)
            back = self.decode({"hidden": values, "scale": scale}).float()
            error += _error_of(back, wide, scale)
            into["hidden"][begin:end].copy_(values)
            into["scale"][begin:end].copy_(scale)
        return error

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What :meth:`encode` stored: [tokens, hidden] in ``dtype``."""
        if self.name == "exact":
            return stored["hidden"]
        return (stored["hidden"].float() * stored["scale"][:, None]).to(self.dtype)


def _chunks(tokens: int, hidden_size: int) -> Iterator[tuple[int, int]]:
    at_once = max(_CHUNK_ELEMENTS // hidden_size, 1)
    for begin in range(0, tokens, at_once):
        yield begin, min(begin + at_once, tokens)


def _quantise(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [tokens, hidden] and scales [tokens] of float32 ``wide``.

    A token of zeros has the scale 0. One that is not finite has no scale, so that it cannot pass for a number later.
    """
    scale = wide.abs().amax(dim=-1) / _LARGEST
    finite = scale.isfinite()
    usable = torch.where(finite & (scale > 0), scale, 1)
    # Below the smallest normal number the quotient may exceed 127 by rounding.
    values = (wide / usable[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
    values = torch.where(finite[:, None], values, 0).to(torch.int8)
    return values, torch.where(finite, scale, math.nan)


def _error_of(back: torch.Tensor, wide: torch.Tensor, scale: torch.Tensor) -> StoredError:
    """The error of ``back`` against float32 ``wide``, both [tokens, hidden]."""
    # In steps of the token's own scale, so that squares neither overflow nor vanish.
    steps = torch.where(scale > 0, scale, 1)[:, None]
    squares = (wide / steps).square_().sum(dim=1)
    relative = ((back - wide) / steps).square_().sum(dim=1) / torch.where(squares > 0, squares, 1)
    finite = scale.isfinite()
    return StoredError(float(torch.where(finite, relative, 0).sum()), int(finite.sum()))
