"""A training run from settings to adapter, or fully tuned model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lopt_lite import devices, files
from lopt_lite.checkpoints.build_store import StoreBuilder
from lopt_lite.checkpoints.store import Store
from lopt_lite.checkpoints.tokenizer import pad_token_id
from lopt_lite.errors import LoptError, StoppedError
from lopt_lite.events import Notice, OnEvent, RunStarted, Validation, ignore
from lopt_lite.float32_products import float32_products
from lopt_lite.journal import Fact, Journal, last_fact, read_facts
from lopt_lite.locks import locked
from lopt_lite.outcomes import TrainOutcome
from lopt_lite.residency.block_major import WAITING, held_out_losses
from lopt_lite.residency.memory_model import FORWARD_ROWS
from lopt_lite.settings import TrainSettings
from lopt_lite.training.adapter_result import write_adapter
from lopt_lite.training.block_results import check_block
from lopt_lite.training.decision import Decision, decide
from lopt_lite.training.disk_plan import require_disk
from lopt_lite.training.draft import Draft
from lopt_lite.training.from_answers import check_finite
from lopt_lite.training.full import remarks
from lopt_lite.training.given import Given, read_given
from lopt_lite.training.joint import train_jointly
from lopt_lite.training.metrics import Metrics, read_metrics
from lopt_lite.training.model_result import write_model
from lopt_lite.training.own_answers import write_answers
from lopt_lite.training.plan import draft_of_run, planned
from lopt_lite.training.run_directory import (
    RESULT_FACTS,
    RunPaths,
    check_not_deleted,
    check_store_place,
    check_usable,
    claim,
    has_results,
    note_store,
    run_directory,
    start_fresh,
)
from lopt_lite.training.sequential import train_sequentially
from lopt_lite.training.standing_result import result_stands
from lopt_lite.training.stopping import Stopper
from lopt_lite.training.store_choice import is_model, store_directory
from lopt_lite.training.targets import without_adapter
from lopt_lite.training.workbench import Workbench

_NO_BFLOAT16 = (
    "this GPU has no units for bfloat16, so its products are slow: --dtype float32 may be faster, and takes more memory"
)


def run(settings: TrainSettings, on_event: OnEvent = ignore) -> TrainOutcome:
    """See :func:`lopt_lite.training.start.train`, the door."""
    started = time.monotonic()
    device = devices.choose_device(settings.device)
    devices.keep_few_kernels(device)
    peak = devices.PeakMemory(device)
    with (
        Stopper(max_hours=settings.max_hours, deadline=settings.deadline) as stop,
        devices.memory_limited(device, settings.memory_bytes()) as memory,
        float32_products(device),
    ):
        given = read_given(settings, stop, on_event)
        settings = settings.settle(has_prompts=given.data.sample is not None, model=given.model.skeleton.kind)
        paths = RunPaths(run_directory(settings, given.model.files.name))
        store_at, builder = _store_builder(settings, given, paths, device, stop, on_event)
        check_usable(paths)
        files.make_directory(paths.root)
        with locked(paths.root, what="the run directory"):
            # What cannot work is refused before anything of an earlier run is deleted, and before this one is known.
            known = [] if settings.fresh or not paths.settings.is_file() else read_facts(paths.journal)[0]
            if not known and not settings.fresh and has_results(paths):
                on_event(
                    Notice(text=f"{paths.journal} is gone or empty: nothing here counts as done, all is trained anew")
                )
            decided = _decide(known, given, settings, device, peak)
            memory.keep_below(decided.chosen.predicted_bytes)
            draft = None
            if not any(last_fact(known, fact) for fact in RESULT_FACTS):
                draft = _draft(given, settings, decided, paths, store_at, device)
                if last_fact(known, "store-ready") is None:
                    require_disk(draft.disk(decided.residence), paths.root)
            if settings.fresh:
                check_not_deleted(paths, given.files(settings))
                start_fresh(paths)
            for remark in claim(paths, given.identity(settings, store_at, device)):
                on_event(Notice(text=remark))
            files.remove_stray_temporaries(paths.root)
            if draft is not None:
                _show_plan(draft, decided, on_event)
            with _open_bench(settings, given, paths, decided, builder, store_at, device, peak, stop, on_event) as bench:
                already_done = result_stands(bench)
                _announce(bench, given)
                if not already_done:
                    with _peak_noted(bench):
                        _work(bench, given)
                predicted_bytes = decided.chosen.predicted_bytes
                seconds = time.monotonic() - started
                return _outcome(bench, already_done=already_done, seconds=seconds, predicted_bytes=predicted_bytes)


def _store_builder(
    settings: TrainSettings, given: Given, paths: RunPaths, device: torch.device, stop: Stopper, on_event: OnEvent
) -> tuple[Path, StoreBuilder | None]:
    """Where the store is, and what makes it, the model's tensors checked; None when MODEL is the store."""
    directory = store_directory(settings, given.model.files, paths.store)
    if settings.store is not None:
        check_store_place(paths, directory)
    if is_model(settings, given.model.files, directory):
        return directory, None
    builder = StoreBuilder(
        given.model.files,
        directory,
        quantize=settings.quantize,
        dtype=settings.dtype,
        device=device,
        anew=settings.fresh and directory == paths.store,
        tokenizer=given.model.tokenizer,
        check=stop.check,
        on_event=on_event,
    )
    return directory, builder


