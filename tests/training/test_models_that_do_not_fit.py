"""Architectures that cannot be trained block by block are refused by name, by plan and by train, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

import lopt_lite
from lopt_lite import PlanSettings, TrainSettings
from lopt_lite.errors import ModelError
from tests.tiny_models import make_config, make_data, make_model

_OPTIONS = {"quantize": "none", "dtype": "float32", "device": "cpu"}


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have found out of the same models, before their code is changed here, is forgotten."""
    monkeypatch.setenv("LOPT_LITE_CACHE", str(tmp_path / "user-cache"))


def _refused(operation: str, model: Path, root: Path) -> ModelError:
    """What the operation says of the model, having written nothing."""
    files = {"model": str(model), "data": str(make_data(root / "data.jsonl")), "output": str(root / "run" / "deep")}
    with pytest.raises(ModelError) as caught:
        if operation == "plan":
            lopt_lite.plan(PlanSettings(**files, **_OPTIONS))
        else:
            lopt_lite.train(TrainSettings(**files, **_OPTIONS))
    assert not (root / "run").exists()
    assert caught.value.expected and caught.value.fix
    return caught.value


@pytest.mark.parametrize("operation", ["plan", "train"])
def test_a_layer_that_cannot_run_by_itself(operation, tmp_path, monkeypatch):
    def leans(*args: Any, **kwargs: Any) -> None:
        raise KeyError("keys of the layer before")

    monkeypatch.setattr(LlamaDecoderLayer, "forward", leans)
    error = _refused(operation, make_model(tmp_path / "model"), tmp_path)
    assert "LlamaForCausalLM has a layer (4) that cannot run by itself" in error.found
    assert "KeyError: 'keys of the layer before'" in error.found


@pytest.mark.parametrize("operation", ["plan", "train"])
def test_one_of_a_rare_kind(operation, tmp_path, monkeypatch):
    """Only the first layer is dense."""

    def leans(*args: Any, **kwargs: Any) -> None:
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(Qwen3MoeMLP, "forward", leans)
    error = _refused(operation, make_model(tmp_path / "model", "qwen3_moe"), tmp_path)
    assert "Qwen3MoeForCausalLM has a layer (1) that cannot run by itself" in error.found


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300}


@pytest.mark.parametrize(
    ("kind", "own"),
    [("Mamba", {"state_size": 4}), ("Mamba2", {"num_heads": 4, "head_dim": 16, "n_groups": 1}), ("Rwkv", {})],
)
def test_models_without_attention(kind, own, tmp_path):
    getattr(transformers, f"{kind}Config")(**_SMALL, **own).save_pretrained(tmp_path / "model")
    error = _refused("plan", tmp_path / "model", tmp_path)
    assert f"{kind}ForCausalLM has no attention heads" in error.found


@pytest.mark.parametrize("shared_layers", [0, 2])
def test_layers_that_are_given_the_embedded_tokens(shared_layers, tmp_path):
    config = make_config("gemma4_text", 300, hidden_size_per_layer_input=8, num_kv_shared_layers=shared_layers)
    config.save_pretrained(tmp_path / "model")
    error = _refused("plan", tmp_path / "model", tmp_path)
    assert "Gemma4ForCausalLM gives its layers more of the embedded tokens than the hidden state" in error.found


def test_a_model_that_computes_between_its_layers(tmp_path):
    """XLM has attention in one list and feed-forward parts in others: one by one, the latter would be left out."""
    transformers.XLMConfig(emb_dim=32, n_layers=2, n_heads=4, vocab_size=300).save_pretrained(tmp_path / "model")
    error = _refused("plan", tmp_path / "model", tmp_path)
    assert "XLMWithLMHeadModel does not pass one hidden state from layer to layer" in error.found
