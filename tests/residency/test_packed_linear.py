"""A layer that dequantises in every product: the numbers of one that was dequantised once, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lopt_lite.residency.layer_loader import DequantizedLinear4bit, PackedLinear4bit
from tests.rig import open_rig
from tests.tiny_models import even_widths, make_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wide", [False, True])
def test_outputs_and_gradients_are_those_of_the_dense_matrix(tmp_path: Path, dtype: str, wide: bool) -> None:
    model = make_model(tmp_path / "model", **(even_widths("llama") if wide else {}))
    rig = open_rig(model, tmp_path / "store", quantize="nf4", dtype=dtype)
    with rig.layers(0, 1) as packed_pool, rig.layers(0, 1, dequantize=True) as dense_pool:
        packed, dense = (pool.layers[0].self_attn.q_proj for pool in (packed_pool, dense_pool))
        assert (type(packed), type(dense)) == (PackedLinear4bit, DequantizedLinear4bit)
        x = torch.randn(2, 5, packed.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        x = x.to(rig.skeleton.dtype)
        results = []
        for linear in (packed, dense):
            leaf = x.clone().requires_grad_()
            output = linear(leaf)
            output.float().square().sum().backward()
            results.append((output, leaf.grad))
    (output, gradient), (expected, expected_gradient) = results
    assert torch.equal(output, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient is not None and gradient.abs().sum() > 0
