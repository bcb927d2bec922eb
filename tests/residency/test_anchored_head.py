"""The anchored loss in chunks and slices equals the plain one; so do the gradients of a head that is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lopt_lite.residency.anchors import Anchors, compare
from lopt_lite.residency.head import AnswerHead, open_head, output_parameters, place_head
from lopt_lite.residency.head_cost import HeadShapes, anchor_bytes, answer_bytes, logit_bytes
from lopt_lite.residency.sliced_head import SlicedHead
from tests.residency.live_bytes import LiveBytes
from tests.rig import CPU, Rig, open_rig
from tests.tiny_models import make_model

OpenRig = Callable[..., Rig]
ANSWERS, ANCHORED = 14, 11
WEIGHT = 0.7


def _batch(rig: Rig, *, drift: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, Anchors]:
    """Three rows: two with a prompt that is anchored in part and answers, one with anchored text alone."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(3, 9, rig.skeleton.hidden_size, generator=generator)
    targets = torch.randint(0, rig.skeleton.vocabulary_rows, (3, 9), generator=generator)
    targets[:2, :2] = targets[2] = -100
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 1] = mask[1, :2] = mask[2, :8] = True
    assert int((targets != -100).sum()) == ANSWERS and int(mask.sum()) == ANCHORED
    base = output[mask] + drift * torch.randn(ANCHORED, rig.skeleton.hidden_size, generator=generator)
    dtype = rig.skeleton.dtype
    return output.to(dtype), targets, Anchors(mask, base.to(dtype), tokens=ANCHORED, weight=WEIGHT)


def _logits(rig: Rig, hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([rig.skeleton.logits(row) for row in hidden.split(4)]).float()


def _every_third(rig: Rig) -> torch.Tensor:
    """Tokens to compare at, the last one of the vocabulary among them."""
    return torch.arange(rig.skeleton.vocabulary_rows).flip(0)[::3].flip(0)


def _plain(
    rig: Rig, output: torch.Tensor, targets: torch.Tensor, anchors: Anchors, compared: torch.Tensor | None = None
) -> tuple[tuple[float, float], torch.Tensor]:
    """Loss, divergence and gradient by the formulas that everyone uses, on all logits.

    The divergence of float32 logits is taken in float64: small ones would have too few digits.
    """
    place_head(rig.skeleton, rig.store, CPU)
    columns = torch.arange(rig.skeleton.vocabulary_rows) if compared is None else compared
    leaf = output.detach().clone().requires_grad_()
    tuned = _logits(rig, leaf.flatten(0, 1))
    with torch.no_grad():
        base = _logits(rig, anchors.base)[:, columns].double().log_softmax(1)
    loss = functional.cross_entropy(tuned, targets.flatten(), reduction="sum") / ANSWERS
    chosen = tuned[anchors.mask.flatten()][:, columns].double().log_softmax(1)
    kl = functional.kl_div(chosen, base, reduction="sum", log_target=True) / anchors.tokens
    (loss + anchors.weight * kl).backward()
    assert leaf.grad is not None
    return (float(loss.detach()), float(kl.detach())), leaf.grad


def _open(
    rig: Rig, rows: int | None, chunk_tokens: int = 1000, compared: torch.Tensor | None = None, **kwargs: Any
) -> AnswerHead:
    columns = max(rig.skeleton.hidden_size, rows or rig.skeleton.vocabulary_rows)
    return open_head(
        rig.skeleton,
        rig.store,
        device=CPU,
        logit_elements=chunk_tokens * columns,
        slice_rows=rows,
        compared=torch.arange(rig.skeleton.vocabulary_rows) if compared is None else compared,
        **kwargs,
    )


def _open_without_anchor(rig: Rig, rows: int | None, chunk_tokens: int = 1000) -> AnswerHead:
    columns = max(rig.skeleton.hidden_size, rows or rig.skeleton.vocabulary_rows)
    return open_head(rig.skeleton, rig.store, device=CPU, logit_elements=chunk_tokens * columns, slice_rows=rows)


def _loss(
    head: AnswerHead, output: torch.Tensor, targets: torch.Tensor, anchors: Anchors, answer_tokens: int = ANSWERS
) -> tuple[tuple[float, float], torch.Tensor]:
    leaf = output.detach().clone().requires_grad_()
    losses = head.anchored_loss_backward(leaf, targets, anchors, answer_tokens=answer_tokens)
    return losses, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _empty(rig: Rig, anchors: Anchors, tokens: int = ANCHORED) -> Anchors:
    """Of the same step, in a micro-batch without anchored tokens."""
    none = anchors.base.new_empty(0, rig.skeleton.hidden_size)
    return dataclasses.replace(anchors, mask=torch.zeros_like(anchors.mask), base=none, tokens=tokens)


ALL = ["llama", "llama-tied", "gemma2", "granite", "cohere", "opt", "phi"]


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("rows", [None, 7, 100, 10_000])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_losses_and_gradient_equal_plain_ones(
    architecture: str, rows: int | None, chunk_tokens: int, rig_of: OpenRig
) -> None:
    rig = rig_of(architecture)
    batch = _batch(rig)
    (loss, kl), gradient = _plain(rig, *batch)
    head = _open(rig, rows, chunk_tokens)

    (got, got_kl), got_gradient = _loss(head, *batch)
    head.close()

    assert got == pytest.approx(loss, rel=1e-6)
    assert got_kl == pytest.approx(kl, rel=1e-5)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("rows", [None, 40])
@pytest.mark.parametrize("chunk_tokens", [1, 1000])
def test_predictions_are_compared_among_the_tokens_asked_for(
    architecture: str, rows: int | None, chunk_tokens: int, rig_of: OpenRig
) -> None:
    rig = rig_of(architecture)
    batch, compared = _batch(rig), _every_third(rig)
    (loss, kl), gradient = _plain(rig, *batch, compared)
    head = _open(rig, rows, chunk_tokens, compared)

    (got, got_kl), got_gradient = _loss(head, *batch)
    (again, _), _ = _loss(head, *batch)
    head.close()

    # The answers' loss, before and after, is that of the whole vocabulary.
    assert [got, again] == pytest.approx([loss, loss], rel=1e-6)
    assert got_kl == pytest.approx(kl, rel=1e-5)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [None, 40])
