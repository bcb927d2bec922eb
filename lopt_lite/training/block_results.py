"""Whether what a trained block left is still what was written."""

from __future__ import annotations

import hashlib

from lopt_lite.checkpoints.integrity import DamagedFileError, check_file, sha256_of
from lopt_lite.training.block_plan import Block
from lopt_lite.training.workbench import Workbench

_FIX = "restore it from a backup, or start anew with --fresh"
_DIGEST_LENGTH = hashlib.sha256().digest_size * 2


def check_block(bench: Workbench, block: Block) -> None:
    """Compare a trained block's adapter, or its fully tuned layers, with what the journal says of them.

    Raises
    ------
    DamagedFileError
        A file is missing or holds something else.
    """
    fact = bench.journal.last("block", block=block.index)
    noted = None if fact is None else fact.get("sha256")
    if noted is None:  # an untrained block left nothing
        return
    if bench.settings.tune == "lora":
        check_file(bench.paths.block_adapter(block.index), noted, fix=_FIX, on_event=bench.on_event)
        return
    layers = list(bench.paths.block_layers(block.index, range(block.first, block.end)).values())
    digest = hashlib.sha256()
    for path in layers:
        try:
            digest.update(sha256_of(path).encode())
        except DamagedFileError as error:
            raise DamagedFileError(error.found, fix=_FIX) from error
        bench.stop.check()
    # One hash over all layers: which of them it was cannot be said.
    if digest.hexdigest() != noted[:_DIGEST_LENGTH]:
        raise DamagedFileError(
            f"the files {layers[0]} to {layers[-1].name} are damaged: their sha256 is {digest.hexdigest()}",
            expected=f"{noted[:_DIGEST_LENGTH]}, as when they were written",
            fix=_FIX,
        )
    if noted[_DIGEST_LENGTH:]:
        check_file(bench.paths.around(block.index), noted[_DIGEST_LENGTH:], fix=_FIX, on_event=bench.on_event)
