"""The joint schedule against a whole-model loop in plain torch, written from the paper's description."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopt_lite
from lopt_lite import TrainSettings
from lopt_lite.data.dataset import Batch, collate
from lopt_lite.data.load import load_dataset
from lopt_lite.events import ignore
from lopt_lite.seeds import derive_seed
from lopt_lite.training.objectives import ReconstructionHead
from tests.tiny_models import make_data, make_model

STEPS = 20
LR, LR_EARLY = 1e-3, 5e-4
LAMBDA = 10.0


@dataclass
class _Record:
    """What a run said of each step."""

    losses: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def _bounds(layers: int, blocks: int) -> list[tuple[int, int]]:
    sizes = [layers // blocks + (1 if i < layers % blocks else 0) for i in range(blocks)]
    ends = [sum(sizes[: i + 1]) for i in range(blocks)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _head(width: int, block: int) -> nn.Sequential:
    """LayerNorm, down to a quarter, GELU, up again, with lopt-lite's start."""
    ours = ReconstructionHead(width, seed=derive_seed(0, "block", block))
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width // 4), nn.GELU(), nn.Linear(width // 4, width))
    for mine, theirs in ((head[0], ours.norm), (head[1], ours.down), (head[3], ours.up)):
        mine.load_state_dict(theirs.state_dict())
    return head


def _reference(model_directory: Path, batch: Batch, blocks: int) -> tuple[nn.Module, _Record]:
    """Every block steps on every batch, by one optimiser over the whole model."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    layers = model.model.layers
    bounds = _bounds(len(layers), blocks)
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}

    def cut(block: int, hidden: torch.Tensor) -> torch.Tensor:
        inputs[block] = hidden.detach()
        return hidden if block == 0 else inputs[block]

    for block, (first, end) in enumerate(bounds):
        layers[first].register_forward_pre_hook(lambda module, args, block=block: (cut(block, args[0]), *args[1:]))
        layers[end - 1].register_forward_hook(
            lambda module, args, output, block=block: outputs.update(
                {block: output[0] if isinstance(output, tuple) else output}
            )
        )
    heads = nn.ModuleList(_head(model.config.hidden_size, block) for block in range(blocks - 1))
    last = {id(p) for i in range(*bounds[-1]) for p in layers[i].parameters()}
    last |= {id(p) for p in (*model.model.norm.parameters(), *model.lm_head.parameters())}
    parameters = [*model.parameters(), *heads.parameters()]
    groups = [
        {"params": [p for p in parameters if id(p) not in last], "peak": LR_EARLY},
        {"params": [p for p in parameters if id(p) in last], "peak": LR},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
    real = batch.real
    warm_up = math.ceil(0.03 * STEPS)
    record = _Record()
    for step in range(STEPS):
        if step < warm_up:
            share = (step + 1) / warm_up
        else:
            share = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (STEPS - warm_up)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        logits = model(input_ids=batch.input_ids, attention_mask=real.long()).logits
        task = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
        errors = [(heads[b](outputs[b]) - inputs[b])[real].square().mean() for b in range(blocks - 1)]
        reconstruction = sum(errors) / len(errors)
        (task + LAMBDA * reconstruction).backward()
        record.losses.append(float(task))
        record.reconstruction.append(float(reconstruction))
        record.norms.append(float(nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return model, record


def _train(tmp_path: Path, model: Path, data: Path, name: str = "run", **changes: Any) -> tuple[Path, _Record]:
    run = tmp_path / name
    values: dict[str, Any] = {
        "preset": "paper",
        "dtype": "float32",
        "epochs": STEPS,
        "batch_size": 6,
        "lr": LR,
        "lr_early": LR_EARLY,
        **changes,
    }
    lopt_lite.train(TrainSettings(model=str(model), data=str(data), output=str(run), **values))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step["phase"] == "train"]
    return run, _Record(
        [s["loss"] for s in steps], [s["reconstruction_loss"] for s in steps], [s["grad_norm"] for s in steps]
    )


def _whole_batch(model: Path, data: Path) -> Batch:
    """All examples at once, so that their order does not matter."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    dataset, _ = load_dataset(str(data), tokenizer, max_length=1024, skip_bad_lines=False, on_event=ignore)
    return collate(dataset, range(len(dataset)), 0)


