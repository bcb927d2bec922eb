"""The layer store: prepared weights, one shard per layer, readable piece by piece.

A store is an ordinary Hugging Face checkpoint directory: ``AutoModelForCausalLM.from_pretrained(store)`` loads it.
It is complete when its index file is there, which is written last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lopt_lite import files
from lopt_lite.checkpoints.header import read_header
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.errors import ModelError, RunDirectoryError

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
        located = {}
        for name, record in info.shards.items():
            path = directory / name
            if Path(name).name != name or not path.is_file() or path.stat().st_size != record["bytes"]:
                raise RunDirectoryError(
                    f"the store's shard {path} is missing or has changed",
                    fix=f"delete {directory} and run the same command again, which rebuilds it from the model",
                )
            header = read_header(path)
            located.update(dict.fromkeys(header.tensors, header))
        self._tensors = TensorFiles(located)

    def layer(self, skeleton: Skeleton, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one layer by name within the layer, on the CPU as stored."""
        prefix = skeleton.layer_prefix(index)
        return {n[len(prefix) :]: self._tensors.read(n) for n in self._tensors.names() if n.startswith(prefix)}

    def layer_bytes(self, index: int) -> int:
        """Stored bytes of one layer's shard."""
        return int(self.info.shards[layer_shard(index)]["bytes"])

    def embedding_rows(self, skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the input embedding: ids int64 [n] -> [n, hidden] as stored, on the CPU."""
        return self._tensors.read_rows(skeleton.embedding_name, ids)

    def head(self, skeleton: Skeleton) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The LM head's weight [vocabulary, hidden] and bias [vocabulary], as stored, on the CPU."""
        weight = self._tensors.read(skeleton.embedding_name if skeleton.tied else skeleton.head_name)
        bias_name = skeleton.head_name.removesuffix("weight") + "bias"
        return weight, self._tensors.read(bias_name) if bias_name in self._tensors else None

    def root(self, skeleton: Skeleton) -> dict[str, torch.Tensor]:
        """Every stored tensor outside the layers except embedding and LM head (norms, position embeddings)."""
        special = {skeleton.embedding_name, skeleton.head_name, skeleton.head_name.removesuffix("weight") + "bias"}
        return {n: self._tensors.read(n) for n in skeleton.root_names if n in self._tensors and n not in special}

    def close(self) -> None:
        """Close the shard files."""
        self._tensors.close()
