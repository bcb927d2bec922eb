"""What LoRA adapters keep for the backward pass, from shapes alone: PEFT itself takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Note = Callable[[torch.Tensor], object]


def saved_bytes_per_token(widths: Iterable[int], *, rank: int, dtype: torch.dtype, dropout: bool) -> int:
    """Bytes that adapters keep of each token, beside what the layer keeps without them.

    An adapter computes in the layer's dtype. Without dropout it keeps the module's input itself, which others may keep
    as well: that is found by :func:`noting_inputs`, not here.

    Parameters
    ----------
    widths:
        Input width of each adapted module.
    dropout:
        Whether adapters have dropout: each then keeps its own input after dropout and, in the same type (CUDA: as one
        byte a value, which is less than said here), the mask.
    """
    copies = 2 if dropout else 0
    return sum((width * copies + rank) * dtype.itemsize for width in widths)


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
