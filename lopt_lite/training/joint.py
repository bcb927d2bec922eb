"""The joint schedule: every block steps on every batch, each on the detached output of the one before (the paper's)."""

from __future__ import annotations

import contextlib

from lopt_lite import files
from lopt_lite.training.anchors import AnchorReader, AnchorSample, write_anchors
from lopt_lite.training.block_inputs import EmbeddedInputs
from lopt_lite.training.block_results import is_trained
from lopt_lite.training.block_trainer import BlockTrainer
from lopt_lite.training.workbench import Workbench


def train_jointly(bench: Workbench, sample: AnchorSample | None) -> None:
    """Train all blocks together, unless that is done and nothing of it is damaged.

    Parameters
    ----------
    sample:
        The anchored tokens, None without an anchor.

    Raises
    ------
    StoppedError, DivergedError, DoesNotFitError
        See :class:`BlockTrainer`.
    """
    (stage,) = bench.stages
    if not is_trained(bench, stage):
        with contextlib.ExitStack() as stack:
            inputs = EmbeddedInputs(bench.skeleton, bench.device, trains=bench.settings.trains_around)
            anchors = None
            if sample is not None:
                write_anchors(bench, sample, bench.blocks, inputs)
                bench.release_memory()
                anchors = AnchorReader(bench, sample)
                stack.callback(anchors.close)
            BlockTrainer(bench, stage, inputs, anchors=anchors).run()
        bench.release_memory()
    # Also for a run that was done before: a crash may have come between the fact and the tidying.
    files.remove_tree(bench.paths.checkpoint(stage.index))
    files.remove_tree(bench.paths.anchors)
