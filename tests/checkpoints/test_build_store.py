"""What is said, and what is refused, when a store is made."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import lopt_lite
from lopt_lite import QuantizeSettings, TrainSettings, files
from lopt_lite.checkpoints import tied_head, tokenizer
from lopt_lite.checkpoints.build_store import StoreBuilder
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.matrices import told_by_layers
from lopt_lite.checkpoints.nf4 import dequantize_matrix, quantize_matrix
from lopt_lite.checkpoints.nf4_layout import STATE_SUFFIX
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.checkpoints.store_index import HEAD_SHARD, layer_shard, store_info
from lopt_lite.errors import ModelError
from lopt_lite.events import Notice
from tests.bad_inputs.place import change_json
from tests.data.tiny_tokenizers import make_tokenizer
from tests.tiny_models import LATE_EXPERTS, make_data, make_model

CPU = torch.device("cpu")


def _builder(model: Path, store: Path, told: list[str] | None = None, **more: Any) -> StoreBuilder:
    def on_event(event: Any) -> None:
        if isinstance(event, Notice) and told is not None:
            told.append(event.text)

    values: dict[str, Any] = {"quantize": "none", "dtype": "bfloat16", **more}
    return StoreBuilder(locate_model(str(model)), store, device=CPU, on_event=on_event, **values)


def _change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


# -- matrices that stay unquantised ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", LATE_EXPERTS)
def test_experts_that_only_later_layers_have_are_told_too(architecture: str, tmp_path: Path) -> None:
    told: list[str] = []
    model = make_model(tmp_path / "model", architecture)
    _builder(model, tmp_path / "store", told, quantize="nf4").build()
    (notice,) = [text for text in told if "quantised" in text]
    assert (
        "mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight of 3 of 4 layers cannot be quantised"
        in notice
    )
    assert "bfloat16" in notice
    info = store_info(tmp_path / "store")
    assert info is not None and {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} < set(info.unquantized)


def test_matrices_that_a_checkpoint_has_as_one_are_taken_apart(tmp_path: Path) -> None:
    if "sarvam_moe" not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know Sarvam")
    config = AutoConfig.for_model(
        "sarvam_moe",
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        vocab_size=300,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert any("query_key_value" in name for name in saved), "its queries, keys and values are not one matrix any more"
    _builder(tmp_path / "model", tmp_path / "store", dtype="float32").build()
    store, expected = Store(tmp_path / "store"), model.state_dict()
    skeleton = Skeleton(locate_model(str(tmp_path / "store")), dtype=torch.float32)
    for index in range(2):
        for name, tensor in store.layer(skeleton, index).items():
            assert torch.equal(tensor, expected[f"model.layers.{index}.{name}"]), name


@pytest.mark.parametrize(("architecture", "count"), [("llama", 0), ("mixtral", 1), ("gpt2", 1)])
def test_of_like_layers_it_is_told_once_for_each_layer(architecture: str, count: int, tmp_path: Path) -> None:
    told: list[str] = []
    _builder(make_model(tmp_path / "model", architecture), tmp_path / "store", told, quantize="nf4").build()
    assert len([text for text in told if " of each layer cannot be quantised" in text]) == count
    assert not [text for text in told if " of 4 layers" in text]


def test_names_of_the_same_layers_are_told_together() -> None:
    places = {"a": [0, 1], "b": [1], "c": [0, 1], "d": [0], "e": [1]}
    assert told_by_layers(places, 2) == "a, c of each layer and b, e of 1 of 2 layers and d of 1 of 2 layers"


# -- heads that config.json ties to the embedding ----------------------------------------------------------------------

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _tied_with_head(directory: Path, change: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Path:
    """A tied model whose file has a head as well: ``change`` of the embedding."""
    model = make_model(directory, "llama-tied")
    _change_weights(model, lambda tensors: tensors.update({HEAD: change(tensors[EMBEDDING]).contiguous()}))
    return model


def _one_off(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[-1, -1] += 1
    return changed


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one with each comparison; a few rows are compared at once."""
    calls: list[bool] = []
    compare = tied_head._are_equal

    def counting(*arguments: Any) -> bool:
        calls.append(compare(*arguments))
        return calls[-1]

    monkeypatch.setattr(tied_head, "_are_equal", counting)
    monkeypatch.setattr(tied_head, "_COMPARED_AT_ONCE", 100)
    return calls


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_tied_head_that_differs_is_refused_before_anything_is_written(
    quantize: str, tmp_path: Path, counted: list[bool]
) -> None:
    model = _tied_with_head(tmp_path / "model", _one_off)
    with pytest.raises(ModelError) as caught:
        _builder(model, tmp_path / "store", quantize=quantize)
    text = str(caught.value)
    assert HEAD in text and EMBEDDING in text and str(model / "config.json") in text
    assert '"tie_word_embeddings": false' in text and "--config DIR" in text
    assert counted == [False] and not (tmp_path / "store").exists()


