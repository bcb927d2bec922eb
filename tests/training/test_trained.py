"""Where trained parameters are, and how many are updated at once, changes no bit of what they become."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lopt_lite.residency.spill import Spill, SpillLimits
from lopt_lite.training.checkpoint import Cursor, restore_checkpoint, save_checkpoint
from lopt_lite.training.trained import TrainedParameters

CPU = torch.device("cpu")
LAYERS = 3


class _Stack:
    """Layers that are used as a streamed pool uses them: entered, run, left; all the way up, and down again."""

    def __init__(
        self,
        directory: Path,
        *,
        offload: bool,
        per_layer: bool,
        eight_bit: bool = False,
        kept_bytes: int = 0,
        dtype: torch.dtype = torch.float32,
        idle: bool = False,
    ) -> None:
        torch.manual_seed(0)
        width = 80
        self.layers = [nn.Linear(width, width).to(dtype) for _ in range(LAYERS)]
        for layer in self.layers if idle else []:
            layer.register_parameter("idle", nn.Parameter(torch.ones(width, dtype=dtype)))
        self.head = nn.Linear(width, 4)
        storage = Spill(SpillLimits(kept_bytes, 0), directory, CPU) if offload else None
        self.trained = TrainedParameters(storage=storage, per_layer=per_layer, eight_bit=eight_bit)
        for index, layer in enumerate(self.layers):
            self.trained.add(index, {f"{index}.{n}": p for n, p in layer.named_parameters()})
            self.trained.leave(index)
        self.trained.add("head", {f"head.{n}": p for n, p in self.head.named_parameters()}, scaffolding=True)

    def step(self, number: int, *, finite: bool = True) -> float:
        self.trained.begin_step(lambda group: 0.01, seed=number)
        hidden = torch.randn(5, 80, generator=torch.Generator().manual_seed(number)) * 3
        inputs = []
        for index, layer in enumerate(self.layers):
            self.trained.enter(index)
            inputs.append(hidden)
            with torch.no_grad():
                hidden = layer(hidden.to(layer.weight.dtype)).tanh().float()
            self.trained.leave(index)
        top = hidden.requires_grad_()
        loss = self.head(top).square().sum() * (1.0 if finite else float("nan"))
        loss.backward()
        gradient = top.grad
        for index in reversed(range(LAYERS)):
            layer, inner = self.layers[index], inputs[index].detach().requires_grad_()
            self.trained.enter(index)
            output = layer(inner.to(layer.weight.dtype)).tanh().float()
            if output.requires_grad and gradient is not None:
                output.backward(gradient)
            gradient = inner.grad
            self.trained.after_backward(index)
            self.trained.leave(index)
        return self.trained.end_step(finite=bool(torch.isfinite(loss)))

    def values(self) -> dict[str, torch.Tensor]:
        return {tensor.name: tensor.read().clone() for tensor in self.trained.parameters()}

    def state(self) -> dict[str, torch.Tensor]:
        return {tensor.name: tensor.read().clone() for tensor in self.trained.state()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


KINDS = [
    {"per_layer": False},
    {"per_layer": True},
    {"per_layer": True, "eight_bit": True, "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("kept_bytes", [0, 40_000, 10**9])
@pytest.mark.parametrize("kind", KINDS, ids=["global", "per layer", "8 bits"])
def test_put_aside_equals_in_place(kind, kept_bytes, tmp_path):
    here = _Stack(tmp_path, offload=False, **kind)
    away = _Stack(tmp_path, offload=True, kept_bytes=kept_bytes, **kind)
    for layers in (False, True):
        here.trained.begin(scaffolding_only=not layers)
        away.trained.begin(scaffolding_only=not layers)
        for number in range(4):
            assert here.step(number) == away.step(number)
    assert _same(here.values(), away.values())
    assert _same(here.state(), away.state())
    start = _Stack(tmp_path, offload=False, **kind).values()
    assert not any(torch.equal(value, start[name]) for name, value in here.values().items())


@pytest.mark.parametrize("kind", KINDS, ids=["global", "per layer", "8 bits"])
def test_what_the_loss_does_not_depend_on_stays_as_it_is(kind, tmp_path):
    """As of a layer's indexer, which only chooses: it gets no gradient."""
    here = _Stack(tmp_path, offload=False, idle=True, **kind)
    away = _Stack(tmp_path, offload=True, idle=True, **kind)
    for stack in (here, away):
        stack.trained.begin(scaffolding_only=False)
    for number in range(2):
        assert here.step(number) == away.step(number)
    save_checkpoint(tmp_path / "c.safetensors", Cursor("train", 2), away.trained)
    resumed = _Stack(tmp_path, offload=True, idle=True, **kind)
    resumed.trained.begin(scaffolding_only=False)
    restore_checkpoint(tmp_path / "c.safetensors", resumed.trained)
    for number in range(2, 4):
        assert here.step(number) == away.step(number) == resumed.step(number)
    for other in (away, resumed):
        assert _same(here.values(), other.values())
    assert all(bool((value == 1).all()) for name, value in here.values().items() if name.endswith("idle"))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=["global", "per layer", "8 bits"])
def test_a_restored_checkpoint_goes_on_as_if_nothing_had_happened(kind, offload, tmp_path):
    whole = _Stack(tmp_path, offload=offload, **kind)
    whole.trained.begin(scaffolding_only=False)
    for number in range(6):
        whole.step(number)
        if number == 2:
            save_checkpoint(tmp_path / "c.safetensors", Cursor("train", 3), whole.trained)
    resumed = _Stack(tmp_path, offload=offload, **kind)
    resumed.trained.begin(scaffolding_only=False)
    restore_checkpoint(tmp_path / "c.safetensors", resumed.trained)
    for number in range(3, 6):
        resumed.step(number)
    assert _same(whole.values(), resumed.values())
    assert _same(whole.state(), resumed.state())


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(per_layer, offload, tmp_path):
    stack = _Stack(tmp_path, offload=offload, per_layer=per_layer)
    stack.trained.begin(scaffolding_only=False)
    stack.step(0)
    values, state = stack.values(), stack.state()
    norm = stack.step(1, finite=False)
    assert norm != norm
    assert _same(values, stack.values())
    assert _same(state, stack.state())
    stack.step(2)
    assert not _same(values, stack.values())


def test_global_clipping_is_pytorchs(tmp_path):
    stack = _Stack(tmp_path, offload=True, per_layer=False)
    plain = _Stack(tmp_path, offload=False, per_layer=False)
    stack.trained.begin(scaffolding_only=False)
    parameters = [p for layer in plain.layers for p in layer.parameters()] + list(plain.head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    for number in range(3):
        norm = stack.step(number)
        hidden = torch.randn(5, 80, generator=torch.Generator().manual_seed(number)) * 3
        for layer in plain.layers:
            hidden = layer(hidden).tanh()
        plain.head(hidden).square().sum().backward()
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(parameters, 1.0)), rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    for value, expected in zip(stack.values().values(), parameters, strict=True):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-7)
