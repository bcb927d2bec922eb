"""The loss in chunks and slices equals the plain one, in value and gradient, and costs what is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lopt_lite.residency.head import AnswerHead, open_head, place_head
from lopt_lite.residency.head_cost import HeadShapes, head_bytes, logit_bytes
from lopt_lite.residency.sliced_head import SlicedHead
from tests.residency.live_bytes import LiveBytes
from tests.rig import CPU, Rig, open_rig
from tests.tiny_models import make_model

OpenRig = Callable[..., Rig]
ANSWERS = 14


def _batch(rig: Rig, *, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of outputs and targets, of which ``ANSWERS`` count; targets at both ends of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2, 9, rig.skeleton.hidden_size, generator=generator) * scale
    targets = torch.randint(0, rig.skeleton.vocabulary_rows, (2, 9), generator=generator)
    targets[0, 8], targets[1, 0], targets[1, 1] = 0, rig.skeleton.vocabulary_rows - 1, 0
    targets[0, :2] = targets[1, 7:] = -100
    return output.to(rig.skeleton.dtype), targets


def _plain(rig: Rig, output: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Loss and gradient by the formula that everyone uses."""
    place_head(rig.skeleton, rig.store, CPU)
    leaf = output.detach().clone().requires_grad_()
    logits = torch.stack([rig.skeleton.logits(row) for row in leaf]).flatten(0, 1).float()
    loss = functional.cross_entropy(logits, targets.flatten(), reduction="sum") / ANSWERS
    loss.backward()
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad


def _open(rig: Rig, rows: int | None, chunk_tokens: int = 1000, **kwargs: Any) -> AnswerHead:
    columns = max(rig.skeleton.hidden_size, rows or rig.skeleton.vocabulary_rows)
    return open_head(
        rig.skeleton, rig.store, device=CPU, logit_elements=chunk_tokens * columns, slice_rows=rows, **kwargs
    )


def _loss(head: AnswerHead, output: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    leaf = output.detach().clone().requires_grad_()
    loss = head.loss_backward(leaf, targets, answer_tokens=ANSWERS)
    assert leaf.grad is not None
    return loss, leaf.grad


ALL = ["llama", "llama-tied", "gemma2", "granite", "cohere", "opt", "phi"]


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("rows", [None, 7, 100, 10_000])
@pytest.mark.parametrize("chunk_tokens", [3, 1000])
def test_loss_and_gradient_equal_plain_cross_entropy(
    architecture: str, rows: int | None, chunk_tokens: int, rig_of: OpenRig
) -> None:
    rig = rig_of(architecture)
    output, targets = _batch(rig)
    expected, gradient = _plain(rig, output, targets)
    head = _open(rig, rows, chunk_tokens)

    got, got_gradient = _loss(head, output, targets)

    assert got == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-7)
    assert head.loss_sum(output, targets) == pytest.approx(ANSWERS * expected, rel=1e-6)
    head.close()


def test_slices_of_one_row_and_chunks_of_one_token_do_too(rig_of: OpenRig) -> None:
    rig = rig_of("phi", hidden_size=16, num_attention_heads=2)
    output, targets = _batch(rig)
    expected, gradient = _plain(rig, output, targets)
    head = _open(rig, 1, 1)
    got, got_gradient = _loss(head, output, targets)
    head.close()
    assert got == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [None, 50])
def test_nothing_to_predict_is_no_loss_and_no_gradient(rows: int | None, rig_of: OpenRig) -> None:
    rig = rig_of("llama")
    output, targets = _batch(rig)
    head = _open(rig, rows)
    output.requires_grad_()
    assert head.loss_backward(output, torch.full_like(targets, -100), answer_tokens=ANSWERS) == 0.0
    assert head.loss_sum(output.detach(), torch.full_like(targets, -100)) == 0.0
    assert output.grad is None
    head.close()


