"""How many tokens a model with a table of positions can see; positions that are computed have no end.

The model is asked, not its config: tables begin at other rows than 0 (OPT's and BioGPT's at 2, RoBERTa's after the
padding token's), and many a config names a number of positions that no table has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

#: Tokens of the row to run the model on: enough for positions to show as numbers that go up by one.
PROBED_TOKENS = 3


class PositionTables(TorchFunctionMode):
    """Within the context: notes the tables in which :data:`PROBED_TOKENS` equal tokens are looked up by position.

    Tables that are looked up by token, or by kind of token, give the same row for each of them. The tables may hold
    embeddings or, in older rotary models, the rotations.
    """

    def __init__(self) -> None:
        super().__init__()
        self._most: list[int] = []

    @property
    def most_positions(self) -> int | None:
        """Positions of the shortest table; None when there is none."""
        return min(self._most, default=None)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is functional.embedding:
            rows, table = args[:2]
            self._note(table, rows)
        elif function is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):  # GPT-J's and CodeGen's
            self._note(*args)
        return function(*args, **(kwargs or {}))

    def note_layer(self, layer: nn.Module) -> None:
        """Note the table that ``layer`` has of its own.

        In transformers before 5.24 each layer of GPT-J and CodeGen has one, which the model's root does not look into.
        """
        self._most += [b.shape[0] for name, b in layer.named_buffers() if name.rpartition(".")[2] == "embed_positions"]

    def _note(self, table: torch.Tensor, rows: torch.Tensor) -> None:
        is_row = rows.numel() == PROBED_TOKENS and rows.dtype in (torch.int64, torch.int32) and not rows.is_meta
        if table.dim() != 2 or not is_row:
            return
        first = int(rows.min())
        goes_up = rows.flatten().tolist() == list(range(first, first + PROBED_TOKENS))
        # What is as long as the row was made for the row.
        if goes_up and table.shape[0] > first + PROBED_TOKENS:
            self._most.append(table.shape[0] - first)
