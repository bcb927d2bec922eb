"""The targets of ``--objective match``: what a block's unquantised layers make of the block's own inputs.

Before the block is trained, its layers are read from the user's model once more, unquantised, into a small store of
their own; the examples pass through them, and what comes out is cached. With the same inputs on both sides the
difference is what quantising these layers has changed, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lopt_lite import files
from lopt_lite.checkpoints.build_store import StoreBuilder
from lopt_lite.checkpoints.store import Store
from lopt_lite.data.dataset import Batch
from lopt_lite.residency.memory_model import FORWARD_ROWS
from lopt_lite.training.activation_cache import CacheLayout
from lopt_lite.training.block_inputs import BlockInputs, CacheReader
from lopt_lite.training.block_plan import Block
from lopt_lite.training.untouched import UntouchedPass
from lopt_lite.training.workbench import Workbench


def write_targets(bench: Workbench, block: Block, inputs: BlockInputs) -> None:
    """Cache the targets of a block, unless that is done; damaged shards are written again.

    Parameters
    ----------
    inputs:
        The block's.

    Raises
    ------
    StoppedError, DoesNotFitError, ModelError
        See :class:`StoreBuilder` and :meth:`UntouchedPass.write`.
    """
    number = block.index + 1
    untouched = UntouchedPass(
        bench,
        bench.paths.targets(block.index),
        _layout(bench),
        fact="targets",
        shard_fact="target-shard",
        what=f"what the unquantised layers of block {number} make",
        dataset=bench.dataset,
        block=block.index,
    )
    if not untouched.stands():
        builder = StoreBuilder(
            bench.model,
            bench.paths.unquantised(block.index),
            quantize="none",
            dtype=bench.settings.dtype,
            device=bench.device,
            layers=range(block.first, block.end),
            check=bench.stop.check,
            on_event=bench.on_event,
        )
        builder.build()
        store = Store(bench.paths.unquantised(block.index), repair=builder.rebuild, on_event=bench.on_event)
        try:
            assert bench.matching_residence is not None
            untouched.write(
                store,
                [(block.first, block.end)],
                inputs,
                residence=bench.matching_residence,
                rows_of=lambda batch, output: output,
            )
        finally:
            store.close()
    # Also of targets that were there before: a crash may have come between the fact and the tidying.
    files.remove_tree(bench.paths.unquantised(block.index))


class Targets:
    """Gives the targets of a batch from the cache.

    Raises
    ------
    ModelError
        The cache cannot be read.
    """

    def __init__(self, bench: Workbench, block: Block) -> None:
        self._device = bench.device
        directory = bench.paths.targets(block.index)
        self._reader = CacheReader(directory, _layout(bench), keep_bytes=bench.residence.cache_keep_bytes)

    def of(self, batch: Batch) -> torch.Tensor:
        """[rows, longest, hidden] on the device, zeros at padding."""
        return self._reader.read(batch).to(self._device)

    def read_ahead(self, batches: Sequence[Batch]) -> None:
        """Start reading those of coming batches in the background."""
        self._reader.read_ahead(batches)

    def close(self) -> None:
        """Close the cache's files."""
        self._reader.close()


def _layout(bench: Workbench) -> CacheLayout:
    """Of training examples, the only ones with a loss."""
    assert bench.matching_residence is not None
    lengths = bench.dataset.lengths
    kept = torch.where(torch.arange(len(lengths)) < bench.train_count, lengths, 0)
    return CacheLayout(
        lengths,
        hidden_size=bench.skeleton.hidden_size,
        dtype=bench.skeleton.dtype,
        max_tokens=bench.matching_residence.forward_tokens,
        max_rows=FORWARD_ROWS,
        kept=kept,
    )
