"""How much disk a run needs, from shapes alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from lopt_lite.errors import DoesNotFitError
from lopt_lite.files import existing_parent
from lopt_lite.outcomes import PlanDisk
from lopt_lite.residency.choices import Residence
from lopt_lite.residency.memory_model import Job
from lopt_lite.settings import TrainSettings
from lopt_lite.training.cache_format import CacheFormat
from lopt_lite.training.model_facts import ModelFacts, compute_dtype

#: Value and two moments of a trained parameter, in float32.
_CHECKPOINT_BYTES = 12


def disk_plan(
    facts: ModelFacts,
    settings: TrainSettings,
    residence: Residence,
    ranges: Sequence[tuple[int, int]],
    job: Job,
    *,
    cached_tokens: int,
    run: Path,
    store: Path,
    store_exists: bool,
) -> PlanDisk:
    """What a run needs while it is at its largest.

    Parameters
    ----------
    ranges:
        (first layer, end layer) of each block.
    cached_tokens:
        Tokens of all examples, held-out ones included.
    run, store:
        Where the run directory and the store are or will be.
    """
    shapes = facts.shapes
    largest = max(ranges, key=lambda r: shapes.trained_parameters(*r))
    head = shapes.hidden**2 // 2 if job.early_blocks else 0
    value_bytes = shapes.itemsize if shapes.full else 4
    checkpoint = (shapes.trained_parameters(*largest) + head) * (
        (shapes.state_bytes_per_parameter - value_bytes) if shapes.full else _CHECKPOINT_BYTES
    )
    # While a block's outputs are written, its inputs are still there; those of the first block are no file.
    caches = min(len(ranges) - 1, 2)
    token_bytes = CacheFormat(settings.cache, shapes.hidden, compute_dtype(settings)).token_bytes
    block = max(ranges, key=lambda r: shapes.stored_bytes(*r))
    boundaries = job.boundary_bytes(shapes, block) if residence.recompute else 0
    spilled = max(0, boundaries - residence.boundary_bytes - residence.boundary_host_bytes)
    on_disk_state = residence.offload_state and residence.predicted_bytes == residence.predicted_host_bytes
    state = int(shapes.state_bytes_per_parameter * shapes.trained_parameters(*largest)) if on_disk_state else 0
    parts = {
        "store_bytes": shapes.stored_bytes(0, len(shapes.layers)) + facts.around_bytes,
        "caches_bytes": caches * cached_tokens * token_bytes,
        "checkpoints_bytes": int(2 * checkpoint),
        # The blocks' own and the one put together from them.
        "adapter_bytes": 2 * value_bytes * shapes.trained_parameters(0, len(shapes.layers)),
        "scratch_bytes": spilled + state,
    }
    total = sum(parts.values()) - (parts["store_bytes"] if store_exists else 0)
    return PlanDisk(
        store=str(store),
        store_exists=store_exists,
        total_bytes=total,
        free_bytes=shutil.disk_usage(existing_parent(run)).free,
        **parts,
    )


def require_disk(disk: PlanDisk, run: Path) -> None:
    """Refuse a run that its disk cannot hold.

    Raises
    ------
    DoesNotFitError
        Too little is free.
    """
    elsewhere = not disk.store_exists and not _same_disk(Path(disk.store), run)
    needed = disk.total_bytes - (disk.store_bytes if elsewhere else 0)
    # What an earlier part of the same run has written is there already, and free space says nothing of it.
    needed -= _present_bytes(run)
    if needed > disk.free_bytes:
        raise DoesNotFitError(
            f"the run needs {needed:,} bytes on the disk of {run}, and {disk.free_bytes:,} are free",
            fix="free some space, or put it on another disk with --output (or --store); --cache int8 halves the "
            "activations between blocks",
        )
    if elsewhere:
        free = shutil.disk_usage(existing_parent(Path(disk.store))).free
        if disk.store_bytes > free:
            raise DoesNotFitError(
                f"the store needs {disk.store_bytes:,} bytes on the disk of {disk.store}, and {free:,} are free",
                fix="free some space, or put it on another disk with --store",
            )


def _same_disk(a: Path, b: Path) -> bool:
    return existing_parent(a).stat().st_dev == existing_parent(b).stat().st_dev


def _present_bytes(run: Path) -> int:
    if not run.is_dir():
        return 0
    return sum(path.stat().st_size for path in run.rglob("*") if path.is_file() and not path.is_symlink())
