"""Log-likelihoods of texts by the base and the tuned model, block after block, each block being loaded once for both.

Questions that share all tokens but the last (the choices A to D after one prompt, say) are one row of a batch.
"""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.checkpoints.tokenizer import pad_token_id
from lopt_lite.data.batches import length_sorted_batches, shortest
from lopt_lite.data.dataset import IGNORED, Batch
from lopt_lite.errors import DataError
from lopt_lite.events import OnEvent, Progress
from lopt_lite.residency.block_major import WAITING, pass_variants
from lopt_lite.residency.choices import Memory, Residence, choose_residence
from lopt_lite.residency.memory_model import Job
from lopt_lite.residency.pool import MicroBatch
from lopt_lite.results.harness_head import ScoringHead
from lopt_lite.results.open_run import OpenRun

#: (tokens before, tokens to rate), neither empty.
Question = tuple[Sequence[int], Sequence[int]]

#: What the user can do other than to give more memory.
_INSTEAD = "lower --num-fewshot"


class Score(NamedTuple):
    """Log-probability of a continuation in nats, and whether it is what greedy decoding would have produced."""

    log_probability: float
    greedy: bool


class Scorer:
    """Rates continuations; what was rated once is remembered, for both models.

    Parameters
    ----------
    max_tokens:
        Most tokens that go into the model; longer questions are cut at their beginning.
    max_rows:
        The largest batch in rows.
    memory:
        Says what there is to use, when it is about to be used.
    """

    def __init__(
        self, run: OpenRun, *, max_tokens: int, max_rows: int, memory: Callable[[], Memory], on_event: OnEvent
    ) -> None:
        self._run = run
        self._max_tokens, self._max_rows, self._memory = max_tokens, max_rows, memory
        self._on_event = on_event
        self._known: dict[bytes, tuple[Score, Score]] = {}

    def scores(self, questions: Sequence[Question], *, tuned: bool) -> list[Score]:
        """One score per question, in order.

        Raises
        ------
        DataError
            A continuation alone is longer than the model may see.
        DoesNotFitError
            The budget is too small.
        """
        keys = [_key(*question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._known}
        if new:
            rows = _Rows(
                list(new.values()), max_tokens=self._max_tokens, pad_token_id=pad_token_id(self._run.tokenizer)
            )
            self._known.update(zip(new, self._rate(rows), strict=True))
        return [self._known[key][tuned] for key in keys]

    def _rate(self, rows: _Rows) -> list[tuple[Score, Score]]:
        """(base, tuned) of every question."""
        run = self._run
        ranges = [(block.first, block.end) for block in run.blocks]
        memory, job = self._memory(), rows.job(self._max_rows)
        residence = choose_residence(run.shapes(), ranges, job, device=run.device, memory=memory, instead=_INSTEAD)
        rows.make_batches(max_tokens=residence.forward_tokens, max_rows=self._max_rows)
        rate = partial(self._pass, rows, residence, ranges)
        if run.settings.tune == "full":
            (base,) = rate(run.store, run.skeleton)
            (tuned,) = rate(run.tuned_store, run.tuned_skeleton)
            return list(zip(base, tuned, strict=True))
        with run.put_aside(residence) as state:
            base, tuned = rate(
                run.store,
                run.skeleton,
                variants=2,
                on_layer=partial(run.on_layer, state=state),
                state=state,
                select=lambda layers, variant: run.select(layers, variant == 1),
            )
        return list(zip(base, tuned, strict=True))

    def _pass(
        self,
        rows: _Rows,
        residence: Residence,
        ranges: list[tuple[int, int]],
        store: Store,
        skeleton: Skeleton,
        *,
        variants: int = 1,
        **how: Any,
    ) -> list[list[Score]]:
        run = self._run
        head = ScoringHead(
            skeleton,
            store,
            device=run.device,
            logit_elements=residence.logit_elements,
            slice_rows=residence.head_slice_rows,
        )
        scores = [[Score(0.0, True)] * rows.questions for _ in range(variants)]
        total, done = len(rows) * len(ranges) * variants, 0

        def embedded(batch: Batch) -> MicroBatch:
            recording = skeleton.record(batch.input_ids.to(run.device), embed=True)
            return MicroBatch(recording.hidden, recording.calls)

        def take(number: int, variant: int, output: torch.Tensor) -> None:
            asked = rows.asked(number)
            hidden = output[(rows[number].targets != IGNORED).to(output.device)]
            log_probabilities, likeliest = head.score(hidden, asked.places, asked.tokens)
            for question, value, greedy in zip(
                asked.questions, log_probabilities.tolist(), likeliest.tolist(), strict=True
            ):
                before = scores[variant][question]
                scores[variant][question] = Score(before.log_probability + value, before.greedy and greedy)

        def on_pass() -> None:
            nonlocal done
            done += 1
            self._on_event(Progress(task="rating answers", done=done, total=total, unit="batches"))

        with contextlib.closing(head):
            pass_variants(
                store,
                skeleton,
                rows,
                ranges,
                embedded,
                take,
                device=run.device,
                residence=residence,
                spill_limits=WAITING,
                spill_directory=run.paths.root,
                variants=variants,
                on_pass=on_pass,
                **how,
            )
        return scores


class _Asked(NamedTuple):
    """What is asked about a batch: of which of its rated positions, which token, for which question."""

    places: torch.Tensor
    tokens: torch.Tensor
    questions: list[int]


class _Rows(Sequence[Batch]):
    """Questions as batches, which are made when they are asked for."""

    def __init__(self, questions: Sequence[Question], *, max_tokens: int, pad_token_id: int) -> None:
        self.questions = len(questions)
        self._pad_token_id = pad_token_id
        self._batches: list[list[int]] = []
        rows: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for number, (before, rated) in enumerate(questions):
            if len(rated) > max_tokens:
                raise DataError(
                    f"a task has an answer of {len(rated)} tokens",
                    expected=f"at most {max_tokens}, which the model may see at once",
                )
            tokens = (*before, *rated)[-(max_tokens + 1) :]
            rows.setdefault(tokens[:-1], []).append((number, list(rated)))
        self._inputs = list(rows)
        self._asked = list(rows.values())
        self._rated = [max(len(rated) for _, rated in asked) for asked in self._asked]

    def job(self, max_rows: int) -> Job:
        longest = max(map(len, self._inputs))
        return Job(
            step_tokens=0,
            longest=longest,
            forward_rows=max_rows,
            shortest=shortest([len(tokens) for tokens in self._inputs], max_rows),
            measured_tokens=sum(self._rated),
            all_tokens=len(self._inputs) * longest,
        )

    def make_batches(self, *, max_tokens: int, max_rows: int) -> None:
        self._batches = length_sorted_batches([len(i) for i in self._inputs], max_tokens=max_tokens, max_rows=max_rows)

    def asked(self, number: int) -> _Asked:
        places: list[int] = []
        tokens: list[int] = []
        questions: list[int] = []
        end = 0
        for row in self._batches[number]:
            end += self._rated[row]
            for question, rated in self._asked[row]:
                places += range(end - len(rated), end)
                tokens += rated
                questions += [question] * len(rated)
        return _Asked(torch.tensor(places), torch.tensor(tokens), questions)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number):  # type: ignore[no-untyped-def]
        """The batch; positions whose next token is asked about have a target (some token, not necessarily that)."""
        rows = self._batches[number]
        lengths = torch.tensor([len(self._inputs[row]) for row in rows])
        input_ids = torch.full((len(rows), int(lengths.max())), self._pad_token_id, dtype=torch.int64)
        targets = torch.full_like(input_ids, IGNORED)
        for place, row in enumerate(rows):
            length = len(self._inputs[row])
            input_ids[place, :length] = torch.tensor(self._inputs[row])
            targets[place, length - self._rated[row] : length] = 0
        return Batch(examples=torch.tensor(rows), input_ids=input_ids, lengths=lengths, targets=targets)


def _key(before: Sequence[int], rated: Sequence[int]) -> bytes:
    """Stands for a question, in little memory."""
    content = array("q", [len(before), *before, *rated]).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()
