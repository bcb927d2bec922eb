"""Attention to nearby tokens, part by part, against attention that is given the dense mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lopt_lite.checkpoints import local_mask
from lopt_lite.checkpoints.layer_calls import LayerCall
from lopt_lite.checkpoints.local_mask import LocalMask, without_dense_masks
from tests.residency.live_bytes import LiveBytes

CPU = torch.device("cpu")
attention = nn.functional.scaled_dot_product_attention


def _mask(tokens: int, size: int, *, chunked: bool, rows: int = 2) -> torch.Tensor:
    """From the definition, pair by pair, and as transformers hands it out: one for all rows."""
    pairs = [
        [k <= q and (q // size == k // size if chunked else q - k < size) for k in range(tokens)] for q in range(tokens)
    ]
    return torch.tensor(pairs)[None, None].expand(rows, 1, tokens, tokens)


def _call(*masks: torch.Tensor | None) -> list[LayerCall]:
    return [LayerCall((), {"attention_mask": mask, "use_cache": False}, None) for mask in masks]


def _local(mask: torch.Tensor) -> LocalMask:
    (call,) = without_dense_masks(_call(mask))
    found = call.kwargs["attention_mask"]
    assert isinstance(found, LocalMask)
    return found


def _inputs(tokens: int, *, rows: int = 2, groups: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 4, tokens, 16), (rows, groups, tokens, 16), (rows, groups, tokens, 8))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    """Short rows too."""
    monkeypatch.setattr(local_mask, "_SHORT_ROW", 0)


def test_short_rows_have_the_bits_of_the_dense_mask(monkeypatch):
    monkeypatch.undo()
    for tokens, in_parts in ((64, False), (65, True)):
        mask, inputs = _mask(tokens, 40, chunked=False), [t.float() for t in _inputs(tokens, groups=4)]
        outputs = [attention(*inputs, attn_mask=given) for given in (mask, _local(mask))]
        assert ("LocalAttention" in outputs[1].grad_fn.name()) == in_parts
        assert in_parts or torch.equal(*outputs)
        torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("tokens", "size"), [(40, 7), (70, 1), (100, 64), (200, 60), (300, 130), (130, 129)])
@pytest.mark.parametrize("groups", [1, 4])
def test_it_is_attention_with_the_dense_mask(tokens, size, chunked, groups):
    mask, inputs = _mask(tokens, size, chunked=chunked), _inputs(tokens, groups=groups)
    local = _local(mask)
    assert (local.size, local.shape) == (size, mask.shape)
    ways = []
    for given in (mask, local):
        output = attention(*inputs, attn_mask=given, scale=0.3, enable_gqa=True)
        gradient = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        ways.append([output.detach(), *torch.autograd.grad(output, inputs, gradient)])
    for expected, found in zip(*ways, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunked", [False, True])
def test_whoever_looks_at_values_gets_them(chunked):
    mask = _mask(20, 6, chunked=chunked)
    local = _local(mask)
    assert (local.dtype, local.ndim, local.shape, local.device.type) == (torch.bool, 4, mask.shape, "cpu")
    assert torch.equal(local[:, :, 3:, :7], mask[:, :, 3:, :7])
    scores = torch.randn(2, 4, 20, 20)
    assert torch.equal(scores.masked_fill(~local, -1.0), scores.masked_fill(~mask, -1.0))
    assert type(local.float()) is torch.Tensor
    other = local.on("meta")
    assert isinstance(other, LocalMask)
    assert (other.is_meta, other.size, other.chunked) == (True, 6, chunked)


@pytest.mark.parametrize(
    "given",
    [{"dropout_p": 0.5}, {"fewer keys": True}],
)
def test_attention_of_another_kind_gets_the_dense_mask(given):
    mask, (query, key, value) = _mask(20, 6, chunked=False), _inputs(20, groups=4)
    local = _local(mask)
    if given.pop("fewer keys", False):
        query, mask, local = query[:, :, 5:], mask[:, :, 5:], local[:, :, 5:]
    outputs = []
    for each in (mask, local):
        torch.manual_seed(0)
        outputs.append(attention(query, key, value, attn_mask=each, **given))
    assert torch.equal(*outputs)


def test_masks_that_say_something_else_stay():
    window = _mask(20, 6, chunked=False)
    of_each_row = window.clone()
    of_each_row[1, :, :, 0] = False
    hole = _mask(20, 6, chunked=False, rows=1).clone()
    hole[..., 12, 9] = False
    both_ways = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    nothing = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    wide = torch.ones(2, 1, 20, 24, dtype=torch.bool)
    calls = _call(None, of_each_row, hole, both_ways, nothing, wide, torch.ones(2, 20, dtype=torch.bool))
    assert without_dense_masks(calls) is calls
    floats = _call(torch.zeros(1, 1, 20, 20))
    assert without_dense_masks(floats) is floats


def test_layers_that_share_a_mask_share_what_stands_for_it():
    window = _mask(20, 6, chunked=False)
    first, full, second = without_dense_masks(_call(window, None, window))
    assert first.kwargs["attention_mask"] is second.kwargs["attention_mask"]
    assert full.kwargs == {"attention_mask": None, "use_cache": False}


def test_nothing_exists_of_all_pairs_of_tokens():
    tokens, inputs = 600, _inputs(600, rows=1)
    local = LocalMask(torch.Size((1, 1, tokens, tokens)), 100, chunked=False, device=CPU)
    dense, without = LiveBytes(tokens * tokens), LiveBytes(tokens * tokens)
    for live, mask in ((dense, local.dense()), (without, local)):
        with live:
            attention(*inputs, attn_mask=mask, enable_gqa=True).sum().backward()
    assert without.peak == 0 < dense.peak


def test_parts_are_of_few_pairs():
    """A window's parts see little more than the window; and no part is so small that there are very many of them."""
    for size in (1, 100, 512, 4096):
        mask = LocalMask(torch.Size((1, 1, 8192, 8192)), size, chunked=False, device=CPU)
        parts = list(local_mask._Parts(mask, 8192, torch.float32))
        assert [q.start for q, _, _ in parts] == [0, *(q.stop for q, _, _ in parts[:-1])]
        assert parts[-1][0].stop == 8192
        pairs = sum((q.stop - q.start) * (k.stop - k.start) for q, k, _ in parts)
        assert pairs <= 8192 * (size + max(size / 2, local_mask._FEWEST_QUERIES))
        assert len(parts) <= 2 + 8192 // local_mask._FEWEST_QUERIES


def test_all_parts_of_all_rows_share_one_bias():
    biases = set()
    for tokens in (150, 1000):
        mask = LocalMask(torch.Size((1, 1, tokens, tokens)), 100, chunked=False, device=CPU)
        for _, _, seen in local_mask._Parts(mask, tokens, torch.bfloat16):
            if "attn_mask" in seen:
                storage = seen["attn_mask"].untyped_storage()
                biases.add((storage._cdata, storage.nbytes()))
    assert [nbytes for _, nbytes in biases] == [local_mask.bias_bytes(100, torch.bfloat16)]


def test_what_cannot_be_done_is_not_done_in_silence():
    mask, inputs = _local(_mask(200, 60, chunked=False)), _inputs(200, groups=4)
    output = attention(*inputs, attn_mask=mask).sum()
    torch.autograd.grad(output, inputs, retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(output, inputs)
    with pytest.raises(RuntimeError, match="no values of its own"):
        mask &= torch.ones_like(mask)
    with pytest.raises(RuntimeError, match="no values of its own"):
        mask[..., 0] = False