@contextlib.contextmanager
def _open_bench(
    settings: TrainSettings,
    given: Given,
    paths: RunPaths,
    decided: Decision,
    builder: StoreBuilder | None,
    store_at: Path,
    device: torch.device,
    peak: devices.PeakMemory,
    stop: Stopper,
    on_event: OnEvent,
) -> Iterator[Workbench]:
    """Open the journal, make the store if it is not there, and put the run's parts on the bench."""
    with contextlib.ExitStack() as stack:
        journal = Journal(paths.journal)
        stack.callback(journal.close)
        if journal.lost_last:
            on_event(Notice(text=f"the last line of {paths.journal} was damaged; what it spoke of is done again"))
        metrics = Metrics(paths.metrics)
        stack.callback(metrics.close)
        skeleton = given.model.skeleton
        dataset = given.data.whole
        decided.note(journal, device)
        if builder is not None:
            builder.build()
        store = Store(store_at, repair=None if builder is None else builder.rebuild, on_event=on_event)
        stack.callback(store.close)
        note_store(paths, store_at)
        if journal.last("store-ready") is None:
            journal.add("store-ready")
        if journal.last("started") is None:
            journal.add("started", examples=len(given.data.train))
        skeleton.set_embedding_reader(lambda ids: store.embedding_rows(skeleton, ids))
        skeleton.place_root_tensors(store.root(skeleton), device)
        yield Workbench(
            settings=settings,
            paths=paths,
            journal=journal,
            metrics=metrics,
            model=given.model.files,
            store=store,
            skeleton=skeleton,
            tokenizer=given.model.tokenizer,
            pad_token_id=pad_token_id(given.model.tokenizer),
            dataset=dataset,
            train_count=len(given.data.train),
            held_out_count=0 if given.data.held_out is None else len(given.data.held_out),
            blocks=given.model.blocks,
            device=device,
            residence=decided.residence,
            matching_residence=decided.chosen.matching,
            answering=decided.chosen.answering,
            peak=peak,
            stop=stop,
            on_event=on_event,
        )


def _decide(
    known: Sequence[Fact], given: Given, settings: TrainSettings, device: torch.device, peak: devices.PeakMemory
) -> Decision:
    sample, held_out = given.data.sample, given.data.held_out
    of_held_out = torch.zeros(1) if held_out is None else held_out.target_counts
    held_out_answers = min(FORWARD_ROWS, len(of_held_out)) * int(of_held_out.max())
    return decide(
        known,
        settings,
        given.model.facts,
        given.model.blocks,
        lengths=given.data.whole.lengths,
        train_examples=len(given.data.train),
        other_examples=sum(len(part) for part in (given.data.other, given.data.answered) if part is not None),
        most_answers=int(given.data.train.target_counts.max()),
        held_out_answers=held_out_answers,
        most_anchors=0 if sample is None else int(sample.counts.max()),
        answered=0 if given.data.answered is None else len(given.data.answered),
        longest_answered=0 if given.data.answered is None else int(given.data.answered.lengths.max()),
        device=device,
        reached_bytes=peak.grown_to(),
    )


def _draft(
    given: Given, settings: TrainSettings, decided: Decision, paths: RunPaths, store: Path, device: torch.device
) -> Draft:
    dataset = given.data.whole
    return draft_of_run(
        settings,
        decided.facts,
        decided.memory,
        lengths=dataset.lengths,
        target_counts=dataset.target_counts,
        counts=(len(given.data.train), 0 if given.data.held_out is None else len(given.data.held_out)),
        device=device,
        run=paths.root,
        store=store,
    )


def _show_plan(draft: Draft, decided: Decision, on_event: OnEvent) -> None:
    """The first lines of a run: what was decided, and what it will need."""
    if not decided.facts.shapes.measured:
        text = "a layer of this model cannot be tried out without its weights: its activations' size is an estimate"
        on_event(Notice(text=text))
    on_event(planned(draft, decided.chosen))


