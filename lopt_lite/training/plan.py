"""What a training run would do, from shapes alone: ``lopt_lite.plan``. No weights are loaded.

What takes long to find out (the machine's speeds, a model's and a data file's numbers) is remembered in the user's
cache; nothing else is written.

Read :func:`plan` from top to bottom: the model in numbers, the data in numbers, where everything will be, and how much
disk and time that takes. :func:`draft_of_run` is the same of a run whose data is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import replace
from pathlib import Path

import torch

from lopt_lite import devices
from lopt_lite.checkpoints.locate import ModelDescription, ModelFiles, describe_model
from lopt_lite.checkpoints.store_index import standing_store
from lopt_lite.data.dataset import check_can_be_split
from lopt_lite.data.estimate import DataEstimate
from lopt_lite.errors import DoesNotFitError
from lopt_lite.events import Notice, OnEvent, Planned, ignore
from lopt_lite.option_fields import flag
from lopt_lite.outcomes import PlanAlternative, PlanBlock, PlanDisk, PlanMemory, PlanOutcome
from lopt_lite.recipe import ModelKind
from lopt_lite.residency.choices import Memory
from lopt_lite.residency.machine import machine_speeds
from lopt_lite.settings import TrainSettings
from lopt_lite.training.block_plan import check_something_learns
from lopt_lite.training.data_facts import known_estimate
from lopt_lite.training.disk_plan import require_disk
from lopt_lite.training.draft import Draft, Places, known_numbers
from lopt_lite.training.job import answered_count, nothing_to_anchor, nothing_to_answer
from lopt_lite.training.memory_choice import Residences, check_unquantised
from lopt_lite.training.model_facts import ModelFacts, model_facts
from lopt_lite.training.own_prompts import prompt_room
from lopt_lite.training.run_directory import RunPaths, check_store_place, check_usable, run_directory
from lopt_lite.training.store_choice import is_store_for, store_directory

MIB = 2**20

#: On the CPU the budget counts the process. When training begins, it has all libraries loaded; planning has not.
#: This much is there after some thousand examples were read with a tokenizer of 49,152 tokens: measured, as is what a
#: larger tokenizer takes for each more of its tokens.
_TRAINING_PROCESS_BYTES = 508 * MIB
_USUAL_VOCABULARY, _VOCABULARY_ENTRY_BYTES = 49_152, 350
#: A token of the data is kept as an int32 and a bool; with the holes that reading leaves: measured with 14 million.
_DATA_TOKEN_BYTES = 6
_OTHER_BLOCKS = (1, 2, 4, 8, 16)
#: Options that decide the defaults of others.
_DECISIVE = ("tune", "schedule", "blocks")
#: A budget for which another's prediction is enough: this much more than it, and a run not longer than by this factor.
_SPARE_BYTES, _AS_FAST = 16 * MIB, 1.02


def plan(settings: TrainSettings, on_event: OnEvent = ignore) -> PlanOutcome:
    """Find out what :func:`lopt_lite.train` would do with the same settings.

    MODEL may be a directory with just a config.json.

    Raises
    ------
    SettingsError, ModelError, DataError
        Something given cannot be used.
    DoesNotFitError
        The memory budget (the message names the smallest that would do) or the disk is too small.
    RunDirectoryError
        The run directory holds something else.
    """
    device = devices.choose_device(settings.device)
    model = describe_model(settings.model, config_dirs=settings.config, on_event=on_event)
    facts = model_facts(model, settings)
    training, held_out, other = _estimate(settings, model, facts.most_positions, on_event)
    if settings.retain_answers and not training.has_prompts:
        raise nothing_to_answer()
    if settings.retain and not training.has_prompts and other is None:
        raise nothing_to_anchor()
    settings = settings.settle(has_prompts=training.has_prompts or other is not None, model=facts.kind)
    draft = Draft(
        facts=facts,
        settings=settings,
        training=training,
        held_out=held_out,
        other=_with_answers(other, training, settings, facts.most_positions),
        device=device,
        memory=_memory_when_training(device, settings.memory_bytes(), facts, training, held_out, other),
        speeds=machine_speeds(device),
        paths=_paths(settings, model),
        source_bytes=_source_bytes(model, facts),
    )
    check_unquantised(model, draft.blocks)
    trained = [layer.trained_parameters for layer in facts.shapes.layers]
    check_something_learns(draft.blocks, trained, settings.lora_targets)
    chosen = draft.residences()
    disk = draft.disk(chosen.training)
    require_disk(disk, draft.paths.run)
    return _outcome(draft, model, chosen, disk)


def draft_of_run(
    settings: TrainSettings,
    facts: ModelFacts,
    memory: Memory,
    *,
    lengths: torch.Tensor,
    target_counts: torch.Tensor,
    counts: tuple[int, int],
    device: torch.device,
    run: Path,
    store: Path,
) -> Draft:
    """The same of a run whose data is loaded.

    Parameters
    ----------
    lengths, target_counts:
        int64 [examples]: tokens, and tokens to be predicted, of the training examples, the held-out ones, and those
        that are only there to anchor on.
    counts:
        How many of the first two there are.
    """
    parts = [
        known_numbers(some, targets) if len(some) else None
        for some, targets in zip(_split(lengths, counts), _split(target_counts, counts), strict=True)
    ]
    assert parts[0] is not None
    return Draft(
        facts=facts,
        settings=settings,
        training=parts[0],
        held_out=parts[1],
        other=parts[2],
        device=device,
        memory=memory,
        speeds=machine_speeds(device, nf4=settings.quantize == "nf4"),
        paths=Places(run, store, standing_store(store) is not None),
        source_bytes=facts.parameters * 2,
    )


def planned(draft: Draft, chosen: Residences) -> Planned:
    """The plan of a run whose residences are decided, for its first lines."""
    residence = chosen.training
    return Planned(
        mode=residence.mode,
        layers=residence.layers,
        resident_layers=residence.resident_layers,
        recompute=residence.recompute,
        micro_batch_tokens=residence.micro_batch_tokens,
        step_tokens=draft.step_tokens,
        budget_bytes=draft.memory.limit_bytes,
        predicted_bytes=chosen.predicted_bytes,
        predicted_host_bytes=chosen.predicted_host_bytes,
        disk_bytes=draft.disk(residence).total_bytes,
        seconds=draft.times(residence).total_s,
        device=draft.device.type,
        advice=draft.advice(residence),
    )


def _estimate(
    settings: TrainSettings, model: ModelDescription, most_positions: int | None, on_event: OnEvent
) -> tuple[DataEstimate, DataEstimate | None, DataEstimate | None]:
    """The training and held-out examples, and those that are only there to anchor on, in numbers."""
    if model.tokenizer_directory is None:
        on_event(Notice(text="There is no tokenizer beside the model; tokens are guessed from the data's bytes."))
    fraction = settings.validation_fraction()
    max_length = min(settings.max_length, most_positions or settings.max_length)
    training, validation, other = (
        None if path is None else known_estimate(path, model, max_length=max_length)
        for path in (settings.data, None if fraction is not None else settings.validation, settings.retain_data)
    )
    assert training is not None
    found = [part for part in (training, validation, other) if part is not None]
    if max_length < settings.max_length and max(part.longest for part in found) >= max_length:
        text = (
            f"Examples of more than {max_length:,} tokens will be cut: the model has no more positions "
            f"(--max-length is {settings.max_length:,})."
        )
        on_event(Notice(text=text))
    if fraction is not None:
        if training.how != "from bytes":
            check_can_be_split(training.examples)
        return *training.split(fraction, settings.seed), other
    return training, validation, other


def _with_answers(
    other: DataEstimate | None, training: DataEstimate, settings: TrainSettings, most_positions: int | None
) -> DataEstimate | None:
    """``other`` and the prompts that the untouched model answers, if it is to be held to its answers.

    Raises
    ------
    SettingsError
        Answers of that length leave no room for a prompt.
    """
    count, tokens = answered_count(settings, training.examples), settings.retain_answers
    if not count:
        return other
    room = prompt_room(tokens, min(settings.max_length, most_positions or settings.max_length))
    prompt = min(room, round((training.tokens - training.answer_tokens) / training.examples))
    own = DataEstimate(
        examples=count,
        tokens=count * (prompt + tokens),
        answer_tokens=0,
        longest=min(room, training.longest) + tokens,
        lengths=(prompt + tokens,) * count,
        how=training.how,
    )
    return own if other is None else other.and_also(own)


def _split(values: torch.Tensor, counts: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    return values.split([*counts, len(values) - sum(counts)])


def _memory_when_training(
    device: torch.device,
    budget_bytes: int | None,
    facts: ModelFacts,
    training: DataEstimate,
    held_out: DataEstimate | None,
    other: DataEstimate | None,
) -> Memory:
    """The memory that a run will find: on the CPU, with a process that has loaded everything it needs."""
    now = Memory.now(device, budget_bytes)
    if device.type != "cpu":
        return now
    tokens = sum(part.tokens for part in (training, held_out, other) if part is not None)
    entries = max(0, facts.shapes.vocabulary - _USUAL_VOCABULARY)
    used_bytes = _TRAINING_PROCESS_BYTES + entries * _VOCABULARY_ENTRY_BYTES + tokens * _DATA_TOKEN_BYTES
    more = max(0, used_bytes - now.used_bytes)
    return replace(now, used_bytes=used_bytes, free_bytes=max(0, now.free_bytes - more))


def _paths(settings: TrainSettings, model: ModelDescription) -> Places:
    """Run directory and store, and whether the latter is complete: ``--store``, MODEL if it is a store, or RUN's."""
    run = run_directory(settings, model.name)
    files = model if isinstance(model, ModelFiles) else None
    check_usable(RunPaths(run))
    own = RunPaths(run).store
    chosen = store_directory(settings, files, own)
    if settings.store is not None:
        check_store_place(RunPaths(run), chosen)
    made_anew = settings.fresh and chosen == own
    return Places(run, chosen, not made_anew and is_store_for(settings, chosen))


