"""What a run is given, a model and examples: read and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopt_lite.checkpoints.build_store import DTYPES
from lopt_lite.checkpoints.locate import ModelFiles, locate_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.tokenizer import check_vocabulary, load_tokenizer
from lopt_lite.data.dataset import TokenizedDataset
from lopt_lite.data.load import load_dataset
from lopt_lite.data.seeding import permutation
from lopt_lite.errors import RunDirectoryError, SettingsError
from lopt_lite.events import OnEvent
from lopt_lite.seeds import derive_seed
from lopt_lite.settings import TrainSettings
from lopt_lite.training.anchors import AnchorSample, check_anchored
from lopt_lite.training.block_plan import Block, plan_blocks
from lopt_lite.training.job import answered_count, nothing_to_answer, other_rows
from lopt_lite.training.memory_choice import check_unquantised
from lopt_lite.training.model_facts import ModelFacts, facts_of
from lopt_lite.training.own_prompts import answered_prompts
from lopt_lite.training.run_directory import RunIdentity, RunPaths, kept_snapshot, read_settings, run_directory
from lopt_lite.training.stopping import Stopper
from lopt_lite.training.targets import target_names


@dataclass(frozen=True)
class GivenModel:
    """The user's model: its files, and what is known of it without its weights."""

    files: ModelFiles
    skeleton: Skeleton
    facts: ModelFacts
    blocks: list[Block]
    tokenizer: Any


@dataclass(frozen=True)
class GivenData:
    """The user's examples.

    Attributes
    ----------
    whole:
        All of them in this order: the training examples, the held-out ones, and those that are only there to anchor on,
        own answers last. The others are views of it.
    sample:
        What the last block is held to, None for no anchor. It is of ``whole`` itself: answers are put into it later.
    """

    whole: TokenizedDataset
    train: TokenizedDataset
    held_out: TokenizedDataset | None
    other: TokenizedDataset | None
    answered: TokenizedDataset | None
    sample: AnchorSample | None


@dataclass(frozen=True)
class Given:
    """Both."""

    model: GivenModel
    data: GivenData

    def files(self, settings: TrainSettings) -> list[Path]:
        """Everything that the run reads."""
        model = self.model.files
        weights = {model.weights.file_of(name) for name in model.weights.names()}
        held_out = None if settings.validation_fraction() is not None else settings.validation
        examples = map(_path, (settings.data, held_out, settings.retain_data))
        others = [model.config_path, model.tokenizer_directory, model.generation_config_path, *examples]
        return [*weights, *(path for path in others if path is not None)]

    def identity(self, settings: TrainSettings, store: Path, device: torch.device) -> RunIdentity:
        """What must be the same for a run to be continued."""
        files, data = self.model.files, self.data
        return RunIdentity(
            settings=settings,
            model_origin=files.origin,
            model_fingerprint=files.fingerprint(),
            model_kind=self.model.skeleton.kind,
            data_fingerprint=data.train.fingerprint(),
            validation_fingerprint=None if data.held_out is None else data.held_out.fingerprint(),
            retain_fingerprint=None if data.other is None else data.other.fingerprint(),
            store=str(store.absolute()),
            device=device.type,
            model_snapshot=None if files.snapshot is None else str(files.snapshot),
        )


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def read_given(settings: TrainSettings, stop: Stopper, on_event: OnEvent) -> Given:
    """Read everything that can be wrong with model and data, but the model's weights.

    Raises
    ------
    ModelError, DataError, SettingsError
        Files are missing or unsound; the architecture cannot be trained, or not with these settings; there is nothing
        to train, to hold out or to anchor on.
    StoppedError
        A signal or a time limit came.
    """
    model = _read_model(settings, on_event)
    return Given(model, _read_data(settings, model, stop, on_event))


