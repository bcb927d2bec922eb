"""Tiny random models of many architectures, made on the spot, with a tokenizer beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.data.tiny_tokenizers import make_tokenizer

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

#: Architecture name -> (config class, its own settings).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "phi": ("PhiConfig", {"bos_token_id": 1, "eos_token_id": 2}),
    "olmo2": ("Olmo2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.5}),
    "opt": ("OPTConfig", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}

#: The same for models of whose layers only the later ones have experts.
LATE_EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [0],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
}

#: More of them, for what they alone have: state spaces beside attention, routers, layers that are asked for more.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_h1": (
        "FalconH1Config",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_chunk_size": 8},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_d_head": 16,
            "mamba_chunk_size": 8,
        },
    ),
    # A router that is made of a linear module, and an embedding that is asked where it is.
    "llama4_text": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 8,
            "moe_layers": [1, 3],
            "pad_token_id": 0,
        },
    ),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # Heads of unlike sizes, and a mapping that layers leave keys and values in.
    "gemma4_text": (
        "Gemma4TextConfig",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 6,
        },
    ),
    # Layers that return attention weights too, and layers that are asked what kind they are.
    "bamba": (
        "BambaConfig",
        {
            "attn_layer_indices": [1, 3],
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_d_head": 16,
            "mamba_chunk_size": 8,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
}


#: Options of runs in which every block learns something, and nothing but that.
EVERY_BLOCK_LEARNS: dict[str, Any] = {"objective": "reconstruct", "retain": 0.0}


def even_widths(architecture: str) -> dict[str, Any]:
    """Changes of the config with which every matrix has a multiple of 64 columns: bitsandbytes reads those rightly."""
    own = (ARCHITECTURES | OTHERS)[architecture][1]
    wide = {"hidden_size": 64, "intermediate_size": 128, "n_embd": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
    wide |= {"mamba_n_heads": 8, "mamba_d_ssm": 128}
    return {
        **{name: value for name, value in wide.items() if name in own or name in _COMMON},
        **({"head_dim": 16} if "head_dim" in own else {}),
    }


def make_config(architecture: str, vocabulary: int, **changes: Any) -> Any:
    """The config of a tiny model."""
    class_name, own = (ARCHITECTURES | LATE_EXPERTS | OTHERS)[architecture]
    values = {**_COMMON, **own, "vocab_size": vocabulary, **changes}
    if architecture == "gpt2":
        values = {k: v for k, v in values.items() if k not in _COMMON}
    return getattr(transformers, class_name)(**values)


def make_model(
    directory: Path,
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: Any = None,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Write a tiny random model with tokenizer; returns its directory."""
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    config = make_config(architecture, max(len(tokenizer), 300), **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return directory


def make_data(path: Path, examples: int = 24, *, seed: int = 0) -> Path:
    """Write a few question/answer lines of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(examples):
        a, b = (int(x) for x in torch.randint(0, 50, (2,), generator=generator))
        extra = " please" * (a % 5)
        lines.append(
            json.dumps({"question": f"What is {a} + {b}?{extra}", "answer": f"{a} + {b} = {a + b}." * (1 + b % 3)})
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
