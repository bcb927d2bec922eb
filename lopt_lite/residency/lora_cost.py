"""What LoRA adapters keep for the backward pass, from shapes alone: PEFT itself takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Note = Callable[[torch.Tensor], object]


def input_width(module: nn.Module) -> int:
    """Width of what goes into a module that can carry an adapter."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0])
    assert isinstance(module, nn.Linear)
    return module.in_features


def saved_bytes_per_token(
    widths: Iterable[int], *, rank: int, dtype: torch.dtype, dropout: bool, fused_dropout: bool
) -> int:
    """Bytes that adapters keep of each token, beside what the layer keeps without them.

    An adapter's parameters are float32, and PEFT turns each module's input into that for it alone. What an adapter
    without dropout keeps of a float32 model is the module's input itself, which others may keep as well: that is
    counted by :func:`noting_inputs`, not here.

    Parameters
    ----------
    widths:
        Input width of each adapted module.
    dropout:
        Whether adapters have dropout: each then keeps its own input after dropout, and the mask.
    fused_dropout:
        Whether the device keeps the mask in one byte a value (CUDA) instead of four.
    """
    widths = list(widths)
    copies = 0 if shares_input(dtype, dropout=dropout) else 4
    mask = (1 if fused_dropout else 4) if dropout else 0
    return sum(width * (copies + mask) + 4 * rank for width in widths)


def shares_input(dtype: torch.dtype, *, dropout: bool) -> bool:
    """Whether adapters keep the modules' inputs themselves instead of copies of their own."""
    return dtype == torch.float32 and not dropout


@contextmanager
def noting_inputs(layer: nn.Module, targets: Iterable[str], note: Note) -> Iterator[None]:
    """Within the context, ``note`` sees what goes into each module of ``layer`` called in ``targets``."""
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(lambda module, args: (note(args[0]), None)[1])
        for name in targets
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
