"""A model's input embedding without its matrix: rows are read as batches need them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

#: Distinct token ids, int64 [n] on the CPU -> their rows [n, hidden].
ReadRows = Callable[[torch.Tensor], torch.Tensor]


class RowEmbedding(nn.Module):
    """The model's input embedding, fed with only the rows a batch needs.

    The embedding module itself runs (some scale their output), on a small matrix of the distinct rows.

    Parameters
    ----------
    device:
        Where batches are.

    Attributes
    ----------
    wrapped:
        The model's own module. Its parts (Inkling has a norm there) are under their own names as well.
    """

    def __init__(self, module: nn.Embedding, dtype: torch.dtype, device: Callable[[], torch.device]) -> None:
        super().__init__()
        module.padding_idx = None  # matters to gradients only, and would be checked against the small matrix
        self.wrapped = module
        for name, part in module.named_children():
            self.add_module(name, part)
        self._dtype = dtype
        self._device = device
        self.read_rows: ReadRows | None = None

    @property
    def weight(self) -> torch.Tensor:
        """No rows, but the type and the device of some: Llama 4 asks where its embedding is."""
        return torch.empty(0, self.wrapped.embedding_dim, dtype=self._dtype, device=self._device())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.read_rows is None:
            width = self.wrapped.embedding_dim
            return torch.zeros(1, 1, 1, dtype=self._dtype, device=input_ids.device).expand(*input_ids.shape, width)
        distinct, inverse = torch.unique(input_ids, return_inverse=True)
        rows = self.read_rows(distinct.cpu()).to(input_ids.device, self._dtype)
        return torch.func.functional_call(self.wrapped, {"weight": rows}, (inverse,))
