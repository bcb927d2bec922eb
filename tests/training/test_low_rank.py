"""A linear module and its adapter in one operation, against PEFT's passes in float32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from lopt_lite.residency.fused import fused_modules
from lopt_lite.settings import TrainSettings
from lopt_lite.training import low_rank
from lopt_lite.training.adapters import adapter_parameters, attach_adapter, enable_adapter, set_training
from tests.rig import open_rig
from tests.tiny_models import make_model

KINDS = [("llama", "none", False), ("llama", "nf4", False), ("llama", "nf4", True), ("gpt2", "none", False)]


def _layer(tmp_path: Path, architecture: str, quantize: str, dequantize: bool, dropout: float = 0.0):
    model = make_model(tmp_path / "model", architecture, dtype=torch.bfloat16)
    rig = open_rig(model, tmp_path / "store", quantize=quantize, dtype="bfloat16")
    settings = TrainSettings(model="m", data="d", lora_r=4, lora_dropout=dropout)

    def adapt(index: int, layer: torch.nn.Module) -> None:
        attach_adapter(layer, index, skeleton=rig.skeleton, settings=settings)
        for number, parameter in enumerate(adapter_parameters(layer).values()):
            generator = torch.Generator().manual_seed(number)
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)

    pool = rig.layers(0, 1, dequantize=dequantize, on_layer=adapt)
    recording = rig.skeleton.record(torch.arange(1, 25).view(2, 12), embed=True)
    return pool.layers[0], recording.calls[0], recording.hidden.detach()


def _run(layer, call, hidden):
    """Output, and gradients of the input and of the adapter."""
    entering = hidden.clone().requires_grad_(True)
    for parameter in adapter_parameters(layer).values():
        parameter.grad = None
    output = call.run(layer, entering)
    (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in adapter_parameters(layer).items()}
    return output.detach(), {"input": entering.grad, **grads}


def _error(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(("architecture", "quantize", "dequantize"), KINDS)
def test_it_gives_pefts_numbers_but_for_rounding(tmp_path, architecture, quantize, dequantize):
    layer, call, hidden = _layer(tmp_path, architecture, quantize, dequantize)
    expected, expected_gradients = _run(layer, call, hidden)
    with fused_modules():
        found, gradients = _run(layer, call, hidden)
    assert _error(found, expected) < 2e-2
    for name, gradient in expected_gradients.items():
        assert _error(gradients[name], gradient) < 3e-2, name


@pytest.mark.parametrize(("architecture", "quantize", "dequantize"), KINDS[:3])
def test_it_is_nearer_to_exact_numbers_than_peft_is(tmp_path, architecture, quantize, dequantize):
    """One linear module with its adapter, in float64."""
    layer, _, _ = _layer(tmp_path, architecture, quantize, dequantize)
    module = layer.mlp.down_proj
    x = torch.randn(64, module.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = low_rank._dense(module.base_layer, torch.float64)
    a, b = (half["default"].weight.bfloat16().double() for half in (module.lora_A, module.lora_B))
    expected = x.double() @ (exact + module.scaling["default"] * (b @ a)).t()
    with torch.no_grad():
        peft = _error(module(x), expected)
        with fused_modules():
            fused = _error(module(x), expected)
    assert fused <= peft < 1e-2


def test_dequantised_or_not_it_gives_the_same_bits(tmp_path):
    results = []
    for dequantize in (False, True):
        layer, call, hidden = _layer(tmp_path / str(dequantize), "llama", "nf4", dequantize)
        with fused_modules():
            results.append(_run(layer, call, hidden))
    (one, one_gradients), (other, other_gradients) = results
    assert torch.equal(one, other)
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in one_gradients.items())


@pytest.mark.parametrize("why", ["dropout", "disabled", "outside"])
def test_otherwise_it_is_peft(tmp_path, monkeypatch, why):
    layer, call, hidden = _layer(tmp_path, "llama", "none", False, dropout=0.5 if why == "dropout" else 0.0)
    set_training(layer, why == "dropout")
    enable_adapter(layer, why != "disabled")
    monkeypatch.setattr(low_rank._LowRankLinear, "apply", lambda *args: pytest.fail("used"))
    with torch.no_grad():
        if why == "outside":
            call.run(layer, hidden)
            return
        with fused_modules():
            torch.manual_seed(0)
            inside = call.run(layer, hidden)
        torch.manual_seed(0)
        assert torch.equal(call.run(layer, hidden), inside)


def test_what_does_not_train_gets_no_gradient(tmp_path):
    layer, call, hidden = _layer(tmp_path, "llama", "none", False)
    for name, parameter in adapter_parameters(layer).items():
        parameter.requires_grad_("lora_B" in name)
    before = copy.deepcopy(adapter_parameters(layer))
    with fused_modules():
        call.run(layer, hidden).float().sum().backward()
    for name, parameter in adapter_parameters(layer).items():
        assert (parameter.grad is not None) == ("lora_B" in name)
        assert torch.equal(parameter, before[name])
