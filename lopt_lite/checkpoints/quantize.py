"""``lopt-lite quantize``: make the store of a model alone."""

from __future__ import annotations

import time
from pathlib import Path

from lopt_lite.checkpoints.build_store import StoreBuilder
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.store import Store
from lopt_lite.checkpoints.store_index import store_info
from lopt_lite.devices import choose_device
from lopt_lite.events import Notice, OnEvent, ignore
from lopt_lite.outcomes import QuantizeOutcome
from lopt_lite.settings import QuantizeSettings


def quantize(settings: QuantizeSettings, on_event: OnEvent = ignore) -> QuantizeOutcome:
    """Make the store of a model (``lopt-lite quantize``); of one that is there, check all shards and mend them.

    Raises
    ------
    ModelError
        The model's files are missing or unsound.
    RunDirectoryError, DoesNotFitError
        The store cannot be written.
    """
    started = time.monotonic()
    for text in settings.without_effect():
        on_event(Notice(text=text))
    device = choose_device(settings.device)
    model = locate_model(settings.model, config_dirs=settings.config, on_event=on_event)
    directory = Path(settings.store)
    builder = StoreBuilder(
        model, directory, quantize=settings.quantize, dtype=settings.dtype, device=device, on_event=on_event
    )
    built = builder.build()
    if not built:
        store = Store(directory, repair=builder.rebuild, on_event=on_event)
        store.check()
        store.close()
    info = store_info(directory)
    assert info is not None
    return QuantizeOutcome(
        store=str(directory),
        already_done=not built,
        shards=len(info.shards),
        source_bytes=model.weights.total_bytes,
        store_bytes=sum(int(s["bytes"]) for s in info.shards.values()),
        unquantized=info.unquantized,
        seconds=time.monotonic() - started,
    )
