"""4-bit matrices: what is read back is what a plain reading of the format says, whatever the width."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from lopt_lite.checkpoints.nf4 import (
    dequantize,
    dequantize_matrix,
    quantize_matrix,
    renewed,
    state_of,
    without_tensors,
)

CPU = torch.device("cpu")
#: The levels of QLoRA (arXiv:2305.14314), appendix E.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SHAPES = [(16, 32), (64, 64), (64, 96), (33, 80), (96, 160), (8, 192), (1, 64), (10, 130), (7, 33), (32, 33), (64, 100)]


def _read_plainly(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Two values a byte, the high half first; each block of 64 has a scale, itself stored in 8 bits."""
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    halves = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)
    elements = state.shape.numel()
    levels = torch.tensor(LEVELS)[halves.long()][:elements]
    return (levels * scales.repeat_interleave(64)[:elements]).reshape(state.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_any_width_is_read_as_the_format_says(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    tensors = quantize_matrix("w", weight, dtype=dtype, device=CPU)
    plain = _read_plainly(tensors["w"], state_of("w", tensors, CPU))
    read = dequantize_matrix("w", tensors, CPU)
    assert (read.dtype, read.shape) == (dtype, shape)
    torch.testing.assert_close(read, plain.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    # A tenth is what 4 bits cost normally distributed values.
    assert float((read.float() - weight).norm() / weight.norm()) < 0.12


def test_widths_that_bitsandbytes_reads_rightly_keep_its_bits():
    torch.manual_seed(0)
    tensors = quantize_matrix("w", torch.randn(48, 192), dtype=torch.bfloat16, device=CPU)
    state = state_of("w", tensors, CPU)
    assert torch.equal(dequantize(tensors["w"], state), bnb.dequantize_4bit(tensors["w"], state))


def test_a_state_that_is_known_is_renewed_without_looking_at_values(monkeypatch):
    torch.manual_seed(0)
    tensors = quantize_matrix("w", torch.randn(48, 96), dtype=torch.bfloat16, device=CPU)
    known = without_tensors(state_of("w", tensors, CPU))
    assert known.absmax is known.code is known.state2.absmax is known.state2.code is None
    expected = dequantize_matrix("w", tensors, CPU)
    elsewhere = {name: tensor.clone() for name, tensor in tensors.items()}
    monkeypatch.setattr(bnb.QuantState, "from_dict", None)
    assert torch.equal(dequantize(elsewhere["w"], renewed(known, "w", elsewhere, CPU)), expected)
