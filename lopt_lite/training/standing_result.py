"""Whether the result of a finished run is still there, and whole."""

from __future__ import annotations

import contextlib

from lopt_lite import files
from lopt_lite.checkpoints.integrity import DamagedFileError
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.store import Store
from lopt_lite.checkpoints.store_index import INDEX_NAME, standing_store
from lopt_lite.checkpoints.tokenizer import load_tokenizer_from, save_tokenizer
from lopt_lite.errors import ModelError, RunDirectoryError
from lopt_lite.events import Notice
from lopt_lite.training.adapter_result import check_adapter
from lopt_lite.training.block_results import check_block
from lopt_lite.training.workbench import Workbench


def result_stands(bench: Workbench) -> bool:
    """Whether the run is done and its result is there; where only the tokenizer beside it is not, it is written again.

    The user is told of what is gone or damaged, and that it will be written again.

    Raises
    ------
    RunDirectoryError
        A tuned model is damaged, and so are the blocks that it could be put together from; or a later version of
        lopt-lite wrote it.
    """
    full = bench.settings.tune == "full"
    fact = bench.journal.last("model" if full else "adapter")
    if fact is None:
        return False
    try:
        if full:
            _check_model(bench)
        else:
            check_adapter(bench.paths.adapter, fact)
    except ModelError as error:
        if full:
            _forget_model(bench, error)
        bench.on_event(Notice(text=f"{error.found}; the result is written again from the run's blocks"))
        return False
    directory = bench.paths.model if full else bench.paths.adapter
    try:
        load_tokenizer_from(directory)
    except ModelError as error:
        bench.on_event(Notice(text=f"{error.found}; it is written again"))
        save_tokenizer(bench.tokenizer, directory)
    return True


def _check_model(bench: Workbench) -> None:
    if standing_store(bench.paths.model) is None:
        raise DamagedFileError(f"the model {bench.paths.model} is gone, or its index is damaged")
    with contextlib.closing(Store(bench.paths.model, on_event=bench.on_event)) as store:
        store.check()
    locate_model(str(bench.paths.model))


def _forget_model(bench: Workbench, damage: ModelError) -> None:
    """Delete a damaged model that can be put together again; what is left of one that cannot stays."""
    if not bench.paths.model.is_dir():
        return
    try:
        for block in bench.blocks:
            check_block(bench, block)
    except DamagedFileError as error:
        raise RunDirectoryError(
            f"the run in {bench.paths.root} is done, but its model is damaged ({damage.found}), and so is what it "
            f"could be put together from ({error.found})",
            fix="restore RUN/model or RUN/blocks from a backup, or train again with --fresh",
        ) from error
    # A store whose index is there counts as complete.
    files.remove_file(bench.paths.model / INDEX_NAME)
    files.remove_tree(bench.paths.model)
