"""What follows prompts, many at once, by transformers' own generation loop over layers that may be streamed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.residency.choices import Residence
from lopt_lite.residency.fitting_attention import fitting_attention
from lopt_lite.residency.head import open_head
from lopt_lite.residency.layers import open_layers


@contextlib.contextmanager
def continuing_model(
    skeleton: Skeleton,
    store: Store,
    residence: Residence,
    *,
    device: torch.device,
    scratch: Path,
    on_layer: Callable[[int, nn.Module], None] | None = None,
    state: Any = None,
) -> Iterator[Any]:
    """The model as transformers generates with it, within the context.

    Parameters
    ----------
    skeleton:
        Used up: it can make no losses and no other answers afterwards.
    on_layer, state:
        See :func:`~lopt_lite.residency.layers.open_layers`.
    """
    with contextlib.ExitStack() as stack:
        pool = open_layers(
            residence,
            store,
            skeleton,
            0,
            skeleton.layer_count,
            device=device,
            scratch=scratch,
            on_layer=on_layer,
            state=state,
        )
        stack.callback(pool.close)
        head = open_head(
            skeleton,
            store,
            device=device,
            logit_elements=residence.logit_elements,
            slice_rows=residence.head_slice_rows,
        )
        stack.callback(head.close)
        head.place_for_generation()
        stack.enter_context(fitting_attention())
        model = skeleton.with_layers(pool.modules())
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)
        yield model


def _contiguous(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Last positions cut out of rows, with strides that are theirs alone.

    PyTorch would copy the head's weight for each row of a cut that is not contiguous. The cut out of a single row
    counts as contiguous whatever its strides are, and the weight is copied all the same: so it is cloned.
    """
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])


def padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts side by side, padded on the left, and 1 where there is a token: int64 [rows, longest] both."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