def _source_bytes(model: ModelDescription, facts: ModelFacts) -> int:
    if isinstance(model, ModelFiles):
        return sum(model.weights.info(name).nbytes for name in model.weights.names())
    return 2 * facts.parameters


def _outcome(draft: Draft, model: ModelDescription, chosen: Residences, disk: PlanDisk) -> PlanOutcome:
    residence = chosen.training
    times = draft.times(residence)
    training, held_out = draft.training, draft.held_out
    block = max(draft.ranges, key=lambda r: draft.facts.shapes.stored_bytes(*r))
    boundaries = draft.job.boundary_bytes(draft.facts.shapes, block) if residence.recompute else 0
    return PlanOutcome(
        command=_command(draft.settings, draft.facts.kind),
        run=str(draft.paths.run),
        model=model.name,
        architecture=draft.facts.architecture,
        parameters=draft.facts.parameters,
        layers=len(draft.facts.shapes.layers),
        weights_found=isinstance(model, ModelFiles),
        data=draft.settings.data,
        data_how=training.how,
        examples=training.examples,
        held_out_examples=0 if held_out is None else held_out.examples,
        tokens=training.tokens,
        answer_tokens=training.answer_tokens,
        longest_tokens=draft.job.longest,
        device=draft.device.type,
        steps_per_epoch=draft.step_counts.per_epoch,
        steps=draft.step_counts.train,
        batch_size=draft.settings.batch_size,
        step_tokens=draft.step_tokens,
        hiding_tokens=draft.hiding_tokens(residence),
        memory=PlanMemory(
            mode=residence.mode,
            layers=residence.layers,
            resident_layers=residence.resident_layers,
            recompute=residence.recompute,
            offload_state=residence.offload_state,
            head_sliced=residence.head_slice_rows is not None,
            micro_batch_tokens=residence.micro_batch_tokens,
            boundary_bytes=boundaries,
            boundary_device_bytes=min(boundaries, residence.boundary_bytes),
            boundary_host_bytes=min(max(0, boundaries - residence.boundary_bytes), residence.boundary_host_bytes),
            budget_bytes=draft.memory.limit_bytes,
            smallest_budget_bytes=draft.smallest_budget(),
            predicted_bytes=chosen.predicted_bytes,
            predicted_host_bytes=chosen.predicted_host_bytes,
        ),
        disk=disk,
        store_s=times.store_s,
        held_out_before_s=times.held_out_before_s,
        anchor_s=times.anchor_s,
        blocks=tuple(
            PlanBlock(
                block=block.index,
                objective=block.objective,
                first_layer=block.first,
                end_layer=block.end,
                total_s=seconds.total_s,
                **dataclasses.asdict(seconds),
            )
            for block, seconds in zip(draft.blocks, times.blocks, strict=True)
        ),
        total_s=times.total_s,
        advice=(*draft.advice(residence), *draft.whole_model_advice(residence)),
        alternatives=_alternatives(draft),
    )


