"""Whole runs on a tiny model: the result is an ordinary PEFT adapter, and everything agrees about its numbers."""

from __future__ import annotations

import dataclasses
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import lopt_lite
from lopt_lite import EvaluateSettings, ExportSettings, GenerateSettings, TrainSettings, devices
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.nf4 import dequantize_matrix
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.checkpoints.tokenizer import load_tokenizer
from lopt_lite.data.batches import epoch_batches
from lopt_lite.data.dataset import collate
from lopt_lite.data.load import load_dataset
from lopt_lite.errors import DoesNotFitError
from lopt_lite.events import Event, Step
from lopt_lite.journal import read_facts
from lopt_lite.residency.continuation import _contiguous
from lopt_lite.residency.pool import MicroBatch
from lopt_lite.results.open_run import open_run
from lopt_lite.training import run as training_run
from lopt_lite.training.optimisation import learning_rate
from tests.rig import CPU, plain_kernels, residence
from tests.tiny_models import EVERY_BLOCK_LEARNS, even_widths, make_data, make_model


def _train(tmp_path: Path, model: Path, events: list[Event] | None = None, **changes: object) -> Path:
    data = make_data(tmp_path / "data.jsonl")
    settings = {"epochs": 2, "batch_size": 4, "lr": 5e-3, "quantize": "none", "dtype": "float32"}
    settings |= {**EVERY_BLOCK_LEARNS, **changes}
    run = tmp_path / "run"
    outcome = lopt_lite.train(
        TrainSettings(model=str(model), data=str(data), output=str(run), **settings),
        on_event=events.append if events is not None else lambda event: None,
    )
    assert Path(outcome.adapter) == run / "adapter"
    return run


@torch.no_grad()
def _own_logits(run: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the tuned model by lopt-lite's own pass."""
    from lopt_lite.residency.head import place_head
    from lopt_lite.residency.pool import ResidentLayers

    opened = open_run(str(run), CPU)
    skeleton = opened.skeleton
    place_head(skeleton, opened.store, CPU)
    recording = skeleton.record(ids, embed=True)
    with ResidentLayers(
        opened.store, skeleton, 0, skeleton.layer_count, device=CPU, dequantize=False, on_layer=opened.on_layer
    ) as pool:
        hidden = pool.forward(MicroBatch(recording.hidden, recording.calls))
    return torch.stack([skeleton.logits(row) for row in hidden])


def _ids() -> torch.Tensor:
    return torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "gpt2", "phi3", "gemma3_text", "mixtral"])
