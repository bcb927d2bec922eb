"""Random models of real shapes, written layer by layer, and runs of them in a process of their own.

Weights are random, so losses mean nothing; memory, disk and time do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lopt_lite.checkpoints.shard_writer import TensorSpec, aligned_order, write_shard
from tests.data.tiny_tokenizers import make_tokenizer


@dataclass(frozen=True)
class Shape:
    """A Llama-like shape."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int


def write_model(directory: Path, shape: Shape) -> Path:
    """Write a random bfloat16 checkpoint with a small tokenizer, one shard per layer; nothing if it is there."""
    if (directory / "model.safetensors.index.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
    (directory / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(directory)
    kv = shape.hidden // shape.heads * shape.key_value_heads
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (shape.hidden, shape.hidden),
        "self_attn.k_proj.weight": (kv, shape.hidden),
        "self_attn.v_proj.weight": (kv, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, shape.hidden),
        "mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
        "mlp.up_proj.weight": (shape.intermediate, shape.hidden),
        "mlp.down_proj.weight": (shape.hidden, shape.intermediate),
        "input_layernorm.weight": (shape.hidden,),
        "post_attention_layernorm.weight": (shape.hidden,),
    }
    shards: dict[str, dict[str, tuple[int, ...]]] = {
        f"layer-{i}.safetensors": {f"model.layers.{i}.{n}": s for n, s in layer.items()} for i in range(shape.layers)
    }
    shards["rest.safetensors"] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
        "lm_head.weight": (shape.vocabulary, shape.hidden),
    }
    weight_map: dict[str, str] = {}
    for file, tensors in shards.items():
        specs = aligned_order([TensorSpec(n, torch.bfloat16, s) for n, s in tensors.items()])
        write_shard(directory / file, specs, _random(specs), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _random(specs: list[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for spec in specs:
        if len(spec.shape) == 1:
            yield spec.name, torch.ones(spec.shape, dtype=spec.dtype)
        else:
            yield spec.name, torch.randn(spec.shape, generator=generator).mul_(0.02).to(spec.dtype)


def write_data(path: Path, examples: int, tokens: int) -> Path:
    """Write examples that are at least ``tokens`` tokens long, so that ``--max-length`` cuts all to one length."""
    lines = []
    for number in range(examples):
        text = " ".join(f"w{(number * 31 + i * 7) % 97}" for i in range(tokens))
        lines.append(json.dumps({"prompt": text[: len(text) // 2], "completion": text[len(text) // 2 :]}))
    path.write_text("\n".join(lines) + "\n")
    return path


_CHILD = """
import json, pathlib, resource, sys, time
import torch
import lopt_lite
from lopt_lite.events import Step
from lopt_lite.journal import read_facts

operation, arguments, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
steps = []
settings = {"train": lopt_lite.TrainSettings, "evaluate": lopt_lite.EvaluateSettings}[operation](**arguments)
started = time.monotonic()
getattr(lopt_lite, operation)(settings, lambda e: steps.append(e) if isinstance(e, Step) else None)
facts, _ = read_facts(pathlib.Path(arguments.get("output") or arguments["run"]) / "journal.jsonl")
residence = next(f for f in facts if f["fact"] == "residence")
print(json.dumps({
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "mode": residence["mode"],
    "predicted_bytes": residence["predicted_bytes"],
    "micro_batch_tokens": residence["micro_batch_tokens"],
    "seconds": time.monotonic() - started,
    "step_s": [s.tokens / s.tokens_per_s for s in steps],
}))
"""


def run_alone(operation: str, threads: int = 2, **arguments: Any) -> dict[str, Any]:
    """Run an operation in a fresh process; returns its peak resident memory, choices and times.

    Raises
    ------
    RuntimeError
        It failed; the message is the end of its output.
    """
    command = [sys.executable, "-c", _CHILD, operation, json.dumps(arguments), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-600:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