def test_micro_batches_add_up_to_the_step(rows: int | None, rig_of: OpenRig) -> None:
    rig = rig_of("gemma2")
    output, targets, anchors = _batch(rig)
    head = _open(rig, rows)
    (loss, kl), gradient = _loss(head, output, targets, anchors)
    parts = []
    for number in range(len(output)):
        of_row = anchors.mask[: number + 1].sum() - anchors.mask[number].sum()
        base = anchors.base[of_row : of_row + anchors.mask[number].sum()]
        row = dataclasses.replace(anchors, mask=anchors.mask[number, None], base=base)
        parts.append(_loss(head, output[number, None], targets[number, None], row))
    head.close()
    assert sum(losses[0] for losses, _ in parts) == pytest.approx(loss, rel=1e-6)
    assert sum(losses[1] for losses, _ in parts) == pytest.approx(kl, rel=1e-5)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [None, 40])
def test_gradients_add_up_where_an_answer_is_anchored(rows: int | None, rig_of: OpenRig) -> None:
    rig = rig_of("llama")
    output, targets, anchors = _batch(rig)
    mask = targets != -100
    both = dataclasses.replace(anchors, mask=mask, base=output[mask] + 0.3, tokens=ANSWERS)
    (loss, kl), gradient = _plain(rig, output, targets, both)
    head = _open(rig, rows)
    (got, got_kl), got_gradient = _loss(head, output, targets, both)
    head.close()
    assert (got, got_kl) == pytest.approx((loss, kl), rel=1e-5)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [None, 40])
def test_an_untouched_model_has_no_divergence_at_all(
    architecture: str, dtype: str, rows: int | None, rig_of: OpenRig
) -> None:
    rig = rig_of(architecture, dtype)
    output, targets, anchors = _batch(rig, drift=0.0)
    head = _open(rig, rows, 5)
    (loss, kl), gradient = _loss(head, output, targets, anchors)
    alone = _loss(head, output, torch.full_like(targets, -100), anchors, 0)
    leaf = output.clone().requires_grad_()
    plain = head.loss_backward(leaf, targets, answer_tokens=ANSWERS)
    head.close()
    assert kl == 0.0
    assert alone[0] == (0.0, 0.0)
    assert not alone[1].any()
    assert loss == plain
    assert torch.equal(gradient, leaf.grad)


