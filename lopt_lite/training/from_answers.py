"""What follows from how likely the answers are, where nobody says: the anchor's weight and the last block's rate.

How likely they are before the last block learns: to the untouched model, unless earlier blocks have been trained. Found
out before its first step, from a sample of the training examples. What follows are facts of the journal, so that a run
that goes on has what it began with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from lopt_lite import recipe
from lopt_lite.data.seeding import permutation
from lopt_lite.events import Notice
from lopt_lite.training.workbench import Workbench

#: Examples of the sample.
_EXAMPLES = 32

#: The journal's facts.
_WEIGHT, _RATE = "anchor-weight", "learning-rate"


def sampled_examples(bench: Workbench) -> list[int]:
    """The training examples whose answers' loss decides."""
    return sorted(permutation(bench.train_count, (bench.settings.seed, "anchor weight"))[:_EXAMPLES].tolist())


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
        self._bench.on_event(Notice(text=f"answers cost the model {loss:.2f} nats a token so far"))
        return loss, answer_tokens

    def anchor_weight(self) -> float:
        """The weight of the run's anchor."""
        fact = self._bench.journal.last(_WEIGHT)
        if fact is not None:
            return float(fact["weight"])
        loss, answer_tokens = self._loss
        weight = recipe.anchor_weight(loss)
        self._bench.journal.add(_WEIGHT, weight=weight, loss=loss, answer_tokens=answer_tokens)
        self._bench.on_event(Notice(text=f"so the anchor's weight is {weight:g} (--retain)"))
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
        self._bench.on_event(Notice(text=f"so the peak learning rate of {steps:,} steps is {rate:g} (--lr)"))
        return rate
