"""How much disk a run needs, from shapes alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lopt_lite import files
from lopt_lite.errors import DoesNotFitError
from lopt_lite.files import existing_parent
from lopt_lite.outcomes import PlanDisk
from lopt_lite.residency.choices import Residence
from lopt_lite.residency.memory_model import Job
from lopt_lite.residency.shapes import ModelShapes
from lopt_lite.settings import TrainSettings
from lopt_lite.training.block_plan import Block
from lopt_lite.training.cache_format import CacheFormat
from lopt_lite.training.memory_choice import matching_ranges
from lopt_lite.training.model_facts import ModelFacts, compute_dtype

#: A trained parameter in float32: its two moments, and those with its value.
_FLOAT32_MOMENTS_BYTES, _FLOAT32_BYTES = 8, 12


def disk_plan(
    facts: ModelFacts,
    settings: TrainSettings,
    residence: Residence,
    blocks: Sequence[Block],
    job: Job,
    *,
    cached_tokens: int,
    anchored_tokens: int,
    run: Path,
    store: Path,
    store_exists: bool,
) -> PlanDisk:
    """What a run needs while it is at its largest: while it trains, or while its result is put together.

    Parameters
    ----------
    cached_tokens:
        Tokens of all examples, held-out ones included.
    anchored_tokens:
        Anchored tokens of all examples, 0 without an anchor.
    run, store:
        Where the run directory and the store are or will be.
    """
    shapes = facts.shapes
    # What is trained at the same time has its checkpoint at the same time.
    together = settings.schedule == "joint"
    trained = [shapes.trained_parameters(block.first, block.end) for block in blocks if block.objective != "none"]
    at_once = sum(trained) if together else max(trained)
    around = 2 * shapes.head_bytes if settings.trains_around else 0
    # While a block's outputs are written, its inputs are still there; those of the first block are no file.
    caches = 0 if together else min(len(blocks) - 1, 2)
    token_bytes = CacheFormat(settings.cache, shapes.hidden, compute_dtype(settings)).token_bytes
    value_bytes = shapes.itemsize if shapes.full else 4
    left = value_bytes * sum(trained) + around
    matching = 0
    if ranges := matching_ranges(blocks):
        # A block's targets, and its unquantised layers while they are made.
        matching = cached_tokens * shapes.hidden * shapes.itemsize
        matching += max(shapes.dense_bytes(*block) for block in ranges)
    parts = {
        "store_bytes": shapes.stored_bytes(0, len(shapes.layers)) + facts.around_bytes,
        "caches_bytes": caches * cached_tokens * token_bytes
        + anchored_tokens * shapes.hidden * shapes.itemsize
        + matching,
        "checkpoints_bytes": 2 * _checkpoint_bytes(shapes, settings, job, at_once),
        "scratch_bytes": _scratch_bytes(shapes, residence, blocks, job, at_once),
        "blocks_bytes": left,
        "result_bytes": _model_bytes(facts, around) if shapes.full else left,
    }
    # Caches, checkpoints and scratch files are gone when the result is put together from what the blocks left.
    working = parts["caches_bytes"] + parts["checkpoints_bytes"] + parts["scratch_bytes"]
    total = left + max(working, parts["result_bytes"])
    return PlanDisk(
        store=str(store),
        store_exists=store_exists,
        result="model" if shapes.full else "adapter",
        total_bytes=total + (0 if store_exists else parts["store_bytes"]),
        free_bytes=shutil.disk_usage(existing_parent(run)).free,
        **parts,
    )


def _checkpoint_bytes(shapes: ModelShapes, settings: TrainSettings, job: Job, trained: int) -> int:
    """One checkpoint of ``trained`` parameters, with what else is trained with them."""
    # All that a parameter needs but its gradient.
    each = shapes.state_bytes_per_parameter - shapes.itemsize if shapes.full else _FLOAT32_BYTES
    size = trained * each
    if job.early_blocks:
        heads = settings.objectives().count("reconstruct") if settings.schedule == "joint" else 1
        size += heads * _head_parameters(shapes) * _FLOAT32_BYTES
    if settings.trains_around:
        size += 2 * shapes.vocabulary * shapes.hidden * (shapes.itemsize + _FLOAT32_MOMENTS_BYTES)
    return int(size)


def _head_parameters(shapes: ModelShapes) -> int:
    """Two matrices between the hidden size and a quarter of it."""
    return shapes.hidden**2 // 2


def _scratch_bytes(shapes: ModelShapes, residence: Residence, blocks: Sequence[Block], job: Job, trained: int) -> int:
    """What a step puts aside in files: activations, and the state of ``trained`` parameters."""
    block = max(((block.first, block.end) for block in blocks), key=lambda r: shapes.stored_bytes(*r))
    boundaries = job.boundary_bytes(shapes, block) if residence.recompute else 0
    spilled = max(0, boundaries - residence.boundary_bytes - residence.boundary_host_bytes)
    state = int(shapes.state_bytes_per_parameter * trained) if residence.offload_state else 0
    return spilled + max(0, state - residence.state_host_bytes)


def _model_bytes(facts: ModelFacts, trained_around: int) -> int:
    """The whole checkpoint in the compute dtype, which of full tuning is the store's too.

    ``trained_around``: embedding and LM head as two tensors, where they are trained; tied they are stored as one.
    """
    shapes = facts.shapes
    return shapes.dense_bytes(0, len(shapes.layers)) + max(facts.around_bytes, trained_around)


def require_disk(disk: PlanDisk, run: Path) -> None:
    """Refuse a run that its disk cannot hold.

    Raises
    ------
    DoesNotFitError
        Too little is free.
    """
    elsewhere = not disk.store_exists and not _same_disk(Path(disk.store), run)
    needed = disk.total_bytes - (disk.store_bytes if elsewhere else 0) + files.BESIDE_BYTES
    # What an earlier part of the same run has written is there already, and free space says nothing of it. A store that
    # is complete is not among what is needed.
    needed -= files.directory_bytes(run, without=Path(disk.store) if disk.store_exists else None)
    if needed > disk.free_bytes:
        raise DoesNotFitError(
            f"the run needs {needed:,} bytes on the disk of {run}, and {disk.free_bytes:,} are free",
            fix="free some space, or put it on another disk with --output (or --store); --cache int8 halves the "
            "activations between blocks",
        )
    if elsewhere:
        free = shutil.disk_usage(existing_parent(Path(disk.store))).free
        needed = disk.store_bytes + files.BESIDE_BYTES
        if needed > free:
            raise DoesNotFitError(
                f"the store needs {needed:,} bytes on the disk of {disk.store}, and {free:,} are free",
                fix="free some space, or put it on another disk with --store",
            )


def _same_disk(a: Path, b: Path) -> bool:
    return existing_parent(a).stat().st_dev == existing_parent(b).stat().st_dev
