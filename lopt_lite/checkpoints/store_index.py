"""A store's index: which shards it has, of which bytes, made from what; read strictly, as stores are handed on."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lopt_lite import files
from lopt_lite.errors import ModelError, RunDirectoryError

INDEX_NAME = "model.safetensors.index.json"
EMBEDDING_SHARD = "embedding.safetensors"
HEAD_SHARD = "head.safetensors"
STORE_VERSION = 1

_LAYER_SHARD = re.compile(r"layer-(\d{5,9})\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    ModelError
        The index is damaged: it holds values of other types than a store's has, or does not list the shards that
        follow from its number of layers.
    RunDirectoryError
        The store is of a later version of lopt-lite.
    """
    read = read_index(directory)
    return None if read is None else read[0]


def read_index(directory: Path) -> tuple[StoreInfo, dict[str, str]] | None:
    """What :func:`store_info` says, and in which shard each tensor lies; raises the same."""
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
    names = {f.name for f in fields(StoreInfo)}
    if set(own) != names:
        odd = ", ".join(sorted(set(own) ^ names))
        raise _damaged(path, f"its metadata has too little or too much: {odd}", expected=", ".join(sorted(names)))
    for name, (is_right, expected) in _FIELDS.items():
        if not is_right(own[name]):
            raise _damaged(path, f"{name} is {reprlib.repr(own[name])}", expected=expected)
    for name, record in own["shards"].items():
        if not _is_record(record):
            raise _damaged(
                path,
                f"of the shard {name!r} it says {reprlib.repr(record)}",
                expected="its bytes (a whole number above 0) and its sha256 (64 hexadecimal digits)",
            )
    info = StoreInfo(**{**own, "unquantized": tuple(own["unquantized"])})
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise _damaged(path, "it has no sound weight_map", expected="an object from tensor names to file names")
    _check_shard_names(path, info, set(weight_map.values()))
    return info, weight_map


def _damaged(path: Path, what: str, *, expected: str) -> ModelError:
    return ModelError(f"the index {path} is damaged: {what}", expected=expected, fix="make the store again")


def _check_shard_names(path: Path, info: StoreInfo, used: set[str]) -> None:
    """Compare the shards that an index lists with those that follow from the number of layers, and with ``used``.

    Parameters
    ----------
    used:
        The shards that hold tensors, as the index says.

    Raises
    ------
    ModelError
        They differ.
    """
    listed = set(info.shards)
    around = {EMBEDDING_SHARD, HEAD_SHARD}
    strange = {name for name in listed - around if not _is_layer_of(name, info.layers)}
    # A store of some layers alone has nothing around them; one of the whole model has all of them.
    whole = listed >= around and len(listed - around) == info.layers
    if strange or not (whole or (listed and not listed & around)):
        raise _damaged(
            path,
            f"it lists {len(listed)} shards ({reprlib.repr(sorted(strange or listed))}) of a model of "
            f"{info.layers} layers",
            expected=f"{EMBEDDING_SHARD}, {layer_shard(0)} to {layer_shard(info.layers - 1)} and {HEAD_SHARD}, "
            "or some of the layers alone",
        )
    # A tied model without a final norm has nothing in its head's shard.
    if not listed - {HEAD_SHARD} <= used <= listed:
        odd = sorted(used ^ listed)
        raise _damaged(
            path,
            f"its weight_map and its list of shards do not agree on {reprlib.repr(odd)}",
            expected="the same shards in both",
        )


def _is_layer_of(name: str, layers: int) -> bool:
    number = _LAYER_SHARD.fullmatch(name)
    return number is not None and int(number[1]) < layers and name == layer_shard(int(number[1]))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_record(value: Any) -> bool:
    """Whether ``value`` is of the type of what :attr:`StoreInfo.shards` says of a shard."""
    if not isinstance(value, dict) or not _is_text(value.get("sha256")):
        return False
    nbytes: Any = value.get("bytes")
    return _is_whole(nbytes) and nbytes > 0 and _SHA256.fullmatch(value["sha256"]) is not None


#: What the values of an index's metadata have to be, and that in words.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "version": (_is_whole, f"{STORE_VERSION}"),
    "quantize": (lambda value: value in ("nf4", "none"), "nf4 or none"),
    "dtype": (lambda value: value in ("bfloat16", "float16", "float32"), "bfloat16, float16 or float32"),
    "model_fingerprint": (_is_text, "text"),
    "source": (_is_text, "text"),
    "layers": (lambda value: _is_whole(value) and value > 0, "a whole number above 0"),
    "unquantized": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of names"),
    "shards": (lambda value: isinstance(value, dict), "an object from file names to what the files are"),
}


def standing_store(directory: Path) -> StoreInfo | None:
    """As :func:`store_info`, and None where the index is damaged too: for whom can make the store again.

    Raises
    ------
    RunDirectoryError
        The store is of a later version of lopt-lite.
    """
    try:
        return store_info(directory)
    except ModelError:
        return None
