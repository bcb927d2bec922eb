"""What is planned for a layer's activations is what the layer keeps, whatever kind of layer it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import JambaConfig

from lopt_lite.checkpoints.locate import describe_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.residency import layer_cost
from lopt_lite.residency.memory_model import Job, Layout, training_parts
from lopt_lite.residency.rms_norm import fuse_norms
from lopt_lite.residency.shapes import ModelShapes, Tuning, model_shapes
from tests.tiny_models import make_config

RANK = 4


def _skeleton(home: Path, architecture: str, **changes: Any) -> Skeleton:
    make_config(architecture, 300, **changes).save_pretrained(home)
    return Skeleton(describe_model(str(home)), dtype=torch.bfloat16)


def _shapes(skeleton: Skeleton) -> ModelShapes:
    tuning = Tuning(rank=RANK)
    return model_shapes(skeleton, quantize="none", stored_dtype=torch.bfloat16, tuning=tuning)


def _kept(skeleton: Skeleton, index: int, tokens: int) -> int:
    layer = skeleton.layer_template(index).to("meta")
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    fuse_norms(layer)
    saved = layer_cost._saved(skeleton, index, layer, tokens, (), layer_cost._fused_attention)
    return sum(storage.nbytes() for storage in saved)


@pytest.mark.parametrize("tokens", [5, 64, 100, 256, 300])
def test_rows_that_are_filled_up_to_whole_chunks_are_reckoned_with(tokens: int, tmp_path: Path) -> None:
    skeleton = _skeleton(tmp_path, "bamba", mamba_chunk_size=64)
    mamba = _shapes(skeleton).layers[0]
    assert mamba.activations.saved_bytes_per_row > 0
    kept = _kept(skeleton, 0, tokens)
    planned = mamba.kept_bytes(tokens, rows=1, row_length=tokens)
    # Of a whole number of chunks, a row is planned one chunk too large.
    assert kept <= planned <= kept * (1 + 80 / tokens)


def test_layers_of_each_kind_cost_what_they_cost(tmp_path: Path) -> None:
    skeleton = _skeleton(tmp_path, "bamba", mamba_chunk_size=64)
    shapes = _shapes(skeleton)
    assert layer_cost.layer_kinds(skeleton) == [0, 1, 0, 1]
    mamba, attention = shapes.layers[:2]
    for index, layer in enumerate((mamba, attention)):
        assert layer.activations.saved_bytes_per_token == pytest.approx(_kept(skeleton, index, 512) / 512, rel=0.05)
    assert attention.activations.saved_bytes_per_row == 0
    many = {"tokens": 512, "rows": 2, "row_length": 256}
    of_each = sorted(layer.kept_bytes(**many) for layer in shapes.layers)
    assert of_each[0] < of_each[-1]
    assert shapes.kept_bytes(0, 4, depth=4, **many) == sum(of_each)
    assert shapes.kept_bytes(0, 4, depth=3, **many) == sum(of_each[1:])
    assert shapes.inside_bytes(0, 2, tokens=512, rows=2, row_length=0) == mamba.inside_bytes(512, rows=2, row_length=0)
    assert shapes.inside_bytes(1, 2, tokens=512, rows=2, row_length=0) == attention.inside_bytes(
        512, rows=2, row_length=0
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "phi3"])
def test_rows_cost_nothing_where_none_are_filled_up(architecture: str, tmp_path: Path) -> None:
    for layer in _shapes(_skeleton(tmp_path, architecture)).layers:
        assert layer.activations.saved_bytes_per_row == 0
        assert layer.activations.measured


def test_rows_that_are_gone_through_token_by_token_keep_objects_of_each(tmp_path: Path) -> None:
    """Small tensors' values are the least of what they take."""
    config = JambaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
    )
    config.save_pretrained(tmp_path)
    skeleton = Skeleton(describe_model(str(tmp_path)), dtype=torch.bfloat16)
    for index, layer in enumerate(_shapes(skeleton).layers):
        values = (_kept(skeleton, index, 512) - _kept(skeleton, index, 256)) / 256
        objects = layer.activations.saved_bytes_per_token - values
        assert objects >= layer_cost._TENSOR_BYTES if index == 0 else abs(objects) < 100


def test_hidden_states_take_the_same_on_every_device(tmp_path: Path) -> None:
    shapes = _shapes(_skeleton(tmp_path, "llama"))
    job = Job(step_tokens=4096, longest=300, rows=8)
    layout = Layout(4, False, False, 1024, 2**20, None, False)
    parts = [training_parts(shapes, (0, 4), job, layout, 0, last=True, on_cpu=on_cpu) for on_cpu in (True, False)]
    # A step's inputs: 32 numbers of two bytes for each token.
    assert [part["hidden states"] for part in parts] == [4096 * 32 * 2] * 2
