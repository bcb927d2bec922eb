"""Held-out loss, perplexity and task scores of the base and the tuned model, one block on the device at a time."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

from lopt_lite import devices
from lopt_lite.checkpoints.tokenizer import pad_token_id
from lopt_lite.data.batches import shortest
from lopt_lite.data.dataset import TokenizedDataset
from lopt_lite.data.load import load_dataset
from lopt_lite.events import OnEvent, ignore
from lopt_lite.float32_products import float32_products
from lopt_lite.outcomes import EvaluateOutcome
from lopt_lite.residency.block_major import WAITING, held_out_losses
from lopt_lite.residency.choices import Memory, choose_residence
from lopt_lite.residency.memory_model import Job
from lopt_lite.results.harness import task_scores
from lopt_lite.results.open_run import OpenRun, open_run
from lopt_lite.settings import EvaluateSettings
from lopt_lite.units import parse_memory


def evaluate(settings: EvaluateSettings, on_event: OnEvent = ignore) -> EvaluateOutcome:
    """Compare base and tuned model on held-out examples, on tasks, or on both (``lopt-lite evaluate``).

    With an adapter both models run side by side through each loaded block, so every layer is loaded once. A model that
    was tuned in full runs after its base.

    Raises
    ------
    RunDirectoryError
        The run is not finished.
    DataError
        The data, or a task, cannot be used.
    SettingsError
        A task is not known, or lm-eval is not installed.
    """
    device = devices.choose_device(settings.device)
    devices.keep_few_kernels(device)
    peak = devices.PeakMemory(device)
    run = open_run(settings.run, device)
    outcome = EvaluateOutcome(run=settings.run)
    try:
        with devices.memory_limited(device, parse_memory(settings.memory)), float32_products(device):
            if settings.data is not None:
                outcome = _with_losses(outcome, run, settings.data, settings, peak, on_event)
                devices.release_everything(device)
            if settings.tasks is not None:
                read = peak if settings.data is None else None
                outcome = dataclasses.replace(outcome, tasks=task_scores(run, settings, peak=read, on_event=on_event))
    finally:
        run.close()
    return dataclasses.replace(outcome, device_peak_bytes=peak.read())


def _with_losses(
    outcome: EvaluateOutcome,
    run: OpenRun,
    data: str,
    settings: EvaluateSettings,
    peak: devices.PeakMemory,
    on_event: OnEvent,
) -> EvaluateOutcome:
    """The outcome with what the examples of the file ``data`` gave."""
    dataset, _ = load_dataset(
        data,
        run.tokenizer,
        max_length=settings.max_length or run.settings.max_length,
        most_positions=run.skeleton.most_positions,
        embedding_rows=run.skeleton.vocabulary_rows,
        skip_bad_lines=settings.skip_bad_lines,
        on_event=on_event,
    )
    memory = Memory.now(run.device, parse_memory(settings.memory), reached_bytes=peak.grown_to())
    base, tuned = _losses(run, dataset, settings, memory, on_event)
    return dataclasses.replace(
        outcome,
        data=data,
        examples=len(dataset),
        answer_tokens=int(dataset.target_counts.sum()),
        base_loss=base,
        base_perplexity=_perplexity(base),
        tuned_loss=tuned,
        tuned_perplexity=_perplexity(tuned),
    )


def _losses(
    run: OpenRun, dataset: TokenizedDataset, settings: EvaluateSettings, memory: Memory, on_event: OnEvent
) -> tuple[float, float]:
    """Held-out loss of the base and of the tuned model."""
    ranges = [(b.first, b.end) for b in run.blocks]
    job = _job(dataset, settings)
    instead = "measure shorter examples"
    residence = choose_residence(run.shapes(), ranges, job, device=run.device, memory=memory, instead=instead)
    measure = partial(
        held_out_losses,
        dataset=dataset,
        ranges=ranges,
        device=run.device,
        residence=residence,
        pad_token_id=pad_token_id(run.tokenizer),
        max_rows=settings.batch_size,
        spill_limits=WAITING,
        spill_directory=run.paths.root,
        on_event=on_event,
    )
    if run.settings.tune == "full":
        (base,) = measure(run.store, run.skeleton, task="held-out loss of the base model")
        (tuned,) = measure(run.tuned_store, run.tuned_skeleton, task="held-out loss of the tuned model")
        return base, tuned
    with run.put_aside(residence) as state:
        base, tuned = measure(
            run.store,
            run.skeleton,
            variants=2,
            on_layer=partial(run.on_layer, state=state),
            state=state,
            select=lambda layers, variant: run.select(layers, variant == 1),
        )
    return base, tuned


def _job(dataset: TokenizedDataset, settings: EvaluateSettings) -> Job:
    longest = int(dataset.lengths.max())
    return Job(
        step_tokens=0,
        longest=longest,
        forward_rows=settings.batch_size,
        shortest=shortest(dataset.lengths, settings.batch_size),
        measured_tokens=int(dataset.target_counts.sum()),
        all_tokens=len(dataset) * longest,
    )


def _perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
