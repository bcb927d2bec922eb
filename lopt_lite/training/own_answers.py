"""The untouched model's own answers to some of the training prompts, to anchor on (``--retain-answers``).

What training changes most is how the model answers, and prompts do not show that. So the untouched model first writes
the beginnings of answers to a sample of the prompts, and the tuned one is held to what it thinks at each of their
tokens. How long they are is known from the start: a place is kept for them in the data set, so that everything is
planned and cached as if they were there already. They are a fact of the journal, batch by batch.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.events import Progress
from lopt_lite.residency.continuation import continuing_model, padded
from lopt_lite.seeds import derive_seed
from lopt_lite.training.workbench import Workbench


def write_answers(bench: Workbench, examples: range, tokens: int) -> None:
    """Put the untouched model's answers in their places in ``bench.dataset``; those that are not known are written now.

    Parameters
    ----------
    examples:
        Those that have a place for an answer, of ``tokens`` tokens, at their end.

    Raises
    ------
    StoppedError
        The run is to stop; batches that are done stay.
    """
    answers = [answer for fact in bench.journal.all("answers") for answer in fact["tokens"]]
    if len(answers) < len(examples):
        _write_the_rest(bench, examples, tokens, answers)
        bench.release_memory()
    for example, answer in zip(examples, answers, strict=True):
        ids, _ = bench.dataset.example(example)
        ids[-tokens:] = torch.tensor(answer, dtype=torch.int32)


@torch.no_grad()
def _write_the_rest(bench: Workbench, examples: range, tokens: int, answers: list[list[int]]) -> None:
    """Answer the examples after those in ``answers``, batch by batch, and add to it."""
    assert bench.answering is not None
    residence, rows, device = bench.answering.residence, bench.answering.rows, bench.device
    prompts = [bench.dataset.example(example)[0][:-tokens].tolist() for example in examples]
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=bench.pad_token_id
    )
    scratch = bench.paths.root
    with continuing_model(_own_skeleton(bench), bench.store, residence, device=device, scratch=scratch) as model:
        # An answer that ends early goes on with what the model thinks comes next: places have one size.
        model.generation_config = GenerationConfig()
        for first in range(len(answers), len(prompts), rows):
            ids, mask = padded(prompts[first : first + rows], bench.pad_token_id)
            progress = _Progress(bench, first, len(prompts), ids.shape[1], tokens)
            written = _sample(model, ids.to(device), mask.to(device), config, progress, _seed(bench, first))
            bench.journal.add("answers", tokens=written)
            answers += written


def _sample(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, config: GenerationConfig, progress: _Progress, seed: int
) -> list[list[int]]:
    """What follows ``ids`` [rows, longest], drawn with ``seed``; other random numbers stay as they are."""
    with torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(seed)
        output = model.generate(
            ids, attention_mask=mask, generation_config=config, stopping_criteria=StoppingCriteriaList([progress])
        )
    new: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return new


def _seed(bench: Workbench, first: int) -> int:
    return derive_seed(bench.settings.seed, "own answers", first)


def _own_skeleton(bench: Workbench) -> Skeleton:
    """A second skeleton of the run's model, since generating uses one up."""
    skeleton, store = Skeleton(bench.model, dtype=bench.skeleton.dtype), bench.store
    skeleton.set_embedding_reader(lambda ids: store.embedding_rows(skeleton, ids))
    skeleton.place_root_tensors(store.root(skeleton), bench.device)
    return skeleton


class _Progress(StoppingCriteria):
    """Shows how far a batch is, and stops when the run is to stop; no row ends before it has all its tokens."""

    def __init__(self, bench: Workbench, first: int, total: int, prompt_tokens: int, tokens: int) -> None:
        self._bench, self._first, self._total = bench, first, total
        self._prompt_tokens, self._tokens = prompt_tokens, tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        bench, rows = self._bench, len(input_ids)
        bench.stop.check()
        done = self._first * self._tokens + rows * (input_ids.shape[1] - self._prompt_tokens)
        text = "what the untouched model answers"
        bench.on_event(Progress(task=text, done=done, total=self._total * self._tokens, unit="tokens"))
        return torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