@pytest.mark.parametrize("memory", ["auto", "tight"])
@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_papers_recipe_equals_a_whole_model_loop(architecture, blocks, memory, tmp_path, monkeypatch):
    model = make_model(tmp_path / "model", architecture)
    data = make_data(tmp_path / "data.jsonl", examples=6)
    expected_model, expected = _reference(model, _whole_batch(model, data), blocks)
    if memory == "tight":
        _stream_everything(monkeypatch)
    run, found = _train(tmp_path, model, data, blocks=blocks)
    for name in ("losses", "reconstruction", "norms"):
        torch.testing.assert_close(
            torch.tensor(getattr(found, name)), torch.tensor(getattr(expected, name)), rtol=1e-5, atol=1e-6, msg=name
        )
    assert found.losses[-1] < 0.95 * found.losses[0]
    tuned = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    for name, value in expected_model.state_dict().items():
        # Sums in another order, made larger where Adam divides by a small gradient.
        torch.testing.assert_close(tuned.state_dict()[name], value, rtol=0, atol=2e-5, msg=name)


def _stream_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    from lopt_lite.training import memory_choice
    from tests.rig import residence

    chosen = residence("offloaded", layers=4, micro_batch_tokens=64)
    monkeypatch.setattr(memory_choice, "choose_residence", lambda *args, **kwargs: chosen)


def test_an_untied_result_is_an_ordinary_checkpoint(tmp_path):
    model = make_model(tmp_path / "model", "llama-tied")
    data = make_data(tmp_path / "data.jsonl", examples=6)
    run, _ = _train(tmp_path, model, data, epochs=2)
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    tuned = AutoModelForCausalLM.from_pretrained(run / "model")
    embedding, head = tuned.get_input_embeddings().weight, tuned.get_output_embeddings().weight
    assert not torch.equal(embedding, head)
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert not torch.equal(before.get_input_embeddings().weight, embedding)
    assert not torch.equal(before.model.norm.weight, tuned.model.norm.weight)
    assert not [name for name in tuned.state_dict() if "head-" in name]


def _adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("mode", ["recomputed", "partly streamed", "streamed", "offloaded"])
def test_every_way_of_working_gives_the_same_adapter(mode, tmp_path, monkeypatch):
    from lopt_lite.training import memory_choice
    from tests.rig import residence

    model = make_model(tmp_path / "model", "llama")
    data = make_data(tmp_path / "data.jsonl", examples=12)
    changes = {"preset": None, "schedule": "joint", "quantize": "nf4", "epochs": 2, "batch_size": 4, "blocks": 2}
    bytes_of = {}
    for name in ("resident", mode):
        monkeypatch.setattr(
            memory_choice,
            "choose_residence",
            lambda *args, name=name, **kwargs: residence(name, layers=4, micro_batch_tokens=128, dequantised=False),
        )
        run, _ = _train(tmp_path, model, data, name=name.replace(" ", "-"), **changes)
        bytes_of[name] = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert bytes_of["resident"] == bytes_of[mode]


def test_blocks_left_as_they_are_get_no_adapter(tmp_path):
    model = make_model(tmp_path / "model", "llama")
    data = make_data(tmp_path / "data.jsonl", examples=8)
    run, _ = _train(
        tmp_path, model, data, preset=None, schedule="joint", blocks=4, objective="none,task,reconstruct", epochs=2
    )
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in _adapter(run)}
    assert layers == {1, 2, 3}


def test_one_block_is_the_same_in_both_schedules(tmp_path):
    model = make_model(tmp_path / "model", "llama")
    data = make_data(tmp_path / "data.jsonl", examples=8)
    found = [
        _adapter(_train(tmp_path, model, data, name=schedule, preset=None, schedule=schedule, blocks=1, epochs=2)[0])
        for schedule in ("sequential", "joint")
    ]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


@pytest.mark.parametrize("fits", [0, 1])
def test_held_out_losses_are_those_of_evaluate(tmp_path, fits):
    model = make_model(tmp_path / "model", "llama-tied")
    data = make_data(tmp_path / "data.jsonl", examples=8)
    held_out = make_data(tmp_path / "held-out.jsonl", examples=5, seed=9)
    run, _ = _train(tmp_path, model, data, epochs=1, batch_size=2, validation=str(held_out), head_fit_epochs=fits)
    facts = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    losses = [fact["loss"] for fact in facts if fact["fact"] == "validation"]
    outcome = lopt_lite.evaluate(lopt_lite.EvaluateSettings(run=str(run), data=str(held_out)))
    assert outcome.base_loss == pytest.approx(losses[0], rel=1e-5)
    assert outcome.tuned_loss == pytest.approx(losses[-1], rel=1e-5)
    assert losses[-1] < losses[0]
