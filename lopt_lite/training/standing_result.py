"""Whether the result of a finished run is still there, and whole."""

from __future__ import annotations

import contextlib

from lopt_lite import files
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.store import Store
from lopt_lite.checkpoints.store_index import INDEX_NAME
from lopt_lite.checkpoints.tokenizer import load_tokenizer_from
from lopt_lite.errors import ModelError, RunDirectoryError
from lopt_lite.events import Notice
from lopt_lite.training.adapter_result import check_adapter
from lopt_lite.training.workbench import Workbench


def result_stands(bench: Workbench) -> bool:
    """Whether the run is done and nothing of its result is gone or damaged.

    The user is told of what is, and that it will be written again.
    """
    full = bench.settings.tune == "full"
    fact = bench.journal.last("model" if full else "adapter")
    if fact is None:
        return False
    try:
        if full:
            with contextlib.closing(Store(bench.paths.model, on_event=bench.on_event)) as store:
                store.check()
            locate_model(str(bench.paths.model))
            load_tokenizer_from(bench.paths.model)
        else:
            check_adapter(bench.paths.adapter, fact)
            load_tokenizer_from(bench.paths.adapter)
    except (ModelError, RunDirectoryError) as error:
        bench.on_event(Notice(text=f"{error.found}; the result is written again from the run's blocks"))
        if full:
            # A store whose index is there counts as complete.
            files.remove_file(bench.paths.model / INDEX_NAME)
            files.remove_tree(bench.paths.model)
        return False
    return True
