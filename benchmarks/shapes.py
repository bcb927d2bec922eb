"""Random models of real shapes, and data of a certain length.

Weights are random, so losses mean nothing; memory, disk and time do. A store is made by quantising one layer and
writing it once per layer: nothing that is measured depends on the values.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lopt_lite import QuantizeSettings, files, quantize
from lopt_lite.checkpoints.header import read_header
from lopt_lite.checkpoints.shard_writer import TensorSpec, aligned_order, write_shard
from lopt_lite.checkpoints.store_index import INDEX_NAME, layer_shard, store_info
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.settings import Quantize
from tests.data.tiny_tokenizers import make_tokenizer

_LAYERS = "model.layers."


@dataclass(frozen=True)
class Shape:
    """A Llama-like shape.

    Attributes
    ----------
    architecture, others:
        Another architecture, as transformers calls it, and what else its config says.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    architecture: str = "llama"
    others: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return f"{self.hidden} x {self.layers}" + (f" {self.architecture}" if self.architecture != "llama" else "")

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, were it a Llama."""
        key_value = self.hidden // self.heads * self.key_value_heads
        layer = 2 * self.hidden * (self.hidden + key_value) + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


def write_store(directory: Path, shape: Shape, quantize_to: Quantize = "nf4") -> Path:
    """Write a store (NF4, or ``"none"``) of random weights with a small tokenizer; nothing if it is there.

    The store of a model with one layer is made in the ordinary way. Then that layer's tensors are written again under
    the names of each other layer, and index and config are told.

    Raises
    ------
    DoesNotFitError
        The disk is too small; nothing large was written.
    """
    info = store_info(directory)
    if info is not None and info.layers == shape.layers:
        return directory
    # The dense layer, embedding and head; in the store, NF4 takes a quarter of a layer and a little.
    one = dataclasses.replace(shape, layers=1)
    layer_bytes = 2 * (one.parameters - 2 * shape.vocabulary * shape.hidden)
    stored = 0.3 if quantize_to == "nf4" else 1.0
    needed = layer_bytes + 8 * shape.vocabulary * shape.hidden + int(shape.layers * layer_bytes * stored)
    files.require_free_space(directory, needed, what="the benchmark's store")
    files.remove_tree(directory)
    source = directory.with_name(directory.name + "-source")
    _write_model(source, one)
    quantize(QuantizeSettings(model=str(source), store=str(directory), quantize=quantize_to, device="cpu"))
    files.remove_tree(source)
    _multiply_layer(directory, shape.layers)
    return directory


def _write_model(directory: Path, shape: Shape) -> None:
    """Write a random bfloat16 checkpoint with a small tokenizer, one shard per layer."""
    files.remove_tree(directory)
    files.make_directory(directory)
    config: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    make_tokenizer().save_pretrained(directory)
    if shape.architecture != "llama":
        made = AutoConfig.for_model(shape.architecture, **{**config, **dict(shape.others)})
        AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(directory)
        return
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    files.write_json(directory / "config.json", config)
    key_value = shape.hidden // shape.heads * shape.key_value_heads
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (shape.hidden, shape.hidden),
        "self_attn.k_proj.weight": (key_value, shape.hidden),
        "self_attn.v_proj.weight": (key_value, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, shape.hidden),
        "mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
        "mlp.up_proj.weight": (shape.intermediate, shape.hidden),
        "mlp.down_proj.weight": (shape.hidden, shape.intermediate),
        "input_layernorm.weight": (shape.hidden,),
        "post_attention_layernorm.weight": (shape.hidden,),
    }
    shards: dict[str, dict[str, tuple[int, ...]]] = {
        f"layer-{i}.safetensors": {f"{_LAYERS}{i}.{n}": s for n, s in layer.items()} for i in range(shape.layers)
    }
    shards["rest.safetensors"] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
        "lm_head.weight": (shape.vocabulary, shape.hidden),
    }
    weight_map: dict[str, str] = {}
    for file, tensors in shards.items():
        specs = aligned_order([TensorSpec(n, torch.bfloat16, s) for n, s in tensors.items()])
        write_shard(directory / file, specs, _random(specs))
        weight_map.update(dict.fromkeys(tensors, file))
    files.write_json(directory / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})


def _random(specs: list[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for spec in specs:
        tensor = torch.ones(spec.shape, dtype=spec.dtype)
        yield spec.name, tensor.normal_(0, 0.02, generator=generator) if len(spec.shape) > 1 else tensor


def _multiply_layer(directory: Path, layers: int) -> None:
    """Make a store with one layer one with ``layers`` equal ones; the index, written last, makes it complete."""
    info = store_info(directory)
    assert info is not None
    index = json.loads((directory / INDEX_NAME).read_text())
    files.remove_file(directory / INDEX_NAME)
    first = read_header(directory / layer_shard(0))
    tensors = TensorFiles(dict.fromkeys(first.tensors, first))
    held = {name: tensors.read(name) for name in first.tensors}
    tensors.close()
    shards = dict(info.shards)
    for number in range(1, layers):
        names = {name: name.replace(f"{_LAYERS}0.", f"{_LAYERS}{number}.") for name in held}
        specs = [TensorSpec(names[name], tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()]
        record = write_shard(
            directory / layer_shard(number), specs, ((names[name], tensor) for name, tensor in held.items())
        )
        shards[record.name] = {"bytes": record.bytes, "sha256": record.sha256}
        index["weight_map"].update(dict.fromkeys(names.values(), record.name))
        index["metadata"]["total_size"] += sum(spec.nbytes for spec in specs)
    config = json.loads((directory / "config.json").read_text())
    # Of one layer; what follows from the number of layers is all alike again.
    config.pop("layer_types", None)
    files.write_json(directory / "config.json", {**config, "num_hidden_layers": layers})
    index["metadata"]["lopt_lite"] = asdict(dataclasses.replace(info, layers=layers, shards=shards))
    files.write_json(directory / INDEX_NAME, index)


def write_data(path: Path, examples: int, tokens: int, *, uneven: bool = False) -> Path:
    """Write examples that ``--max-length`` of ``tokens`` cuts all to that length, about half of it answer.

    ``uneven``: only a few have that length, the others down to an eighth of it.
    """
    tokenizer = make_tokenizer()
    lines = []
    longest = tokens
    for number in range(examples):
        if uneven:
            tokens = longest // 8 + number * 29 % longest
        answer = ""
        word = 0
        while len(tokenizer(answer)["input_ids"]) < tokens // 2:
            answer += f"w{(number * 31 + word * 7) % 97} "
            word += 1
        prompt = " ".join(f"q{(number * 17 + i * 5) % 89}" for i in range(tokens))
        lines.append(json.dumps({"prompt": prompt, "completion": answer.strip()}))
    files.write_bytes(path, ("\n".join(lines) + "\n").encode())
    return path
