"""Where layers are while many prompts are answered at once.

A streamed model is read once for each new token of a batch, so batches are as large as they may be. What is kept of a
batch, keys and values of its tokens and the states of state spaces, stays on the device while it is answered: it is
taken off the budget before layers are placed.
"""

from __future__ import annotations

import dataclasses

import torch

from lopt_lite.errors import DoesNotFitError
from lopt_lite.residency.choices import Memory, Residence, choose_residence, smallest_budget
from lopt_lite.residency.memory_model import Job
from lopt_lite.residency.shapes import ModelShapes


def place(
    shapes: ModelShapes,
    *,
    longest: int,
    rows: int,
    memory: Memory,
    device: torch.device,
    fix: str,
    prompt_at_once: int = 0,
) -> tuple[Residence, int]:
    """Where the layers are, and how many prompts are continued at once: fewer where keys and values would not fit.

    Parameters
    ----------
    longest:
        Tokens of the longest prompt with what follows it.
    rows:
        Prompts that are continued at once, at most.
    fix:
        What the user can do where even one does not fit.
    prompt_at_once:
        Tokens of the longest prompt, if all prompts that are continued at once pass through the layers at once as well;
        0 if no more of them do than ``forward_tokens`` allows.

    Raises
    ------
    DoesNotFitError
        The budget is too small even for one prompt at a time, or for what was read.
    """
    whole = [(0, len(shapes.layers))]
    while True:
        kept = rows * shapes.cache_bytes(longest)
        left = memory.with_budget(memory.limit_bytes - kept)
        job = Job(
            step_tokens=0,
            longest=longest,
            forward_rows=rows,
            measured_tokens=rows,
            at_once=rows * prompt_at_once,
            generates=True,
        )
        try:
            placed = choose_residence(shapes, whole, job, device=device, memory=left)
        except DoesNotFitError as error:
            if rows == 1:
                smallest = smallest_place(shapes, longest=longest, memory=memory, device=device)
                raise DoesNotFitError(
                    f"a budget of {memory.limit_bytes >> 20:,} MiB is too small to answer prompts of up to "
                    f"{longest:,} tokens with their answers",
                    expected=f"at least --memory {(smallest >> 20) + 1}MiB",
                    fix=fix,
                ) from error
            rows //= 2
        else:
            memory.check_not_exceeded(
                lambda: smallest_place(shapes, longest=longest, memory=memory, device=device), fix="raise --memory"
            )
            predicted = placed.predicted_bytes + kept
            host = predicted if device.type == "cpu" else placed.predicted_host_bytes
            return dataclasses.replace(placed, predicted_bytes=predicted, predicted_host_bytes=host), rows


def smallest_place(shapes: ModelShapes, *, longest: int, memory: Memory, device: torch.device) -> int:
    """The smallest budget, in bytes, with which :func:`place` finds a way for one prompt at a time."""
    job = Job(step_tokens=0, longest=longest, forward_rows=1, measured_tokens=1, generates=True)
    smallest = smallest_budget(shapes, [(0, len(shapes.layers))], job, device=device, memory=memory.with_budget(0))
    return max(shapes.cache_bytes(longest) + smallest, memory.least_bytes)
