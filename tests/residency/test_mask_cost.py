"""What the plan says of masks is what batches bring to the layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconConfig

from lopt_lite.checkpoints.local_mask import LocalMask
from lopt_lite.checkpoints.locate import describe_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.residency import layer_cost
from lopt_lite.residency.mask_cost import MaskCost, mask_cost
from lopt_lite.residency.memory_model import Job, Layout, forward_peak, training_parts
from lopt_lite.residency.rms_norm import fuse_norms
from lopt_lite.residency.shapes import ModelShapes, Tuning, model_shapes
from tests.tiny_models import make_config

WINDOW = 6


def _skeleton(home: Path, architecture: str, **changes: Any) -> Skeleton:
    make_config(architecture, 300, **changes).save_pretrained(home)
    return Skeleton(describe_model(str(home)), dtype=torch.bfloat16)


def _dense_bytes(skeleton: Skeleton, rows: int, tokens: int) -> int:
    """Of what a batch brings to all layers, that has a value for each pair of tokens."""
    skeleton.set_embedding_reader(lambda ids: torch.zeros(len(ids), skeleton.hidden_size))
    calls = skeleton.record(torch.ones(rows, tokens, dtype=torch.long), embed=False).calls
    given = [value for call in calls for value in (*call.args, *call.kwargs.values())]
    masks = [
        v.untyped_storage()
        for v in given
        if isinstance(v, torch.Tensor) and not isinstance(v, LocalMask) and v.shape[-2:] == (tokens, tokens)
    ]
    return sum({storage._cdata: storage.nbytes() for storage in masks}.values())


def _has_mask(skeleton: Skeleton, tokens: int) -> bool:
    return any(isinstance(value, LocalMask) for call in skeleton.probe(tokens) for value in call.kwargs.values())


@pytest.mark.parametrize(
    ("architecture", "longest_without", "kept"),
    [
        ("llama", None, 0),
        ("qwen3", None, 0),
        ("mistral", WINDOW - 1, 0),
        ("gemma3_text", WINDOW - 1, 0),
        ("llama4_text", 8 - 1, 0),
        # Their attention caps scores, and has no fused kernel.
        ("gemma2", 0, 4),
    ],
)
def test_it_is_what_batches_bring(architecture, longest_without, kept, tmp_path):
    skeleton = _skeleton(tmp_path, architecture)
    cost = mask_cost(skeleton)
    assert (cost.longest_without, cost.kept_bytes_per_pair) == (longest_without, kept)
    for rows, tokens in ((1, 5), (2, 40), (3, 70)):
        dense = _dense_bytes(skeleton, rows, tokens)
        assert dense + cost.bias_bytes * cost.are_made(tokens) == cost.kept_bytes(rows * tokens**2, tokens)
    if longest_without:
        around = (longest_without, longest_without + 1)
        assert [_has_mask(skeleton, tokens) for tokens in around] == [False, True]
        assert [cost.are_made(tokens) for tokens in around] == [False, True]


def test_wide_windows_are_found_without_long_rows(tmp_path, monkeypatch):
    skeleton = _skeleton(tmp_path, "gemma3_text", sliding_window=4096)
    probed = []
    probe = Skeleton.probe
    monkeypatch.setattr(Skeleton, "probe", lambda self, tokens: (probed.append(tokens), probe(self, tokens))[1])
    cost = mask_cost(skeleton)
    assert cost == MaskCost(4095, 0, 2 * 1024 * 5120)
    assert max(probed) < 100
    assert skeleton.model.base_model.config.sliding_window == 4096
    assert cost.making_bytes(4095) == cost.kept_bytes(4095**2, 4095) == 0
    assert cost.making_bytes(4096) >= 4096**2
    assert cost.kept_bytes(4096**2, 4096) == cost.bias_bytes


def test_windows_that_no_layer_has_make_no_masks(tmp_path):
    changes = {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 4}
    assert mask_cost(_skeleton(tmp_path, "qwen2", **changes)) == MaskCost()


def _shapes(home: Path, architecture: str, **changes: Any) -> ModelShapes:
    tuning = Tuning(rank=4)
    return model_shapes(
        _skeleton(home, architecture, **changes), quantize="none", stored_dtype=torch.bfloat16, tuning=tuning
    )


@pytest.mark.parametrize("window", [100, 700, 4096])
@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
def test_rows_longer_than_a_window_cost_what_their_layers_keep(architecture, window, tmp_path):
    """Whether windows are shorter than the rows that are measured, or lie between them, or are longer."""
    shapes = _shapes(tmp_path, architecture, sliding_window=window)
    skeleton = _skeleton(tmp_path, architecture, sliding_window=32)
    layer = skeleton.layer_template(0).to("meta").requires_grad_(False)
    fuse_norms(layer)
    kept = {
        tokens: sum(s.nbytes() for s in layer_cost._saved(skeleton, 0, layer, tokens, (), layer_cost._fused_attention))
        for tokens in (20, 600)  # without a mask, and with one
    }
    planned = shapes.layers[0]
    short = planned.kept_bytes(20, rows=1, row_length=window - 1)
    long = planned.kept_bytes(600, rows=1, row_length=window)
    assert short == pytest.approx(kept[20], rel=0.05)
    assert long == pytest.approx(kept[600], rel=0.05)
    assert long / 600 > short / 20, "keys and values are repeated where there is a mask"


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text", "deepseek_v3", "falcon"])
def test_no_layer_keeps_anything_of_all_pairs(architecture, tmp_path):
    changes: dict[str, Any] = {"sliding_window": 100} if architecture in ("mistral", "gemma3_text") else {}
    if architecture == "deepseek_v3":
        changes = {"first_k_dense_replace": 4}
    if architecture == "falcon":
        FalconConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, multi_query=True
        ).save_pretrained(tmp_path)
        skeleton = Skeleton(describe_model(str(tmp_path)), dtype=torch.bfloat16)
        shapes = model_shapes(skeleton, quantize="none", stored_dtype=torch.bfloat16, tuning=Tuning(rank=4))
    else:
        shapes = _shapes(tmp_path, architecture, **changes)
    for layer in shapes.layers:
        assert layer.activations.measured
        assert layer.activations.saved_bytes_per_pair == layer.activations.transient_bytes_per_pair == 0


def test_masks_are_planned_for_as_long_as_they_wait(tmp_path):
    shapes = _shapes(tmp_path, "gemma2")
    assert shapes.masks.kept_bytes_per_pair == 4
    job = Job(step_tokens=4 * 200, longest=200, rows=4)
    resident = Layout(4, False, False, 200, 2**20, None, False)
    streamed = Layout(0, False, True, 200, 2**20, None, False)

    def hidden_states(shapes: ModelShapes, layout: Layout) -> int:
        return training_parts(shapes, (0, 4), job, layout, 0, last=True, on_cpu=True)["hidden states"]

    without = dataclasses.replace(shapes, masks=MaskCost())
    # Micro-batches of a step are there until it is done.
    for layout in (resident, streamed):
        assert hidden_states(shapes, layout) - hidden_states(without, layout) == 4 * 4 * 200**2
    peaks = [forward_peak(s, (0, 4), job, resident, 600, on_cpu=True) for s in (shapes, without)]
    assert peaks[0] - peaks[1] == 4 * 600 * 200


def test_making_masks_counts_where_it_takes_more_than_a_step(tmp_path):
    shapes = _shapes(tmp_path, "mistral")
    longest = 20_000
    job, layout = Job(step_tokens=longest, longest=longest, rows=1), Layout(4, False, True, 200, 2**20, None, False)
    parts = training_parts(shapes, (0, 4), job, layout, 0, last=True, on_cpu=True)
    assert parts["activations"] == shapes.masks.making_bytes(longest) == 3 * longest**2