def _announce(bench: Workbench, given: Given) -> None:
    training = given.data.train
    bench.on_event(
        RunStarted(
            run=str(bench.paths.root),
            model=given.model.files.name,
            data=bench.settings.data,
            examples=len(training),
            validation_examples=bench.held_out_count,
            tokens=int(training.lengths.sum()),
            answer_tokens=int(training.target_counts.sum()),
            blocks=len(bench.blocks),
            layers=bench.skeleton.layer_count,
            device=bench.device.type,
            resumed=bench.journal.last("announced") is not None,
        )
    )
    if bench.journal.last("announced") is None:
        bench.journal.add("announced")


def _remarks(bench: Workbench) -> list[str]:
    """What the user should know of these settings on this device."""
    found = [*bench.settings.without_effect(), *remarks(bench.settings, bench.device)]
    found += without_adapter(bench.skeleton, bench.settings, bench.blocks)
    if bench.skeleton.dtype == torch.bfloat16 and devices.backend(bench.device).lacks_bfloat16():
        found.append(_NO_BFLOAT16)
    return found


@contextlib.contextmanager
def _peak_noted(bench: Workbench) -> Iterator[None]:
    """Write down the memory that all of the work took, between the steps as well, when it ends or is stopped."""

    def note() -> None:
        # Nothing follows from it: a disk that is full now makes no other end of what was done.
        with contextlib.suppress(LoptError):
            bench.journal.add("peak", device_bytes=bench.peak.read())

    try:
        yield
    except StoppedError:
        note()
        raise
    note()


def _work(bench: Workbench, given: Given) -> None:
    for remark in _remarks(bench):
        bench.on_event(Notice(text=remark))
    _measure_untouched_model(bench)
    bench.release_memory()
    if given.data.sample is not None and given.data.sample.answered:
        write_answers(bench, given.data.sample.answered, given.data.sample.answer_tokens)
    if bench.settings.schedule == "joint":
        train_jointly(bench, given.data.sample)
    else:
        train_sequentially(bench, given.data.sample)
    for block in bench.blocks:
        check_block(bench, block)
    if bench.settings.tune == "full":
        bench.journal.add("model", sha256=write_model(bench))
        return
    digests = write_adapter(
        bench.paths,
        bench.skeleton,
        bench.blocks,
        bench.settings,
        origin=given.model.files.origin,
        tokenizer=bench.tokenizer,
    )
    bench.journal.add("adapter", **digests)


def _measure_untouched_model(bench: Workbench) -> None:
    """Held-out loss before training, once per run."""
    if not bench.held_out_count or bench.journal.last("validation", epoch=0):
        return
    held_out = bench.held_out()
    (loss,) = held_out_losses(
        bench.store,
        bench.skeleton,
        held_out,
        [(b.first, b.end) for b in bench.blocks],
        device=bench.device,
        residence=bench.residence,
        pad_token_id=bench.pad_token_id,
        max_rows=FORWARD_ROWS,
        spill_limits=WAITING,
        spill_directory=bench.paths.root,
        check=bench.stop.check,
        on_event=bench.on_event,
        task="held-out loss before",
    )
    check_finite(loss, "the held-out examples")
    answer_tokens = int(held_out.target_counts.sum())
    bench.journal.add("validation", epoch=0, loss=loss, answer_tokens=answer_tokens)
    bench.on_event(Validation(epoch=0, epochs=bench.step_counts.epochs, loss=loss, answer_tokens=answer_tokens))


def _outcome(bench: Workbench, *, already_done: bool, seconds: float, predicted_bytes: int) -> TrainOutcome:
    before = bench.journal.last("validation", epoch=0)
    after = bench.journal.last("validation", epoch=bench.step_counts.epochs)
    steps = read_metrics(bench.paths.metrics)
    finite = [
        r["loss"]
        for r in steps
        if r["block"] == len(bench.stages) - 1 and r["phase"] == "train" and r["loss"] is not None
    ]
    recent = finite[-10:]
    peaks = [r["device_peak_bytes"] for r in steps if r.get("device_peak_bytes")]
    peaks += [fact["device_bytes"] for fact in bench.journal.all("peak")]
    return TrainOutcome(
        run=str(bench.paths.root),
        adapter=None if bench.settings.tune == "full" else str(bench.paths.adapter),
        tuned_model=str(bench.paths.model) if bench.settings.tune == "full" else None,
        already_done=already_done,
        examples=bench.train_count,
        steps=len(steps),
        loss_before=before["loss"] if before else None,
        loss_after=after["loss"] if after else None,
        final_train_loss=sum(recent) / len(recent) if recent else None,
        seconds=seconds,
        device_peak_bytes=max(peaks, default=0),
        predicted_bytes=predicted_bytes,
    )
