"""What LoRA adapters keep for the backward pass, from shapes alone: PEFT itself takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Note = Callable[[torch.Tensor], object]


def saved_bytes_per_token(widths: Iterable[int], *, rank: int, dtype: torch.dtype, dropout: bool) -> int:
    """Bytes that adapters keep of each token, beside what the layer keeps without them.

    An adapter's parameters are float32, and PEFT turns each module's input into that for it alone. In a float32 model
    an adapter without dropout keeps the module's input itself, which others may keep as well: that is found by
    :func:`noting_inputs`, not here.

    Parameters
    ----------
    widths:
        Input width of each adapted module.
    dropout:
        Whether adapters have dropout: each then keeps its own input after dropout and, as float32 (CUDA: as one byte a
        value, which is less than said here), the mask.
    """
    copies = 0 if keeps_inputs(dtype, dropout=dropout) else 4
    return sum(width * (copies + (4 if dropout else 0)) + 4 * rank for width in widths)


def keeps_inputs(dtype: torch.dtype, *, dropout: bool) -> bool:
    """Whether adapters keep the modules' inputs themselves instead of copies of their own."""
    return dtype == torch.float32 and not dropout


@contextmanager
def noting_inputs(layer: nn.Module, targets: Iterable[str], note: Note) -> Iterator[None]:
    """Within the context, ``note`` sees what goes into each module of ``layer`` called in ``targets``."""

    def see(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        note(args[0])

    hooks = [layer.get_submodule(name).register_forward_pre_hook(see) for name in targets]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
