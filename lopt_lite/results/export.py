"""Taking the result elsewhere: the PEFT adapter, or a Hugging Face checkpoint (merged layer by layer, if need be)."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch
from torch import nn

from lopt_lite import devices, files
from lopt_lite.checkpoints.build_store import BUILD_FILES, JOURNAL_NAME, StoreBuilder
from lopt_lite.checkpoints.locate import ModelFiles, locate_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.checkpoints.store_index import store_info
from lopt_lite.errors import ModelError, RunDirectoryError, SettingsError
from lopt_lite.events import OnEvent, ignore
from lopt_lite.outcomes import ExportOutcome
from lopt_lite.results.given_paths import GivenPaths
from lopt_lite.results.open_run import OpenRun, finished_run, open_run
from lopt_lite.settings import ExportSettings
from lopt_lite.training.run_directory import kept_snapshot, read_settings

_NAME_ORIGINAL = "name the original with --model, or merge with --onto quantized"


def export(settings: ExportSettings, on_event: OnEvent = ignore) -> ExportOutcome:
    """Write the adapter or a merged checkpoint (``lopt-lite export``).

    Raises
    ------
    RunDirectoryError
        The run is not finished, or OUT is not empty. What an export that was cut off has left in it does not count.
    SettingsError
        Asks for an adapter, or for merging, of a run that tuned the whole model.
    ModelError
        The original model is gone or has changed, or a file to be copied or merged is damaged.
    """
    device = devices.choose_device(settings.device)
    out, onto = Path(settings.out), None
    run = finished_run(settings.run)
    if run.settings.tune == "full":
        _check_nothing_to_merge(settings)
        with contextlib.closing(Store(run.paths.model)) as model:
            model.check()
        files.copy_tree(run.paths.model, out, what="the copy of the model")
    elif settings.format == "adapter":
        files.copy_tree(run.paths.adapter, out, what="the copy of the adapter")
    else:
        with contextlib.closing(open_run(settings.run, device)) as opened:
            onto = _write_merged(opened, out, settings, on_event)
    return ExportOutcome(out=str(out), format=settings.format, onto=onto, bytes=files.directory_bytes(out))


def _check_nothing_to_merge(settings: ExportSettings) -> None:
    if settings.format == "adapter":
        raise SettingsError(
            f"the run in {settings.run} tuned the model in full and has no adapter",
            fix="take the whole model with --format merged",
        )
    if settings.onto != "original" or settings.model is not None:
        raise SettingsError(
            f"the run in {settings.run} tuned the model in full, so there is nothing to merge",
            fix="leave --onto and --model out",
        )


def _adapter_fingerprint(run: OpenRun) -> str:
    return hashlib.sha256((run.paths.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def _write_merged(run: OpenRun, out: Path, settings: ExportSettings, on_event: OnEvent) -> str:
    """Stream the base weights through ``base + adapter`` into a new checkpoint, or go on with one that was begun.

    Returns
    -------
    str
        Onto which weights: a run whose MODEL was in 4 bits has no others, unless they are named.
    """
    _check_adapter(run)
    finished = store_info(out) if out.is_dir() else None
    if finished is not None and not (out / JOURNAL_NAME).exists():
        raise _holds_another(out)
    source = _source(run, settings, on_event)
    fingerprint = _adapter_fingerprint(run)
    if finished is None:
        StoreBuilder(
            source,
            out,
            quantize="none",
            dtype="bfloat16",
            device=run.device,
            transform=lambda name, tensor: _merge(run, name, tensor),
            transform_fingerprint=fingerprint,
            on_event=on_event,
        ).build()
    elif finished.model_fingerprint != f"{source.fingerprint()}+{fingerprint}":
        raise _holds_another(out)
    # The journal goes last: with it, a checkpoint is known as one that this export was cut off at the end of.
    for name in reversed(BUILD_FILES):
        files.remove_file(out / name)
    return "quantized" if "quantization_config" in source.config else settings.onto


def _holds_another(out: Path) -> RunDirectoryError:
    return RunDirectoryError(f"{out} holds a finished checkpoint already", fix="name a new or empty directory")


def _source(run: OpenRun, settings: ExportSettings, on_event: OnEvent) -> ModelFiles:
    """The weights to merge into."""
    if settings.onto == "quantized":
        run.store.check()
        return locate_model(str(run.store.directory), on_event=on_event)
    content = read_settings(run.paths)
    given = GivenPaths(content)
    where = settings.model or given.model()
    snapshot = None if settings.model else kept_snapshot(content)
    try:
        directories = [given.directory(directory) for directory in run.settings.config]
        source = locate_model(where, config_dirs=directories, snapshot=snapshot, on_event=on_event)
    except ModelError as error:
        raise ModelError(
            f"the model this run was trained from cannot be used: {error.found}", fix=_NAME_ORIGINAL
        ) from error
    # A run from a store may have that which the store was made from.
    if source.fingerprint() not in (content["model"]["fingerprint"], run.store.info.model_fingerprint):
        raise ModelError(f"the model at {where} is not the one this run was trained from", fix=_NAME_ORIGINAL)
    return source


def _check_adapter(run: OpenRun) -> None:
    """Every adapter tensor must belong to a module of the model, or it would be left out of the merge in silence."""
    for layer, tensors in run.adapters.items():
        known = {f"{n}.lora_{half}.weight" for n in run.skeleton.adaptable_names(layer) for half in "AB"}
        strangers = sorted(set(tensors) - known)
        if strangers:
            raise RunDirectoryError(
                f"the adapter holds {strangers[0]} for layer {layer}, which {run.skeleton.architecture} does not have",
                fix="restore RUN/adapter from a backup, or train again with --fresh",
            )


def _merge(run: OpenRun, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Add the adapter's product to a weight, in float32: W + (alpha / r) B A (LoRA, arXiv:2106.09685)."""
    layer, local = _layer_of(run.skeleton, name)
    adapter = run.adapters.get(layer, {})
    module = local.removesuffix(".weight")
    a, b = adapter.get(f"{module}.lora_A.weight"), adapter.get(f"{module}.lora_B.weight")
    if a is None or b is None or not local.endswith(".weight"):
        return tensor
    delta = (b.float() @ a.float()) * (run.settings.lora_alpha / run.settings.lora_r)
    is_linear = isinstance(run.skeleton.layer_template(layer).get_submodule(module), nn.Linear)
    return tensor.float() + (delta if is_linear else delta.T)


def _layer_of(skeleton: Skeleton, name: str) -> tuple[int, str]:
    """(layer, name within it) of a full tensor name; (-1, name) outside the layers."""
    prefix = skeleton.layers_path + "."
    if not name.startswith(prefix):
        return -1, name
    index, _, local = name.removeprefix(prefix).partition(".")
    return int(index), local
