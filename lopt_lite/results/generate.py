"""Trying the tuned model: one answer, with a key-value cache, by transformers' own generation loop."""

from __future__ import annotations

import contextlib
import time
from functools import partial

import torch
from transformers import GenerationConfig

from lopt_lite import devices
from lopt_lite.checkpoints.generation_config import GENERATION_CONFIG_NAME, end_tokens
from lopt_lite.checkpoints.tokenizer import pad_token_id
from lopt_lite.data.templates import load_prompt, stop_token_ids
from lopt_lite.data.tokenization import token_without_row
from lopt_lite.errors import DataError, SettingsError
from lopt_lite.events import Notice, OnEvent, ignore
from lopt_lite.float32_products import float32_products
from lopt_lite.outcomes import GenerateOutcome
from lopt_lite.residency.answer_places import place
from lopt_lite.residency.choices import Memory
from lopt_lite.residency.continuation import continuing_model
from lopt_lite.results.open_run import OpenRun, open_run
from lopt_lite.settings import GenerateSettings
from lopt_lite.units import parse_memory


def generate(settings: GenerateSettings, on_event: OnEvent = ignore) -> GenerateOutcome:
    """Answer a prompt (``lopt-lite generate``).

    Raises
    ------
    RunDirectoryError
        The run is not finished.
    SettingsError
        The model has too few positions for the prompt and the longest answer.
    DataError
        The prompt has a token that the model has not.
    DoesNotFitError
        The memory budget is too small.
    """
    for text in settings.without_effect():
        on_event(Notice(text=text))
    device = devices.choose_device(settings.device)
    devices.keep_few_kernels(device)
    peak = devices.PeakMemory(device)
    run = open_run(settings.run, device)
    try:
        with devices.memory_limited(device, parse_memory(settings.memory)), float32_products(device):
            return _answer(run, settings, peak)
    finally:
        run.close()


@torch.no_grad()
def _answer(run: OpenRun, settings: GenerateSettings, peak: devices.PeakMemory) -> GenerateOutcome:
    skeleton, store = (run.skeleton, run.store) if settings.base else (run.tuned_skeleton, run.tuned_store)
    prompt = load_prompt(run.tokenizer, settings.prompt)
    problem = token_without_row(run.tokenizer, prompt, skeleton.vocabulary_rows)
    if problem is not None:
        raise DataError(f"the prompt cannot be used: {problem}", fix="leave the token out of the prompt")
    _check_positions(len(prompt), settings.max_new_tokens, skeleton.most_positions)
    ids = torch.as_tensor([list(prompt)], dtype=torch.long, device=run.device)
    residence, _ = place(
        run.shapes(),
        longest=ids.shape[1] + settings.max_new_tokens,
        rows=1,
        memory=Memory.now(run.device, parse_memory(settings.memory), reached_bytes=peak.grown_to()),
        device=run.device,
        fix="raise --memory, or lower --max-new-tokens",
    )
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(run.put_aside(residence))
        model = stack.enter_context(
            continuing_model(
                skeleton,
                store,
                residence,
                device=run.device,
                scratch=run.paths.root,
                on_layer=None if settings.base else partial(run.on_layer, state=state),
                state=state,
            )
        )
        ends = _end_tokens(run)
        choices = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=settings.temperature > 0,
            temperature=settings.temperature or None,
            top_p=settings.top_p if settings.temperature > 0 else None,
            top_k=0 if settings.temperature > 0 else None,
            eos_token_id=ends or None,
            pad_token_id=pad_token_id(run.tokenizer),
        )
        torch.manual_seed(settings.seed)
        started = time.monotonic()
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=choices)
        devices.synchronize(run.device)
        seconds = time.monotonic() - started
    new = output[0, ids.shape[1] :].tolist()
    finished = bool(new) and new[-1] in ends
    return GenerateOutcome(
        prompt=settings.prompt,
        text=run.tokenizer.decode(new, skip_special_tokens=True).strip(),
        tokens=len(new),
        tokens_per_s=len(new) / max(seconds, 1e-9),
        finished=finished,
    )


def _check_positions(prompt_tokens: int, new_tokens: int, most_positions: int | None) -> None:
    if most_positions is None or prompt_tokens + new_tokens <= most_positions:
        return
    left = most_positions - prompt_tokens
    raise SettingsError(
        f"the prompt has {prompt_tokens:,} tokens with the chat template, and --max-new-tokens is {new_tokens:,}",
        expected=f"no more than {most_positions:,} together, the positions that the model has",
        fix=f"--max-new-tokens {left}, or a shorter prompt" if left > 0 else "give a shorter prompt",
    )


def _end_tokens(run: OpenRun) -> list[int]:
    """Tokens that end an answer: those that training teaches to end a turn, and those that the model's makers list."""
    ends = set(stop_token_ids(run.tokenizer))
    return sorted(ends.union(end_tokens(run.store.directory / GENERATION_CONFIG_NAME)))
