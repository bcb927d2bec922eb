"""Where layers are while they are trained, and unquantised ones while targets are made of them (``match``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from lopt_lite.checkpoints.locate import ModelDescription, ModelFiles
from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX
from lopt_lite.errors import DoesNotFitError, SettingsError
from lopt_lite.residency.choices import Memory, Residence, choose_residence, smallest_budget
from lopt_lite.residency.memory_model import Job
from lopt_lite.residency.shapes import ModelShapes
from lopt_lite.training.block_plan import Block


def check_unquantised(model: ModelDescription, blocks: Sequence[Block]) -> None:
    """Refuse a model whose unquantised layers are nowhere, if blocks are to match them.

    Raises
    ------
    SettingsError
        Its weights have 4 bits already.
    """
    if not matching_ranges(blocks) or not isinstance(model, ModelFiles):
        return
    if any(name.endswith(STATE_SUFFIX) for name in model.weights.names()):
        raise SettingsError(
            f"--objective match needs unquantised layers, and the weights of {model.origin} have 4 bits already",
            fix="name the model that they were made from, or choose another objective",
        )


def matching_ranges(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """(first layer, end layer) of each block that is to match its unquantised layers."""
    return [(block.first, block.end) for block in blocks if block.objective == "match"]


def residences(
    shapes: ModelShapes,
    blocks: Sequence[Block],
    stages: Sequence[tuple[int, int]],
    job: Job,
    *,
    train_examples: int,
    device: torch.device,
    memory: Memory,
) -> tuple[Residence, Residence | None]:
    """Where layers are while they are trained, and where unquantised ones are while targets are made of them.

    Parameters
    ----------
    stages, job:
        Of training, as for :func:`choose_residence`.

    Raises
    ------
    DoesNotFitError
        The budget is too small; the message names the smallest that would do for both.
    """
    ranges = matching_ranges(blocks)
    matching = _job(shapes, train_examples, job.longest)
    try:
        training = choose_residence(shapes, stages, job, device=device, memory=memory)
        if not ranges:
            return training, None
        return training, choose_residence(_unquantised(shapes), ranges, matching, device=device, memory=memory)
    except DoesNotFitError as error:
        smallest = smallest_for_both(
            shapes, blocks, stages, job, train_examples=train_examples, device=device, memory=memory
        )
        raise DoesNotFitError(error.found, expected=f"at least --memory {smallest >> 20}MiB", fix=error.fix) from error


def smallest_for_both(
    shapes: ModelShapes,
    blocks: Sequence[Block],
    stages: Sequence[tuple[int, int]],
    job: Job,
    *,
    train_examples: int,
    device: torch.device,
    memory: Memory,
) -> int:
    """The smallest budget, in bytes, for training and for making targets, if there are any to be made.

    Parameters
    ----------
    stages, job:
        Of training, as for :func:`smallest_budget`.
    """
    smallest = smallest_budget(shapes, stages, job, device=device, memory=memory)
    ranges = matching_ranges(blocks)
    if not ranges:
        return smallest
    matching = _job(shapes, train_examples, job.longest)
    return max(smallest, smallest_budget(_unquantised(shapes), ranges, matching, device=device, memory=memory))


def _unquantised(shapes: ModelShapes) -> ModelShapes:
    """The same model in its compute dtype, nothing being trained."""
    layers = tuple(dataclasses.replace(layer, stored_bytes=layer.dense_bytes) for layer in shapes.layers)
    return dataclasses.replace(shapes, quantised=False, state_bytes_per_parameter=0, layers=layers)


def _job(shapes: ModelShapes, train_examples: int, longest: int) -> Job:
    """The pass that writes targets: no gradients, no LM head."""
    tokens = train_examples * longest
    row_bytes = shapes.hidden * shapes.itemsize
    return Job(step_tokens=0, longest=longest, answer_tokens=0, all_tokens=tokens, cache_bytes=tokens * row_bytes)
