"""What adapters keep for the backward pass: the formula equals what PEFT's adapters are seen to keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lopt_lite.checkpoints.locate import describe_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.residency.fused import fused_modules
from lopt_lite.residency.layer_cost import activation_cost
from lopt_lite.residency.rms_norm import fuse_norms
from lopt_lite.settings import TrainSettings
from lopt_lite.training.adapters import adapter_parameters, attach_adapter, set_training
from lopt_lite.training.targets import target_names
from tests.tiny_models import make_config

LAYER, TOKENS, RANK = 2, 8, 4


def kept_bytes(skeleton: Skeleton, layer: nn.Module) -> int:
    """Bytes per token that autograd keeps of a layer's forward pass on the meta device, and of its output."""
    call = skeleton.probe(TOKENS)[LAYER]

    def to_meta(value):
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return type(value)(to_meta(v) for v in value) if isinstance(value, tuple) else value

    kwargs = {name: to_meta(value) for name, value in call.kwargs.items()}
    meta_call = type(call)(tuple(to_meta(value) for value in call.args), kwargs, call.hidden_keyword)
    weights = {p.untyped_storage()._cdata for p in layer.parameters()}
    # Copies of adapters' values in the compute dtype do not grow with the tokens, and are counted elsewhere.
    adapters = {tuple(p.shape) for p in adapter_parameters(layer).values()}
    adapters |= {shape[::-1] for shape in adapters}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage()._cdata not in weights and tuple(tensor.shape) not in adapters:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    hidden = torch.empty(1, TOKENS, skeleton.hidden_size, dtype=skeleton.dtype, device="meta", requires_grad=True)
    with fused_modules(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        note(meta_call.run(layer, hidden))
    return sum(storage.nbytes() for storage in kept.values()) // TOKENS


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "phi3", "mixtral", "gpt2", "cohere"])
def test_the_formula_says_what_peft_keeps(tmp_path: Path, architecture, dtype, dropout):
    if architecture == "mixtral" and dtype == torch.float32:
        pytest.skip("routed experts run on the meta device in bfloat16 only, so a formula stands for the whole layer")
    make_config(architecture, 300).save_pretrained(tmp_path)
    skeleton = Skeleton(describe_model(str(tmp_path)), dtype=dtype)
    settings = TrainSettings(model="m", data="d", lora_r=RANK, lora_dropout=dropout)
    targets = target_names(skeleton, LAYER, settings)

    layer = skeleton.layer_template(LAYER).to("meta")
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    if dtype != torch.float32:
        fuse_norms(layer)
    without = kept_bytes(skeleton, layer)
    attach_adapter(layer, LAYER, skeleton=skeleton, settings=settings)
    set_training(layer, True)

    def cost(names):
        found = activation_cost(skeleton, LAYER, targets=names, rank=RANK, dropout=dropout > 0, full=False)
        assert found.measured
        return found.saved_bytes_per_token

    assert cost(targets) - cost([]) == kept_bytes(skeleton, layer) - without


def test_only_the_modules_named_count(tmp_path: Path):
    make_config("llama", 300).save_pretrained(tmp_path)
    skeleton = Skeleton(describe_model(str(tmp_path)), dtype=torch.bfloat16)

    def cost(targets):
        return activation_cost(skeleton, 0, targets=targets, rank=RANK, dropout=False, full=False).saved_bytes_per_token

    # q_proj takes 32 values, down_proj 64, of two bytes each, and RANK values in the adapter's middle.
    assert cost(["self_attn.q_proj"]) - cost([]) == 32 * 2 + RANK * 2
    assert cost(["mlp.down_proj"]) - cost([]) == 64 * 2 + RANK * 2


def test_without_fused_attention_the_weights_of_all_pairs_are_kept(tmp_path: Path):
    make_config("llama", 300).save_pretrained(tmp_path)
    skeleton = Skeleton(describe_model(str(tmp_path)), dtype=torch.bfloat16)

    def pairs(fused: bool) -> int:
        found = activation_cost(
            skeleton, 0, targets=[], rank=RANK, dropout=False, full=False, fused_attention=fused
        ).saved_bytes_per_pair
        return int(found)

    assert pairs(True) == 0
    # A number of each of the four heads at least.
    assert pairs(False) >= 4 * 2