def test_untied_as_the_refusal_says_both_are_stored(tmp_path: Path, counted: list[bool]) -> None:
    model = _tied_with_head(tmp_path / "model", _one_off)
    change_json(model / "config.json", tie_word_embeddings=False)
    builder = _builder(model, tmp_path / "store", dtype="float32")
    builder.build()
    store = Store(tmp_path / "store")
    assert torch.equal(store.tensor(HEAD), _one_off(store.tensor(EMBEDDING)))
    assert not counted
    store.close()


@pytest.mark.parametrize("change", [torch.clone, torch.Tensor.bfloat16], ids=["the same", "in the stored type"])
def test_a_tied_head_that_is_the_same_as_stored_is_stored_once(
    change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path, counted: list[bool]
) -> None:
    model = _tied_with_head(tmp_path / "model", change)
    _builder(model, tmp_path / "store").build()
    store = Store(tmp_path / "store")
    assert counted == [True]
    with pytest.raises(ModelError, match="no tensor"):
        store.tensor(HEAD)
    store.close()


def test_a_tied_head_is_compared_once_for_each_store(tmp_path: Path, counted: list[bool]) -> None:
    model = _tied_with_head(tmp_path / "model")
    for _ in range(3):
        _builder(model, tmp_path / "store").build()
    assert len(counted) == 1
    _builder(model, tmp_path / "layers", layers=range(2)).build()
    assert len(counted) == 1  # these have neither embedding nor head
    _builder(model, tmp_path / "other").build()
    assert len(counted) == 2


def test_a_store_that_is_made_anew_is_of_a_compared_head(tmp_path: Path, counted: list[bool]) -> None:
    model = _tied_with_head(tmp_path / "model")
    _builder(model, tmp_path / "store").build()
    builder = _builder(model, tmp_path / "store")
    for path in (tmp_path / "store").iterdir():
        path.unlink()
    builder.build()
    assert len(counted) == 2


