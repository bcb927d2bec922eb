"""What follows from how likely the answers are, where nobody says: the anchor's weight and the last block's rate.

How likely they are before the last block learns: to the untouched model, unless earlier blocks have been trained. Found
out before its first step, from a sample of the training examples. What follows are facts of the journal, so that a run
that goes on has what it began with.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from lopt_lite import recipe
from lopt_lite.data.seeding import permutation
from lopt_lite.errors import DivergedError
from lopt_lite.events import Notice
from lopt_lite.training.job import measured_examples
from lopt_lite.training.workbench import Workbench

#: What can be tried with a model that never has a finite loss.
NO_FINITE_LOSS = "--quantize none or --dtype float32 tell whether it is a matter of precision"

#: The journal's facts.
_WEIGHT, _RATE = "anchor-weight", "learning-rate"


def sampled_examples(bench: Workbench) -> list[int]:
    """The training examples whose answers' loss decides."""
    count = measured_examples(bench.settings, bench.train_count)
    return sorted(permutation(bench.train_count, (bench.settings.seed, "anchor weight"))[:count].tolist())


def check_finite(loss: float, examples: str) -> None:
    """Refuse to train a last block that has no finite ``loss`` of such examples before its first step.

    Raises
    ------
    DivergedError
        The loss is not a finite number.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"the model's loss of {examples} is {loss}, before its last block has learnt anything",
            expected="a finite number",
            fix="see whether the model's files are whole and of the right model, and whether it runs elsewhere; "
            f"{NO_FINITE_LOSS}",
        )


class FromAnswers:
    """Finds them out, or reads them from the journal.

    Parameters
    ----------
    loss_of_answers:
        Given what to call it: mean loss of the sample's answers before training, in nats a token, and their tokens.
    """

    def __init__(self, bench: Workbench, loss_of_answers: Callable[[str], tuple[float, int]]) -> None:
        self._bench, self._loss_of_answers = bench, loss_of_answers

    @functools.cached_property
    def _loss(self) -> tuple[float, int]:
        # The weight is found out first: a run may have been cut off since.
        fact = self._bench.journal.last(_WEIGHT)
        if fact is not None:
            return float(fact["loss"]), int(fact["answer_tokens"])
        loss, answer_tokens = self._loss_of_answers("how likely the answers are")
        check_finite(loss, "the training examples")
        self._bench.on_event(Notice(text=f"answers cost the model {loss:.2f} nats a token so far", ordinary=True))
        return loss, answer_tokens

    def anchor_weight(self) -> float:
        """The weight of the run's anchor."""
        fact = self._bench.journal.last(_WEIGHT)
        if fact is not None:
            return float(fact["weight"])
        loss, answer_tokens = self._loss
        weight = recipe.anchor_weight(loss)
        self._bench.journal.add(_WEIGHT, weight=weight, loss=loss, answer_tokens=answer_tokens)
        self._bench.on_event(Notice(text=f"so the anchor's weight is {weight:g} (--retain)", ordinary=True))
        return weight

    def learning_rate(self, steps: int) -> float:
        """The peak learning rate of the last block, which takes so many ``steps`` in all."""
        fact = self._bench.journal.last(_RATE)
        if fact is not None:
            return float(fact["lr"])
        rate = self._bench.settings.model_lr(self._bench.skeleton.kind)
        if not recipe.is_short(steps):
            self._bench.journal.add(_RATE, lr=rate)
            return rate
        loss, answer_tokens = self._loss
        rate = recipe.short_run_rate(rate, loss, steps)
        self._bench.journal.add(_RATE, lr=rate, loss=loss, answer_tokens=answer_tokens)
        text = f"so the peak learning rate of {steps:,} steps is {rate:g} (--lr)"
        self._bench.on_event(Notice(text=text, ordinary=True))
        return rate