@pytest.mark.parametrize("rows", [None, 40])
def test_without_anchored_tokens_it_is_the_plain_loss(rows: int | None, rig_of: OpenRig) -> None:
    rig = rig_of("llama")
    output, targets, anchors = _batch(rig)
    head = _open(rig, rows)
    leaf = output.clone().requires_grad_()
    plain = head.loss_backward(leaf, targets, answer_tokens=ANSWERS)
    for tokens in (ANCHORED, 0):
        losses, gradient = _loss(head, output, targets, _empty(rig, anchors, tokens))
        assert losses == (plain, 0.0)
        assert torch.equal(gradient, leaf.grad)
    head.close()


@pytest.mark.parametrize("rows", [None, 40])
def test_without_answers_it_is_the_divergence_alone(rows: int | None, rig_of: OpenRig) -> None:
    rig = rig_of("llama")
    output, targets, anchors = _batch(rig)
    (_, kl), _ = _plain(rig, output, targets, anchors)
    head = _open(rig, rows)
    no_answers = torch.full_like(targets, -100)
    (loss, got_kl), gradient = _loss(head, output, no_answers, anchors, answer_tokens=0)
    (_, _), with_answers = _loss(head, output, targets, anchors)
    assert loss == 0.0
    assert got_kl == pytest.approx(kl, rel=1e-5)
    assert torch.equal(gradient[anchors.mask], with_answers[anchors.mask])
    assert not gradient[~anchors.mask].any()
    # And nothing at all is no loss, no gradient and no reading.
    leaf = output.clone().requires_grad_()
    read = head.loads if isinstance(head, SlicedHead) else 0
    assert head.anchored_loss_backward(leaf, no_answers, _empty(rig, anchors), answer_tokens=0) == (0.0, 0.0)
    assert leaf.grad is None
    assert read == (head.loads if isinstance(head, SlicedHead) else 0)
    head.close()


def test_states_for_other_positions_are_refused(rig_of: OpenRig) -> None:
    rig = rig_of("llama")
    output, targets, anchors = _batch(rig)
    short = dataclasses.replace(anchors, base=anchors.base[1:])
    for rows in (None, 40):
        head = _open(rig, rows)
        with pytest.raises(ValueError, match=r"base states of shape \[10, 32\] for anchored ones of \[11, 32\]"):
            _loss(head, output, targets, short)
        head.close()


@pytest.mark.parametrize("prefetch", [True, False])
def test_anchored_tokens_read_no_slice(prefetch: bool, rig_of: OpenRig) -> None:
    rig = rig_of("llama")
    output, targets, anchors = _batch(rig)
    slices = -(-rig.skeleton.vocabulary_rows // 50)
    head = _open(rig, 50, 2, prefetch=prefetch)
    assert isinstance(head, SlicedHead)
    first = _loss(head, output, targets, anchors)
    # Reading ahead, the first slice of the next loss is on its way already.
    assert slices - 1 <= head.loads <= slices + 1
    read = head.loads
    _loss(head, output, torch.full_like(targets, -100), anchors, answer_tokens=0)
    assert head.loads == read
    again = _loss(head, output, targets, anchors)
    head.close()
    assert again[0] == first[0]
    assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("drift", [0.02, 0.5])
@pytest.mark.parametrize("architecture", ["gemma2", "granite"])
def test_bfloat16_is_as_good_in_slices_as_whole(architecture: str, drift: float, rig_of: OpenRig) -> None:
    exact_rig, rig = rig_of(architecture), rig_of(architecture, "bfloat16")
    output, targets, anchors = _batch(rig, drift=drift)
    same = dataclasses.replace(anchors, base=anchors.base.float())
    (_, kl), gradient = _plain(exact_rig, output.float(), targets, same)
    (_, plain_kl), plain_gradient = _plain(rig, output, targets, anchors)
    plain_error = (plain_gradient.float() - gradient)[anchors.mask].norm()
    for rows in (None, 7, 100):
        head = _open(rig, rows)
        (_, got_kl), got_gradient = _loss(head, output, targets, anchors)
        head.close()
        assert abs(got_kl - kl) <= 2 * abs(plain_kl - kl) + 1e-3 * kl
        assert (got_gradient.float() - gradient)[anchors.mask].norm() <= 2 * plain_error


@pytest.mark.parametrize("rows", [None, 7, 100])
def test_huge_logits_stay_finite_and_exact(rows: int | None, rig_of: OpenRig) -> None:
    rig = rig_of("granite", logits_scaling=1e-3)
    batch = _batch(rig)
    (_, kl), gradient = _plain(rig, *batch)
    assert kl > 100
    head = _open(rig, rows)
    (_, got_kl), got_gradient = _loss(head, *batch)
    head.close()
    assert got_kl == pytest.approx(kl, rel=1e-5)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [None, 40])
