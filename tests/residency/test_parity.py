"""Our layer-by-layer pass equals Hugging Face's own forward, for every architecture named here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lopt_lite.residency.pool import MicroBatch
from tests.rig import open_rig, plain_kernels
from tests.tiny_models import ARCHITECTURES, LATE_EXPERTS, OTHERS, even_widths, make_model


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the second padded on the right, longer than the tiny sliding windows."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (2, 17), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return ids, mask


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *LATE_EXPERTS, *OTHERS])
def test_unquantised_logits_equal_transformers(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", architecture)
    rig = open_rig(model, tmp_path / "store", quantize="none", dtype="float32")
    ids, mask = _batch()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    # Fused experts sum in an order that depends on the padding tokens' routing; everything else is bit for bit.
    tolerance = 1e-5 if architecture in ("mixtral", *LATE_EXPERTS) else 0.0
    torch.testing.assert_close(rig.logits(ids)[real], expected[real], rtol=0, atol=tolerance)


# transformers gives a quantised Llama 4 experts of another layout, which no quantised checkpoint of it has.
@pytest.mark.parametrize("architecture", [name for name in (*ARCHITECTURES, *OTHERS) if name != "llama4_text"])
def test_a_store_loads_in_transformers_with_the_same_logits(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", architecture, **even_widths(architecture))
    rig = open_rig(model, tmp_path / "store", quantize="nf4", dtype="bfloat16")
    ids, mask = _batch()
    reference = plain_kernels(AutoModelForCausalLM.from_pretrained(tmp_path / "store", dtype=torch.bfloat16).eval())
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    assert torch.equal(rig.logits(ids)[real], expected[real])
    quantised = [n for n in rig.store.layer(rig.skeleton, 0) if n.endswith("quant_state.bitsandbytes__nf4")]
    assert bool(quantised) == (architecture != "gpt2")
    if architecture in ARCHITECTURES:
        assert bool(rig.builder.unquantized) == (architecture in ("gpt2", "mixtral"))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "qwen3"])
def test_a_layer_dequantised_once_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", architecture)
    rig = open_rig(model, tmp_path / "store", quantize="nf4", dtype="bfloat16")
    ids, _ = _batch()
    assert torch.equal(rig.logits(ids, dequantize=True), rig.logits(ids, dequantize=False))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_padding_never_changes_a_real_token(architecture: str, attention: str, tmp_path: Path) -> None:
    rig = open_rig(
        make_model(tmp_path / "model", architecture),
        tmp_path / "store",
        quantize="none",
        dtype="float32",
        attention=attention,
    )
    ids, _ = _batch()
    alone = rig.logits(ids[1:, :10])
    padded = rig.logits(ids)[1:, :10]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "granite"])
def test_blocks_chained_through_their_outputs_equal_the_whole_model(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", architecture)
    rig = open_rig(model, tmp_path / "store", quantize="none", dtype="float32")
    ids, _ = _batch()
    with torch.no_grad(), rig.layers(0, 3) as lower, rig.layers(3, 4) as upper:
        recording = rig.skeleton.record(ids, embed=True)
        middle = lower.forward(MicroBatch(recording.hidden, recording.calls))
        again = rig.skeleton.record(ids, embed=False)
        output = upper.forward(MicroBatch(middle, again.calls))
    chained = torch.stack([rig.skeleton.logits(row) for row in output])
    assert torch.equal(chained, rig.logits(ids))


def test_tied_and_untied_heads_are_told_apart(tmp_path: Path) -> None:
    tied = open_rig(make_model(tmp_path / "a", "llama-tied"), tmp_path / "as", quantize="none", dtype="float32")
    untied = open_rig(make_model(tmp_path / "b", "llama"), tmp_path / "bs", quantize="none", dtype="float32")
    assert tied.skeleton.tied and not untied.skeleton.tied
    assert torch.equal(
        tied.store.head(tied.skeleton)[0],
        tied.store.embedding_rows(tied.skeleton, torch.arange(tied.skeleton.vocabulary_rows)),
    )
    assert not torch.equal(
        untied.store.head(untied.skeleton)[0],
        untied.store.embedding_rows(untied.skeleton, torch.arange(untied.skeleton.vocabulary_rows)),
    )