@pytest.mark.parametrize("scaling", [4.0, 0.2, 0.05])
@pytest.mark.parametrize("rows", [None, 7, 100])
def test_bfloat16_is_as_good_in_slices_as_plain_also_for_sure_predictions(
    scaling: float, rows: int | None, rig_of: OpenRig
) -> None:
    exact_rig = rig_of("granite", logits_scaling=scaling)
    rig = rig_of("granite", "bfloat16", logits_scaling=scaling)
    output, targets = _batch(rig)
    # What the head says most likely, so that losses are small and gradients are small differences.
    place_head(exact_rig.skeleton, exact_rig.store, CPU)
    best = torch.stack([exact_rig.skeleton.logits(row) for row in output.float()]).argmax(-1)
    targets = torch.where(targets == -100, targets, best)
    exact, exact_gradient = _plain(exact_rig, output.float(), targets)
    plain, plain_gradient = _plain(rig, output, targets)
    head = _open(rig, rows)
    got, gradient = _loss(head, output, targets)
    head.close()

    assert abs(got - exact) <= 2 * abs(plain - exact) + 1e-6
    plain_error = (plain_gradient.float() - exact_gradient).norm()
    assert (gradient.float() - exact_gradient).norm() <= 2 * plain_error


@pytest.mark.parametrize("rows", [None, 1, 7, 100])
def test_huge_logits_stay_finite_and_exact(rows: int | None, rig_of: OpenRig) -> None:
    rig = rig_of("granite", logits_scaling=1e-4)
    output, targets = _batch(rig)
    expected, gradient = _plain(rig, output, targets)
    assert expected > 1e4
    head = _open(rig, rows)
    got, got_gradient = _loss(head, output, targets)
    head.close()
    assert got == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [None, 1, 100])
@pytest.mark.parametrize("trouble", ["nan", "infinite logits"])
def test_a_loss_that_is_not_finite_is_returned(trouble: str, rows: int | None, rig_of: OpenRig) -> None:
    rig = rig_of("granite", logits_scaling=1e-40) if trouble == "infinite logits" else rig_of("llama")
    output, targets = _batch(rig)
    if trouble == "nan":
        output[0, 5, 3] = math.nan
    assert not math.isfinite(_plain(rig, output, targets)[0])
    head = _open(rig, rows)
    assert not math.isfinite(_loss(head, output, targets)[0])
    assert not math.isfinite(head.loss_sum(output, targets))
    head.close()


def test_an_infinite_logit_of_the_target_is_no_perfect_prediction(rig_of: OpenRig) -> None:
    rig = rig_of("granite", logits_scaling=6e-39)
    output, targets = _batch(rig)
    place_head(rig.skeleton, rig.store, CPU)
    logits = torch.stack([rig.skeleton.logits(row) for row in output])
    infinite = ((logits == math.inf).sum(-1) == 1) & (targets != -100)
    assert infinite.any()
    targets = torch.where(infinite, logits.argmax(-1), -100)
    head = _open(rig, 40)
    assert math.isnan(head.loss_sum(output, targets))
    head.close()


