"""Opening a finished run for reading: its store, skeleton, tokenizer, and adapter or tuned model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lopt_lite.checkpoints.build_store import DTYPES
from lopt_lite.checkpoints.integrity import DamagedFileError
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.checkpoints.store_index import standing_store
from lopt_lite.checkpoints.tokenizer import holds_tokenizer, load_tokenizer, load_tokenizer_from
from lopt_lite.errors import ModelError, RunDirectoryError, SettingsError
from lopt_lite.journal import last_fact, read_facts
from lopt_lite.residency.choices import Residence
from lopt_lite.residency.shapes import ModelShapes, model_shapes
from lopt_lite.residency.spill import Spill
from lopt_lite.settings import TrainSettings
from lopt_lite.training.adapter_result import StoredAdapter, check_adapter
from lopt_lite.training.adapters import adapter_parameters, attach_adapter, enable_adapter, load_adapter, set_training
from lopt_lite.training.block_plan import Block, plan_blocks
from lopt_lite.training.run_directory import RESULT_FACTS, RunPaths, current_store, read_settings
from lopt_lite.training.targets import tuning
from lopt_lite.training.trained import TrainedParameters

_WRITE_AGAIN = "give the command of the training again: it writes anew what is missing or damaged"


def stored_settings(content: dict[str, Any]) -> TrainSettings:
    """The settings a run was started with, from the content of its settings.json."""
    values = dict(content["settings"])
    try:
        return TrainSettings(
            model=content["model"]["given"],
            data=content["data"]["given"],
            config=tuple(content.get("config", ())),
            **values,
        )
    except (TypeError, KeyError, SettingsError) as error:
        raise RunDirectoryError(
            f"the run's settings.json cannot be used: {error}", fix="use the release of lopt-lite that made the run"
        ) from error


@dataclass(frozen=True)
class OpenRun:
    """A run's parts, ready to compute with.

    Attributes
    ----------
    store, tuned_store:
        The weights of the base model, and those below the adapter: the same, unless the model was tuned in full. Then
        the latter are the result, and ``adapters`` is empty.
    skeleton, tuned_skeleton:
        Each with the tensors outside the layers of its store.
    """

    paths: RunPaths
    settings: TrainSettings
    store: Store
    tuned_store: Store
    skeleton: Skeleton
    tuned_skeleton: Skeleton
    tokenizer: Any
    blocks: list[Block]
    adapters: Mapping[int, dict[str, torch.Tensor]]
    device: torch.device

    def shapes(self) -> ModelShapes:
        """The model's shapes with the adapter on it, if it has one; nothing is trained any more."""
        return model_shapes(
            self.skeleton,
            quantize=self.store.info.quantize,
            stored_dtype=DTYPES[self.store.info.dtype],
            tuning=tuning(self.skeleton, self.settings) if self.settings.tune == "lora" else None,
        )

    def on_layer(self, index: int, layer: nn.Module, state: TrainedParameters | None = None) -> None:
        """Put the trained adapter on a layer that was just loaded, ready to evaluate.

        Parameters
        ----------
        state:
            Looks after the adapter's parameters (see :meth:`put_aside`); None leaves them on the device.
        """
        if index in self.adapters:
            attach_adapter(layer, index, skeleton=self.skeleton, settings=self.settings)
            load_adapter(layer, self.adapters[index])
            set_training(layer, False)
            if state is not None:
                state.add(index, {f"{index}.{name}": p for name, p in adapter_parameters(layer).items()})

    @contextlib.contextmanager
    def put_aside(self, residence: Residence) -> Iterator[TrainedParameters | None]:
        """What keeps adapters away while their layer is, within the context; None where they may stay."""
        if not residence.offload_state:
            yield None
            return
        with Spill(residence.state_limits, self.paths.root, self.device) as storage:
            yield TrainedParameters(storage=storage, per_layer=False)

    def select(self, layers: list[nn.Module], tuned: bool) -> None:
        """Let the layers compute with their adapters, or as the untouched base model."""
        for layer in layers:
            enable_adapter(layer, tuned)

    def close(self) -> None:
        """Close the stores' files."""
        self.store.close()
        self.tuned_store.close()


@dataclass(frozen=True)
class FinishedRun:
    """A run that is done and whose result is there.

    Attributes
    ----------
    content:
        What its settings.json says.
    """

    paths: RunPaths
    content: dict[str, Any]
    settings: TrainSettings


def finished_run(run: str) -> FinishedRun:
    """Look at a run's directory, and at nothing outside it.

    Raises
    ------
    RunDirectoryError
        It is no run, is not finished, or its result is gone.
    DamagedFileError
        The adapter is not what the run wrote.
    """
    paths = RunPaths(Path(run))
    content = read_settings(paths)
    facts, _ = read_facts(paths.journal)
    if not any(fact["fact"] in RESULT_FACTS for fact in facts):
        raise RunDirectoryError(
            f"the run in {run} is not finished",
            fix=f"see 'lopt-lite status {run}', and continue it with lopt-lite train",
        )
    settings = stored_settings(content)
    if settings.tune == "full" and standing_store(paths.model) is None:
        raise RunDirectoryError(f"the model of the run in {run} is gone or damaged", fix=_WRITE_AGAIN)
    if settings.tune == "lora":
        check_adapter(paths.adapter, last_fact(facts, "adapter") or {})
    return FinishedRun(paths, content, settings)


def open_run(run: str, device: torch.device) -> OpenRun:
    """Open a finished run.

    Raises
    ------
    RunDirectoryError
        As :func:`finished_run`, or its store is gone.
    ModelError
        Something in it is damaged.
    """
    found = finished_run(run)
    paths, settings = found.paths, found.settings
    full = settings.tune == "full"
    store = Store(current_store(paths, found.content))
    skeleton = _skeleton_of(store, settings, device)
    tuned_store = Store(paths.model) if full else store
    return OpenRun(
        paths=paths,
        settings=settings,
        store=store,
        tuned_store=tuned_store,
        skeleton=skeleton,
        tuned_skeleton=_skeleton_of(tuned_store, settings, device) if full else skeleton,
        tokenizer=_tokenizer(paths, store, settings),
        blocks=plan_blocks(skeleton.layer_count, settings.objectives(), settings.last_layers),
        adapters={} if full else StoredAdapter(paths.adapter, skeleton),
        device=device,
    )


def _tokenizer(paths: RunPaths, store: Store, settings: TrainSettings) -> Any:
    """The tokenizer that the run trained with, which lies beside its result; a shared store may have another one."""
    beside = paths.model if settings.tune == "full" else paths.adapter
    with _of_the_run():
        if holds_tokenizer(beside):
            return load_tokenizer_from(beside)
        return load_tokenizer(locate_model(str(store.directory)))


@contextlib.contextmanager
def _of_the_run() -> Iterator[None]:
    """What a broken file of the user's model would need is not what one of a run needs."""
    try:
        yield
    except DamagedFileError:
        raise
    except ModelError as error:
        raise ModelError(error.found, expected=error.expected, fix=_WRITE_AGAIN) from error


def _skeleton_of(store: Store, settings: TrainSettings, device: torch.device) -> Skeleton:
    """The skeleton of a store, reading its embeddings from it."""
    with _of_the_run():
        skeleton = Skeleton(locate_model(str(store.directory)), dtype=DTYPES[settings.dtype])
    skeleton.set_embedding_reader(lambda ids: store.embedding_rows(skeleton, ids))
    skeleton.place_root_tensors(store.root(skeleton), device)
    return skeleton