def _command(settings: TrainSettings, kind: ModelKind) -> str:
    """The command line that runs the plan."""
    words = ["lopt-lite", "train", settings.model, settings.data]
    # Other options' defaults depend on these, and all of theirs on the preset.
    preset = TrainSettings(model=settings.model, data=settings.data, preset=settings.preset)
    defaults = {"preset": None} | {name: getattr(preset, name) for name in _DECISIVE}
    decided = {name: getattr(settings, name) for name in ("preset", *_DECISIVE)}
    plain = TrainSettings(model=settings.model, data=settings.data, **decided)
    plain = plain.settle(has_prompts=True, model=kind)
    defaults["last_layers"] = dataclasses.replace(settings, last_layers=None).last_block_layers(kind.layers)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = defaults[field.name] if field.name in defaults else getattr(plain, field.name)
        if field.metadata.get("positional") or value == default:
            continue
        name, values = flag(field.name), value if isinstance(value, tuple) else (value,)
        words += [name] if value is True else [word for item in values for word in (name, str(item))]
    return shlex.join(words)


def _alternatives(draft: Draft) -> tuple[PlanAlternative, ...]:
    """The smallest budget, the one asked for, a middle one and one that leaves nothing to wish; other blocks.

    Where the last of two blocks is larger than the first, they may be halves as well, which takes less memory and time.
    """
    smallest = draft.smallest_budget()
    # A small model's prediction may lie below the smallest budget, which has a margin.
    most = max(smallest, -(-draft.with_budget(1 << 62).residences().predicted_bytes // MIB) * MIB)
    middle = -(-math.isqrt(smallest * most) // MIB) * MIB
    budgets = {smallest, _no_more_than_used(draft, middle), _no_more_than_used(draft, most)}
    rows = [_alternative(draft.with_budget(budget), f"--memory {budget // MIB}MiB") for budget in budgets]
    rows.append(_alternative(draft, f"--memory {draft.settings.memory}", chosen=True))
    rows.sort(key=lambda row: (row.predicted_bytes or 0, not row.chosen))
    rows = [
        row
        for number, row in enumerate(rows)
        if row.chosen or not any(other.predicted_bytes == row.predicted_bytes for other in rows[:number])
    ]
    if "," in draft.settings.objective:
        return tuple(rows)
    layers = len(draft.facts.shapes.layers)
    if len(draft.blocks) == 2 and draft.blocks[-1].end - draft.blocks[-1].first > layers // 2:
        rows.append(_alternative(draft.with_settings(last_layers=layers // 2), f"--last-layers {layers // 2}"))
    for count in _OTHER_BLOCKS:
        if count != draft.settings.blocks and count <= layers:
            # With one block there is no anchor, unless one is asked for.
            asked = draft.settings.retain is not None or draft.settings.retain_data or draft.settings.retain_answers
            anchor = {} if asked or count > 1 else {"retain": 0.0}
            other = draft.with_settings(blocks=count, last_layers=None, **anchor)
            rows.append(_alternative(other, f"--blocks {count}"))
    return tuple(rows)


def _no_more_than_used(draft: Draft, budget_bytes: int) -> int:
    """A budget without what would stay unused of ``budget_bytes``, where it does as well."""
    chosen = draft.with_budget(budget_bytes).residences()
    used_bytes = -(-chosen.predicted_bytes // MIB) * MIB + _SPARE_BYTES
    if not draft.smallest_budget() <= used_bytes < budget_bytes:
        return budget_bytes
    roomy, tight = chosen.training, draft.with_budget(used_bytes).residences().training
    same = (tight.mode, tight.resident_layers) == (roomy.mode, roomy.resident_layers)
    as_fast = draft.times(tight).total_s <= _AS_FAST * draft.times(roomy).total_s
    return used_bytes if same and as_fast else budget_bytes


def _alternative(draft: Draft, options: str, *, chosen: bool = False) -> PlanAlternative:
    smallest = draft.smallest_budget()
    try:
        found = draft.residences()
    except DoesNotFitError:
        return PlanAlternative(
            options=options,
            chosen=chosen,
            fits=False,
            mode="does not fit",
            smallest_budget_bytes=smallest,
            predicted_bytes=None,
            disk_bytes=None,
            seconds=None,
        )
    return PlanAlternative(
        options=options,
        chosen=chosen,
        fits=True,
        mode=found.training.mode,
        smallest_budget_bytes=smallest,
        predicted_bytes=found.predicted_bytes,
        disk_bytes=draft.disk(found.training).total_bytes,
        seconds=draft.times(found.training).total_s,
    )
