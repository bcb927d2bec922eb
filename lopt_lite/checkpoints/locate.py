"""From what a user writes as MODEL to everything that belongs to the model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_lite.checkpoints import hub
from lopt_lite.checkpoints.generation_config import GENERATION_CONFIG_NAME, end_tokens
from lopt_lite.checkpoints.model_config import check_layers_against_weights, read_config
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.checkpoints.weight_files import INDEX_SUFFIX, WEIGHTS_NAME, WEIGHTS_SUFFIX, find_weights, open_weights
from lopt_lite.errors import ModelError
from lopt_lite.events import OnEvent, ignore
from lopt_lite.files import unreadable

CONFIG_NAME = "config.json"

#: Files that hold a vocabulary; any one of them makes a directory the tokenizer's.
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)

#: Endings of files that hold weights, usable or not.
_WEIGHT_SUFFIXES = (WEIGHTS_SUFFIX, INDEX_SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What can be known of a model without its weights.

    ``name`` is short, for people and directory names. ``tokenizer_directory`` is None when no vocabulary was found.
    """

    name: str
    config_path: Path
    config: dict[str, Any]
    tokenizer_directory: Path | None


@dataclass(frozen=True, kw_only=True)
class ModelFiles(ModelDescription):
    """A model as it lies on disk, checked.

    ``origin`` is the hub id, or the absolute directory of the weights: what an adapter names as its base model.
    ``snapshot`` is the directory of the hub's cache that the files are in, for a model that was named by its hub id.
    """

    origin: str
    snapshot: Path | None = None
    weights: TensorFiles
    generation_config_path: Path | None

    def fingerprint(self) -> str:
        """A hash that changes with weights or configuration, not with where or how they are stored.

        Raises
        ------
        ModelError
            The weights cannot be read.
        """
        canonical = json.dumps(self.config, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{self.weights.fingerprint()} {canonical}".encode()).hexdigest()


def locate_model(
    model: str, *, config_dirs: Sequence[str] = (), snapshot: Path | None = None, on_event: OnEvent = ignore
) -> ModelFiles:
    """Find and check a model's weights, configuration and tokenizer directory.

    Parameters
    ----------
    model:
        A ``.safetensors`` file, an index, a directory, or a hub id when no such path exists.
    config_dirs:
        Directories looked through for config.json and tokenizer before the weights' own.
    snapshot:
        Where the files of a hub id are; None to ask the hub for its newest revision.

    Raises
    ------
    ModelError
        Something is missing, damaged, unsafe or of an unsupported kind; the message says which.
    """
    extra = [_config_directory(text) for text in config_dirs]
    path = _absolute(model) if model else None
    try:
        if path is not None and (path.exists() or path.is_symlink()):
            given, hub_id = path, None
        else:
            given, hub_id = snapshot or _fetch(model, on_event), model
        weights_path = find_weights(given)
        directories = [*extra, weights_path.parent]
        config_path = _first_with(directories, (CONFIG_NAME,))
        generation = _first_with(directories, (GENERATION_CONFIG_NAME,))
        vocabulary = _first_with(directories, TOKENIZER_NAMES)
    except OSError as error:
        raise unreadable(error, Path(error.filename or model), "the file", ModelError) from error
    if config_path is None:
        raise ModelError(
            f"there is no {CONFIG_NAME} beside {weights_path}",
            expected="the model's configuration, as Hugging Face models have it",
            fix="put it there, or name its directory with --config DIR",
        )
    config = read_config(config_path, on_event)
    if generation is not None:
        end_tokens(generation)
    weights = open_weights(weights_path, on_event)
    check_layers_against_weights(config_path, config, len(weights))
    return ModelFiles(
        origin=hub_id or str(weights_path.parent),
        snapshot=given if hub_id else None,
        name=hub_id.split("/")[-1] if hub_id else _short_name(given, weights_path),
        config=config,
        weights=weights,
        config_path=config_path,
        tokenizer_directory=None if vocabulary is None else vocabulary.parent,
        generation_config_path=generation,
    )


def describe_model(model: str, *, config_dirs: Sequence[str] = (), on_event: OnEvent = ignore) -> ModelDescription:
    """As :func:`locate_model`, for a model whose weights may be missing: a directory with a config.json will do.

    Of a hub id everything but the weights is fetched.

    Returns
    -------
    :class:`ModelFiles` where there are weights, else :class:`ModelDescription`.

    Raises
    ------
    ModelError
        There is no config.json, or what is there is damaged, unsafe or of an unsupported kind.
    """
    path = _absolute(model) if model else None
    name = None
    try:
        if path is None or not (path.exists() or path.is_symlink()):
            path, name = _fetch(model, on_event, weights=False), model.split("/")[-1]
        elif not path.is_dir() or _has_weights(path):
            return locate_model(model, config_dirs=config_dirs, on_event=on_event)
        directories = [*(_config_directory(text) for text in config_dirs), path]
        config_path = _first_with(directories, (CONFIG_NAME,))
        vocabulary = _first_with(directories, TOKENIZER_NAMES)
    except OSError as error:
        raise unreadable(error, Path(error.filename or model), "the file", ModelError) from error
    if config_path is None:
        raise ModelError(f"there is no {CONFIG_NAME} in {path}", fix="name the directory that has it with --config DIR")
    return ModelDescription(
        name=name or path.name or "model",
        config_path=config_path,
        config=read_config(config_path, on_event),
        tokenizer_directory=None if vocabulary is None else vocabulary.parent,
    )


def _has_weights(directory: Path) -> bool:
    """Whether there are files that are, or could be taken for, weights: then they are looked at."""
    return any(entry.name.endswith(_WEIGHT_SUFFIXES) for entry in directory.iterdir())


def _absolute(text: str) -> Path:
    """Absolute, without following symbolic links: what lies beside a link in the hub's cache belongs to it."""
    try:
        return Path(os.path.abspath(Path(text).expanduser()))  # noqa: PTH100
    except RuntimeError as error:
        raise ModelError(f"{text!r}: there is no such home directory") from error


def _config_directory(text: str) -> Path:
    path = _absolute(text)
    if not path.is_dir():
        raise ModelError(f"--config {text}: there is no such directory", expected="a directory with config.json")
    return path


def _fetch(model: str, on_event: OnEvent, *, weights: bool = True) -> Path:
    if model.endswith((WEIGHTS_SUFFIX, ".json")) or not hub.looks_like_hub_id(model):
        raise ModelError(
            f"there is no file or directory {model!r}",
            expected="a .safetensors file, an index, a directory, or a hub id such as organisation/name",
            fix="check the path",
        )
    return hub.fetch(model, on_event, weights=weights)


def _first_with(directories: list[Path], names: tuple[str, ...]) -> Path | None:
    for directory in directories:
        for name in names:
            if (directory / name).is_file():
                return directory / name
    return None


def _short_name(given: Path, weights_path: Path) -> str:
    """The file's own name if it says something, else its directory's, else (in the hub's cache) the repository's."""
    # They differ when a directory was given, or a shard that stands for the whole.
    if given == weights_path and given.name not in (WEIGHTS_NAME, WEIGHTS_NAME + ".index.json"):
        return given.name.removesuffix(INDEX_SUFFIX).removesuffix(WEIGHTS_SUFFIX)
    directory = weights_path.parent
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--")[-1]
    return directory.name or "model"
