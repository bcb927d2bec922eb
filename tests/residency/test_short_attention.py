"""Attention by plain products of matrices, against PyTorch's own in float32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lopt_lite import float32_products
from lopt_lite.residency import short_attention
from lopt_lite.residency.short_attention import heads_of, transient_bytes
from tests.residency.live_bytes import LiveBytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _with_bfloat16_instructions(monkeypatch):
    """As on a CPU that has them; without them the fused kernel is used."""
    monkeypatch.setattr(float32_products, "_cpu_multiplies_bfloat16", lambda: True)


def _inputs(rows=2, heads=6, groups=2, tokens=40, width=16, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)

    def made(count):
        # As models make them: heads beside each other in a token's row.
        values = torch.randn(rows, tokens, count, width, generator=generator).to(dtype)
        return values.transpose(1, 2).detach().requires_grad_()

    return made(heads), made(groups), made(groups)


def _plain(query, key, value, scale=None, **_):
    """As transformers' ``eager_attention_forward``."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores + torch.full(scores.shape[2:], -torch.inf, dtype=scores.dtype).triu(1)
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value


def _run(tensors, attend=None, **kwargs):
    for tensor in tensors:
        tensor.grad = None
    attend = attend or nn.functional.scaled_dot_product_attention
    output = attend(*tensors, is_causal=True, enable_gqa=True, **kwargs)
    output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype))
    return output.detach().float(), [tensor.grad.float() for tensor in tensors]


def _error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("tokens", [1, 7, 64, 150, 401, 1024])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_it_is_exact_attention_but_for_rounding(groups, tokens, scale):
    tensors = _inputs(groups=groups, tokens=tokens)
    exact, exact_gradients = _run([t.detach().float().requires_grad_() for t in tensors], scale=scale)
    with short_attention.short_attention(CPU):
        output, gradients = _run(tensors, scale=scale)
    assert _error(output, exact) < 1e-2
    # About as exact as transformers' plain attention, though gradients are rounded more often where parts add them up.
    plain, plain_gradients = _run(tensors, scale=scale, attend=_plain)
    assert _error(output, exact) < 1.05 * _error(plain, exact) + 1e-4
    for found, other, expected in zip(gradients, plain_gradients, exact_gradients, strict=True):
        assert tokens < 64 or _error(found, expected) < 1.5 * _error(other, expected) + 1e-4
    # A single token attends to itself whatever its query and key are.
    for found, expected in zip(gradients[tokens == 1 and 2 :], exact_gradients[tokens == 1 and 2 :], strict=True):
        assert _error(found, expected) < 2e-2


@pytest.mark.parametrize("tokens", [40, 150, 401])
def test_a_token_does_not_see_those_behind_it(tokens):
    tensors = _inputs(tokens=tokens)
    with short_attention.short_attention(CPU):
        before, _ = _run(tensors)
        with torch.no_grad():
            for tensor in tensors[1:]:
                tensor[:, :, 20:] = 7.0
        after, _ = _run(tensors)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.equal(before[:, :, 20:], after[:, :, 20:])


@pytest.mark.parametrize("tokens", [100, 143, 144, 190, 401, 768])
def test_in_parts_there_are_no_more_scores_than_the_plan_says(tokens, monkeypatch):
    rows, heads = 2, 2
    tensors = _inputs(rows=rows, heads=heads, groups=1, tokens=tokens)
    monkeypatch.setattr(short_attention, "_group_bytes", lambda: 1)
    width = tensors[0].shape[-1]
    live = LiveBytes(lambda tensor: tensor.dim() > 1 and width not in tensor.shape)  # scores and masks
    with short_attention.short_attention(CPU), live:
        _run(tensors)
    assert 0 < live.peak <= transient_bytes(rows, tokens, heads)


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 3])
def test_scores_exist_as_often_as_the_plan_says(rows_at_a_time, monkeypatch):
    rows, heads, tokens = 3, 6, 40
    tensors = _inputs(rows=rows, heads=heads, groups=1, tokens=tokens)
    keys = 64  # the next multiple of 32
    scores = heads * tokens * keys * rows_at_a_time
    monkeypatch.setattr(short_attention, "_group_bytes", lambda: 2 * scores)
    live = LiveBytes(scores)
    with short_attention.short_attention(CPU), live:
        _run(tensors)
    mask = 2 * heads * tokens * keys
    assert live.peak == transient_bytes(rows, tokens, heads) == 3 * 2 * scores + mask


@pytest.mark.parametrize("tokens", [33, 200])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_how_many_heads_are_worked_on_at_once_changes_nothing(groups, tokens, monkeypatch):
    tensors = _inputs(rows=3, groups=groups, tokens=tokens)
    found = []
    for size in (1, 2**14, 2**30):
        monkeypatch.setattr(short_attention, "_group_bytes", lambda size=size: size)
        with short_attention.short_attention(CPU):
            found.append(_run(tensors))
    for output, gradients in found[1:]:
        assert torch.equal(output, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0][1], strict=True))


def test_the_plan_counts_no_scores_where_it_is_not_used(monkeypatch):
    config = SimpleNamespace(num_attention_heads=4)
    assert heads_of(config, torch.bfloat16) == 4
    assert heads_of(config, torch.float32) == heads_of(SimpleNamespace(), torch.bfloat16) == 0
    assert transient_bytes(8, 40, 0) == 0
    monkeypatch.setattr(float32_products, "_cpu_multiplies_bfloat16", lambda: False)
    assert heads_of(config, torch.bfloat16) == 0


def _mask_of(tensors):
    return torch.ones(tensors[0].shape[2], tensors[0].shape[2], dtype=torch.bool).tril()


@pytest.mark.parametrize("why", ["float32", "long", "mask", "not causal", "outside"])
def test_what_does_not_suit_is_left_to_pytorch(why, monkeypatch):
    tensors = _inputs(dtype=torch.float32 if why == "float32" else torch.bfloat16, groups=6)
    monkeypatch.setattr(short_attention, "LONGEST", 20 if why == "long" else 64)
    kwargs = {"mask": {"attn_mask": _mask_of(tensors)}, "not causal": {}}.get(why, {"is_causal": True})
    expected = nn.functional.scaled_dot_product_attention(*tensors, **kwargs)
    monkeypatch.setattr(short_attention._ShortAttention, "apply", lambda *args: pytest.fail("used"))
    if why == "outside":
        with short_attention.short_attention(CPU):
            pass
        found = nn.functional.scaled_dot_product_attention(*tensors, **kwargs)
    else:
        with short_attention.short_attention(CPU):
            found = nn.functional.scaled_dot_product_attention(*tensors, **kwargs)
    assert torch.equal(found, expected)


def test_an_error_leaves_pytorchs_attention_in_place():
    before = nn.functional.scaled_dot_product_attention
    with pytest.raises(KeyError), short_attention.short_attention(CPU):
        raise KeyError
    assert nn.functional.scaled_dot_product_attention is before


def test_where_products_are_made_in_float32_it_is_not_used(monkeypatch):
    monkeypatch.setattr(float32_products, "_cpu_multiplies_bfloat16", lambda: False)
    fused = nn.functional.scaled_dot_product_attention
    with short_attention.short_attention(CPU):
        assert nn.functional.scaled_dot_product_attention is fused
