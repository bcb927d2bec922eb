"""The layer store: prepared weights, one shard per layer, readable piece by piece.

A store is an ordinary Hugging Face checkpoint directory: ``AutoModelForCausalLM.from_pretrained(store)`` loads it.
It is complete when its index file is there, which is written last.
"""

from __future__ import annotations

import contextlib
import copy
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lopt_lite.checkpoints.header import Header, read_header
from lopt_lite.checkpoints.integrity import SILENT_S, CheckedFiles, DamagedFileError
from lopt_lite.checkpoints.store_index import StoreInfo, read_index
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.errors import ModelError, RunDirectoryError
from lopt_lite.events import OnEvent, Progress, ignore

if TYPE_CHECKING:
    from lopt_lite.checkpoints.skeleton import Skeleton


def _remedy(info: StoreInfo, directory: Path) -> str:
    """What can be done about a damaged shard that nothing in the process can make again."""
    # Weights that were transformed, as by training, are in no other place.
    if "+" in info.model_fingerprint:
        return (
            "give the command that made these weights again ('lopt-lite train' mends the model in its run directory, "
            "an export needs a new one), or restore the file from a backup"
        )
    command = ["lopt-lite", "quantize", info.source, str(directory), "--quantize", info.quantize]
    command += ["--dtype", info.dtype] if info.quantize == "none" else []
    return f"get the file again, or give the command '{shlex.join(command)}', which rebuilds it from the model"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies within a shard's data: bytes ``start`` to ``end``."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardView:
    """A layer's shard as one stretch of bytes, and where its tensors (by name within the layer) lie in it."""

    nbytes: int
    tensors: dict[str, Place]
    read_into: Callable[[torch.Tensor], None]


