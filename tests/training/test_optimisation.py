"""Learning rate, clipping and AdamW, against what they should be written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lopt_lite.training.optimisation import learning_rate, make_optimizer, round_at_random, rounded_step
from lopt_lite.training.trained import TrainedParameters


def test_the_rate_rises_for_three_percent_of_the_steps_and_then_falls_along_a_cosine():
    rates = [learning_rate(step, 200, 1.0) for step in range(200)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert rates[6] == 1.0
    for step in range(6, 200):
        assert rates[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 6) / 194)))
    assert 0 < rates[-1] < 1e-3


@given(st.integers(1, 3000), st.floats(1e-8, 10))
def test_every_step_learns_and_none_faster_than_the_peak(steps, peak):
    rates = [learning_rate(step, steps, peak) for step in range(steps)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(peak)


def _parameters(*values: list[float]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(v)) for v in values]


def _trained(parameters: list[nn.Parameter]) -> TrainedParameters:
    """The parameters under control, each in a group of its own."""
    trained = TrainedParameters(storage=None, per_layer=False)
    for number, parameter in enumerate(parameters):
        trained.add(number, {f"{number}.p": parameter})
    trained.begin(scaffolding_only=False)
    return trained


def _step(trained: TrainedParameters, *, lr: float) -> float:
    trained.begin_step(lambda group: lr)
    return trained.end_step(finite=True)


def _adamw_by_hand(values, gradients, rates, *, clip):
    """AdamW without weight decay in float64 lists, gradients clipped over all of a step's values together."""
    m, v = [0.0] * len(values), [0.0] * len(values)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(sum(g * g for g in gradient))
        scale = min(1.0, clip / (norm + 1e-6))
        for i, g in enumerate(x * scale for x in gradient):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            values[i] -= rate * (m[i] / (1 - 0.9**t)) / (math.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
    return values


def test_steps_equal_adamw_written_out_by_hand():
    parameters = _parameters([1.0, -2.0], [0.5])
    trained = _trained(parameters)
    gradients = [[0.3, -0.1, 0.2], [30.0, -10.0, 5.0], [0.0, 0.01, -4.0]]
    rates = [1e-2, 2e-2, 5e-3]
    for gradient, rate in zip(gradients, rates, strict=True):
        parameters[0].grad, parameters[1].grad = torch.tensor(gradient[:2]), torch.tensor(gradient[2:])
        norm = _step(trained, lr=rate)
        assert norm == pytest.approx(math.sqrt(sum(g * g for g in gradient))), "the norm before clipping"
        assert all(p.grad is None for p in parameters)
    expected = _adamw_by_hand([1.0, -2.0, 0.5], gradients, rates, clip=1.0)
    assert torch.cat([p.detach() for p in parameters]).tolist() == pytest.approx(expected, rel=1e-5)


def test_weights_are_not_decayed():
    (parameter,) = _parameters([3.0])
    trained = _trained([parameter])
    parameter.grad = torch.zeros(1)
    _step(trained, lr=0.1)
    assert parameter.item() == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_leaves_weights_and_state_alone(bad):
    parameters = _parameters([1.0, 2.0], [3.0])
    trained = _trained(parameters)
    parameters[0].grad, parameters[1].grad = torch.tensor([0.1, 0.2]), torch.tensor([0.3])
    _step(trained, lr=0.1)
    before = [p.detach().clone() for p in parameters]
    state = {t.name: t.read().clone() for t in trained.state()}
    parameters[0].grad, parameters[1].grad = torch.tensor([0.1, bad]), torch.tensor([0.3])
    assert not math.isfinite(_step(trained, lr=0.1))
    assert all(torch.equal(p.detach(), b) for p, b in zip(parameters, before, strict=True))
    assert state
    assert all(torch.equal(t.read(), state[t.name]) for t in trained.state())
    assert all(p.grad is None for p in parameters), "the bad gradient must not be added to the next one"


def test_rounding_at_random_gives_neighbours_and_the_right_mean():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).repeat(4000, 1)
    rounded = round_at_random(values, torch.Generator().manual_seed(1)).float()
    nearest = values.bfloat16().float()
    spacing = 2.0 ** (values.abs().log2().floor() - 7)
    assert ((rounded - values).abs() < spacing).all()
    assert torch.equal(round_at_random(nearest, torch.Generator().manual_seed(2)).float(), nearest)
    error = (rounded.mean(0) - values[0]).abs() / spacing[0]
    assert error.max() < 0.04
    assert ((nearest[0] - values[0]).abs() / spacing[0]).max() > 0.3


def test_small_steps_add_up_in_bfloat16():
    """Rounding to the nearest would leave every weight where it is."""
    weight = nn.Parameter(torch.full((64, 64), 0.13).bfloat16())
    start = weight.detach().clone()
    optimizer = make_optimizer([weight], eight_bit=True)
    for step in range(100):
        weight.grad = torch.full_like(weight, 1e-3)
        rounded_step(optimizer, {"weight": weight}, norm=torch.tensor(0.1), lr=2e-5, seed=step)
    moved = start.float().mean() - weight.detach().float().mean()
    assert float(moved) == pytest.approx(100 * 2e-5, rel=0.05)
