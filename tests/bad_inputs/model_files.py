"""Bad MODELs: the files."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import torch
from safetensors.torch import save_file

from tests.bad_inputs.place import (
    INDEX,
    INPUT,
    WEIGHTS,
    bad,
)

# -- MODEL: which files ------------------------------------------------------------------------------------------------


@bad(INPUT, "no-such.safetensors", "hub id")
def model_that_is_not_there(place):
    place.model = place.root / "no-such.safetensors"
    return place.train()


@bad(INPUT, "nobody/nothing-called-this", "network", "directory as MODEL")
def hub_id_without_a_network(place):
    import huggingface_hub

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    place.patch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    return ["train", "nobody/nothing-called-this", str(place.data), "--output", str(place.run)]


@bad(INPUT, "holds no safetensors file", WEIGHTS)
def empty_directory_as_model(place):
    place.model = place.root / "empty"
    place.model.mkdir()
    return place.train()


@bad(INPUT, "pytorch_model.bin", "convert to safetensors", "never loaded")
def directory_with_only_a_pickle(place):
    (place.own_model() / WEIGHTS).rename(place.model / "pytorch_model.bin")
    return place.train()


@bad(INPUT, WEIGHTS, "pickle", "save_pretrained")
def pickle_that_is_called_safetensors(place):
    torch.save({"weight": torch.zeros(64)}, place.own_model() / WEIGHTS)
    return place.train()


@bad(INPUT, "weights.bin", "pickles can run code", "safetensors")
def pickle_as_model(place):
    place.model = place.root / "weights.bin"
    torch.save({"weight": torch.zeros(64)}, place.model)
    return place.train()


@bad(INPUT, "model.gguf", "GGUF is for inference only", "original checkpoint")
def gguf_as_model(place):
    place.model = place.root / "model.gguf"
    place.model.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    return place.train()


@bad(INPUT, "PEFT adapter", "give the model that it was made for")
def adapter_as_model(place):
    place.model = place.stock.run / "adapter"
    return place.train()


@bad(INPUT, "README.md is not a model", ".safetensors")
def text_file_as_model(place):
    place.model = place.root / "README.md"
    place.model.write_text("# A fine model")
    return place.train()


@bad(INPUT, "2 files that could be the model", "name one of them")
def directory_with_two_models(place):
    (place.own_model() / WEIGHTS).rename(place.model / "one.safetensors")
    shutil.copy(place.model / "one.safetensors", place.model / "two.safetensors")
    return place.train()


@bad(INPUT, "is truncated", "get the file again")
def truncated_safetensors(place):
    path = place.own_model() / WEIGHTS
    os.truncate(path, path.stat().st_size - 1000)
    return place.train()


@bad(INPUT, "too few for a safetensors file", "get the file again")
def empty_safetensors(place):
    (place.own_model() / WEIGHTS).write_bytes(b"")
    return place.train()


@bad(INPUT, "claims a header of 1,152,921,504,606,846,976 bytes", "get the file again")
def header_that_claims_an_exbibyte(place):
    path = place.own_model() / WEIGHTS
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    return place.train()


@bad(INPUT, "Git LFS pointer", "git lfs pull")
def git_lfs_pointer(place):
    (place.own_model() / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return place.train()


@bad(INPUT, "is not a regular file", ".safetensors file")
def named_pipe_as_weights(place):
    (place.own_model() / WEIGHTS).unlink()
    os.mkfifo(place.model / WEIGHTS)
    return place.train()


# -- MODEL: the index --------------------------------------------------------------------------------------------------


@bad(INPUT, INDEX, "'../outside.safetensors'", "own directory", "do not use this index")
def index_that_leaves_its_directory(place):
    place.change_index(lambda names: names.update({"lm_head.weight": "../outside.safetensors"}))
    return place.train()


@bad(INPUT, INDEX, "outside.safetensors'", "own directory", "do not use this index")
def index_with_an_absolute_path(place):
    outside = place.root / "outside.safetensors"
    save_file({"lm_head.weight": torch.zeros(2, 2)}, outside)
    place.change_index(lambda names: names.update({"lm_head.weight": str(outside)}))
    return place.train()


@bad(INPUT, INDEX, "is not there", "get the missing file")
def index_that_names_a_missing_shard(place):
    next(place.own_model(sharded=True).glob("model-00002-of-*.safetensors")).unlink()
    return place.train()


@bad(INPUT, INDEX, "lm_head.weight", "does not hold it", "from the same place")
def index_that_names_the_wrong_shard(place):
    place.change_index(lambda names: names.update({"lm_head.weight": names["model.embed_tokens.weight"]}))
    return place.train()


@bad(INPUT, INDEX, "not valid JSON", "get the file again")
def index_that_is_not_json(place):
    (place.own_model(sharded=True) / INDEX).write_text("{weight_map:")
    return place.train()


def store_whose_index(place, **own):
    """MODEL becomes a store, and its index says ``own`` of it."""
    place.model = shutil.copytree(place.stock.run / "store", place.root / "model")
    content = json.loads((place.model / INDEX).read_text())
    content["metadata"]["lopt_lite"].update(own)
    (place.model / INDEX).write_text(json.dumps(content))


@bad(INPUT, INDEX, "is damaged: of the shard 'x' it says 5", "sha256", "make the store again")
def store_as_model_whose_shards_are_numbers(place):
    store_whose_index(place, shards={"x": 5})
    return place.train()


@bad(INPUT, INDEX, "is damaged: it lists 0 shards", "layer-00000.safetensors", "make the store again")
def store_as_model_that_lists_no_shards(place):
    store_whose_index(place, shards={})
    return place.train()


@bad(INPUT, INDEX, "is damaged: model_fingerprint is 5", "text", "make the store again")
def store_as_model_with_a_number_as_its_fingerprint(place):
    store_whose_index(place, model_fingerprint=5)
    return place.train()


@bad(INPUT, "no index beside it lists it", "get the other shards and the index")
def one_shard_without_its_index(place):
    (place.own_model(sharded=True) / INDEX).unlink()
    place.model = next(place.model.glob("model-00001-of-*.safetensors"))
    return place.train()


@bad(INPUT, "overlaps the one before it", "damaged")
def header_whose_tensors_overlap(place):
    path = place.own_model() / WEIGHTS
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    first, second = sorted((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])[:2]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0] + 2, first["data_offsets"][0] + 2 + size]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    return place.train()