def test_a_tied_matrix_that_is_called_the_head_is_the_embedding(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama-tied")
    _builder(model, tmp_path / "expected").build()
    _change_weights(model, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    _builder(model, tmp_path / "store").build()
    expected, found = store_info(tmp_path / "expected"), store_info(tmp_path / "store")
    assert expected is not None and found is not None and found.shards == expected.shards


def test_an_untied_model_needs_its_own_embedding(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    _change_weights(model, lambda tensors: tensors.pop(EMBEDDING))
    with pytest.raises(ModelError, match=f"lacks {EMBEDDING}"):
        _builder(model, tmp_path / "store")


# -- models that are in 4 bits already ---------------------------------------------------------------------------------

PACKED = "model.layers.1.mlp.up_proj.weight"


def _pack(tensors: dict[str, torch.Tensor], *names: str, dtype: torch.dtype = torch.bfloat16) -> None:
    for name in names:
        tensors.update(quantize_matrix(name, tensors.pop(name), dtype=dtype, device=CPU))


def _packed_model(directory: Path, *names: str, architecture: str = "llama", **more: Any) -> Path:
    model = make_model(directory, architecture)
    _change_weights(model, lambda tensors: _pack(tensors, *names, **more))
    return model


def _dense(model: Path, name: str) -> torch.Tensor:
    tensors = load_file(model / "model.safetensors")
    return dequantize_matrix(name, {k: v for k, v in tensors.items() if k.startswith(name)}, CPU)


def _say(tensors: dict[str, torch.Tensor], **values: Any) -> None:
    state = {**json.loads(bytes(tensors[PACKED + STATE_SUFFIX].tolist())), **values}
    tensors[PACKED + STATE_SUFFIX] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _fill(tensors: dict[str, torch.Tensor], suffix: str, value: float) -> None:
    tensors[PACKED + suffix] = torch.full_like(tensors[PACKED + suffix], value)


_BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "zeros": (lambda t: t.update({PACKED + STATE_SUFFIX: torch.zeros(90, dtype=torch.uint8)}), "not valid JSON"),
    "a shape of one number": (lambda t: _say(t, shape=5), "has shape 5"),
    "blocks of nothing": (lambda t: _say(t, blocksize=0), "has blocksize 0"),
    "an unknown dtype": (lambda t: _say(t, dtype="nonsense"), "has dtype 'nonsense'"),
    "larger blocks": (lambda t: _say(t, blocksize=4096), r"up_proj.weight.absmax .* U8 of shape \[32\]"),
    "no scales": (lambda t: t.pop(PACKED + ".absmax"), "lacks .*up_proj.weight.absmax"),
    "few scales": (lambda t: t.update({PACKED + ".absmax": t[PACKED + ".absmax"][:3].clone()}), r"shape \[3\]"),
    "a short matrix": (lambda t: t.update({PACKED: t[PACKED][:100].clone()}), r"shape \[100, 1\]"),
    "another shape": (lambda t: _say(t, shape=[32, 64]), r"has shape \[32, 64\]"),
}


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("damage", _BROKEN)
def test_a_4bit_matrix_that_cannot_be_read_is_refused_before_anything_is_written(
    quantize: str, damage: str, tmp_path: Path
) -> None:
    model = _packed_model(tmp_path / "model", PACKED)
    change, match = _BROKEN[damage]
    _change_weights(model, change)
    with pytest.raises(ModelError, match=match) as caught:
        _builder(model, tmp_path / "store", quantize=quantize)
    assert PACKED in caught.value.found and caught.value.expected and caught.value.fix
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("suffix", [".quant_map", ".nested_absmax", ".nested_quant_map"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_of_a_4bit_matrix_that_are_not_numbers_are_refused_as_weights_are(
    suffix: str, value: float, tmp_path: Path
) -> None:
    model = _packed_model(tmp_path / "model", PACKED)
    _change_weights(model, lambda tensors: _fill(tensors, suffix, value))
    with pytest.raises(ModelError, match=f"{PACKED}{suffix} holds values that are not finite"):
        _builder(model, tmp_path / "store", quantize="nf4").build()
    assert store_info(tmp_path / "store") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_4bit_matrices_of_linear_layers_are_copied_and_others_dequantised(dtype: torch.dtype, tmp_path: Path) -> None:
    """Nothing but a linear layer reads packed matrices; one of an LM head stopped a run in its first step."""
    names = [PACKED, EMBEDDING, HEAD]
    model = _packed_model(tmp_path / "model", *names, dtype=dtype)
    given = load_file(model / "model.safetensors")
    _builder(model, tmp_path / "store", quantize="nf4").build()
    written = {n: t for path in (tmp_path / "store").glob("*.safetensors") for n, t in load_file(path).items()}
    for name in (EMBEDDING, HEAD):
        assert torch.equal(written[name], _dense(model, name).bfloat16())
        assert not [other for other in written if other.startswith(name + ".")]
    for name in (n for n in given if n.startswith(PACKED)):
        assert torch.equal(written[name], given[name])
    config = json.loads((tmp_path / "store" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    assert not config["tie_word_embeddings"]
    _builder(model, tmp_path / "dense", quantize="none", dtype="float32").build()
    written = {n: t for path in (tmp_path / "dense").glob("*.safetensors") for n, t in load_file(path).items()}
    assert all(torch.equal(written[name], _dense(model, name).float()) for name in names)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
@pytest.mark.parametrize("untie", [False, True])
def test_a_tied_matrix_that_is_in_4_bits_is_stored_dense(name: str, untie: bool, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama-tied")

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors.pop(EMBEDDING)
        _pack(tensors, name)

    _change_weights(model, pack)
    _builder(model, tmp_path / "store", quantize="nf4", untie=untie).build()
    store = Store(tmp_path / "store")
    assert torch.equal(store.tensor(EMBEDDING), _dense(model, name))
    if untie:
        assert torch.equal(store.tensor(HEAD), _dense(model, name))
    store.close()
    config = json.loads((tmp_path / "store" / "config.json").read_text())
    assert config["tie_word_embeddings"] is not untie


def test_experts_in_4_bits_are_put_together_from_what_they_stand_for(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mixtral")
    tensors = load_file(model / "model.safetensors")
    experts = [name for name in tensors if ".experts." in name and tensors[name].dim() == 2]
    assert experts, "transformers keeps one matrix for each of them"
    plain = shutil.copytree(model, tmp_path / "plain")
    _change_weights(model, lambda tensors: _pack(tensors, *experts))
    dense = {name: _dense(model, name) for name in experts}
    _change_weights(plain, lambda tensors: tensors.update(dense))
    for quantize in ("nf4", "none"):
        infos = []
        for source in (model, plain):
            _builder(source, tmp_path / f"{source.name}-{quantize}", quantize=quantize).build()
            infos.append(store_info(tmp_path / f"{source.name}-{quantize}"))
        assert infos[0].shards == infos[1].shards


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_a_model_whose_head_is_in_4_bits_is_trained(quantize: Any, tmp_path: Path) -> None:
    model, data = _packed_model(tmp_path / "model", PACKED, HEAD), make_data(tmp_path / "data.jsonl")
    run = tmp_path / "run"
    lopt_lite.train(
        TrainSettings(model=str(model), data=str(data), output=str(run), device="cpu", max_steps=1, quantize=quantize)
    )
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    shard = run / "store" / HEAD_SHARD
    assert load_file(shard)[HEAD].dtype == torch.bfloat16
    assert (PACKED + STATE_SUFFIX in load_file(run / "store" / layer_shard(1))) == (quantize == "nf4")


# -- tensors that are not used -----------------------------------------------------------------------------------------


def _told_unused(model: Path, store: Path, **more: Any) -> list[str]:
    told: list[str] = []
    _builder(model, store, told, **more).build()
    return [text for text in told if "not used" in text]


def test_layers_that_config_json_does_not_have_are_told(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    change_json(model / "config.json", num_hidden_layers=2)
    (notice,) = _told_unused(model, tmp_path / "store")
    assert "not used: 18, such as model.layers.2.input_layernorm.weight;" in notice and "config.json" in notice
    assert not _told_unused(model, tmp_path / "store")  # it stands
    assert not _told_unused(model, tmp_path / "layers", layers=range(1))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "mixtral", "gpt_neox", *LATE_EXPERTS])
def test_nothing_is_told_of_a_whole_model(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", architecture)
    assert not _told_unused(model, tmp_path / "store", quantize="nf4")
    assert not _told_unused(tmp_path / "store", tmp_path / "again")  # with the side tensors of its 4-bit weights


@pytest.mark.parametrize(
    ("architecture", "name", "shape"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", (4,)),
        ("llama", "model.rotary_emb.inv_freq", (4,)),
        ("gpt2", "transformer.h.0.attn.bias", (1, 1, 8, 8)),
        ("gpt2", "h.0.attn.bias", (1, 1, 8, 8)),
        ("deepseek_v3", "model.layers.61.eh_proj.weight", (4, 4)),
        ("deepseek_v3", "layers.61.eh_proj.weight", (4, 4)),
        ("llama-tied", HEAD, None),
    ],
)
def test_what_transformers_leaves_out_on_purpose_is_not_told(
    architecture: str, name: str, shape: tuple[int, ...] | None, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", architecture)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[EMBEDDING].clone() if shape is None else torch.ones(shape)

    _change_weights(model, add)
    assert not _told_unused(model, tmp_path / "store")


def test_a_stranger_tensor_is_told(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama-tied")
    _change_weights(model, lambda tensors: tensors.update({"score.weight": torch.ones(2, 32)}))
    (notice,) = _told_unused(model, tmp_path / "store")
    assert "not used: 1, such as score.weight;" in notice


def test_a_run_that_is_started_anew_is_refused_before_it_is_deleted(tmp_path: Path, monkeypatch: Any) -> None:
    """Its store may have been made by an earlier version, which tied every head."""
    model, data = _tied_with_head(tmp_path / "model", _one_off), make_data(tmp_path / "data.jsonl")
    settings = TrainSettings(model=str(model), data=str(data), output=str(tmp_path / "run"), device="cpu")
    with monkeypatch.context() as earlier:
        earlier.setattr(tied_head, "_are_equal", lambda *arguments: True)
        lopt_lite.train(settings)
    assert lopt_lite.train(settings).already_done, "what stands goes on"
    with pytest.raises(ModelError, match="ties the two"):
        lopt_lite.train(dataclasses.replace(settings, fresh=True))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_run_loads_its_tokenizer_once(tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one takes some hundred MiB, which the budget does not have twice."""
    loaded: list[Path] = []
    load = tokenizer.load_tokenizer_from

    def counting(directory: Path) -> Any:
        loaded.append(directory)
        return load(directory)

    monkeypatch.setattr(tokenizer, "load_tokenizer_from", counting)
    model, data = make_model(tmp_path / "model", "llama"), make_data(tmp_path / "data.jsonl")
    run = tmp_path / "run"
    lopt_lite.train(TrainSettings(model=str(model), data=str(data), output=str(run), device="cpu", tune=tune))
    assert len(loaded) == 1
    for place in ("store", "adapter" if tune == "lora" else "model"):
        assert (run / place / "tokenizer.json").is_file()


def test_a_complete_store_is_used_without_writing_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make_model(tmp_path / "model", "llama"), make_data(tmp_path / "data.jsonl")
    store = tmp_path / "store"
    lopt_lite.quantize(QuantizeSettings(model=str(model), store=str(store), device="cpu"))
    make_directory = files.make_directory

    def refusing(path: Path) -> None:
        assert store not in [path, *path.parents], "it may be read-only"
        make_directory(path)

    monkeypatch.setattr(files, "make_directory", refusing)
    for path in store.iterdir():
        path.chmod(0o444)
    store.chmod(0o555)
    try:
        before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
        settings = TrainSettings(
            model=str(model), data=str(data), output=str(tmp_path / "run"), store=str(store), device="cpu"
        )
        lopt_lite.train(settings)
        assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == before
    finally:
        store.chmod(0o755)
