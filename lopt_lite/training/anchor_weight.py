"""How much the anchor counts, where nobody says: it depends on how likely the answers are before the last block learns.

That is what the untouched model makes of them, unless earlier blocks have been trained. Found out before the first step
of the last block, from a sample of the training examples, and a fact of the journal, so that a run that goes on has the
weight that it began with.
"""

from __future__ import annotations

from collections.abc import Callable

from lopt_lite import recipe
from lopt_lite.data.seeding import permutation
from lopt_lite.events import Notice
from lopt_lite.training.workbench import Workbench

#: Examples of the sample.
_EXAMPLES = 32


def weighed_examples(bench: Workbench) -> list[int]:
    """The training examples whose answers' loss decides."""
    return sorted(permutation(bench.train_count, (bench.settings.seed, "anchor weight"))[:_EXAMPLES].tolist())


def anchor_weight(bench: Workbench, loss_of_answers: Callable[[str], tuple[float, int]]) -> float:
    """The weight of the run's anchor, as it was found out before, or from the answers' loss.

    Parameters
    ----------
    loss_of_answers:
        Given what to call it: mean loss of the sample's answers before training, in nats a token, and their tokens.
    """
    fact = bench.journal.last("anchor-weight")
    if fact is None:
        loss, answer_tokens = loss_of_answers("how likely the answers are")
        weight = recipe.anchor_weight(loss)
        bench.journal.add("anchor-weight", weight=weight, loss=loss, answer_tokens=answer_tokens)
        text = f"answers cost the model {loss:.2f} nats a token so far: the anchor's weight is {weight:g} (--retain)"
        bench.on_event(Notice(text=text))
        return weight
    return float(fact["weight"])
