"""RMS norms in one operation, against the models' own modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lopt_lite.residency import rms_norm
from lopt_lite.residency.fused import fused_modules
from lopt_lite.residency.rms_norm import fuse_norms


def _norm(kind, width=48, dtype=torch.bfloat16, trained=False):
    generator = torch.Generator().manual_seed(0)
    norm = kind(width, eps=1e-5).to(dtype)
    norm.weight.data = torch.randn(width, generator=generator).to(dtype)
    norm.weight.requires_grad_(trained)
    return nn.ModuleDict({"norm": norm})


def _input(shape=(2, 5, 7, 48), dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _run(layer, x):
    x = x.clone().requires_grad_()
    output = layer["norm"](x)
    output.backward(torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype))
    return output.detach(), x.grad


@pytest.fixture(params=[1, 3, 2**16])
def pieces(request, monkeypatch):
    """Tokens in a piece; some do not divide the tokens."""
    monkeypatch.setattr(rms_norm, "_PIECE", request.param * 48)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("pieces")
def test_forward_it_has_the_modules_bits_and_backward_its_gradient(kind, dtype):
    layer, x = _norm(kind, dtype=dtype), _input(dtype=dtype)
    plain, plain_gradient = _run(layer, x)
    fuse_norms(layer)
    fuse_norms(layer)  # once more changes nothing
    with fused_modules():
        fused, gradient = _run(layer, x)
    assert type(layer["norm"]) is not kind
    assert isinstance(layer["norm"], kind)
    assert torch.equal(fused, plain)
    # In float32 but for the last rounding, and one of the gradient times the weight: a few values round elsewhere.
    assert (gradient != plain_gradient).float().mean() < 0.01
    torch.testing.assert_close(gradient.float(), plain_gradient.float(), rtol=2e-2, atol=1e-3)


def test_its_gradient_is_the_exact_one_but_for_rounding():
    layer, x = _norm(LlamaRMSNorm), _input()
    fuse_norms(layer)
    with fused_modules():
        gradient = _run(layer, x)[1].double()
    exact = _float64_gradient(layer["norm"].weight.double(), x.double())
    assert (gradient - exact).norm() / exact.norm() < 4e-3


def _float64_gradient(weight, x):
    x = x.clone().requires_grad_()
    output = weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    output.backward(torch.linspace(-1, 1, x.numel()).view(x.shape).bfloat16().double())
    return x.grad


def test_rows_that_do_not_lie_beside_each_other():
    layer, x = _norm(LlamaRMSNorm), _input()
    fuse_norms(layer)
    with fused_modules():
        assert torch.equal(layer["norm"](x.transpose(1, 2)), layer["norm"](x).transpose(1, 2))


def test_a_norm_that_computes_otherwise_stays_as_it_is():
    layer = _norm(Gemma2RMSNorm)  # multiplies by 1 + weight
    expected, expected_gradient = _run(layer, _input())
    fuse_norms(layer)
    assert type(layer["norm"]) is Gemma2RMSNorm
    with fused_modules():
        found, gradient = _run(layer, _input())
    assert torch.equal(found, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("why", ["float32", "trained", "outside", "other input"])
def test_what_does_not_suit_is_left_to_the_module(why, monkeypatch):
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    layer = _norm(LlamaRMSNorm, dtype=dtype, trained=why == "trained")
    x = _input(dtype=torch.float32 if why == "other input" else dtype)
    expected, expected_gradient = _run(layer, x)
    fuse_norms(layer)
    monkeypatch.setattr(rms_norm._RmsNorm, "apply", lambda *args: pytest.fail("used"))
    with fused_modules():
        if why != "outside":
            found, gradient = _run(layer, x)
    if why == "outside":
        found, gradient = _run(layer, x)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, expected_gradient)


def test_a_module_that_needs_more_than_a_weight_stays_as_it_is():
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) * self.factor

    layer = _norm(OddRMSNorm)
    layer["norm"].factor = 2.0
    fuse_norms(layer)
    assert type(layer["norm"]) is OddRMSNorm
