"""A run's work in numbers, for the memory plan: the same for a run whose data is loaded and for one on paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lopt_lite import recipe
from lopt_lite.errors import DataError
from lopt_lite.residency.memory_model import FORWARD_ROWS, Job, around_state_bytes
from lopt_lite.residency.shapes import ModelShapes
from lopt_lite.settings import TrainSettings
from lopt_lite.training.block_plan import Block
from lopt_lite.training.own_prompts import MOST_PROMPTS
from lopt_lite.training.step_batches import LargestMicroBatch

#: Examples of ``--retain-data`` in a step, for each example of DATA.
_OTHERS_PER_EXAMPLE = 0.25


#: Examples whose answers' loss is measured where something follows from it.
_MEASURED_EXAMPLES = 32


def measured_examples(settings: TrainSettings, train_examples: int) -> int:
    """Training examples whose answers are measured before the last block learns, as what was not said follows from it.

    See ``from_answers.py``. ``settings`` are settled.
    """
    short = recipe.is_short(settings.step_counts(train_examples).train)
    follows = settings.retain is None or (settings.lr is None and short)
    return min(_MEASURED_EXAMPLES, train_examples) if follows else 0


def other_rows(batch_size: int, others: int) -> int:
    """How many of ``others`` examples that are only there to anchor on are in each step."""
    return min(others, max(1, round(_OTHERS_PER_EXAMPLE * batch_size))) if others else 0


def answered_count(settings: TrainSettings, train_examples: int) -> int:
    """Prompts that the untouched model answers, at most: no more than the steps take, 0 unless it is asked to."""
    if settings.retain == 0 or not settings.retain_answers:
        return 0
    taken = settings.step_counts(train_examples).train * other_rows(settings.batch_size, MOST_PROMPTS)
    return min(MOST_PROMPTS, taken, train_examples)


def nothing_to_anchor() -> DataError:
    """What to tell a user who asks for an anchor and brings nothing to hold on to."""
    return DataError(
        "--retain has nothing to hold on to: every token of the data is to be learnt",
        expected="examples with a prompt",
        fix="name other text with --retain-data, or leave --retain out",
    )


def nothing_to_answer() -> DataError:
    """What to tell a user who asks for the untouched model's answers and brings no prompts."""
    return DataError(
        "--retain-answers has nothing to answer: every token of the data is to be learnt",
        expected="examples with a prompt",
        fix="leave --retain-answers out",
    )


def make_job(
    settings: TrainSettings,
    shapes: ModelShapes,
    blocks: Sequence[Block],
    *,
    train_examples: int,
    all_examples: int,
    other_examples: int,
    longest: int,
    all_tokens: int,
    shortest: Callable[[int], tuple[int, ...]],
    most_answers: int | None,
    held_out_answers: int | None,
    most_anchors: int,
    largest_micro_batch: LargestMicroBatch | None = None,
) -> Job:
    """The largest step of a run.

    Parameters
    ----------
    all_examples, all_tokens, longest:
        Of everything, held-out examples and those that are only there to anchor on included.
    other_examples:
        Those that are only there to anchor on.
    shortest:
        Gives the tokens of so many of the shortest, from short to long.
    most_answers:
        Answer tokens of one training example, None when any token may be one.
    held_out_answers:
        Answer tokens of the held-out examples that pass together, 0 without any, None when any token may be one.
    most_anchors:
        Anchored tokens of one example, 0 without an anchor.
    largest_micro_batch:
        Of the steps' training examples; None where their lengths are not known one by one.
    """
    together = settings.schedule == "joint"
    rows = min(settings.batch_size, train_examples)
    others = other_rows(settings.batch_size, other_examples)
    anchored_rows = others if settings.retain_answers else rows + others
    measured = measured_examples(settings, train_examples)
    if held_out_answers is None or (most_answers is None and measured):
        measured_tokens = None
    else:
        measured_tokens = max(held_out_answers, 0 if most_answers is None else measured * most_answers)
    row_bytes = shapes.hidden * shapes.itemsize
    cached_tokens = all_tokens if len(blocks) > 1 and not together else 0
    # Which other examples pass with them, a step decides.
    known = largest_micro_batch is not None and not others and largest_micro_batch.is_quick
    return Job(
        step_tokens=(rows + others) * longest,
        longest=longest,
        rows=rows + others,
        shortest=shortest(max(rows + others, FORWARD_ROWS)),
        answer_tokens=None if most_answers is None else rows * most_answers,
        measured_tokens=measured_tokens,
        all_tokens=all_examples * longest,
        early_blocks="reconstruct" in settings.objectives(),
        matches="match" in settings.objectives(),
        # The anchor's cache is written through the same buffers.
        cache_bytes=max(cached_tokens, most_anchors * all_examples) * row_bytes,
        anchored_tokens=anchored_rows * most_anchors,
        graph_layers=max(block.end - block.first for block in blocks) if together else None,
        around_bytes=around_state_bytes(shapes) if settings.trains_around else 0,
        held_out=held_out_answers != 0,
        largest_micro_batch=largest_micro_batch if known else None,
    )
