"""The sequential schedule: train block after block, each on the cached outputs of the one before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lopt_lite import files
from lopt_lite.data.dataset import collate
from lopt_lite.events import Progress
from lopt_lite.residency.block_major import groups
from lopt_lite.residency.choices import open_layers
from lopt_lite.training.activation_cache import CacheLayout, shard_name, write_cache
from lopt_lite.training.adapters import attach_adapter, load_adapter, set_training
from lopt_lite.training.block_inputs import BlockInputs, CachedInputs, EmbeddedInputs
from lopt_lite.training.block_plan import Block
from lopt_lite.training.block_trainer import BlockTrainer
from lopt_lite.training.checkpoint import load_tensors
from lopt_lite.training.workbench import FORWARD_ROWS, Workbench


def train_sequentially(bench: Workbench) -> None:
    """Train every block that is not trained yet, first to last.

    For block b: train it on its inputs; pass the data through it once to write the next block's inputs; delete its own.

    Raises
    ------
    StoppedError, DivergedError, DoesNotFitError
        See :class:`BlockTrainer` and :func:`write_cache`.
    """
    for block in bench.blocks:
        is_last = block.index == len(bench.blocks) - 1
        if is_last or not bench.journal.last("cache", block=block.index + 1):
            if not bench.journal.last("block", block=block.index):
                _train(bench, block)
            if not is_last:
                _write_next_inputs(bench, block)
        # Also for a block that was done before: a crash may have come between the fact and the tidying.
        files.remove_tree(bench.paths.cache(block.index))
        files.remove_tree(bench.paths.checkpoint(block.index))


def _train(bench: Workbench, block: Block) -> None:
    if block.objective == "none":
        bench.journal.add("block", block=block.index)
        return
    inputs = _inputs(bench, block)
    try:
        BlockTrainer(bench, block, inputs).run()
    finally:
        inputs.close()


def _inputs(bench: Workbench, block: Block) -> BlockInputs:
    if block.index == 0:
        return EmbeddedInputs(bench.skeleton, bench.device)
    return CachedInputs(bench.skeleton, bench.device, bench.paths.cache(block.index), _layout(bench))


def _layout(bench: Workbench) -> CacheLayout:
    return CacheLayout(
        bench.dataset.lengths,
        hidden_size=bench.skeleton.hidden_size,
        dtype=bench.skeleton.dtype,
        max_tokens=bench.residence.forward_tokens,
        max_rows=FORWARD_ROWS,
    )


def _write_next_inputs(bench: Workbench, block: Block) -> None:
    """Pass all examples through the trained block and cache what comes out."""
    following = block.index + 1
    directory = bench.paths.cache(following)
    layout = _layout(bench)
    done = [int(f["shard"]) for f in bench.journal.all("cache-shard", block=following)]
    files.require_free_space(
        bench.paths.root,
        layout.total_bytes - files.directory_bytes(directory) + (16 << 20),
        what=f"the activation cache of block {following + 1}",
    )
    trained = {} if block.objective == "none" else load_tensors(bench.paths.block_adapter(block.index))

    def with_adapter(index: int, layer: nn.Module) -> None:
        if block.objective == "none":
            return
        attach_adapter(layer, index, skeleton=bench.skeleton, settings=bench.settings)
        prefix = f"{index}."
        load_adapter(layer, {n.removeprefix(prefix): t for n, t in trained.items() if n.startswith(prefix)})
        set_training(layer, False)

    inputs = _inputs(bench, block)
    total = sum(len(batches) for batches in layout.shards)
    finished = sum(len(layout.shards[n]) for n in done)
    pool = open_layers(
        bench.residence,
        bench.store,
        bench.skeleton,
        block.first,
        block.end,
        device=bench.device,
        on_layer=with_adapter,
    )

    def run_batches(batches: list[list[int]], on_output: Callable[[int, torch.Tensor], None]) -> None:
        for group in groups(batches, layout.lengths, bench.residence.group_tokens):

            def take(position: int, output: torch.Tensor, group: list[int] = group) -> None:
                nonlocal finished
                bench.stop.check()
                on_output(group[position], output)
                finished += 1
                task = f"outputs of block {block.index + 1}"
                bench.on_event(Progress(task=task, done=finished, total=total, unit="batches"))

            parts = [collate(bench.dataset, batches[b], bench.pad_token_id) for b in group]
            pool.forward_all([inputs.micro_batch(part) for part in parts], take)

    try:
        write_cache(
            directory,
            layout,
            run_batches,
            done=done,
            on_shard=lambda n: bench.journal.add("cache-shard", block=following, shard=n, name=shard_name(n)),
        )
    finally:
        pool.close()
        inputs.close()
    bench.journal.add("cache", block=following)