def test_a_divergence_that_is_not_finite_is_returned(rows: int | None, rig_of: OpenRig) -> None:
    rig = rig_of("llama")
    output, targets, anchors = _batch(rig)
    output[2, 5, 3] = math.nan
    head = _open(rig, rows)
    (loss, kl), _ = _loss(head, output, targets, anchors)
    head.close()
    assert math.isfinite(loss)
    assert math.isnan(kl)


def test_small_divergences_keep_their_digits() -> None:
    """Where the plain formula in float32 has none left: compared with it in float64."""
    torch.manual_seed(0)
    logits = 5 * torch.randn(6, 5000)
    for drift in (1e-3, 1e-2, 1.0, 30.0):
        moved = logits + drift * torch.randn_like(logits)
        exact_p, exact_q = logits.double().log_softmax(1), moved.double().log_softmax(1)
        expected = functional.kl_div(exact_q, exact_p, reduction="none", log_target=True).sum(1)
        tuned = moved.clone()
        got = compare(logits, tuned, 1.0)
        torch.testing.assert_close(got.double(), expected, rtol=2e-3 if drift == 1e-3 else 1e-4, atol=0)
        torch.testing.assert_close(tuned.double(), exact_q.exp() - exact_p.exp(), rtol=1e-2, atol=1e-8)
        assert (got > 0).all()


# -- a head that is trained -------------------------------------------------------------------------------------------


def _through(model: Any, layers_path: str, output: torch.Tensor) -> torch.Tensor:
    """Logits that transformers' model makes of the last layer's ``output``: [rows * tokens, vocabulary]."""

    def instead(module: Any, args: Any, result: Any) -> Any:
        return (output, *result[1:]) if isinstance(result, tuple) else output

    handle = model.get_submodule(layers_path)[-1].register_forward_hook(instead)
    try:
        return model(input_ids=torch.zeros(output.shape[:2], dtype=torch.long), use_cache=False).logits.flatten(0, 1)
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", [*ALL, "gpt2", "gpt_neox"])
def test_a_trained_heads_gradients_are_those_of_the_plain_model(architecture: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", architecture)
    rig = open_rig(path, tmp_path / "s", quantize="none", dtype="float32")
    output, targets, _ = _batch(rig)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    leaf = output.clone().requires_grad_()
    logits = _through(model, rig.skeleton.layers_path, leaf)
    loss = functional.cross_entropy(logits, targets.flatten(), reduction="sum") / ANSWERS
    loss.backward()
    expected = {
        name: parameter.grad
        for name, parameter in model.named_parameters(remove_duplicate=False)
        # A tied head's gradient is also the embedding's, under its own name; of the rest, these are what got one.
        if parameter.grad is not None and name != rig.skeleton.embedding_name
    }

    head = _open_without_anchor(rig, None, 6)
    trained = output_parameters(rig.skeleton)
    for parameter in trained.values():
        assert not parameter.requires_grad
        parameter.requires_grad_(True)
    head.train(list(trained.values()))
    got_leaf = output.clone().requires_grad_()
    got = head.loss_backward(got_leaf, targets, answer_tokens=ANSWERS)

    assert set(trained) == set(expected)
    assert got == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(got_leaf.grad, leaf.grad, rtol=1e-5, atol=1e-7)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    # They are added to, and only by what asks for gradients.
    head.loss_sum(output, targets)
    head.loss_backward(output.clone().requires_grad_(), targets, answer_tokens=ANSWERS)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, 2 * expected[name], rtol=1e-4, atol=2e-6, msg=name)
    rig.store.close()


def test_a_head_that_is_compared_through_cannot_be_trained(rig_of: OpenRig) -> None:
    rig = rig_of("llama")
    head = _open(rig, None)
    head.train([])
    with pytest.raises(ValueError, match="compared through"):
        head.train(list(output_parameters(rig.skeleton).values()))
    head.close()


