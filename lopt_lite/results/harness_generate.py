"""Answers to many prompts at once, by transformers' own generation loop over layers that may be streamed.

A streamed model is read once for each new token of a batch, so batches are as large as they may be. Keys and values of
a batch's tokens stay on the device while it is answered: they are taken off the budget before layers are placed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from lopt_lite.checkpoints.tokenizer import pad_token_id
from lopt_lite.data.batches import length_sorted_batches
from lopt_lite.errors import DoesNotFitError
from lopt_lite.events import OnEvent, Progress
from lopt_lite.residency.choices import Memory, Residence, choose_residence, smallest_budget
from lopt_lite.residency.head import open_head
from lopt_lite.residency.layers import open_layers
from lopt_lite.residency.memory_model import Job
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
    budget_bytes: int | None,
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
    max_rows, budget_bytes:
        The largest batch in rows, and the memory budget (None for most of what is free).

    Raises
    ------
    DoesNotFitError
        The budget is too small even for one prompt at a time.
    """
    lengths = [len(prompt) for prompt in prompts]
    residence, rows = _place(run, max(lengths) + max_new_tokens, min(max_rows, len(prompts)), budget_bytes)
    batches = length_sorted_batches(lengths, max_tokens=residence.forward_tokens, max_rows=rows)
    skeleton, store = (run.tuned_skeleton, run.tuned_store) if tuned else (run.skeleton, run.store)
    device = run.device
    answers: list[list[int]] = [[] for _ in prompts]
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(run.put_aside(residence))
        pool = open_layers(
            residence,
            store,
            skeleton,
            0,
            skeleton.layer_count,
            device=device,
            scratch=run.paths.root,
            on_layer=partial(run.on_layer, state=state) if tuned else None,
            state=state,
        )
        stack.callback(pool.close)
        head = open_head(
            skeleton,
            store,
            device=device,
            logit_elements=residence.logit_elements,
            slice_rows=residence.head_slice_rows,
        )
        stack.callback(head.close)
        head.place_for_generation()
        model = skeleton.with_layers(pool.modules())
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)
        settings = _generation_config(run)
        settings.update(
            **choices,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_ids) or None,
            pad_token_id=pad_token_id(run.tokenizer),
        )
        for done, batch in enumerate(batches, start=1):
            ids, mask = _padded([prompts[i] for i in batch], pad_token_id(run.tokenizer))
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


def _place(run: OpenRun, longest: int, rows: int, budget_bytes: int | None) -> tuple[Residence, int]:
    """Where the layers are, and how many prompts are answered at once: fewer where keys and values would not fit."""
    shapes, whole = run.shapes(), [(0, run.skeleton.layer_count)]
    memory = Memory.now(run.device, budget_bytes)
    while True:
        kept = rows * longest * _cache_bytes_per_token(run)
        left = dataclasses.replace(memory, budget_bytes=memory.limit_bytes - kept)
        job = Job(step_tokens=0, longest=longest, answer_tokens=rows)
        try:
            return choose_residence(shapes, whole, job, device=run.device, memory=left), rows
        except DoesNotFitError as error:
            if rows == 1:
                smallest = kept + smallest_budget(shapes, whole, job, device=run.device, memory=memory)
                raise DoesNotFitError(
                    f"a budget of {memory.limit_bytes >> 20:,} MiB is too small to answer prompts of up to "
                    f"{longest:,} tokens with their answers",
                    expected=f"at least --memory {(smallest >> 20) + 1}MiB",
                    fix="raise --memory, or lower --max-length",
                ) from error
            rows //= 2


def _cache_bytes_per_token(run: OpenRun) -> int:
    """Keys and values of one token in all layers."""
    config = run.skeleton.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * kept * width * run.skeleton.layer_count * run.skeleton.dtype.itemsize)


def _generation_config(run: OpenRun) -> GenerationConfig:
    """What the model's makers recommend, if they do."""
    directory = run.store.directory
    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory, local_files_only=True)  # nosec B615
    return GenerationConfig()


def _contiguous(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Last positions cut out of several rows are not contiguous; PyTorch would copy the head's weight for each row."""
    return (args[0].contiguous(), *args[1:])


def _until_end(tokens: list[int], end_ids: Sequence[int]) -> list[int]:
    """Tokens up to the one that ends the answer; padding follows."""
    end = next((place for place, token_id in enumerate(tokens) if token_id in end_ids), len(tokens))
    return tokens[:end]


def _padded(prompts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts side by side, padded on the left, and 1 where there is a token: int64 [rows, longest] both."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


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
