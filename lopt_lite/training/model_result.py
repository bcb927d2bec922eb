"""The result of full tuning: one Hugging Face checkpoint directory, put together from the blocks' layers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from lopt_lite import files
from lopt_lite.checkpoints.build_store import BUILD_FILES, StoreBuilder
from lopt_lite.checkpoints.header import read_header
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.store_index import store_info
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.checkpoints.tokenizer import save_tokenizer
from lopt_lite.training.block_results import noted_sha256
from lopt_lite.training.workbench import Workbench


def write_model(bench: Workbench) -> str:
    """Write ``RUN/model`` for ``AutoModelForCausalLM.from_pretrained``; returns a sha256 over its shards.

    It is a store as well: of kind ``"none"``, with the trained layers in place of the original ones. What of it is
    written already is not written again.

    Raises
    ------
    StoppedError
        A signal or a time limit came; finished shards are kept.
    DoesNotFitError, RunDirectoryError
        The disk is full or a file cannot be written.
    """
    directory = bench.paths.model
    if store_info(directory) is None:
        _build(bench)
    save_tokenizer(bench.tokenizer, directory)
    for name in BUILD_FILES:
        files.remove_file(directory / name)
    info = store_info(directory)
    assert info is not None
    return _digest(info.shards)


def _build(bench: Workbench) -> None:
    bench.store.check()  # it is read past the store below
    shards = [
        path
        for block in bench.blocks
        if block.objective != "none"
        for path in bench.paths.block_layers(block.index, range(block.first, block.end)).values()
    ]
    if bench.settings.trains_around:
        shards.append(bench.paths.around(bench.blocks[-1].index))
    trained = TensorFiles({name: header for header in map(read_header, shards) for name in header.tensors})
    try:
        StoreBuilder(
            replace(locate_model(str(bench.store.directory)), origin=bench.store.info.source),
            bench.paths.model,
            quantize="none",
            dtype=bench.settings.dtype,
            device=bench.device,
            transform=lambda name, tensor: trained.read(name) if name in trained else tensor,
            transform_fingerprint=_digest([noted_sha256(bench, block) for block in bench.blocks]),
            untie=bench.settings.trains_around,
            tokenizer=bench.tokenizer,
            check=bench.stop.check,
            on_event=bench.on_event,
        ).build()
    finally:
        trained.close()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
