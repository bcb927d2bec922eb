"""Whose code drives the layers: what it returns and raises, and which of its modules are what they seem."""

from __future__ import annotations

import copy
import json
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from lopt_lite.checkpoints.layer_calls import LayerCall
from lopt_lite.checkpoints.locate import describe_model, locate_model
from lopt_lite.checkpoints.row_embedding import RowEmbedding
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.errors import ModelError, StoppedError
from lopt_lite.residency.pool import MicroBatch
from tests.rig import open_rig
from tests.tiny_models import make_config, make_model


def _skeleton(directory: Path, architecture: str = "llama", **changes: Any) -> Skeleton:
    make_config(architecture, 300, **changes).save_pretrained(directory)
    return Skeleton(describe_model(str(directory)), dtype=torch.float32)


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


_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"rope_parameters": _DYNAMIC}),
        (
            "gemma3_text",
            {
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "rope_parameters": {"full_attention": _DYNAMIC, "sliding_attention": _PLAIN},
            },
        ),
    ],
)
def test_longer_rows_leave_nothing_to_the_batches_after_them(architecture, changes, tmp_path):
    """Or a run that goes on in the middle would end with other bytes."""
    model = make_model(tmp_path / "model", architecture, max_position_embeddings=16, **changes)
    rig = open_rig(model, tmp_path / "store", quantize="none", dtype="float32")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    batches = [torch.arange(3, 3 + tokens)[None] for tokens in (24, 40, 20, 8, 24)]
    # One after the other, as while outputs are cached. Logits are made of rows of one token, which end the effect.
    recordings = [rig.skeleton.record(ids, embed=True) for ids in batches]
    with rig.layers() as pool:
        for ids, recording in zip(batches, recordings, strict=True):
            hidden = pool.forward(MicroBatch(recording.hidden, recording.calls))
            fresh = copy.deepcopy(whole)
            assert torch.equal(rig.skeleton.logits(hidden[0]), fresh(ids).logits[0])


@pytest.mark.parametrize("error", [KeyError("sliding"), ZeroDivisionError("by zero"), RuntimeError("4 is not 8\nat x")])
@pytest.mark.parametrize("part", [LlamaModel, LlamaForCausalLM])
def test_what_the_models_own_code_raises_tells_of_the_model(part, error, tmp_path, monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(part, "forward" if part is LlamaModel else "__init__", broken)
    with pytest.raises(ModelError, match=str(error).splitlines()[0]) as caught:
        _skeleton(tmp_path)
    assert "lama" in caught.value.found and caught.value.fix
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
        StoppedError("stopped"),
    ],
)
@pytest.mark.parametrize("part", [LlamaModel, LlamaForCausalLM])
def test_what_tells_nothing_of_the_model_is_raised_as_it_is(part, error, tmp_path, monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(part, "forward" if part is LlamaModel else "__init__", broken)
    with pytest.raises(type(error)) as caught:
        _skeleton(tmp_path)
    assert caught.value is error


def test_a_model_that_looks_into_its_layers_is_told_so(tmp_path, monkeypatch):
    def looks(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.layers[0].self_attn.q_proj(self.embed_tokens(input_ids))

    monkeypatch.setattr(LlamaModel, "forward", looks)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .* a layer is asked for its 'self_attn'"):
        _skeleton(tmp_path)


def test_the_model_can_be_had_as_a_whole(tmp_path):
    skeleton = _skeleton(tmp_path)
    with skeleton.as_a_whole() as model:
        weight = model.get_parameter("model.layers.2.self_attn.q_proj.weight")
        assert (weight.is_meta, tuple(weight.shape)) == (True, (32, 32))
    with pytest.raises(AttributeError):
        skeleton.model.get_parameter("model.layers.2.self_attn.q_proj.weight")
    assert len(skeleton.probe(3)) == 4


def test_parts_of_an_embedding_keep_their_names():
    class Normed(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(10, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.norm(super().forward(input_ids))

    whole = Normed()
    nn.init.normal_(whole.norm.weight)
    ids = torch.tensor([[7, 2, 7]])
    expected = whole(ids)
    embedding = RowEmbedding(whole, torch.float32, lambda: torch.device("cpu"))
    embedding.read_rows = lambda asked: whole.weight[asked]
    assert embedding.get_submodule("norm") is whole.norm
    assert torch.equal(embedding(ids), expected)


@pytest.mark.parametrize(("architecture", "router"), [("llama4_text", "feed_forward.router"), ("phimoe", "mlp.router")])
def test_a_router_that_is_made_of_a_linear_module_is_none(architecture, router, tmp_path):
    skeleton = _skeleton(tmp_path, architecture)
    assert f"{router}.weight" in skeleton.layer_parameters(1)
    assert router not in skeleton.linear_names(1) and router not in skeleton.adaptable_names(1)
    assert skeleton.unquantizable_names() == ["router"]
    assert "self_attn.q_proj" in skeleton.linear_names(1)


def test_a_linear_module_that_is_written_in_another_way_is_one(tmp_path):
    skeleton = _skeleton(tmp_path)
    skeleton._templates[0].mlp.up_proj = FalconLinear(32, 64, device="meta")
    assert "mlp.up_proj" in skeleton.linear_names(0)
    assert "mlp.up_proj" in skeleton.adaptable_names(0)


def test_layers_leave_nothing_in_a_mapping_that_all_of_them_are_given():
    shared: UserDict[str, torch.Tensor] = UserDict()

    class Leaves(nn.Module):
        def forward(self, hidden: torch.Tensor, states: UserDict[str, torch.Tensor]) -> torch.Tensor:
            states["mine"] = hidden
            return hidden

    hidden = torch.zeros(1, 2, 3)
    assert LayerCall((), {"states": shared}, None).run(Leaves(), hidden) is hidden
    assert LayerCall((shared,), {}, None).run(Leaves(), hidden) is hidden
    assert not shared


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
