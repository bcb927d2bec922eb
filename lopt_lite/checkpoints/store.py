"""The layer store: prepared weights, one shard per layer, readable piece by piece.

A store is an ordinary Hugging Face checkpoint directory: ``AutoModelForCausalLM.from_pretrained(store)`` loads it.
It is complete when its index file is there, which is written last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lopt_lite import files
from lopt_lite.checkpoints.header import Header, read_header
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.errors import ModelError, RunDirectoryError

if TYPE_CHECKING:
    from lopt_lite.checkpoints.skeleton import Skeleton

INDEX_NAME = "model.safetensors.index.json"
EMBEDDING_SHARD = "embedding.safetensors"
HEAD_SHARD = "head.safetensors"
STORE_VERSION = 1


def layer_shard(index: int) -> str:
    """File name of a layer's shard."""
    return f"layer-{index:05d}.safetensors"


@dataclass(frozen=True)
class StoreInfo:
    """What a store says of itself, in its index file's metadata."""

    version: int
    quantize: str
    dtype: str
    model_fingerprint: str
    source: str
    layers: int
    unquantized: tuple[str, ...]
    shards: dict[str, dict[str, Any]]  # file name -> {"bytes": int, "sha256": hex}


def store_info(directory: Path) -> StoreInfo | None:
    """What the store in ``directory`` says of itself, or None when there is no complete store.

    Raises
    ------
    RunDirectoryError
        The index is damaged, or of a later version of lopt-lite.
    """
    path = directory / INDEX_NAME
    if not path.is_file():
        return None
    index = files.read_json(path, what="the index", error=ModelError, fix="get the file again, or make the store again")
    metadata = index.get("metadata") if isinstance(index, dict) else None
    own = metadata.get("lopt_lite") if isinstance(metadata, dict) else None
    if own is None:
        return None
    if not isinstance(own, dict) or own.get("version") != STORE_VERSION:
        raise RunDirectoryError(
            f"the store {directory} has an unknown format",
            expected=f"version {STORE_VERSION}",
            fix="make it again with this release of lopt-lite, in an empty directory",
        )
    try:
        return StoreInfo(**{**own, "unquantized": tuple(own["unquantized"])})
    except (TypeError, KeyError) as error:
        raise RunDirectoryError(f"the index {path} is damaged: {error}", fix="make the store again") from error


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
    """An open, complete store.

    Parameters
    ----------
    directory:
        Where it lies.

    Raises
    ------
    RunDirectoryError
        There is no complete store, or a shard is missing or has changed its size.
    """

    def __init__(self, directory: Path) -> None:
        info = store_info(directory)
        if info is None:
            raise RunDirectoryError(f"{directory} holds no complete store", fix="run the same command again")
        self.directory = directory
        self.info = info
        located: dict[str, Header] = {}
        for name, record in info.shards.items():
            path = directory / name
            if Path(name).name != name or not path.is_file() or path.stat().st_size != record["bytes"]:
                raise RunDirectoryError(
                    f"the store's shard {path} is missing or has changed",
                    fix=f"delete {directory} and run the same command again, which rebuilds it from the model",
                )
            header = read_header(path)
            located.update(dict.fromkeys(header.tensors, header))
        self._located = located
        self._tensors = TensorFiles(located)

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
        overlay._tensors = TensorFiles(overlay._located)
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
