"""A block's state in mid-training, as one safetensors file.

Adapter, reconstruction head and optimiser state are tensors; the data cursor (phase and step) is in its metadata.
The learning rate, the order of the data and every random state follow from the step and the run's seed, so there is
nothing else to keep. One file, so one rename makes a checkpoint stand; the one before it goes only after that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lopt_lite import files
from lopt_lite.checkpoints.header import read_header
from lopt_lite.checkpoints.integrity import DamagedFileError, check_file
from lopt_lite.checkpoints.shard_writer import TensorSpec, aligned_order, write_shard
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.errors import RunDirectoryError
from lopt_lite.training.trained import SavedTensor, TrainedParameters

_CURSOR = "cursor"


@dataclass(frozen=True)
class Cursor:
    """Where training is: ``step`` optimiser steps of ``phase`` are done."""

    phase: str
    step: int


def save_lazily(path: Path, tensors: dict[str, SavedTensor], metadata: dict[str, str] | None = None) -> str:
    """Write tensors durably to one safetensors file, each made when its turn comes; returns the file's sha256.

    The keys are their names in the file.
    """
    specs = aligned_order([TensorSpec(n, t.dtype, t.shape) for n, t in sorted(tensors.items())])
    content = ((spec.name, tensors[spec.name].read().cpu().contiguous()) for spec in specs)
    return write_shard(path, specs, content, metadata=metadata).sha256


def load_tensors(path: Path, *, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file whose names begin with ``prefix``, without it, on the CPU."""
    header = read_header(path)
    source = TensorFiles(dict.fromkeys(header.tensors, header))
    try:
        return {n.removeprefix(prefix): source.read(n) for n in header.tensors if n.startswith(prefix)}
    finally:
        source.close()


def save_checkpoint(path: Path, cursor: Cursor, trained: TrainedParameters) -> str:
    """Write a checkpoint: everything trainable of the block, and the state of its optimisers, one tensor at a time.

    Returns the file's sha256.
    """
    saved = {f"parameter.{tensor.name}": tensor for tensor in trained.parameters()}
    saved |= {f"optimizer.{tensor.name}": tensor for tensor in trained.state()}
    return save_lazily(path, saved, {_CURSOR: json.dumps({"phase": cursor.phase, "step": cursor.step})})


def read_cursor(path: Path) -> Cursor:
    """Where the checkpoint at ``path`` stands.

    Raises
    ------
    RunDirectoryError
        It is no checkpoint.
    """
    try:
        value = json.loads(read_header(path).metadata[_CURSOR])
        return Cursor(str(value["phase"]), int(value["step"]))
    except (KeyError, ValueError, TypeError) as error:
        raise RunDirectoryError(f"{path} is not a checkpoint of lopt-lite: {error}") from error


def restore_checkpoint(path: Path, trained: TrainedParameters) -> None:
    """Put a checkpoint's values back, one tensor at a time.

    Raises
    ------
    RunDirectoryError
        The checkpoint does not hold exactly these parameters.
    """
    header = read_header(path)
    saved = {n.removeprefix("parameter.") for n in header.tensors if n.startswith("parameter.")}
    if saved != {tensor.name for tensor in trained.parameters()}:
        raise RunDirectoryError(
            f"the checkpoint {path} holds other parameters than this run trains",
            fix="start anew with --fresh, or use the release of lopt-lite that wrote it",
        )
    keys: dict[str, list[str]] = {}
    for name in header.tensors:
        if name.startswith("optimizer."):
            _, key, parameter = name.split(".", 2)
            keys.setdefault(parameter, []).append(key)
    source = TensorFiles(dict.fromkeys(header.tensors, header))
    try:
        trained.restore(source.read, keys)
    finally:
        source.close()


class SavedCheckpoint(NamedTuple):
    """What the journal says of a checkpoint: the name and the sha256 of its file."""

    name: str
    sha256: str


class CheckpointDirectory:
    """The checkpoints of one block: at most one, and for a moment two while the newer is not yet journalled."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, name: str) -> Path:
        """Path of the checkpoint called ``name``."""
        return self._directory / name

    def save(self, cursor: Cursor, trained: TrainedParameters) -> SavedCheckpoint:
        """Write a checkpoint; returns what the journal is to say of it."""
        files.make_directory(self._directory)
        name = f"{cursor.phase}-{cursor.step:08d}.safetensors"
        return SavedCheckpoint(name, save_checkpoint(self.path(name), cursor, trained))

    def check(self, name: str, sha256: str | None) -> None:
        """Compare the checkpoint called ``name`` with what the journal says; earlier releases noted no sha256.

        Raises
        ------
        DamagedFileError
            It is missing or damaged.
        """
        path = self.path(name)
        if sha256 is not None:
            check_file(path, sha256, fix="start anew with --fresh")
        elif not path.is_file():
            raise DamagedFileError(f"{path} is missing")

    def keep_only(self, name: str | None) -> None:
        """Delete every checkpoint but ``name``."""
        if self._directory.is_dir():
            for path in self._directory.iterdir():
                if path.name != name:
                    files.remove_file(path)
