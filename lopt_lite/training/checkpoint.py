"""A block's state in mid-training, as one safetensors file.

Adapter, reconstruction head and optimiser state are tensors; the data cursor (phase and step) is in its metadata.
The learning rate, the order of the data and every random state follow from the step and the run's seed, so there is
nothing else to keep. One file, so one rename makes a checkpoint stand; the one before it goes only after that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lopt_lite import files
from lopt_lite.checkpoints.header import read_header
from lopt_lite.checkpoints.shard_writer import TensorSpec, aligned_order, write_shard
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.errors import RunDirectoryError

_CURSOR = "cursor"


@dataclass(frozen=True)
class Cursor:
    """Where training is: ``step`` optimiser steps of ``phase`` are done."""

    phase: str
    step: int


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write tensors durably to one safetensors file; returns the file's sha256."""
    specs = aligned_order([TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in sorted(tensors.items())])
    content = ((spec.name, tensors[spec.name].detach().cpu().contiguous()) for spec in specs)
    return write_shard(path, specs, content, metadata=metadata).sha256


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file, on the CPU."""
    header = read_header(path)
    source = TensorFiles(dict.fromkeys(header.tensors, header))
    try:
        return {name: source.read(name) for name in header.tensors}
    finally:
        source.close()


def save_checkpoint(
    path: Path, cursor: Cursor, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write a checkpoint.

    Parameters
    ----------
    parameters:
        Everything trainable of the block, by name. Those that ``optimizer`` has stepped are saved with its state.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    save_tensors(path, tensors, {_CURSOR: json.dumps({"phase": cursor.phase, "step": cursor.step})})


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


def restore_checkpoint(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's values back into ``parameters`` and ``optimizer``.

    Raises
    ------
    RunDirectoryError
        The checkpoint does not hold exactly these parameters.
    """
    tensors = load_tensors(path)
    saved = {n.removeprefix("parameter.") for n in tensors if n.startswith("parameter.")}
    if saved != set(parameters):
        raise RunDirectoryError(
            f"the checkpoint {path} holds other parameters than this run trains",
            fix="start anew with --fresh, or use the release of lopt-lite that wrote it",
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"parameter.{name}"])
        state = {
            key.split(".")[1]: value
            for key, value in tensors.items()
            if key.startswith("optimizer.") and key.split(".", 2)[2] == name
        }
        if state and id(parameter) in trained:
            # AdamW keeps its step count on the CPU and its moments beside the parameter.
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }


class CheckpointDirectory:
    """The checkpoints of one block: at most one, and for a moment two while the newer is not yet journalled."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, name: str) -> Path:
        """Path of the checkpoint called ``name``."""
        return self._directory / name

    def save(self, cursor: Cursor, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> str:
        """Write a checkpoint; returns its name, for the journal."""
        files.make_directory(self._directory)
        name = f"{cursor.phase}-{cursor.step:08d}.safetensors"
        save_checkpoint(self.path(name), cursor, parameters, optimizer)
        return name

    def keep_only(self, name: str | None) -> None:
        """Delete every checkpoint but ``name``."""
        if self._directory.is_dir():
            for path in self._directory.iterdir():
                if path.name != name:
                    files.remove_file(path)
