"""How many optimiser steps a run takes: one place for planning, training and telling."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepCounts:
    """Optimiser steps of each block.

    Attributes
    ----------
    per_epoch:
        Of one pass over the data; 0 before there are examples.
    head_fit, train:
        Of the two phases. Training may end within a pass.
    """

    per_epoch: int
    head_fit: int
    train: int

    @property
    def epochs(self) -> int:
        """Passes over the data that training begins."""
        return -(-self.train // self.per_epoch) if self.per_epoch else 0

    @property
    def passes(self) -> float:
        """Passes over the data that training makes, the last one perhaps in part."""
        return self.train / self.per_epoch if self.per_epoch else 0.0

    def at_end_of(self, epoch: int) -> int:
        """Training steps done when an epoch (1 is the first) ends."""
        return min(epoch * self.per_epoch, self.train)


def step_counts(
    examples: int, *, batch_size: int, epochs: int, head_fit_epochs: int, max_steps: int | None
) -> StepCounts:
    """The steps that so many training examples and these options of ``lopt-lite train`` make."""
    per_epoch = math.ceil(examples / batch_size)
    train = epochs * per_epoch if max_steps is None or not per_epoch else max_steps
    head_fit = head_fit_epochs * per_epoch
    if max_steps is not None:
        head_fit = min(head_fit, max_steps)
    return StepCounts(per_epoch=per_epoch, head_fit=head_fit, train=train)