def test_parameters_keep_whether_they_require_gradients(rig_of: OpenRig) -> None:
    rig = rig_of("opt")
    place_head(rig.skeleton, rig.store, CPU)
    parameters = dict(rig.skeleton.model.named_parameters())
    parameters["model.decoder.final_layer_norm.bias"].requires_grad_(True)
    before = {name: p.requires_grad for name, p in parameters.items()}
    found = output_parameters(rig.skeleton)
    assert {name: p.requires_grad for name, p in parameters.items()} == before
    assert set(before.values()) == {True, False}
    assert not any(p.grad is not None for p in parameters.values())
    parameters["model.decoder.final_layer_norm.bias"].requires_grad_(False)
    assert set(found) == {
        "model.decoder.final_layer_norm.weight",
        "model.decoder.final_layer_norm.bias",
        "lm_head.weight",
    }
    assert all(found[name] is parameters[name] for name in found)


def test_a_head_in_slices_cannot_be_trained(rig_of: OpenRig) -> None:
    rig = rig_of("llama")
    place_head(rig.skeleton, rig.store, CPU)
    trained = list(output_parameters(rig.skeleton).values())
    head = _open_without_anchor(rig, 40)
    head.train([])
    with pytest.raises(ValueError, match="read in slices"):
        head.train(trained)
    head.close()


# -- memory -----------------------------------------------------------------------------------------------------------


def _shapes(rig: Rig) -> HeadShapes:
    return HeadShapes.of(rig.skeleton.config, stored=rig.store.head(rig.skeleton)[0].dtype, compute=rig.skeleton.dtype)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "cohere", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [97, 512])
def test_two_models_logits_take_no_more_memory_than_ones(
    architecture: str, dtype: str, rows: int, rig_of: OpenRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of(architecture, dtype)
    # Beside the chunks of a real model, the pieces that both are compared in are small; they are not counted.
    monkeypatch.setattr("lopt_lite.residency.logits._CPU_PIECE", 1)
    tokens, compared = 16, torch.arange(min(rows, rig.skeleton.vocabulary_rows))
    anchors = Anchors(
        mask=torch.ones(1, 4 * tokens, dtype=torch.bool),
        base=torch.randn(4 * tokens, rig.skeleton.hidden_size).to(rig.skeleton.dtype),
        tokens=4 * tokens,
        weight=1.0,
    )
    elements = tokens * len(compared)
    head = open_head(rig.skeleton, rig.store, device=CPU, logit_elements=elements, slice_rows=None, compared=compared)
    output = torch.randn(1, 4 * tokens, rig.skeleton.hidden_size).to(rig.skeleton.dtype).requires_grad_()
    no_answers = torch.full((1, 4 * tokens), -100)
    half = tokens // 2 * len(compared)
    with LiveBytes(half) as counted:
        head.anchored_loss_backward(output, no_answers, anchors, answer_tokens=0)
    head.close()
    limit = logit_bytes(_shapes(rig), elements, None, gradient=True)
    assert limit // 2 <= counted.peak <= limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [None, 97])
def test_what_is_kept_of_anchored_tokens_is_what_is_foretold(dtype: str, rows: int | None, rig_of: OpenRig) -> None:
    rig = rig_of("llama", dtype)
    anchored, answered = 44, 60
    mask = torch.zeros(1, 120, dtype=torch.bool)
    mask[0, :anchored] = True
    hidden = rig.skeleton.hidden_size
    base = torch.randn(anchored, hidden).to(rig.skeleton.dtype)
    anchors = Anchors(mask, base, tokens=anchored, weight=1.0)
    targets = torch.full((1, 120), -100)
    targets[0, anchored : anchored + answered] = torch.arange(answered)
    output = torch.randn(1, 120, hidden).to(rig.skeleton.dtype).requires_grad_()
    head = _open(rig, rows, 10)
    for tokens, foretold in (
        (anchored, anchor_bytes(_shapes(rig), anchored) - base.nbytes),
        (answered, answer_bytes(_shapes(rig), answered, rows, gradient=True)),
    ):
        with LiveBytes(tokens * hidden) as counted:
            head.anchored_loss_backward(output, targets, anchors, answer_tokens=answered)
        assert counted.peak == foretold
    head.close()