def _read_model(settings: TrainSettings, on_event: OnEvent) -> GivenModel:
    snapshot = _snapshot_of_run(settings)
    model = locate_model(settings.model, config_dirs=settings.config, snapshot=snapshot, on_event=on_event)
    skeleton = Skeleton(model, dtype=DTYPES[settings.dtype])
    last_layers = settings.last_block_layers(skeleton.layer_count)
    blocks = plan_blocks(skeleton.layer_count, settings.objectives(), last_layers)
    check_unquantised(model, blocks)
    if settings.tune == "lora" and not any(
        target_names(skeleton, index, settings) for index in range(skeleton.layer_count)
    ):
        raise SettingsError(
            f"{skeleton.architecture} has no linear layers that an adapter could go on",
            fix="train the weights themselves with --tune full",
        )
    facts = facts_of(skeleton, settings)  # tries out its layers
    tokenizer = load_tokenizer(model)
    check_vocabulary(tokenizer, skeleton.vocabulary_rows, on_event=on_event)
    return GivenModel(model, skeleton, facts, blocks, tokenizer)


def _snapshot_of_run(settings: TrainSettings) -> Path | None:
    """What the run that these settings may continue read its model of the hub from."""
    paths = RunPaths(run_directory(settings, settings.model.rpartition("/")[2]))
    if settings.fresh or not paths.settings.is_file():
        return None
    try:
        content = read_settings(paths)
    except RunDirectoryError:
        return None  # which is told where the run directory is looked at
    return kept_snapshot(content) if content["model"]["given"] == settings.model else None


def _read_data(settings: TrainSettings, model: GivenModel, stop: Stopper, on_event: OnEvent) -> GivenData:
    def load(path: str) -> TokenizedDataset:
        dataset, _ = load_dataset(
            path,
            model.tokenizer,
            max_length=settings.max_length,
            most_positions=model.skeleton.most_positions,
            embedding_rows=model.skeleton.vocabulary_rows,
            skip_bad_lines=settings.skip_bad_lines,
            check=stop.check,
            on_event=on_event,
        )
        return dataset

    training = load(settings.data)
    held_out = None
    fraction = settings.validation_fraction()
    if fraction is not None:
        training, held_out = training.split(fraction, settings.seed)
    elif settings.validation is not None:
        held_out = load(settings.validation)
    other = None if settings.retain_data is None else load(settings.retain_data).without_targets()
    if other is not None:
        other = _used(other, settings, len(training))
    answered = _answered(settings, training, model.skeleton)
    whole, views = TokenizedDataset.join([part for part in (training, held_out, other, answered) if part is not None])
    # Views of the whole stand for the parts, so that the data is in memory once.
    training, *rest = views
    held_out, other, answered = (None if part is None else rest.pop(0) for part in (held_out, other, answered))
    del views
    sample = _sample(settings, whole, len(training), other, answered)
    return GivenData(whole, training, held_out, other, answered, sample)


def _sample(
    settings: TrainSettings,
    whole: TokenizedDataset,
    train_count: int,
    other: TokenizedDataset | None,
    answered: TokenizedDataset | None,
) -> AnchorSample | None:
    """What the last block is held to; None where no anchor was asked for and there is nothing to hold it to."""
    if settings.retain == 0:
        return None
    count, own = len(whole), 0 if answered is None else len(answered)
    sample = AnchorSample(
        whole,
        train_count,
        range(count - own - (0 if other is None else len(other)), count),
        most=settings.retain_tokens,
        seed=derive_seed(settings.seed, "anchor"),
        answered=range(count - own, count),
        answer_tokens=settings.retain_answers,
    )
    if settings.retain is None and not settings.retain_answers and not sample.holds_anything:
        return None
    check_anchored(sample)
    return sample


def _answered(settings: TrainSettings, training: TokenizedDataset, skeleton: Skeleton) -> TokenizedDataset | None:
    """Prompts with places for the untouched model's answers, if it is to be held to those."""
    count = answered_count(settings, len(training))
    if not count:
        return None
    found = answered_prompts(
        training,
        most=count,
        tokens=settings.retain_answers,
        most_tokens=min(settings.max_length, skeleton.most_positions or settings.max_length),
        seed=derive_seed(settings.seed, "own answers"),
    )
    if not len(found):
        raise nothing_to_answer()
    return found


def _used(other: TokenizedDataset, settings: TrainSettings, train_count: int) -> TokenizedDataset:
    """Of the examples that are only there to anchor on, as many as the run has use for: a sample if there are more."""
    needed = settings.step_counts(train_count).train * other_rows(settings.batch_size, len(other))
    if len(other) <= needed:
        return other
    chosen = permutation(len(other), (settings.seed, "other text"))[:needed]
    return other.select(np.sort(chosen).tolist())
