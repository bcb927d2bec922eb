"""From a file, an index or a directory to the tensors in it, refusing whatever is unsafe or not weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from lopt_lite.checkpoints.header import DTYPE_NAMES, Header, TensorInfo, parse_json_strictly, read_header
from lopt_lite.checkpoints.names import split_nf4_suffix
from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.errors import ModelError
from lopt_lite.events import Notice, OnEvent
from lopt_lite.files import unreadable

WEIGHTS_NAME = "model.safetensors"
WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"

_SHARD_NAME = re.compile(r".*-\d+-of-(\d+)\.safetensors")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

#: Endings of weights that are never read, with what to do about each.
_REFUSED = {
    (".bin", ".pt", ".pth", ".ckpt", ".pkl"): (
        "PyTorch pickles",
        "convert to safetensors (save_pretrained in transformers does); pickles can run code and are never loaded",
    ),
    (".gguf",): ("GGUF", "bring the original checkpoint in safetensors; GGUF is for inference only"),
    (".h5", ".msgpack", ".onnx", ".npz"): ("weights of another framework", "bring the model in safetensors"),
}


def find_weights(path: Path) -> Path:
    """The ``.safetensors`` file or index that ``path`` (a file or directory that exists) stands for.

    Raises
    ------
    ModelError
        There is none, more than one could be meant, or the file is of another kind.
    """
    if path.is_dir():
        return _find_in_directory(path)
    if path.name == "adapter_model.safetensors":
        raise _is_adapter(path)
    if path.name.endswith((WEIGHTS_SUFFIX, INDEX_SUFFIX)):
        return _index_of_shard(path)
    for suffixes, (kind, fix) in _REFUSED.items():
        if path.name.endswith(suffixes):
            raise ModelError(f"{path} cannot be used: {kind}", expected="a safetensors file", fix=fix)
    raise ModelError(
        f"{path} is not a model", expected=f"a *{WEIGHTS_SUFFIX} file, a *{INDEX_SUFFIX} file, a directory or a hub id"
    )


def open_weights(path: Path, on_event: OnEvent) -> TensorFiles:
    """Open a ``.safetensors`` file or an index, checking headers and types.

    Raises
    ------
    ModelError
        Anything wrong with the index or a file, or tensors of a type that cannot be trained on.
    """
    if path.name.endswith(INDEX_SUFFIX):
        locations = _read_index(path, on_event)
    else:
        header = read_header(path)
        locations = dict.fromkeys(header.tensors, header)
    if not locations:
        raise ModelError(f"{path} holds no tensors", expected="a model's weights")
    for name, header in locations.items():
        if not _is_usable(header.tensors[name], locations):
            raise ModelError(
                f"the tensor {name!r} in {header.path} has the type {DTYPE_NAMES[header.tensors[name].dtype]}",
                expected="BF16, F16 or F32 weights (or bitsandbytes NF4)",
                fix="bring the unquantised checkpoint; it is quantised to 4 bits here",
            )
    return TensorFiles(locations)


def _find_in_directory(directory: Path) -> Path:
    names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    for name in (WEIGHTS_NAME, WEIGHTS_NAME + ".index.json"):
        if name in names:
            return directory / name
    # Mistral's own format beside the usual one, and adapters, are not what is meant.
    others = [name for name in names if not name.startswith(("consolidated", "adapter_model"))]
    for suffix in (INDEX_SUFFIX, WEIGHTS_SUFFIX):
        found = [name for name in others if name.endswith(suffix)]
        if len(found) == 1:
            return _index_of_shard(directory / found[0])
        if found:
            raise ModelError(
                f"{directory} holds {len(found)} files that could be the model: {', '.join(found[:4])}"
                f"{', ...' if len(found) > 4 else ''}",
                expected=f"{WEIGHTS_NAME}, or an index ({WEIGHTS_NAME}.index.json) for several",
                fix="name one of them as MODEL, or get the index that belongs to them",
            )
    raise _no_weights(directory, names)


def _no_weights(directory: Path, names: list[str]) -> ModelError:
    if "adapter_config.json" in names or "adapter_model.safetensors" in names:
        return _is_adapter(directory)
    if any(name.startswith("consolidated.") for name in names):
        return ModelError(
            f"{directory} holds the model in its makers' own format (consolidated.*)",
            fix=f"get the Hugging Face format of it: {WEIGHTS_NAME} and config.json",
        )
    for suffixes, (kind, fix) in _REFUSED.items():
        found = [name for name in names if name.endswith(suffixes)]
        if found:
            return ModelError(
                f"{directory} holds no safetensors file, only {kind} ({found[0]})", expected=WEIGHTS_NAME, fix=fix
            )
    return ModelError(f"{directory} holds no safetensors file", expected=f"{WEIGHTS_NAME}, or shards with an index")


def _is_adapter(path: Path) -> ModelError:
    return ModelError(f"{path} is a PEFT adapter, not a model", fix="give the model that it was made for")


def _index_of_shard(path: Path) -> Path:
    """``path`` itself, or the index beside it when ``path`` is one shard of several."""
    if path.name == WEIGHTS_NAME or path.name.endswith(INDEX_SUFFIX):
        return path
    shard = _SHARD_NAME.fullmatch(path.name)
    for index in sorted(path.parent.glob(f"*{INDEX_SUFFIX}")):
        files = set(_weight_map(index).values())
        if path.name in files and len(files) > 1:
            return index
    if shard and int(shard[1]) > 1:
        raise ModelError(
            f"{path} is one of {int(shard[1])} shards, and no index beside it lists it",
            fix=f"get the other shards and the index ({WEIGHTS_NAME}.index.json), and name the index or the directory",
        )
    return path


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = parse_json_strictly(index.read_bytes())
    except OSError as error:
        raise unreadable(error, index, "the index", ModelError) from error
    except ValueError as error:
        raise ModelError(f"the index {index} is not valid JSON: {error}", fix="get the file again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"the index {index} has no weight_map", expected="an object from tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise ModelError(
                f"the index {index} places the tensor {name!r} in {file!r}",
                expected="the plain name of a .safetensors file in the index's own directory",
                fix="do not use this index: it points outside its directory, or is damaged",
            )
    return weight_map


def _is_plain_name(file: str) -> bool:
    return (
        file.endswith(WEIGHTS_SUFFIX)
        and file.isprintable()
        and PurePosixPath(file).name == file
        and PureWindowsPath(file).name == file
    )


def _read_index(index: Path, on_event: OnEvent) -> dict[str, Header]:
    weight_map = _weight_map(index)
    headers: dict[str, Header] = {}
    holder: dict[str, str] = {}
    for file in sorted(set(weight_map.values())):
        path = index.parent / file
        if not path.exists():
            what = "is a symbolic link to nothing" if path.is_symlink() else "is not there"
            raise ModelError(f"the index {index} names {file}, which {what}", fix="get the missing file")
        headers[file] = read_header(path)
        for name in headers[file].tensors:
            if name in holder:
                raise ModelError(f"the tensor {name!r} is in both {holder[name]} and {file}", fix="get the files again")
            holder[name] = file
    for name, file in weight_map.items():
        if name not in headers[file].tensors:
            raise ModelError(
                f"the index {index} places the tensor {name!r} in {file}, which does not hold it",
                fix="get the index and the shards again, from the same place",
            )
    unlisted = len(holder) - len(weight_map)
    if unlisted:
        on_event(Notice(text=f"{unlisted} tensors in the model's shards are not in {index.name} and are not used."))
    return {name: headers[file] for name, file in weight_map.items()}


def _is_usable(info: TensorInfo, locations: Mapping[str, Header]) -> bool:
    if info.dtype in _FLOATS:
        return True
    base, suffix = split_nf4_suffix(info.name)
    if info.dtype == torch.uint8 and base + STATE_SUFFIX in locations:
        return suffix != "" or info.name == base
    # Old checkpoints carry causal masks ([1, 1, n, n]) and position numbers, which transformers does not use.
    mask = info.dtype == torch.uint8 and info.shape[:2] == (1, 1) and len(info.shape) == 4
    return (mask or info.dtype in (torch.bool, torch.int64)) and not info.name.endswith(".weight")
