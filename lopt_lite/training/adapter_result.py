"""The result: one PEFT adapter directory, put together from the blocks' adapters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lopt_lite import files
from lopt_lite.checkpoints.header import read_header
from lopt_lite.checkpoints.integrity import DamagedFileError, check_file
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.checkpoints.tokenizer import save_tokenizer
from lopt_lite.errors import RunDirectoryError
from lopt_lite.settings import TrainSettings
from lopt_lite.training.adapters import lora_config
from lopt_lite.training.block_plan import Block
from lopt_lite.training.checkpoint import load_tensors, save_lazily
from lopt_lite.training.run_directory import RunPaths
from lopt_lite.training.targets import target_names
from lopt_lite.training.trained import SavedTensor

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_WRITE_AGAIN = "give the command of the training again: it writes the adapter anew from its blocks"


def write_adapter(
    paths: RunPaths, skeleton: Skeleton, blocks: list[Block], settings: TrainSettings, *, origin: str, tokenizer: object
) -> dict[str, str]:
    """Write ``RUN/adapter`` for ``PeftModel.from_pretrained``; returns what :func:`check_adapter` wants to know.

    Parameters
    ----------
    origin:
        Directory or hub id of the base model, for ``base_model_name_or_path``.
    """
    files.make_directory(paths.adapter)
    done = [block for block in blocks if block.objective != "none"]
    headers = [read_header(paths.block_adapter(block.index)) for block in done]
    layers = (index for block in done for index in range(block.first, block.end))
    trained = [skeleton.layer_prefix(i) + n for i in layers for n in target_names(skeleton, i, settings)]
    # One tensor at a time: a budget that holds one layer's adapter need not hold them all.
    blocks_files = TensorFiles({name: header for header in headers for name in header.tensors})
    try:
        tensors = {}
        for name in blocks_files.names():
            layer, _, rest = name.partition(".")
            info, read = blocks_files.info(name), partial(blocks_files.read, name)
            target = _PEFT_PREFIX + skeleton.layer_prefix(int(layer)) + rest
            tensors[target] = SavedTensor(target, info.dtype, info.shape, read)
        _check_names(tensors, trained)
        _write_config(paths.adapter / CONFIG_NAME, skeleton, settings, trained, origin)
        save_tokenizer(tokenizer, paths.adapter)
        weights = save_lazily(paths.adapter / WEIGHTS_NAME, tensors, {"format": "pt"})
    finally:
        blocks_files.close()
    return {"sha256": weights, "config_sha256": _config_digest(paths.adapter / CONFIG_NAME)}


def _check_names(tensors: Mapping[str, object], trained: list[str]) -> None:
    """See that blocks, which an earlier version may have trained, are of the modules that get an adapter."""
    expected = {f"{_PEFT_PREFIX}{name}.lora_{half}.weight" for name in trained for half in "AB"}
    others = sorted(expected ^ set(tensors))
    if others:
        raise RunDirectoryError(
            f"the run's blocks, which an earlier version trained, are of other modules than get an adapter now "
            f"({others[0]})",
            fix="start anew with --fresh",
        )


def check_adapter(directory: Path, fact: Mapping[str, Any]) -> None:
    """See that an adapter is what the run wrote.

    Parameters
    ----------
    fact:
        The journal's fact ``adapter``. Earlier versions noted less.

    Raises
    ------
    DamagedFileError
        It is not, or something is missing.
    """
    weights = directory / WEIGHTS_NAME
    for path in (weights, directory / CONFIG_NAME):
        if not path.is_file():
            raise DamagedFileError(f"{path} is missing", fix=_WRITE_AGAIN)
    if fact.get("sha256") is not None:
        check_file(weights, str(fact["sha256"]), fix=_WRITE_AGAIN)
    config = directory / CONFIG_NAME
    if fact.get("config_sha256") is not None and _config_digest(config) != fact["config_sha256"]:
        raise DamagedFileError(f"{config} is not as it was written", fix=_WRITE_AGAIN)


def _config_digest(path: Path) -> str:
    """Of what the file says, but for where the base model is: that may move, and be put right by hand."""
    content = files.read_json(path, what="the adapter's config", error=DamagedFileError, fix=_WRITE_AGAIN)
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is not a JSON object", fix=_WRITE_AGAIN)
    said = {name: value for name, value in content.items() if name != "base_model_name_or_path"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _write_config(path: Path, skeleton: Skeleton, settings: TrainSettings, trained: list[str], origin: str) -> None:
    config = lora_config(settings, _shortest_names(skeleton, trained))
    config.base_model_name_or_path = origin
    config.inference_mode = True
    template = skeleton.layer_template(0)
    config.fan_in_fan_out = any(
        not isinstance(template.get_submodule(n), nn.Linear) for n in target_names(skeleton, 0, settings)
    )
    with files.temporary_directory(path.parent) as scratch:
        config.save_pretrained(scratch)
        content = files.read_json(scratch / CONFIG_NAME, what="PEFT's config", error=RunDirectoryError)
    content["target_modules"] = sorted(content["target_modules"])
    files.write_json(path, content)


def _shortest_names(skeleton: Skeleton, trained: list[str]) -> list[str]:
    """Module names for PEFT: last parts (``q_proj``) when they name exactly the trained modules, else full names.

    PEFT adapts every module whose name ends in a listed one, anywhere in the model.
    """
    endings = sorted({name.rpartition(".")[2] for name in trained})
    everywhere = [
        skeleton.layer_prefix(i) + name for i in range(skeleton.layer_count) for name in skeleton.adaptable_names(i)
    ] + [name for name in skeleton.root_linear_names() if name + ".weight" != skeleton.head_name]
    matched = {name for name in everywhere if name.rpartition(".")[2] in endings}
    return endings if matched == set(trained) else sorted(trained)


class StoredAdapter(Mapping[int, dict[str, torch.Tensor]]):
    """An adapter directory's weights by layer, {name within the layer: tensor}; a layer's are read when asked for.

    Parameters
    ----------
    path:
        The adapter directory.
    """

    def __init__(self, path: Path, skeleton: Skeleton) -> None:
        self._weights = path / WEIGHTS_NAME
        names = read_header(self._weights).tensors
        prefixes = {index: _PEFT_PREFIX + skeleton.layer_prefix(index) for index in range(skeleton.layer_count)}
        self._prefixes = {i: prefix for i, prefix in prefixes.items() if any(n.startswith(prefix) for n in names)}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return load_tensors(self._weights, prefix=self._prefixes[index])

    def __contains__(self, index: object) -> bool:
        return index in self._prefixes

    def __iter__(self) -> Iterator[int]:
        return iter(self._prefixes)

    def __len__(self) -> int:
        return len(self._prefixes)