def test_adapter_in_plain_peft_gives_our_logits(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", architecture)
    run = _train(tmp_path, model, epochs=1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        untouched = base(_ids()).logits
        expected = PeftModel.from_pretrained(base, run / "adapter").eval()(_ids()).logits
    assert not torch.allclose(untouched, expected, atol=1e-3), "training must have changed something"
    torch.testing.assert_close(_own_logits(run, _ids()), expected, rtol=0, atol=1e-5)


def test_adapter_on_the_plain_bitsandbytes_base_gives_our_logits(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16, **even_widths("llama"))
    run = _train(tmp_path, model, epochs=1, quantize="nf4", dtype="bfloat16")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=config)
    tuned = plain_kernels(PeftModel.from_pretrained(base, run / "adapter").eval())
    # Adapters are kept in float32 and compute in the model's dtype.
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        expected = tuned(_ids()).logits
    # Not one bit apart: the same kernels, the same class of adapter.
    assert torch.equal(_own_logits(run, _ids()), expected)


def test_frozen_early_blocks_are_left_out_of_the_adapter(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    run = _train(tmp_path, model, objective="none", lora_targets="q_proj,down_proj")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, run / "adapter")
    adapted = {n.split("layers.")[1].split(".lora_A")[0] for n, _ in tuned.named_parameters() if "lora_A" in n}
    assert adapted == {f"{i}.{m}" for i in (1, 2, 3) for m in ("self_attn.q_proj", "mlp.down_proj")}
    with torch.no_grad():
        torch.testing.assert_close(_own_logits(run, _ids()), tuned.eval()(_ids()).logits, rtol=0, atol=1e-5)
    lopt_lite.report(lopt_lite.ReportSettings(run=str(run)))
    assert "2–4" in (run / "report.html").read_text(encoding="utf-8")


def test_a_last_block_is_as_large_as_was_asked_for(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    run = _train(tmp_path, model, objective="none", last_layers=1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, run / "adapter")
    assert {n.split("layers.")[1].split(".")[0] for n, _ in tuned.named_parameters() if "lora_A" in n} == {"3"}
    with torch.no_grad():
        torch.testing.assert_close(_own_logits(run, _ids()), tuned.eval()(_ids()).logits, rtol=0, atol=1e-5)


def test_one_block_equals_a_plain_peft_loop(tmp_path: Path) -> None:
    """K = 1, unquantised, float32: the same losses, gradient norms and weights as PEFT and transformers alone."""
    model = make_model(tmp_path / "model", "llama")
    events: list[Event] = []
    run = _train(tmp_path, model, events, blocks=1, epochs=2)
    steps = [e for e in events if isinstance(e, Step)]

    tokenizer = load_tokenizer(locate_model(str(model)))
    dataset, _ = load_dataset(
        tmp_path / "data.jsonl", tokenizer, max_length=1024, skip_bad_lines=False, on_event=lambda e: None
    )
    torch.manual_seed(0)
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    _start_as_we_do(plain, model)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    losses, norms = [], []
    for epoch in range(2):
        for indices in epoch_batches(dataset.lengths, batch_size=4, seed=(0, "block", 0, "train", epoch)):
            batch = collate(dataset, indices, tokenizer.pad_token_id or 0)
            logits = plain(input_ids=batch.input_ids, attention_mask=batch.real.long()).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 1.0)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(len(losses), len(steps), 5e-3)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert [s.loss for s in steps] == pytest.approx(losses, rel=1e-4)
    assert [s.grad_norm for s in steps] == pytest.approx(norms, rel=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(_own_logits(run, _ids()), plain.eval()(_ids()).logits, rtol=0, atol=2e-3)


def _start_as_we_do(plain: torch.nn.Module, model: Path) -> None:
    """Copy our adapter's start (it depends on seed and layer) into a PEFT model."""
    from lopt_lite.checkpoints.skeleton import Skeleton
    from lopt_lite.training.adapters import adapter_parameters, attach_adapter

    skeleton = Skeleton(locate_model(str(model)), dtype=torch.float32)
    settings = TrainSettings(model=str(model), data="unused")
    parameters = dict(plain.named_parameters())
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for index, layer in enumerate(reference.model.layers):
        attach_adapter(layer, index, skeleton=skeleton, settings=settings)
        for name, value in adapter_parameters(layer).items():
            full = f"base_model.model.model.layers.{index}.{name.removesuffix('.weight')}.default.weight"
            parameters[full].data.copy_(value.data)


def test_gradient_accumulation_is_weighted_by_answer_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting a step into micro-batches of uneven answer lengths does not change its loss or gradient."""
    from lopt_lite.residency import choices

    model = make_model(tmp_path / "model", "llama")
    whole: list[Event] = []
    _train(tmp_path, model, whole, epochs=1)
    monkeypatch.setattr(choices, "_ROOMY_TOKENS", (60,))
    parts: list[Event] = []
    _train(tmp_path, model, parts, epochs=1, fresh=True)
    for a, b in zip((e for e in whole if isinstance(e, Step)), (e for e in parts if isinstance(e, Step)), strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_held_out_loss_falls_and_evaluate_agrees_with_training(blocks: int, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    held_out = make_data(tmp_path / "held_out.jsonl", 8, seed=9)
    data = make_data(tmp_path / "data.jsonl")
    settings = TrainSettings(
        model=str(model),
        data=str(data),
        output=str(tmp_path / "run"),
        validation=str(held_out),
        blocks=blocks,
        epochs=3,
        batch_size=4,
        lr=5e-3,
        quantize="none",
        dtype="float32",
    )
    outcome = lopt_lite.train(settings)
    assert outcome.loss_before is not None and outcome.loss_after is not None
    assert outcome.loss_after < outcome.loss_before - 0.2
    again = lopt_lite.evaluate(EvaluateSettings(run=str(tmp_path / "run"), data=str(held_out)))
    assert again.base_loss == pytest.approx(outcome.loss_before, rel=1e-4)
    assert again.tuned_loss == pytest.approx(outcome.loss_after, rel=1e-4)
    assert again.tuned_perplexity == pytest.approx(math.exp(again.tuned_loss))
    assert not (tmp_path / "run" / "cache" / "block-01").exists()
    assert lopt_lite.status(tmp_path / "run").state == "done"
    assert lopt_lite.train(settings).already_done


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "mixtral"])
def test_merged_onto_original_equals_base_plus_adapter(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", architecture, dtype=torch.bfloat16)
    run = _train(tmp_path, model, epochs=1, quantize="nf4", dtype="bfloat16")
    out = tmp_path / "merged"
    lopt_lite.export(ExportSettings(run=str(run), out=str(out), format="merged"))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.bfloat16
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[name].bfloat16(), rtol=0.01, atol=1e-3)
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(model).chat_template
    assert not (out / "journal.jsonl").exists()


def test_merged_onto_quantized_is_the_evaluated_model(tmp_path: Path) -> None:
    """Every merged weight is the dequantised one plus the adapter's product, rounded once to bfloat16."""
    model = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    run = _train(tmp_path, model, epochs=1, quantize="nf4", dtype="bfloat16")
    out = tmp_path / "merged"
    lopt_lite.export(ExportSettings(run=str(run), out=str(out), format="merged", onto="quantized"))
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval().state_dict()
    opened = open_run(str(run), CPU)
    for index, adapter in opened.adapters.items():
        stored = opened.store.layer(opened.skeleton, index)
        for module in opened.skeleton.linear_names(index):
            dense = dequantize_matrix(
                f"{module}.weight", {k: v for k, v in stored.items() if k.startswith(f"{module}.weight")}, CPU
            )
            product = adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
            expected = (dense.float() + 2.0 * product).bfloat16()
            assert product.abs().max() > 0
            assert torch.equal(merged[f"model.layers.{index}.{module}.weight"], expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox"])
def test_generation_equals_transformers_with_the_adapter(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", architecture)
    run = _train(tmp_path, model, epochs=1)
    outcome = lopt_lite.generate(GenerateSettings(run=str(run), prompt="What is 3 + 4?", max_new_tokens=8))
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 4?"}], add_generation_prompt=True, tokenize=False
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), run / "adapter")
    expected = plain.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert outcome.text == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_a_store_is_itself_a_model(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    lopt_lite.quantize(lopt_lite.QuantizeSettings(model=str(model), store=str(tmp_path / "store")))
    direct = _train(tmp_path, model, epochs=1, quantize="nf4", dtype="bfloat16")
    weights = (direct / "adapter" / "adapter_model.safetensors").read_bytes()
    from_store = _train(tmp_path, tmp_path / "store", epochs=1, quantize="nf4", dtype="bfloat16", fresh=True)
    assert (from_store / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert not (from_store / "store").exists()


def test_config_of_another_models_store_does_not_replace_the_weights(tmp_path: Path) -> None:
    other, model = make_model(tmp_path / "other", seed=1), make_model(tmp_path / "model", seed=2)
    lopt_lite.quantize(lopt_lite.QuantizeSettings(model=str(other), store=str(tmp_path / "store")))
    changes = {"epochs": 1, "quantize": "nf4", "dtype": "bfloat16"}
    plain = (_train(tmp_path, model, **changes) / "adapter" / "adapter_model.safetensors").read_bytes()
    run = _train(tmp_path, model, fresh=True, config=(str(tmp_path / "store"),), **changes)
    assert (run / "store").is_dir()
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == plain


def test_a_foreign_nf4_checkpoint_gives_the_same_store(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "nf4"
    )
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "nf4")
    a = _train(tmp_path, model, epochs=1, quantize="nf4", dtype="bfloat16")
    weights = (a / "adapter" / "adapter_model.safetensors").read_bytes()
    b = _train(tmp_path, tmp_path / "nf4", epochs=1, quantize="nf4", dtype="bfloat16", fresh=True)
    assert (b / "adapter" / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("mode", ["resident", "recomputed", "partly streamed", "streamed", "offloaded"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_where_layers_are_does_not_change_the_result(
    mode: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident dequantised, resident 4-bit and streamed runs end with the same adapter bytes and held-out losses."""
    from lopt_lite.training import memory_choice

    model = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    changes = {
        "quantize": "nf4",
        "dtype": "bfloat16",
        "blocks": blocks,
        "lora_dropout": 0.1,
        "validation": "0.2",
        "objective": "reconstruct",
    }
    expected = _train(tmp_path, model, **changes)
    weights = (expected / "adapter" / "adapter_model.safetensors").read_bytes()
    losses = [f["loss"] for f in read_facts(expected / "journal.jsonl")[0] if f["fact"] == "validation"]
    assert _mode(expected) == "dequantised"

    monkeypatch.setattr(memory_choice, "choose_residence", lambda *a, **k: residence(mode))
    run = _train(tmp_path, model, fresh=True, **changes)

    assert _mode(run) == {"offloaded": "streamed"}.get(mode, mode)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert [f["loss"] for f in read_facts(run / "journal.jsonl")[0] if f["fact"] == "validation"] == losses


def _mode(run: Path) -> str:
    return next(f["mode"] for f in read_facts(run / "journal.jsonl")[0] if f["fact"] == "residence")


@pytest.mark.parametrize("architecture", ["llama", "nemotron_h"])
def test_generation_is_the_same_with_streamed_layers(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lopt_lite.results import generate as generation

    run = _train(tmp_path, make_model(tmp_path / "model", architecture), epochs=1)
    settings = GenerateSettings(run=str(run), prompt="What is 3 + 4?", max_new_tokens=6)
    expected = lopt_lite.generate(settings).text
    monkeypatch.setattr(generation, "place", lambda *a, **k: (residence("streamed", layers=4), 1))
    assert lopt_lite.generate(settings).text == expected


def test_what_an_answer_keeps_of_its_tokens_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lopt_lite.results.open_run import OpenRun

    run = _train(tmp_path, make_model(tmp_path / "model", "llama"), epochs=1)
    shapes = OpenRun.shapes

    def with_large_keys(self: OpenRun) -> Any:
        return dataclasses.replace(shapes(self), cache_bytes_per_token=2**20)

    def settings(tokens: int, memory: str) -> GenerateSettings:
        return GenerateSettings(run=str(run), prompt="What is 3 + 4?", max_new_tokens=tokens, memory=memory)

    monkeypatch.setattr(OpenRun, "shapes", with_large_keys)
    with pytest.raises(DoesNotFitError, match="lower --max-new-tokens") as refused:
        lopt_lite.generate(settings(64, "1MiB"))
    enough = int(re.search(r"at least --memory ([0-9]+)MiB", str(refused.value))[1])
    # The process has become no smaller since, and a little larger perhaps.
    assert lopt_lite.generate(settings(32, f"{enough}MiB")).tokens > 0
    with pytest.raises(DoesNotFitError):
        lopt_lite.generate(settings(128, f"{enough}MiB"))


@pytest.mark.parametrize("memory", ["1MiB", "0GiB"])
def test_a_budget_that_cannot_work_names_the_smallest_that_can(tmp_path: Path, memory: str) -> None:
    model = make_model(tmp_path / "model", "llama")
    with pytest.raises(DoesNotFitError, match=r"at least --memory [0-9]+MiB"):
        _train(tmp_path, model, memory=memory)


def test_the_adapter_is_written_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that holds one layer's adapter need not hold them all."""
    read, write = TensorFiles.read, training_run.write_adapter
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def noted(files: TensorFiles, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(files, name)
        made.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in made))
        return tensor

    def watched(*args: Any, **options: Any) -> dict[str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(TensorFiles, "read", noted)
            return write(*args, **options)

    monkeypatch.setattr(training_run, "write_adapter", watched)
    _train(tmp_path, make_model(tmp_path / "model", "llama"), epochs=1)
    assert len(made) > 8
    assert most <= 2


def test_evaluating_in_too_small_a_budget_advises_nothing_that_only_training_has(tmp_path: Path) -> None:
    run = _train(tmp_path, make_model(tmp_path / "model", "llama"), epochs=1)
    settings = EvaluateSettings(run=str(run), data=str(tmp_path / "data.jsonl"), memory="1MiB")
    with pytest.raises(DoesNotFitError, match="raise --memory, or measure shorter examples") as refused:
        lopt_lite.evaluate(settings)
    assert "--lora-r" not in str(refused.value)


def test_a_budget_that_reading_has_exceeded_already_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that is small beside its tokenizer."""
    run = _train(tmp_path, make_model(tmp_path / "model", "llama"), epochs=1)

    def evaluate(memory: str) -> object:
        return lopt_lite.evaluate(
            EvaluateSettings(run=str(run), data=str(tmp_path / "data.jsonl"), memory=memory, device="cpu")
        )

    def generate(memory: str) -> object:
        return lopt_lite.generate(
            GenerateSettings(run=str(run), prompt="What?", max_new_tokens=2, memory=memory, device="cpu")
        )

    monkeypatch.setattr(devices.PeakMemory, "read", lambda peak: 9 << 30)
    for work in (evaluate, generate):
        with pytest.raises(DoesNotFitError, match=r"reading .* took 9,216 MiB\n.*at least --memory 9224MiB"):
            work("8GiB")
        assert work("9224MiB")
        assert work("auto")


@pytest.mark.parametrize("rows", [1, 3])
def test_the_heads_input_has_strides_of_its_own_while_generating(rows: int) -> None:
    """The last position of a single row counts as contiguous as it is, and PyTorch would copy the head for it."""
    last = torch.zeros(rows, 7, 4)[:, -1:]
    (found,) = _contiguous(torch.nn.Linear(4, 5), (last,))
    assert found.stride() == (4, 4, 1)
    assert torch.equal(found, last)
