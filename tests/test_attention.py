"""What layers ask of attention arrives as they ask it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lopt_lite.attention import ATTENTION, AttentionCall, Before, replaced_attention


def _inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 2, 2)]


def test_calls_arrive_and_leave_as_they_were():
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    query, key, value = inputs = _inputs()
    seen: list[AttentionCall] = []

    def attend(call: AttentionCall, before: Before) -> torch.Tensor:
        seen.append(call)
        return before(call)

    with replaced_attention(attend):
        found = [
            nn.functional.scaled_dot_product_attention(*inputs, mask, 0.0, False, scale=0.3, enable_gqa=True),
            nn.functional.scaled_dot_product_attention(
                query=query, key=key, value=value, attn_mask=mask, scale=0.3, enable_gqa=True
            ),
            nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True),
        ]
    assert seen[0] == AttentionCall(query, key, value, mask, scale=0.3, enable_gqa=True)
    assert seen[2] == AttentionCall(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    expected = ATTENTION(*inputs, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
    torch.testing.assert_close(found[2], expected)


def test_replacements_are_asked_from_the_inside_out_and_leave_nothing():
    order: list[str] = []

    def named(name: str):
        def attend(call: AttentionCall, before: Before) -> torch.Tensor:
            order.append(name)
            return before(call)

        return attend

    with pytest.raises(KeyError), replaced_attention(named("outer")), replaced_attention(named("inner")):
        nn.functional.scaled_dot_product_attention(*_inputs(), enable_gqa=True)
        raise KeyError
    assert order == ["inner", "outer"]
    assert nn.functional.scaled_dot_product_attention is ATTENTION
