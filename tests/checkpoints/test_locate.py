"""From MODEL to its files: every way to name a model, and every way in which its files can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lopt_lite.checkpoints.locate import ModelFiles, locate_model
from lopt_lite.errors import ModelError
from lopt_lite.events import Event, Notice

CONFIG: dict[str, Any] = {"model_type": "llama", "hidden_size": 8}
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "model.embed_tokens.weight": torch.randn((12, 8), generator=generator).to(torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight": torch.randn((16, 8), generator=generator).to(torch.float16),
        "model.norm.weight": torch.ones(8),
    }


def write_config(directory: Path, **changes: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def write_index(directory: Path, weight_map: object, name: str = INDEX) -> Path:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory / name


def single(directory: Path, name: str = "model.safetensors") -> Path:
    write_config(directory)
    save_file(tensors(), directory / name)
    return directory / name


def sharded(directory: Path) -> dict[str, str]:
    write_config(directory)
    everything = tensors()
    names = list(everything)
    weight_map = {names[0]: FIRST, names[1]: SECOND, names[2]: SECOND}
    for file in (FIRST, SECOND):
        save_file({name: everything[name] for name in names if weight_map[name] == file}, directory / file)
    write_index(directory, weight_map)
    return weight_map


def check(files: ModelFiles) -> None:
    assert files.config["model_type"] == "llama"
    assert set(files.weights.names()) == set(tensors())
    for name, tensor in tensors().items():
        assert torch.equal(files.weights.read(name), tensor)


# --- ways to name a model ---------------------------------------------------------------------------------------------


def test_a_file_a_directory_an_index_and_a_shard_all_name_the_model(tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    path = single(one)
    sharded(many)
    prints = set()
    for given, directory in [(path, one), (one, one), (many, many), (many / INDEX, many), (many / FIRST, many)]:
        files = locate_model(str(given))
        check(files)
        assert files.origin == str(directory)
        assert files.name == directory.name
        assert files.config_path == directory / "config.json"
        prints.add(files.fingerprint())
    assert len(prints) == 1


def test_relative_paths_and_dots_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single(tmp_path / "tiny" / "sub")
    single(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny" / "sub")
    assert locate_model("..").name == "tiny"
    assert locate_model("model.safetensors").origin == str(tmp_path / "tiny" / "sub")


def test_a_file_of_any_name_is_named_after_itself(tmp_path: Path) -> None:
    path = single(tmp_path / "dir", "my-model.v2.safetensors")
    assert locate_model(str(path)).name == "my-model.v2"
    assert locate_model(str(tmp_path / "dir")).name == "dir"


def test_model_safetensors_wins_over_the_other_files_of_its_directory(tmp_path: Path) -> None:
    single(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    check(locate_model(str(tmp_path)))


def test_links_as_in_the_hub_cache_are_followed_and_name_the_repository(tmp_path: Path) -> None:
    sharded(tmp_path / "source")
    repository = tmp_path / "models--org--tiny-model"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted((tmp_path / "source").iterdir())):
        shutil.copy(file, repository / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob{number}")
    for given in (snapshot, snapshot / INDEX, snapshot / FIRST):
        files = locate_model(str(given))
        check(files)
        assert files.name == "tiny-model"
        assert files.origin == str(snapshot)


def test_config_directories_come_before_the_weights_own(tmp_path: Path) -> None:
    path = single(tmp_path / "weights")
    for name in ("generation_config.json", "tokenizer.json"):
        (tmp_path / "weights" / name).write_text("{}")
    files = locate_model(str(path))
    assert files.tokenizer_directory == tmp_path / "weights"
    assert files.generation_config_path == tmp_path / "weights" / "generation_config.json"
    write_config(tmp_path / "config", hidden_size=16)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.json").write_text("{}")
    files = locate_model(str(path), config_dirs=[str(tmp_path / "words"), str(tmp_path / "config")])
    assert files.config["hidden_size"] == 16
    assert files.tokenizer_directory == tmp_path / "words"
    (tmp_path / "weights" / "config.json").unlink()
    with pytest.raises(ModelError, match="--config DIR"):
        locate_model(str(path))
    locate_model(str(path), config_dirs=[str(tmp_path / "config")])
    with pytest.raises(ModelError, match="no such directory"):
        locate_model(str(path), config_dirs=[str(tmp_path / "absent")])


def test_without_a_vocabulary_there_is_no_tokenizer_directory(tmp_path: Path) -> None:
    path = single(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    files = locate_model(str(path))
    assert files.tokenizer_directory is None
    assert files.generation_config_path is None


def test_the_fingerprint_changes_with_config_and_weights_alone(tmp_path: Path) -> None:
    first = locate_model(str(single(tmp_path / "a"))).fingerprint()
    assert locate_model(str(single(tmp_path / "b", "renamed.safetensors"))).fingerprint() == first
    write_config(tmp_path / "a", rope_theta=5.0)
    second = locate_model(str(tmp_path / "a")).fingerprint()
    changed = tensors()
    changed["model.norm.weight"][3] = 2
    save_file(changed, tmp_path / "b" / "renamed.safetensors")
    third = locate_model(str(tmp_path / "b")).fingerprint()
    assert len({first, second, third}) == 3


# --- paths that name no model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["", "absent.safetensors", "org/absent.safetensors", "./absent", "gpt2", "a/b/c", "a\0b"]
)
def test_what_is_neither_path_nor_hub_id_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no file or directory"):
        locate_model(model)


def test_a_name_that_the_system_refuses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        locate_model(str(tmp_path / ("x" * 5000)))


def test_an_unknown_home_directory_is_an_error() -> None:
    with pytest.raises(ModelError, match="home"):
        locate_model("~no-such-user-here/model")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([], "no safetensors"),
        (["pytorch_model.bin"], "never loaded"),
        (["model.pt"], "never loaded"),
        (["model.ckpt"], "never loaded"),
        (["model.Q4_K_M.gguf"], "GGUF"),
        (["consolidated.00.pth"], "makers' own format"),
        (["consolidated.safetensors"], "makers' own format"),
        (["adapter_config.json", "adapter_model.safetensors"], "PEFT adapter"),
        (["a.safetensors", "b.safetensors"], "2 files that could be the model: a.safetensors, b.safetensors"),
        (["a.safetensors.index.json", "b.safetensors.index.json"], "2 files"),
        (["tf_model.h5"], "another framework"),
    ],
)
def test_a_directory_without_one_clear_model_says_what_it_holds(tmp_path: Path, names: list[str], match: str) -> None:
    write_config(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=match):
        locate_model(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "notes.txt", "adapter_model.safetensors"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        locate_model(str(tmp_path / name))


def test_a_pickle_named_safetensors_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    torch.save(tensors(), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="never loaded"):
        locate_model(str(tmp_path))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = single(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="truncated"):
        locate_model(str(path))


def test_a_shard_without_its_index_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ModelError, match="one of 2 shards"):
        locate_model(str(tmp_path / SECOND))
    (tmp_path / FIRST).unlink()
    with pytest.raises(ModelError, match="one of 2 shards"):
        locate_model(str(tmp_path))


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no tensors"):
        locate_model(str(tmp_path))


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "../outside.safetensors",
        "sub/inside.safetensors",
        "./model.safetensors",
        "..",
        "",
        "sub\\inside.safetensors",
        "C:model.safetensors",
        "model.bin",
        "a\0.safetensors",
        7,
        None,
        ["x.safetensors"],
    ],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, place: object) -> None:
    directory = tmp_path / "model"
    weight_map = sharded(directory)
    (directory / "sub").mkdir()
    for target in (tmp_path / "outside.safetensors", directory / "sub" / "inside.safetensors"):
        save_file({"model.norm.weight": torch.ones(8)}, target)
    write_index(directory, {**weight_map, "model.norm.weight": place})
    with pytest.raises(ModelError, match=r"places the tensor 'model\.norm\.weight'"):
        locate_model(str(directory))


def test_an_index_with_an_absolute_path_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    weight_map = sharded(directory)
    save_file({"model.norm.weight": torch.ones(8)}, tmp_path / "outside.safetensors")
    write_index(directory, {**weight_map, "model.norm.weight": str(tmp_path / "outside.safetensors")})
    with pytest.raises(ModelError, match=r"outside\.safetensors"):
        locate_model(str(directory / INDEX))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}']
)
def test_a_malformed_index_is_refused_by_name(tmp_path: Path, text: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    for given in (tmp_path, tmp_path / FIRST):
        with pytest.raises(ModelError, match=r"index\.json"):
            locate_model(str(given))


def test_an_index_naming_a_missing_shard_or_a_dead_link_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(ModelError, match=f"{SECOND}, which is not there"):
        locate_model(str(tmp_path))
    (tmp_path / SECOND).symlink_to("nowhere")
    with pytest.raises(ModelError, match="symbolic link to nothing"):
        locate_model(str(tmp_path))


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    write_index(tmp_path, {**weight_map, "model.extra.weight": FIRST})
    with pytest.raises(ModelError, match=r"'model\.extra\.weight' in model-00001.*does not hold it"):
        locate_model(str(tmp_path))
    write_index(tmp_path, weight_map)
    save_file(tensors(), tmp_path / FIRST)
    with pytest.raises(ModelError, match="is in both"):
        locate_model(str(tmp_path))


def test_tensors_that_the_index_does_not_list_are_left_out_with_a_notice(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    del weight_map["model.norm.weight"]
    write_index(tmp_path, weight_map)
    events: list[Event] = []
    files = locate_model(str(tmp_path), on_event=events.append)
    assert "model.norm.weight" not in files.weights
    assert any(isinstance(event, Notice) and "1 tensors" in event.text for event in events)


# --- types of tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "label"),
    [
        ("a.weight", torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "F8_E4M3"),
        ("a.qweight", torch.zeros(4, 4, dtype=torch.int32), "I32"),
        ("a.weight", torch.zeros(4, 4, dtype=torch.int8), "I8"),
        ("a.weight", torch.zeros(4, 4, dtype=torch.int64), "I64"),
        ("a.weight", torch.zeros(4, 4, dtype=torch.uint8), "U8"),
        ("a.weight.absmax", torch.zeros(4, dtype=torch.uint8), "U8"),
        ("a.bias", torch.zeros(4, dtype=torch.float64), "F64"),
    ],
)
def test_a_type_that_cannot_be_trained_on_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, label: str
) -> None:
    write_config(tmp_path)
    save_file({**tensors(), name: tensor}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"'{name}'.* type {label}"):
        locate_model(str(tmp_path))


def test_masks_and_position_numbers_of_old_checkpoints_do_not_hinder(tmp_path: Path) -> None:
    write_config(tmp_path)
    buffers = {
        "layers.0.attention.bias": torch.zeros((1, 1, 4, 4), dtype=torch.uint8),
        "layers.1.attention.bias": torch.zeros((1, 1, 4, 4), dtype=torch.bool),
        "position_ids": torch.arange(4),
    }
    save_file({**tensors(), **buffers}, tmp_path / "model.safetensors")
    assert "position_ids" in locate_model(str(tmp_path)).weights


def nf4_parts(base: str) -> dict[str, torch.Tensor]:
    return {
        f"{base}.weight": torch.zeros((64, 1), dtype=torch.uint8),
        f"{base}.weight.absmax": torch.zeros(2, dtype=torch.uint8),
        f"{base}.weight.quant_map": torch.zeros(16),
        f"{base}.weight.nested_absmax": torch.zeros(1),
        f"{base}.weight.nested_quant_map": torch.zeros(256),
        f"{base}.weight.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
    }


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_a_bitsandbytes_nf4_checkpoint_is_accepted(tmp_path: Path) -> None:
    write_config(tmp_path, quantization_config=NF4)
    save_file({**tensors(), **nf4_parts("a")}, tmp_path / "model.safetensors")
    assert "a.weight.absmax" in locate_model(str(tmp_path)).weights


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": 3}', '{"model_type": ""}', "{bad"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    single(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        locate_model(str(tmp_path))


def test_code_that_comes_with_a_model_is_never_needed_nor_run(tmp_path: Path) -> None:
    single(tmp_path)
    (tmp_path / "modeling_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto_map = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    write_config(tmp_path, auto_map=auto_map)
    events: list[Event] = []
    locate_model(str(tmp_path), on_event=events.append)
    assert any(isinstance(event, Notice) and "built-in llama" in event.text for event in events)
    write_config(tmp_path, auto_map=auto_map, model_type="unheard-of")
    with pytest.raises(ModelError, match=r"needs remote code(.|\n)*never run"):
        locate_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("quantization", "match"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes fp4"),
        ({**NF4, "bnb_4bit_quant_storage": "bfloat16"}, "stored as bfloat16"),
        ({"quant_method": "bitsandbytes"}, "neither"),
        ("gptq", "not an object"),
    ],
)
def test_other_quantisations_are_refused_by_name(tmp_path: Path, quantization: object, match: str) -> None:
    single(tmp_path)
    for changes in ({"quantization_config": quantization}, {"text_config": {"quantization_config": quantization}}):
        write_config(tmp_path, **changes)
        with pytest.raises(ModelError, match=rf"{match}(.|\n)*unquantised checkpoint"):
            locate_model(str(tmp_path))
