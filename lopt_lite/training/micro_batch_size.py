"""How many tokens go through the layers at once: what was planned, halved wherever the device ran out of memory.

A step's gradient is the same sum in smaller pieces. Since sums differ in the last bits when they are made in other
pieces, the journal says from which step on which size holds: a resumed run repeats the steps before it as they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lopt_lite.data.batches import micro_batches
from lopt_lite.errors import DoesNotFitError
from lopt_lite.journal import Fact, Journal

_FACT = "out-of-memory"

_COST_TOKENS_CPU, _COST_TOKENS_GPU = 128, 1024


def group_cost_tokens(device: torch.device) -> int:
    """What a micro-batch costs beside its tokens (dequantised weights, launched operations), in tokens.

    On a CPU 40 to 120 were measured. For GPUs, which few rows do not keep busy, it is a cautious guess.
    """
    return _COST_TOKENS_CPU if device.type == "cpu" else _COST_TOKENS_GPU


class MicroBatchSize:
    """Splits the steps of one stage into micro-batches.

    Parameters
    ----------
    journal:
        The run's journal: remembers where memory ran out.
    stage:
        The stage's number; what was noted in earlier stages holds for it too.
    phases:
        The names of the stage's stretches of training, in order.
    planned_tokens:
        Most padded tokens of a micro-batch while memory suffices.
    lengths:
        Tokens of every example: int64 [examples].
    device:
        Where the layers are computed: decides how much padding is worth another micro-batch.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        stage: int,
        phases: Sequence[str],
        planned_tokens: int,
        lengths: torch.Tensor,
        device: torch.device,
    ) -> None:
        self._journal, self._stage, self._phases = journal, stage, list(phases)
        self._planned_tokens, self._lengths = planned_tokens, lengths
        self._cost_tokens = group_cost_tokens(device)

    def tokens(self, phase: str, step: int) -> int:
        """Most padded tokens of a micro-batch of ``step`` (the first is 0); a longer single example goes alone."""
        position = self._position(self._stage, phase, step)
        smaller = [
            int(fact["micro_batch_tokens"])
            for fact in self._journal.all(_FACT)
            if self._position(int(fact["block"]), str(fact["phase"]), int(fact["step"])) <= position
        ]
        return min([self._planned_tokens, *smaller])

    def split(self, phase: str, step: int, examples: Sequence[int]) -> list[list[int]]:
        """The micro-batches of a step on ``examples``. See :func:`micro_batches`."""
        return micro_batches(
            examples, self._lengths, max_tokens=self.tokens(phase, step), cost_tokens=self._cost_tokens
        )

    def halve(self, phase: str, step: int, examples: Sequence[int]) -> Fact:
        """Note that memory did not suffice for ``step`` on ``examples``: from it on, micro-batches are half as large.

        Returns
        -------
        dict
            The fact that is durable now; ``micro_batch_tokens`` is the new size.

        Raises
        ------
        DoesNotFitError
            Every example went through alone already.
        """
        parts = self.split(phase, step, examples)
        longest = max(int(self._lengths[example]) for example in examples)
        if all(len(part) == 1 for part in parts):
            raise DoesNotFitError(
                f"the device is out of memory with one example of {longest:,} tokens at a time (step {step + 1})",
                fix="lower --max-length or --memory, or use more --blocks, and start anew with --fresh; "
                "or close what else uses the device and give the same command again",
            )
        largest = max(len(part) * int(self._lengths[part[0]]) for part in parts if len(part) > 1)
        values = {"block": self._stage, "phase": phase, "step": step, "micro_batch_tokens": largest // 2}
        self._journal.add(_FACT, **values)
        return values

    def _position(self, stage: int, phase: str, step: int) -> tuple[int, int, int]:
        # Stretches of other stages may have other names: those stages lie wholly before this one, or after it.
        number = self._phases.index(phase) if stage == self._stage else 0
        return stage, number, step


def describe(fact: Fact, before: int) -> str:
    """One sentence for the user about what :meth:`MicroBatchSize.halve` noted; ``before``: the size until then."""
    return (
        f"out of memory at step {fact['step'] + 1}: from here on at most {fact['micro_batch_tokens']:,} tokens go "
        f"through the layers at once, instead of {before:,}; the gradient of a step stays the same"
    )
