"""Whose code drives the layers: what it returns, and how many layers there may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lopt_lite.checkpoints.locate import describe_model, locate_model
from lopt_lite.errors import ModelError
from tests.rig import open_rig
from tests.tiny_models import make_config, make_model


def _change_config(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("asked", [{"return_dict": False}, {"output_hidden_states": True, "output_attentions": True}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_config_asks_the_model_to_return_changes_nothing(architecture, asked, tmp_path):
    model = make_model(tmp_path / "model", architecture)
    ids = torch.arange(3, 20)[None]
    usual = open_rig(model, tmp_path / "usual", quantize="none", dtype="float32").logits(ids)
    _change_config(model, **asked)
    found = open_rig(model, tmp_path / "store", quantize="none", dtype="float32").logits(ids)
    assert torch.equal(found, usual)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "num_layers"])
@pytest.mark.parametrize("count", [1001, 10**9, 1e300, float("inf")])
def test_more_layers_than_any_model_has_are_refused_before_one_is_made(name, count, tmp_path):
    make_config("llama", 300).save_pretrained(tmp_path)
    _change_config(tmp_path, **{name: count})
    with pytest.raises(ModelError, match=rf"{name} .*\n.*1000 layers at most\n.*config\.json"):
        describe_model(str(tmp_path))


def test_those_of_a_part_of_the_model_too(tmp_path):
    make_config("llama", 300).save_pretrained(tmp_path)
    _change_config(tmp_path, text_config={"num_hidden_layers": 10**9})
    with pytest.raises(ModelError, match="num_hidden_layers 1000000000"):
        describe_model(str(tmp_path))


def test_more_layers_than_the_weights_have_tensors_are_refused(tmp_path):
    model = make_model(tmp_path / "model", num_hidden_layers=2)
    tensors = len(locate_model(str(model)).weights)
    _change_config(model, num_hidden_layers=tensors + 1)
    for find in (describe_model, locate_model):
        with pytest.raises(ModelError, match=f"num_hidden_layers {tensors + 1}.*\n.*which is {tensors}\n"):
            find(str(model))
