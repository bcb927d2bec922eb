"""Answers to many prompts at once, for the tasks of lm-eval."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lopt_lite.checkpoints.generation_config import GENERATION_CONFIG_NAME
from lopt_lite.checkpoints.tokenizer import pad_token_id
from lopt_lite.checkpoints.trial import first_line
from lopt_lite.data.batches import length_sorted_batches
from lopt_lite.errors import ModelError
from lopt_lite.events import OnEvent, Progress
from lopt_lite.residency.answer_places import place
from lopt_lite.residency.choices import Memory
from lopt_lite.residency.continuation import continuing_model, padded
from lopt_lite.results.open_run import OpenRun


@torch.no_grad()
def complete(
    run: OpenRun,
    prompts: Sequence[list[int]],
    *,
    tuned: bool,
    max_new_tokens: int,
    stop: Sequence[str],
    end_ids: Sequence[int],
    choices: dict[str, Any],
    max_rows: int,
    memory: Memory,
    on_event: OnEvent,
) -> list[list[int]]:
    """The tokens that follow each prompt.

    Parameters
    ----------
    run:
        Used up: its skeleton can make no losses and no other answers afterwards.
    tuned:
        Whether the tuned model answers, or the base.
    stop:
        An answer that contains one of these texts (special tokens left out) is done.
    end_ids:
        Tokens that end an answer; they are left off.
    choices:
        Other settings of transformers' :class:`GenerationConfig`, over those of the model's generation_config.json.
    max_rows, memory:
        The largest batch in rows, and what there is to use.

    Raises
    ------
    DoesNotFitError
        The budget is too small even for one prompt at a time.
    ModelError
        The model's generation_config.json cannot be used.
    """
    lengths = [len(prompt) for prompt in prompts]
    skeleton, store = (run.tuned_skeleton, run.tuned_store) if tuned else (run.skeleton, run.store)
    residence, rows = place(
        run.shapes(),
        longest=max(lengths) + max_new_tokens,
        rows=min(max_rows, len(prompts)),
        memory=memory,
        device=run.device,
        fix="raise --memory, or lower --max-length",
    )
    batches = length_sorted_batches(lengths, max_tokens=residence.forward_tokens, max_rows=rows)
    device = run.device
    answers: list[list[int]] = [[] for _ in prompts]
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(run.put_aside(residence))
        model = stack.enter_context(
            continuing_model(
                skeleton,
                store,
                residence,
                device=device,
                scratch=run.paths.root,
                on_layer=partial(run.on_layer, state=state) if tuned else None,
                state=state,
            )
        )
        settings = _generation_config(run)
        settings.update(
            **choices,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_ids) or None,
            pad_token_id=pad_token_id(run.tokenizer),
        )
        for done, batch in enumerate(batches, start=1):
            ids, mask = padded([prompts[i] for i in batch], pad_token_id(run.tokenizer))
            output = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList([_StopTexts(run.tokenizer, stop, ids.shape[1])]),
            )
            for row, number in enumerate(batch):
                answers[number] = _until_end(output[row, ids.shape[1] :].tolist(), end_ids)
            on_event(Progress(task="writing answers", done=done, total=len(batches), unit="batches"))
    return answers


def _generation_config(run: OpenRun) -> GenerationConfig:
    """What the model's makers recommend, if they do."""
    directory = run.store.directory
    if not (directory / GENERATION_CONFIG_NAME).is_file():
        return GenerationConfig()
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)  # nosec B615
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"transformers cannot use {directory / GENERATION_CONFIG_NAME}: {first_line(error)}",
            fix="correct the file, or take it away",
        ) from error


def _until_end(tokens: list[int], end_ids: Sequence[int]) -> list[int]:
    """Tokens up to the one that ends the answer; padding follows."""
    end = next((place for place, token_id in enumerate(tokens) if token_id in end_ids), len(tokens))
    return tokens[:end]


class _StopTexts(StoppingCriteria):
    """Ends each row that contains one of some texts."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int) -> None:
        self._tokenizer, self._start = tokenizer, start
        self._texts = [text for text in texts if text]
        # A text of n tokens may be spelt with more of them, but hardly with more than one for each byte.
        self._window = max((len(text.encode()) for text in self._texts), default=0) + 2

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        first = max(self._start, input_ids.shape[1] - self._window)
        ends = self._tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
        done = [any(text in end for text in self._texts) for end in ends]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)