@pytest.mark.parametrize("prefetch", [True, False])
def test_each_loss_reads_each_slice_once(prefetch: bool, rig_of: OpenRig) -> None:
    rig = rig_of("llama")
    output, targets = _batch(rig)
    slices = -(-rig.skeleton.vocabulary_rows // 50)
    head = _open(rig, 50, 2, prefetch=prefetch)
    assert isinstance(head, SlicedHead)
    _loss(head, output, targets)
    # Reading ahead, the first slice of the next loss is on its way already.
    assert head.loads == slices + prefetch
    for again in (_loss, lambda head, *batch: head.loss_sum(*batch)):
        before = head.loads
        again(head, output, targets)
        # Not reading ahead, a slice that is still in a slab is not read at all.
        assert slices - (not prefetch) <= head.loads - before <= slices
    head.close()


@pytest.mark.parametrize("architecture", ["gemma2", "phi"])
def test_reading_ahead_changes_no_bit(architecture: str, rig_of: OpenRig) -> None:
    rig = rig_of(architecture)
    output, targets = _batch(rig)
    results = []
    for prefetch in (True, False):
        head = _open(rig, 30, 4, prefetch=prefetch)
        results += [_loss(head, output, targets) for _ in range(2)]
        head.close()
    for loss, gradient in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(gradient, results[0][1])


def test_a_head_stored_in_another_type_is_cast_slice_by_slice(rig_of: OpenRig) -> None:
    rig = rig_of("llama", quantize="nf4")
    assert rig.store.head(rig.skeleton)[0].dtype == torch.bfloat16
    assert rig.skeleton.dtype == torch.float32
    output, targets = _batch(rig)
    expected, gradient = _plain(rig, output, targets)
    head = _open(rig, 100)
    got, got_gradient = _loss(head, output, targets)
    head.close()
    assert got == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-7)


def test_slices_of_no_rows_are_refused(rig_of: OpenRig) -> None:
    rig = rig_of("llama")
    with pytest.raises(ValueError, match="slices of 0 rows"):
        _open(rig, 0)
    rows = rig.skeleton.vocabulary_rows
    with pytest.raises(ValueError, match=f"an LM head of {rows} rows"):
        rig.store.head_view(rig.skeleton, rows - 1, rows + 1)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi", "gpt2"])
def test_a_sliced_head_generates_what_a_whole_one_does(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", architecture)
    written = []
    for rows in (None, 64):
        rig = open_rig(model, tmp_path / "s", quantize="none", dtype="float32")
        head = _open(rig, rows)
        head.place_for_generation()
        with rig.layers() as pool:
            generator = rig.skeleton.with_layers(pool.modules())
            ids = torch.tensor([[5, 17, 40, 9]])
            written.append(
                generator.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None
                )
            )
        head.close()
        rig.store.close()
    assert written[0].shape == (1, 16)
    assert torch.equal(written[0], written[1])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "cohere", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [None, 97])
def test_logits_take_the_memory_that_is_foretold(
    architecture: str, dtype: str, rows: int | None, rig_of: OpenRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of(architecture, dtype)
    shapes = HeadShapes.of(
        rig.skeleton.config, stored=rig.store.head(rig.skeleton)[0].dtype, compute=rig.skeleton.dtype
    )
    elements = 11 * (rows or rig.skeleton.vocabulary_rows)
    head = open_head(rig.skeleton, rig.store, device=CPU, logit_elements=elements, slice_rows=rows)
    output = torch.randn(1, 44, rig.skeleton.hidden_size).to(rig.skeleton.dtype).requires_grad_()
    targets = torch.arange(44)[None]
    # Pieces of a real model's logits are small beside them; they are not counted.
    monkeypatch.setattr("lopt_lite.residency.logits._CPU_PIECE", 1)
    with LiveBytes(elements) as counted:
        head.loss_backward(output, targets, answer_tokens=44)
    assert counted.peak == logit_bytes(shapes, elements, rows, gradient=True)
    with LiveBytes(elements) as counted:
        head.loss_sum(output.detach(), targets)
    assert counted.peak == logit_bytes(shapes, elements, rows, gradient=False)
    head.close()


def test_bytes_of_the_weight_whole_in_slices_and_cast() -> None:
    same = HeadShapes(1000, 64, torch.bfloat16, torch.bfloat16, scaled=False, capped=False)
    assert head_bytes(same, None) == 1000 * 64 * 2
    assert head_bytes(same, 100) == 2 * 100 * 64 * 2
    assert head_bytes(same, 5000) == 2 * 1000 * 64 * 2
    cast = HeadShapes(1000, 64, torch.bfloat16, torch.float32, scaled=False, capped=False)
    assert head_bytes(cast, 100) == 100 * 64 * (2 * 2 + 4)
