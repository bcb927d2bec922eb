"""The sequential schedule: train block after block, each on the cached outputs of the one before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

import torch
from torch import nn

from lopt_lite import files
from lopt_lite.data.dataset import Batch, collate
from lopt_lite.events import Notice, Progress
from lopt_lite.residency.block_major import groups
from lopt_lite.residency.layers import open_layers
from lopt_lite.residency.memory_model import FORWARD_ROWS
from lopt_lite.residency.spill import Spill
from lopt_lite.training.activation_cache import CacheLayout, drop_damaged, shard_name, write_cache
from lopt_lite.training.adapters import adapter_parameters, attach_adapter, load_adapter, set_training
from lopt_lite.training.anchors import AnchorReader, AnchorSample, needs_untouched_pass, write_anchors
from lopt_lite.training.block_inputs import BlockInputs, CachedInputs, EmbeddedInputs
from lopt_lite.training.block_plan import Block, Stage
from lopt_lite.training.block_results import check_block, is_trained
from lopt_lite.training.block_trainer import BlockTrainer
from lopt_lite.training.cache_format import StoredError
from lopt_lite.training.checkpoint import load_tensors
from lopt_lite.training.matching import Targets, write_targets
from lopt_lite.training.trained import TrainedParameters
from lopt_lite.training.workbench import Workbench


def train_sequentially(bench: Workbench, sample: AnchorSample | None) -> None:
    """Train every block that is not trained yet, first to last.

    For block b: train it on its inputs; pass the data through it once to write the next block's inputs; delete its own.
    One whose files were damaged meanwhile is trained again; as that gives what it gave before, those after it stand.

    Parameters
    ----------
    sample:
        The anchored tokens, None without an anchor.

    Raises
    ------
    StoppedError, DivergedError, DoesNotFitError
        See :class:`BlockTrainer` and :func:`write_cache`.
    """
    layout = _layout(bench)
    trained = {stage.index: is_trained(bench, stage) for stage in bench.stages}
    last = bench.stages[-1].index
    if sample is not None and needs_untouched_pass(bench.blocks) and not trained[last]:
        write_anchors(bench, sample, bench.blocks, EmbeddedInputs(bench.skeleton, bench.device))
        bench.release_memory()
    for stage in bench.stages:
        (block,) = stage.blocks
        is_last = block.index == last
        passed_on = is_last or bench.journal.last("cache", block=block.index + 1) is not None
        if not trained[block.index] or not passed_on:
            if block.index:
                _check_inputs(bench, block, layout)
            if not trained[block.index]:
                _train(bench, stage, layout, sample if is_last else None)
                bench.release_memory()
            if not passed_on:
                _write_next_inputs(bench, block, layout)
                bench.release_memory()
        # Also for a block that was done before: a crash may have come between the fact and the tidying.
        files.remove_tree(bench.paths.cache(block.index))
        files.remove_tree(bench.paths.targets(block.index))
        files.remove_tree(bench.paths.checkpoint(block.index))
    files.remove_tree(bench.paths.anchors)


def _train(bench: Workbench, stage: Stage, layout: CacheLayout, sample: AnchorSample | None) -> None:
    (block,) = stage.blocks
    if block.objective == "none":
        bench.journal.add("block", block=block.index)
        return
    with contextlib.ExitStack() as stack:
        inputs = _inputs(bench, block, layout)
        stack.callback(inputs.close)
        anchors = None
        if sample is not None:
            # What enters the last block is what the untouched model makes, unless a block before it was trained.
            write_anchors(bench, sample, [block], inputs)
            bench.release_memory()
            anchors = AnchorReader(bench, sample)
            stack.callback(anchors.close)
        targets = None
        if block.objective == "match":
            write_targets(bench, block, inputs)
            bench.release_memory()
            targets = Targets(bench, block)
            stack.callback(targets.close)
        BlockTrainer(bench, stage, inputs, anchors=anchors, targets=targets).run()


def _inputs(bench: Workbench, block: Block, layout: CacheLayout, shards: Collection[int] | None = None) -> BlockInputs:
    if block.index == 0:
        return EmbeddedInputs(bench.skeleton, bench.device)
    return CachedInputs(
        bench.skeleton,
        bench.device,
        bench.paths.cache(block.index),
        layout,
        keep_bytes=bench.residence.cache_keep_bytes,
        shards=shards,
    )


def _check_inputs(bench: Workbench, block: Block, layout: CacheLayout) -> None:
    """Check the cached inputs of a block before they are used, and write again what is damaged."""
    directory, what = bench.paths.cache(block.index), f"the inputs of block {block.index + 1}"
    damaged: Collection[int]
    if directory.is_dir():
        damaged = drop_damaged(
            directory,
            layout,
            bench.journal.all("cache-shard", block=block.index),
            what=what,
            check=bench.stop.check,
            on_event=bench.on_event,
        )
    else:  # deleted, as the block had been trained
        bench.on_event(Notice(text=f"{what} are computed again"))
        damaged = range(len(layout.shards))
    if damaged:
        _rewrite_inputs(bench, block, layout, damaged)
        bench.release_memory()


def _rewrite_inputs(bench: Workbench, block: Block, layout: CacheLayout, shards: Collection[int]) -> None:
    """Write some shards of a block's inputs again.

    The inputs of the block before are gone by then: the same shards of them are made first, and deleted afterwards.
    """
    before = bench.blocks[block.index - 1]
    if before.index:
        _rewrite_inputs(bench, before, layout, shards)
    _write_outputs(bench, before, layout, shards)
    if before.index:
        files.remove_tree(bench.paths.cache(before.index))


def _layout(bench: Workbench) -> CacheLayout:
    return CacheLayout(
        bench.dataset.lengths,
        hidden_size=bench.skeleton.hidden_size,
        dtype=bench.skeleton.dtype,
        max_tokens=bench.residence.forward_tokens,
        max_rows=FORWARD_ROWS,
        cache=bench.settings.cache,
    )


def _write_next_inputs(bench: Workbench, block: Block, layout: CacheLayout) -> None:
    """Pass all examples through the trained block and cache what comes out."""
    _write_outputs(bench, block, layout)
    _finish_cache(bench, layout, block.index + 1)


def _write_outputs(bench: Workbench, block: Block, layout: CacheLayout, wanted: Collection[int] | None = None) -> None:
    """Write those of the ``wanted`` shards of the next block's inputs that are missing; None for all."""
    following = block.index + 1
    directory = bench.paths.cache(following)
    check_block(bench, block)
    journalled = {int(f["shard"]) for f in bench.journal.all("cache-shard", block=following)}
    done = {number for number in journalled if (directory / shard_name(number)).is_file()}
    of_these = range(len(layout.shards)) if wanted is None else wanted
    files.require_free_space(
        bench.paths.root,
        layout.shard_bytes(n for n in of_these if n not in done) + files.BESIDE_BYTES,
        what=f"the activation cache of block {following + 1}",
    )
    storage = Spill(bench.residence.state_limits, bench.paths.root, bench.device)
    trained = TrainedParameters(storage=storage if bench.residence.offload_state else None, per_layer=False)
    full = bench.settings.tune == "full" and block.objective != "none"
    shards = bench.paths.block_layers(block.index, range(block.first, block.end)) if full else {}
    # Layers that were trained themselves are read like any others.
    store = bench.store.overlaid(shards.values())

    def with_adapter(index: int, layer: nn.Module) -> None:
        if block.objective == "none" or full:
            return
        attach_adapter(layer, index, skeleton=bench.skeleton, settings=bench.settings)
        load_adapter(layer, load_tensors(bench.paths.block_adapter(block.index), prefix=f"{index}."))
        set_training(layer, False)
        trained.add(index, {f"{index}.{name}": p for name, p in adapter_parameters(layer).items()})

    inputs = _inputs(bench, block, layout, wanted)
    total = sum(len(layout.shards[n]) for n in of_these)
    finished = sum(len(layout.shards[n]) for n in done.intersection(of_these))
    pool = open_layers(
        bench.residence,
        store,
        bench.skeleton,
        block.first,
        block.end,
        device=bench.device,
        scratch=bench.paths.root,
        on_layer=with_adapter,
        state=trained,
    )

    def collated(examples: list[int]) -> Batch:
        return collate(bench.dataset, examples, bench.pad_token_id)

    def on_shard(number: int, error: StoredError, sha256: str) -> None:
        measured = error.to_json() if layout.format.name == "int8" else {}
        name = shard_name(number)
        bench.journal.add("cache-shard", block=following, shard=number, name=name, sha256=sha256, **measured)

    def run_batches(batches: list[list[int]], on_output: Callable[[int, torch.Tensor], None]) -> None:
        of_pass = groups(batches, layout.lengths, bench.residence.group_tokens)
        for number, group in enumerate(of_pass):

            def take(position: int, output: torch.Tensor, group: list[int] = group) -> None:
                nonlocal finished
                bench.stop.check()
                on_output(group[position], output)
                finished += 1
                task = f"outputs of block {block.index + 1}"
                bench.on_event(Progress(task=task, done=finished, total=total, unit="batches"))

            micro_batches = [inputs.micro_batch(collated(batches[b])) for b in group]
            # One batch is what memory has room for beside a group; the others' reading is short beside computing it.
            inputs.read_ahead([collated(batches[coming[0]]) for coming in of_pass[number + 1 : number + 2]])
            pool.forward_all(micro_batches, take)

    try:
        write_cache(directory, layout, run_batches, done=done, on_shard=on_shard, wanted=wanted)
    finally:
        pool.close()
        inputs.close()
        storage.close()
        store.close()


def _finish_cache(bench: Workbench, layout: CacheLayout, block: int) -> None:
    """Note that the inputs of ``block`` are there, and how exact they are."""
    if layout.format.name == "exact":
        bench.journal.add("cache", block=block)
        return
    # A shard that was lost and written again has several facts; they say the same.
    newest = {fact["shard"]: fact for fact in bench.journal.all("cache-shard", block=block)}
    error = StoredError.total(newest[number] for number in range(len(layout.shards)))
    bench.journal.add("cache", block=block, relative_error=error.relative)
    bench.on_event(
        Notice(text=f"the 8-bit cache of block {block + 1} has a relative error of {100 * error.relative:.2g} %")
    )
