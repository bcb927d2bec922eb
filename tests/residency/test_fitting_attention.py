"""Attention brought into the shapes that fused kernels take, against attention as it was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lopt_lite.attention import AttentionCall
from lopt_lite.checkpoints.local_mask import LocalMask
from lopt_lite.residency.fitting_attention import fitting_attention, is_fused

TOKENS = 24


def _inputs(groups: int, key_width: int, value_width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, TOKENS, key_width), (2, groups, TOKENS, key_width), (2, groups, TOKENS, value_width))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def _run(inputs: list[torch.Tensor], **given) -> tuple[list[torch.Tensor], str]:
    output = nn.functional.scaled_dot_product_attention(*inputs, **given)
    node, names = output.grad_fn, []
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    gradient = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)], " ".join(names)


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize(
    "shape", [(4, 16, 8), (4, 8, 16), (1, 16, 16), (1, 24, 16)], ids=["narrow values", "wide", "one head", "both"]
)
def test_it_is_the_same_attention_by_a_fused_kernel(shape, scale):
    inputs = _inputs(*shape)
    expected, slow = _run(inputs, is_causal=True, scale=scale)
    with fitting_attention():
        found, fast = _run(inputs, is_causal=True, scale=scale)
    assert "Flash" in fast
    assert "Flash" not in slow
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_mask_that_says_causal_is_none():
    inputs = _inputs(4, 16, 16)
    mask = LocalMask(torch.Size((2, 1, TOKENS, TOKENS)), TOKENS, chunked=False, device=torch.device("cpu"))
    expected, _ = _run(inputs, attn_mask=mask.dense())
    with fitting_attention():
        found, fast = _run(inputs, attn_mask=mask)
        narrower = LocalMask(mask.shape, TOKENS - 1, chunked=False, device=torch.device("cpu"))
        other, _ = _run(inputs, attn_mask=narrower)
    assert "Flash" in fast
    for one, same in zip(found, expected, strict=True):
        torch.testing.assert_close(one, same)
    assert not torch.allclose(found[0], other[0])


def test_attention_that_fits_is_left_alone():
    inputs = _inputs(4, 16, 16)
    expected, _ = _run(inputs, is_causal=True)
    before = nn.functional.scaled_dot_product_attention
    with fitting_attention():
        found, _ = _run(inputs, is_causal=True)
        assert nn.functional.scaled_dot_product_attention is not before
    assert nn.functional.scaled_dot_product_attention is before
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 16, 8), (2, 16, 16), (1, 16, 16)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("enable_gqa", [False, True])
def test_which_shapes_are_fused_is_known(shape, dropout_p, enable_gqa):
    inputs = _inputs(*shape)
    known = is_fused(AttentionCall(*inputs, dropout_p=dropout_p, enable_gqa=enable_gqa))
    if shape[0] == 2 and not enable_gqa:
        # PyTorch refuses them.
        assert not known
        return
    _, names = _run(inputs, is_causal=True, dropout_p=dropout_p, enable_gqa=enable_gqa)
    assert known == ("Flash" in names)


def test_masks_that_want_a_gradient_are_not_fused():
    inputs = _inputs(4, 16, 16)
    mask = torch.zeros(1, 1, TOKENS, TOKENS)
    for wants in (False, True):
        mask.requires_grad_(wants)
        _, names = _run(inputs, attn_mask=mask)
        assert is_fused(AttentionCall(*inputs, attn_mask=mask)) == ("Flash" in names) != wants
