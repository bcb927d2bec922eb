"""Models in which not every layer has the same modules, or modules are not what they seem."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lopt_lite
from lopt_lite import EvaluateSettings, PlanSettings, TrainSettings
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.data.dataset import collate
from lopt_lite.data.load import load_dataset
from lopt_lite.errors import RunDirectoryError, SettingsError
from lopt_lite.events import Event, Notice, ignore
from lopt_lite.results.open_run import open_run
from lopt_lite.training.peft_limits import refused_by_peft
from tests.rig import CPU
from tests.tiny_models import ARCHITECTURES, make_data, make_model


def _train(directory: Path, model: Path, events: list[Event] | None = None, **changes: Any) -> Any:
    values = {"blocks": 1, "epochs": 2, "batch_size": 4, "lr": 5e-3, "quantize": "none", "dtype": "float32", **changes}
    data = make_data(directory / "data.jsonl")
    settings = TrainSettings(model=str(model), data=str(data), output=str(directory / "run"), **values)
    return lopt_lite.train(settings, on_event=events.append if events is not None else lambda event: None)


def _loss_by_peft(model: Path, adapter: Path, data: Path) -> float:
    """Held-out loss of the adapter on transformers' model, without a warning."""
    run = open_run(str(adapter.parent), CPU)
    run.close()
    dataset, _ = load_dataset(data, run.tokenizer, max_length=1024, skip_bad_lines=False, on_event=ignore)
    batch = collate(dataset, list(range(len(dataset))), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    with torch.no_grad():
        logits = tuned(input_ids=batch.input_ids).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))


@pytest.mark.parametrize(
    ("architecture", "refused"),
    [("qwen3_moe", {"gate_proj", "up_proj", "down_proj"}), ("falcon_h1", {"out_proj"})],
)
def test_what_peft_would_drop_gets_no_adapter_and_what_it_loads_is_what_was_trained(
    tmp_path, one_thread, architecture, refused
):
    model = make_model(tmp_path / "model", architecture)
    events: list[Event] = []
    _train(tmp_path, model, events)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert sum(text.startswith(f"{', '.join(sorted(refused))} of ") and "PEFT" in text for text in told) == 1
    measured = lopt_lite.evaluate(EvaluateSettings(run=str(tmp_path / "run"), data=str(tmp_path / "data.jsonl")))
    assert measured.tuned_loss < measured.base_loss - 0.05
    found = _loss_by_peft(model, tmp_path / "run" / "adapter", tmp_path / "data.jsonl")
    assert found == pytest.approx(measured.tuned_loss, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama4_text", "phimoe", "gemma4_text", "bamba", "nemotron_h"])
def test_block_by_block_they_learn_what_peft_then_loads(architecture, tmp_path, one_thread):
    model = make_model(tmp_path / "model", architecture)
    _train(tmp_path, model, blocks=2, objective="reconstruct", retain=0.0)
    measured = lopt_lite.evaluate(EvaluateSettings(run=str(tmp_path / "run"), data=str(tmp_path / "data.jsonl")))
    assert measured.tuned_loss < measured.base_loss - 0.02
    found = _loss_by_peft(model, tmp_path / "run" / "adapter", tmp_path / "data.jsonl")
    assert found == pytest.approx(measured.tuned_loss, rel=1e-4)


def test_what_peft_would_drop_cannot_be_asked_for(tmp_path):
    model = make_model(tmp_path / "model", "qwen3_moe")
    with pytest.raises(SettingsError, match="'down_proj', which PEFT would not load in Qwen3MoeForCausalLM"):
        _train(tmp_path, model, lora_targets="o_proj,down_proj")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_loads_everything_of_the_usual_models(architecture, tmp_path):
    skeleton = Skeleton(locate_model(str(make_model(tmp_path / "model", architecture))), dtype=torch.float32)
    assert refused_by_peft(skeleton) == frozenset()


def test_targets_that_only_some_layers_have_are_trained_where_they_are(tmp_path, one_thread):
    """Attention layers and those with state spaces take turns."""
    model = make_model(tmp_path / "model", "granitemoehybrid")
    outcome = _train(tmp_path, model, lora_targets="q_proj", validation="0.2")
    assert outcome.loss_after < outcome.loss_before
    run = open_run(str(tmp_path / "run"), CPU)
    run.close()
    assert sorted(run.adapters) == [1, 3]


@pytest.mark.parametrize("operation", ["train", "plan"])
def test_a_block_without_any_target_is_refused(tmp_path, operation):
    model = make_model(tmp_path / "model", "granitemoehybrid")
    options = {"lora_targets": "q_proj", "blocks": 2, "last_layers": 3, "objective": "task", "retain": 0.0}
    with pytest.raises(SettingsError, match="layers 1 to 1, which are block 1, have no such module"):
        if operation == "train":
            _train(tmp_path, model, **options)
        else:
            data = make_data(tmp_path / "data.jsonl")
            lopt_lite.plan(PlanSettings(model=str(model), data=str(data), device="cpu", **options))
    assert not (tmp_path / "run" / "settings.json").exists()


def test_norms_with_a_gate_are_trained_past_in_bfloat16(tmp_path, one_thread):
    model = make_model(tmp_path / "model", "granitemoehybrid", dtype=torch.bfloat16)
    outcome = _train(tmp_path, model, dtype="bfloat16", validation="0.2")
    assert outcome.loss_after < outcome.loss_before


def test_an_adapter_of_other_modules_is_not_loaded_in_part(tmp_path, one_thread):
    """Versions that adapted what PEFT drops left such."""
    _train(tmp_path, make_model(tmp_path / "model", "llama"), lora_targets="q_proj,o_proj")
    run = open_run(str(tmp_path / "run"), CPU)
    try:
        fewer = dataclasses.replace(run.settings, lora_targets="q_proj")
        run = dataclasses.replace(run, settings=fewer)
        with pytest.raises(RunDirectoryError, match=r"other modules .*self_attn\.o_proj"):
            run.on_layer(0, run.skeleton.layer_template(0))
    finally:
        run.close()
