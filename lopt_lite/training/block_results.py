"""Whether what a trained block left is still what was written."""

from __future__ import annotations

import hashlib

from lopt_lite.checkpoints.integrity import DamagedFileError, UnreadableFileError, check_file, sha256_of
from lopt_lite.events import Notice, Progress
from lopt_lite.training.block_plan import Block, Stage
from lopt_lite.training.workbench import Workbench

_FIX = "restore it from a backup, or run the training again: it trains this block anew"
_DIGEST_LENGTH = hashlib.sha256().digest_size * 2


def is_trained(bench: Workbench, stage: Stage) -> bool:
    """Whether the blocks of a stage are trained, and what they left is what was written.

    The user is told of what is damaged, and that it will be made again.

    Raises
    ------
    UnreadableFileError
        A file cannot be read: a disk that fails or missing rights are no reason to train for hours again.
    """
    if any(bench.journal.last("block", block=block.index) is None for block in stage.blocks):
        return False
    try:
        for block in stage.blocks:
            check_block(bench, block)
    except UnreadableFileError:
        raise
    except DamagedFileError as error:
        bench.on_event(Notice(text=f"{error.found}; {stage.name} is trained again"))
        return False
    return True


def noted_sha256(bench: Workbench, block: Block) -> str | None:
    """The sha256 of what a block left when it was trained last; None for an untrained one, which left nothing."""
    fact = bench.journal.last("block", block=block.index)
    return None if fact is None else fact.get("sha256")


def check_block(bench: Workbench, block: Block) -> None:
    """Compare a trained block's adapter, or its fully tuned layers, with what the journal says of them.

    Raises
    ------
    DamagedFileError
        A file is missing or holds something else.
    """
    noted = noted_sha256(bench, block)
    if noted is None:
        return
    if bench.settings.tune == "lora":
        check_file(bench.paths.block_adapter(block.index), noted, fix=_FIX, on_event=bench.on_event)
        return
    layers = list(bench.paths.block_layers(block.index, range(block.first, block.end)).values())
    digest = hashlib.sha256()
    for number, path in enumerate(layers):
        try:
            digest.update(sha256_of(path).encode())
        except DamagedFileError as error:
            raise type(error)(error.found, fix=_FIX) from error
        task = f"checking block {block.index + 1}"
        bench.on_event(Progress(task=task, done=number + 1, total=len(layers), unit="layers"))
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