class Store:
    """An open, complete store. A shard is checked by its sha256 when the first of its tensors is read.

    Parameters
    ----------
    directory:
        Where it lies.
    repair:
        Given the name of a damaged or missing shard, makes it anew; may be called from the thread that reads.
    on_event:
        Told how far a check is that takes long.

    Raises
    ------
    RunDirectoryError
        There is no complete store.
    ModelError
        Its index is damaged.
    DamagedFileError
        A shard is missing, has changed its size, or has another header than it was written with, and ``repair`` is
        None. From then on, reading raises it of a shard that holds something else than was written.
    """

    def __init__(
        self, directory: Path, *, repair: Callable[[str], None] | None = None, on_event: OnEvent = ignore
    ) -> None:
        read = read_index(directory)
        if read is None:
            raise RunDirectoryError(
                f"{directory} holds no complete store",
                fix="if it has moved, give the run's 'lopt-lite train' command again with where it is now (--store, or "
                "MODEL where the store was that); else make it again with 'lopt-lite quantize'",
            )
        info, weight_map = read
        self.directory = directory
        self.info = info
        self._headers: dict[Path, Header] = {}
        self._repair, self._on_event = repair, on_event
        self._checked = CheckedFiles(
            {directory / name: record["sha256"] for name, record in info.shards.items()},
            fix=_remedy(info, directory),
            repair=None if repair is None else self._repair_shard,
            on_event=on_event,
        )
        held: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            held.setdefault(name, set()).add(tensor)
        for name in info.shards:
            path = directory / name
            self._headers[path] = self._header(path, info.shards[name]["bytes"], held.get(name, set()))
        self._located = {name: header for header in self._headers.values() for name in header.tensors}
        self._tensors = TensorFiles(self._located, before_opening=self._checked.check)

    def _header(self, path: Path, nbytes: int, names: set[str]) -> Header:
        """The header of a shard; the whole shard is checked if it cannot be the one that was written."""
        header = None
        if path.is_file() and path.stat().st_size == nbytes:
            with contextlib.suppress(ModelError):
                header = read_header(path)
        if header is None or set(header.tensors) != names:
            self._checked.check(path)
            header = read_header(path)
        return header

    def _repair_shard(self, path: Path) -> None:
        assert self._repair is not None
        self._repair(path.name)
        read_before = self._headers.get(path)
        if read_before is not None and read_header(path) != read_before:
            raise DamagedFileError(
                f"the header of {path} was damaged when the store was opened, and has been made again",
                fix="give the same command again",
            )

    def check(self) -> None:
        """Check every shard that was not read yet.

        Raises
        ------
        DamagedFileError
            A shard is damaged and cannot be repaired.
        """
        told_s = time.monotonic()
        for number, path in enumerate(self._headers, start=1):
            self._checked.check(path)
            if time.monotonic() - told_s >= SILENT_S:
                told_s = time.monotonic()
                total = len(self._headers)
                self._on_event(Progress(task="checking the store", done=number, total=total, unit="shards"))

    def overlaid(self, shards: Iterable[Path]) -> Store:
        """This store as if ``shards`` replaced those of the same layers; it has to be closed by itself.

        Each shard holds all tensors of a layer (or of several), by their full names.

        Raises
        ------
        ModelError
            A shard is missing or damaged.
        RunDirectoryError
            A shard holds something that the store does not have, or only part of a layer.
        """
        overlay = copy.copy(self)
        overlay._located = dict(self._located)
        for path in shards:
            header = read_header(path)
            replaced = {self._located[name].path for name in header.tensors if name in self._located}
            whole = {name for name, other in self._located.items() if other.path in replaced}
            if set(header.tensors) != whole:
                raise RunDirectoryError(
                    f"{path} does not hold the same tensors as the shards it stands for",
                    fix="start anew with --fresh",
                )
            overlay._located.update(dict.fromkeys(header.tensors, header))
        overlay._tensors = TensorFiles(overlay._located, before_opening=self._checked.check)
        return overlay

    def layer(self, skeleton: Skeleton, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one layer by name within the layer, on the CPU as stored."""
        prefix = skeleton.layer_prefix(index)
        return {n[len(prefix) :]: self._tensors.read(n) for n in self._tensors.names() if n.startswith(prefix)}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its full name, on the CPU as stored."""
        return self._tensors.read(name)

    def layer_names(self, skeleton: Skeleton, index: int) -> set[str]:
        """Names (within the layer) of the tensors of one layer."""
        prefix = skeleton.layer_prefix(index)
        return {n[len(prefix) :] for n in self._tensors.names() if n.startswith(prefix)}

    def layer_view(self, skeleton: Skeleton, index: int) -> ShardView:
        """One layer's shard, to be read in one piece: ``read_into`` fills a uint8 buffer of ``nbytes``.

        Tensors of 16 bytes and more start at multiples of 16 (see :func:`aligned_order`).
        """
        infos = {n: self._tensors.info(skeleton.layer_prefix(index) + n) for n in self.layer_names(skeleton, index)}
        begin, end = min(i.start for i in infos.values()), max(i.end for i in infos.values())
        anchor = skeleton.layer_prefix(index) + next(iter(infos))
        return ShardView(
            nbytes=end - begin,
            tensors={n: Place(i.start - begin, i.end - begin, i.dtype, i.shape) for n, i in infos.items()},
            read_into=lambda buffer: self._tensors.read_stretch(anchor, begin, buffer),
        )

    def embedding_rows(self, skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the input embedding: ids int64 [n] -> [n, hidden] as stored, on the CPU."""
        return self._tensors.read_rows(skeleton.embedding_name, ids)

    def head(self, skeleton: Skeleton) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The LM head's weight [vocabulary, hidden] and bias [vocabulary], as stored, on the CPU."""
        return self._tensors.read(self._head_name(skeleton)), self.head_bias(skeleton)

    def head_rows(self, skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the LM head's weight: ids int64 [n] -> [n, hidden] as stored, on the CPU."""
        return self._tensors.read_rows(self._head_name(skeleton), ids)

    def head_bias(self, skeleton: Skeleton) -> torch.Tensor | None:
        """The LM head's bias [vocabulary] as stored, on the CPU, where there is one."""
        name = skeleton.head_name.removesuffix("weight") + "bias"
        return self._tensors.read(name) if name in self._tensors else None

    def head_view(self, skeleton: Skeleton, start: int, end: int) -> ShardView:
        """Rows ``start`` to ``end`` (exclusive) of the LM head as one stretch, its tensor called ``"weight"``."""
        name = self._head_name(skeleton)
        info = self._tensors.info(name)
        if not 0 <= start < end <= info.shape[0]:
            raise ValueError(f"rows {start} to {end} of an LM head of {info.shape[0]} rows")
        row_bytes = info.nbytes // info.shape[0]
        nbytes = (end - start) * row_bytes
        return ShardView(
            nbytes=nbytes,
            tensors={"weight": Place(0, nbytes, info.dtype, (end - start, *info.shape[1:]))},
            read_into=lambda buffer: self._tensors.read_stretch(name, info.start + start * row_bytes, buffer),
        )

    @staticmethod
    def _head_name(skeleton: Skeleton) -> str:
        return skeleton.embedding_name if skeleton.tied else skeleton.head_name

    def root(self, skeleton: Skeleton) -> dict[str, torch.Tensor]:
        """Every stored tensor outside the layers except embedding and LM head (norms, position embeddings)."""
        special = {skeleton.embedding_name, skeleton.head_name, skeleton.head_name.removesuffix("weight") + "bias"}
        return {n: self._tensors.read(n) for n in skeleton.root_names if n in self._tensors and n not in special}

    def close(self) -> None:
        """Close the shard files."""
        self._tensors.close()
