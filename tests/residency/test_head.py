"""Chunked cross-entropy equals the plain one, in value and gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from lopt_lite.residency import head
from tests.rig import open_rig
from tests.tiny_models import make_model


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_chunked_loss_and_gradient_equal_plain_cross_entropy(
    architecture: str, chunk_tokens: int, tmp_path: Path
) -> None:
    rig = open_rig(make_model(tmp_path / "m", architecture), tmp_path / "s", quantize="none", dtype="float32")
    elements = chunk_tokens * rig.skeleton.vocabulary_rows
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2, 9, rig.skeleton.hidden_size, generator=generator, requires_grad=True)
    targets = torch.randint(0, 200, (2, 9), generator=generator)
    targets[0, :4] = -100
    targets[1, 7:] = -100
    plain = output.detach().clone().requires_grad_()
    logits = torch.stack([rig.skeleton.logits(row) for row in plain])
    expected = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / 21
    expected.backward()

    got = head.answer_loss_backward(rig.skeleton, output, targets, answer_tokens=21, logit_elements=elements)

    assert got == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(output.grad, plain.grad, rtol=1e-5, atol=1e-7)
    assert head.answer_loss_sum(rig.skeleton, output.detach(), targets, logit_elements=elements) == pytest.approx(
        21 * got, rel=1e-6
    )
