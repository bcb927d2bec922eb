"""Everything that users get wrong: the documented exit code, a message that names what to change, and nothing lost.

Each function marked with :func:`bad` prepares one bad input and returns the command line to give; the mark says which exit
code and which words must come of it. All of them go through one test.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lopt_lite_cli.main import main
from safetensors.torch import load_file, save_file

from lopt_lite.locks import LOCK_NAME
from tests.tiny_models import make_data, make_model

SETTINGS, INPUT, DOES_NOT_FIT, RUN_DIRECTORY = 2, 3, 4, 5
CODE_NAMES = {
    SETTINGS: "settings",
    INPUT: "model or data",
    DOES_NOT_FIT: "does not fit",
    RUN_DIRECTORY: "run directory",
}

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OPTIONS = ("--quantize", "none", "--dtype", "float32", "--device", "cpu", "--head-fit-epochs", "0")


class Stock(NamedTuple):
    """Sound things made once; a case copies what it damages."""

    model: Path
    sharded: Path
    data: Path
    run: Path


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    root = tmp_path_factory.mktemp("stock")
    made = Stock(
        model=make_model(root / "model", num_hidden_layers=2),
        sharded=make_model(root / "sharded", num_hidden_layers=2, max_shard_size="50KB"),
        data=make_data(root / "data.jsonl", 10),
        run=root / "run",
    )
    assert main(["train", str(made.model), str(made.data), "--output", str(made.run), "--quiet", *OPTIONS]) == 0
    return made


@dataclass
class Place:
    """Where one case plays: its directory, and what its command line will name."""

    root: Path
    stock: Stock
    patch: pytest.MonkeyPatch
    cleanup: contextlib.ExitStack
    model: Path = field(init=False)
    data: Path = field(init=False)
    run: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model, self.data, self.run = self.stock.model, self.stock.data, self.root / "run"

    def own_model(self, *, sharded: bool = False) -> Path:
        """A copy of the tiny model, to damage."""
        source = self.stock.sharded if sharded else self.stock.model
        self.model = shutil.copytree(source, self.root / "model")
        return self.model

    def change_config(self, **values: Any) -> None:
        change_json(self.own_model() / "config.json", **values)

    def change_weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        path = self.own_model() / WEIGHTS
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    def change_index(self, change: Callable[[dict[str, str]], object]) -> None:
        path = self.own_model(sharded=True) / INDEX
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    def own_data(self, content: bytes | list[Any]) -> Path:
        """A data file of these bytes, or of these objects and ready-made lines."""
        self.data = self.root / "own.jsonl"
        if isinstance(content, list):
            lines = [line if isinstance(line, str) else json.dumps(line) for line in content]
            content = "".join(line + "\n" for line in lines).encode()
        self.data.write_bytes(content)
        return self.data

    def finished_run(self) -> Path:
        """A copy of a finished run."""
        return shutil.copytree(self.stock.run, self.run)

    def stray_directory(self, name: str) -> Path:
        """A directory that holds something of the user's."""
        directory = self.root / name
        directory.mkdir()
        (directory / "thesis.txt").write_text("three years of work")
        (directory / ".thesis.txt.tmp").write_text("and the newest page")
        return directory

    def train(self, *options: str) -> list[str]:
        return ["train", str(self.model), str(self.data), "--output", str(self.run), *OPTIONS, *options]


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def place(tmp_path: Path, stock: Stock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as cleanup:
        yield Place(tmp_path, stock, monkeypatch, cleanup)


class Case(NamedTuple):
    code: int
    words: tuple[str, ...]
    prepare: Callable[[Place], list[str]]
    found_at_work: bool


CASES: dict[str, Case] = {}


def bad(code: int, *words: str, found_at_work: bool = False) -> Callable[[Callable[[Place], list[str]]], None]:
    """Register a case: its exit code and words of its message.

    ``found_at_work``: it can only be found while the weights are prepared, so the run directory may have been begun.
    """

    def register(prepare: Callable[[Place], list[str]]) -> None:
        assert prepare.__name__ not in CASES
        CASES[prepare.__name__] = Case(code, words, prepare, found_at_work)

    return register


# -- MODEL: which files -----------------------------------------------------------------------------------------------


@bad(INPUT, "no-such.safetensors", "hub id")
def model_that_is_not_there(place):
    place.model = place.root / "no-such.safetensors"
    return place.train()


@bad(INPUT, "nobody/nothing-called-this", "network", "directory as MODEL")
def hub_id_without_a_network(place):
    import huggingface_hub

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    place.patch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    return ["train", "nobody/nothing-called-this", str(place.data), "--output", str(place.run)]


@bad(INPUT, "holds no safetensors file", WEIGHTS)
def empty_directory_as_model(place):
    place.model = place.root / "empty"
    place.model.mkdir()
    return place.train()


@bad(INPUT, "pytorch_model.bin", "convert to safetensors", "never loaded")
def directory_with_only_a_pickle(place):
    (place.own_model() / WEIGHTS).rename(place.model / "pytorch_model.bin")
    return place.train()


@bad(INPUT, WEIGHTS, "pickle", "save_pretrained")
def pickle_that_is_called_safetensors(place):
    torch.save({"weight": torch.zeros(64)}, place.own_model() / WEIGHTS)
    return place.train()


@bad(INPUT, "weights.bin", "pickles can run code", "safetensors")
def pickle_as_model(place):
    place.model = place.root / "weights.bin"
    torch.save({"weight": torch.zeros(64)}, place.model)
    return place.train()


@bad(INPUT, "model.gguf", "GGUF is for inference only", "original checkpoint")
def gguf_as_model(place):
    place.model = place.root / "model.gguf"
    place.model.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    return place.train()


@bad(INPUT, "PEFT adapter", "give the model that it was made for")
def adapter_as_model(place):
    place.model = place.stock.run / "adapter"
    return place.train()


@bad(INPUT, "README.md is not a model", ".safetensors")
def text_file_as_model(place):
    place.model = place.root / "README.md"
    place.model.write_text("# A fine model")
    return place.train()


@bad(INPUT, "2 files that could be the model", "name one of them")
def directory_with_two_models(place):
    (place.own_model() / WEIGHTS).rename(place.model / "one.safetensors")
    shutil.copy(place.model / "one.safetensors", place.model / "two.safetensors")
    return place.train()


@bad(INPUT, "is truncated", "get the file again")
def truncated_safetensors(place):
    path = place.own_model() / WEIGHTS
    os.truncate(path, path.stat().st_size - 1000)
    return place.train()


@bad(INPUT, "too few for a safetensors file", "get the file again")
def empty_safetensors(place):
    (place.own_model() / WEIGHTS).write_bytes(b"")
    return place.train()


@bad(INPUT, "claims a header of 1,152,921,504,606,846,976 bytes", "get the file again")
def header_that_claims_an_exbibyte(place):
    path = place.own_model() / WEIGHTS
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    return place.train()


@bad(INPUT, "Git LFS pointer", "git lfs pull")
def git_lfs_pointer(place):
    (place.own_model() / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return place.train()


@bad(INPUT, "is not a regular file", ".safetensors file")
def named_pipe_as_weights(place):
    (place.own_model() / WEIGHTS).unlink()
    os.mkfifo(place.model / WEIGHTS)
    return place.train()


# -- MODEL: the index -------------------------------------------------------------------------------------------------


@bad(INPUT, INDEX, "'../outside.safetensors'", "own directory", "do not use this index")
def index_that_leaves_its_directory(place):
    place.change_index(lambda names: names.update({"lm_head.weight": "../outside.safetensors"}))
    return place.train()


@bad(INPUT, INDEX, "outside.safetensors'", "own directory", "do not use this index")
def index_with_an_absolute_path(place):
    outside = place.root / "outside.safetensors"
    save_file({"lm_head.weight": torch.zeros(2, 2)}, outside)
    place.change_index(lambda names: names.update({"lm_head.weight": str(outside)}))
    return place.train()


@bad(INPUT, INDEX, "is not there", "get the missing file")
def index_that_names_a_missing_shard(place):
    next(place.own_model(sharded=True).glob("model-00002-of-*.safetensors")).unlink()
    return place.train()


@bad(INPUT, INDEX, "lm_head.weight", "does not hold it", "from the same place")
def index_that_names_the_wrong_shard(place):
    place.change_index(lambda names: names.update({"lm_head.weight": names["model.embed_tokens.weight"]}))
    return place.train()


@bad(INPUT, INDEX, "not valid JSON", "get the file again")
def index_that_is_not_json(place):
    (place.own_model(sharded=True) / INDEX).write_text("{weight_map:")
    return place.train()


@bad(INPUT, "no index beside it lists it", "get the other shards and the index")
def one_shard_without_its_index(place):
    (place.own_model(sharded=True) / INDEX).unlink()
    place.model = next(place.model.glob("model-00001-of-*.safetensors"))
    return place.train()


# -- MODEL: config.json and the architecture --------------------------------------------------------------------------


@bad(INPUT, "no config.json beside", "--config DIR")
def model_without_config(place):
    (place.own_model() / "config.json").unlink()
    return place.train()


@bad(INPUT, "config.json is not valid JSON", "to fix")
def config_that_is_not_json(place):
    (place.own_model() / "config.json").write_text('{"model_type": "llama",')
    return place.train()


@bad(INPUT, "not a model's configuration", "model_type", "--config DIR")
def config_without_a_model_type(place):
    (place.own_model() / "config.json").write_text('{"hidden_size": 32}')
    return place.train()


@bad(INPUT, "hypermamba", "config.json", "transformers release")
def unknown_architecture(place):
    place.change_config(model_type="hypermamba", architectures=["HyperMamba"])
    return place.train()


@bad(INPUT, "remote code", "hypermamba", "never run")
def architecture_that_needs_remote_code(place):
    place.change_config(model_type="hypermamba", auto_map={"AutoConfig": "evil.Config"})
    (place.model / "evil.py").write_text("raise SystemExit('this code must never run')")
    return place.train()


@bad(INPUT, "t5", "decoder-only")
def encoder_decoder(place):
    place.change_config(model_type="t5", architectures=["T5ForConditionalGeneration"], num_heads=4, d_kv=8, d_ff=64)
    return place.train()


@bad(INPUT, "BertLMHeadModel", "encoder", "decoder-only")
def encoder_alone(place):
    place.change_config(model_type="bert", architectures=["BertForMaskedLM"])
    return place.train()


@bad(INPUT, "config.json", "to fix: check config.json")
def config_with_a_value_of_the_wrong_type(place):
    place.change_config(hidden_size="wide")
    return place.train()


@bad(INPUT, "layers", "config.json")
def config_with_no_layers(place):
    place.change_config(num_hidden_layers=0)
    return place.train()


@bad(INPUT, "already quantised (gptq)", "bring the unquantised checkpoint")
def gptq_checkpoint(place):
    place.change_config(quantization_config={"quant_method": "gptq", "bits": 4})
    return place.train()


@bad(INPUT, "already quantised (bitsandbytes int8)", "NF4", "bring the unquantised checkpoint")
def int8_checkpoint(place):
    place.change_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    return place.train()


# -- MODEL: the tensors -----------------------------------------------------------------------------------------------


@bad(INPUT, "lacks model.layers.1.mlp.down_proj.weight", "config.json belongs to these weights")
def checkpoint_that_lacks_a_tensor(place):
    place.change_weights(lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    return place.train()


@bad(INPUT, "model.norm.weight has shape [31]", "[32], from config.json", "config.json belongs to these weights")
def tensor_of_another_shape_than_config_says(place):
    place.change_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    return place.train()


@bad(INPUT, "has shape [32, 64]", "[32, 96]", "config.json belongs to these weights")
def config_of_another_size_than_the_tensors(place):
    place.change_config(intermediate_size=96)
    return place.train()


@bad(INPUT, "model.norm.weight", "I8", "BF16, F16 or F32", "unquantised checkpoint")
def weights_of_an_integer_type(place):
    place.change_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    return place.train()


@bad(INPUT, "lm_head.weight", "F64", "BF16, F16 or F32")
def weights_in_double_precision(place):
    place.change_weights(lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].double()}))
    return place.train()


@bad(INPUT, "model.layers.1.self_attn.q_proj.weight", "NaN", "download the checkpoint again", found_at_work=True)
def weights_that_are_not_numbers(place):
    place.change_weights(lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"][3].fill_(float("nan")))
    return place.train()


@bad(INPUT, "model.norm.weight", "infinity", "sound one", found_at_work=True)
def infinite_weights_in_quantize(place):
    place.change_weights(lambda tensors: tensors["model.norm.weight"][3].fill_(float("inf")))
    return ["quantize", str(place.model), str(place.root / "store"), "--device", "cpu"]


# -- MODEL: the tokenizer ---------------------------------------------------------------------------------------------


@bad(INPUT, "no tokenizer beside the model", "tokenizer.json", "--config DIR")
def model_without_tokenizer(place):
    (place.own_model() / "tokenizer.json").unlink()
    return place.train()


@bad(INPUT, "the tokenizer in", "cannot be loaded", "get them again")
def broken_tokenizer(place):
    (place.own_model() / "tokenizer.json").write_text('{"version": "1.0"}')
    return place.train()


@bad(INPUT, "embedding has 100 rows", "tokenizer that belongs to this model")
def tokenizer_of_a_larger_vocabulary(place):
    place.change_config(vocab_size=100)
    return place.train()


@bad(INPUT, "template", "tokenizer")
def broken_chat_template(place):
    (place.own_model() / "chat_template.jinja").write_text("{% for message in messages %}{{ message.")
    return place.train()


# -- DATA -------------------------------------------------------------------------------------------------------------

GOOD_LINE = {"question": "What is 1 + 1?", "answer": "2"}


@bad(INPUT, "no-such.jsonl does not exist", "check the path")
def data_that_is_not_there(place):
    place.data = place.root / "no-such.jsonl"
    return place.train()


@bad(INPUT, "is a directory", "JSON Lines file")
def directory_as_data(place):
    place.data = place.stray_directory("data")
    return place.train()


@bad(INPUT, "own.jsonl is empty", "one JSON object per line")
def empty_data(place):
    place.own_data(b"")
    return place.train()


@bad(INPUT, "own.jsonl is empty", "one JSON object per line")
def data_of_blank_lines(place):
    place.own_data(b"\n  \r\n\n")
    return place.train()


@bad(INPUT, "own.jsonl, line 7", "not valid JSON", "--skip-bad-lines")
def bad_json_at_line_7(place):
    place.own_data([*[GOOD_LINE] * 6, '{"question": "What is', GOOD_LINE])
    return place.train()


@bad(INPUT, "own.jsonl, line 1", "not UTF-8", "--skip-bad-lines")
def binary_garbage_as_data(place):
    place.own_data(bytes(range(255, 0, -1)) * 20)
    return place.train()


@bad(INPUT, "line 1", "UTF-16", "save the file as UTF-8")
def data_in_utf_16(place):
    place.own_data(json.dumps(GOOD_LINE).encode("utf-16"))
    return place.train()


@bad(INPUT, "line 1", "one object per line, not one array")
def one_json_array_as_data(place):
    place.own_data(json.dumps([GOOD_LINE], indent=2).encode())
    return place.train()


@bad(INPUT, "line 2", "a JSON string, not an object")
def line_that_is_no_object(place):
    place.own_data([GOOD_LINE, '"just text"'])
    return place.train()


@bad(INPUT, "line 3", "'text'", "'question+answer'", "--skip-bad-lines")
def mixed_formats(place):
    place.own_data([GOOD_LINE, GOOD_LINE, {"text": "Once upon a time"}])
    return place.train()


@bad(INPUT, "line 1", "no known format has the keys 'input_text', 'target_text'", "question+answer")
def unknown_format(place):
    place.own_data([{"input_text": "a", "target_text": "b"}])
    return place.train()


@bad(INPUT, "line 2", "'answer' is a JSON number, not a string")
def answer_that_is_no_text(place):
    place.own_data([GOOD_LINE, {"question": "What is 1 + 1?", "answer": 2}])
    return place.train()


@bad(INPUT, "line 1", "'narrator'", "known are", "assistant")
def unknown_role(place):
    place.own_data([{"messages": [{"role": "narrator", "content": "It was night."}]}])
    return place.train()


@bad(INPUT, "none of the 2 examples", "token to train on", "have assistant messages")
def data_without_an_answer(place):
    place.own_data([{"messages": [{"role": "user", "content": "Hello?"}]}] * 2)
    return place.train()


@bad(INPUT, "none of the 2 lines", "line 1", "question+answer")
def no_usable_line_with_skip_bad_lines(place):
    place.own_data(["{", "}"])
    return place.train("--skip-bad-lines")


@bad(INPUT, "held_out.jsonl does not exist", "check the path")
def validation_file_that_is_not_there(place):
    return place.train("--validation", str(place.root / "held_out.jsonl"))


@bad(SETTINGS, "--validation is 1.5", "a fraction between 0 and 1")
def validation_fraction_above_one(place):
    return place.train("--validation", "1.5")


@bad(INPUT, "1 example", "cannot be split", "leave --validation out")
def one_example_to_split(place):
    place.own_data([GOOD_LINE])
    return place.train("--validation", "0.5")


# -- options ----------------------------------------------------------------------------------------------------------


@bad(SETTINGS, "DATA is missing", "lopt-lite train MODEL DATA")
def forgotten_data(place):
    return ["train", str(place.model)]


@bad(SETTINGS, "--blocks is 3", "the model has 2 layers", "at most 2")
def more_blocks_than_layers(place):
    return place.train("--blocks", "3")


@bad(SETTINGS, "--objective names 'distil'", "reconstruct, task, none")
def unknown_objective(place):
    return place.train("--objective", "distil")


@bad(SETTINGS, "--lora-targets names 'query'", "q_proj")
def unknown_lora_target(place):
    return place.train("--lora-targets", "query")


@bad(SETTINGS, "--lr is", "above 0")
def learning_rate_that_is_no_number(place):
    return place.train("--lr", "nan")


@bad(SETTINGS, "--dtype", "bfloat16", "float32")
def unknown_dtype(place):
    return place.train("--dtype", "int4")


@bad(SETTINGS, "--device cuda", "--device cpu")
def cuda_on_a_machine_without(place):
    place.patch.setattr(torch.cuda, "is_available", lambda: False)
    return place.train("--device", "cuda")


@bad(SETTINGS, "options.yaml", "'learning-speed'", "no option", "lr")
def yaml_with_an_unknown_option(place):
    (place.root / "options.yaml").write_text("learning-speed: 3\n")
    return place.train("--config", "options.yaml")


@bad(SETTINGS, "options.yaml", "not YAML")
def yaml_that_is_not_yaml(place):
    (place.root / "options.yaml").write_text("lr: [1, 2\nblocks: }")
    return place.train("--config", "options.yaml")


@bad(SETTINGS, "no-such.yaml", "No such file")
def yaml_that_is_not_there(place):
    return place.train("--config", "no-such.yaml")


@bad(SETTINGS, "--epochs is 'many'", "a whole number")
def yaml_with_a_value_of_the_wrong_type(place):
    (place.root / "options.yaml").write_text("epochs: many\n")
    return place.train("--config", "options.yaml")


# -- the run directory ------------------------------------------------------------------------------------------------


@bad(RUN_DIRECTORY, "thesis.txt", "no run directory", "--output")
def output_that_holds_something_else(place):
    place.run = place.stray_directory("mine")
    return place.train()


@bad(RUN_DIRECTORY, "thesis.txt", "no run directory", "--output")
def fresh_output_that_holds_something_else(place):
    place.run = place.stray_directory("mine")
    return place.train("--fresh")


@bad(RUN_DIRECTORY, "no run directory", "adapter", "--output")
def fresh_output_whose_parts_are_called_like_a_run_s(place):
    place.run = place.root / "mine"
    place.run.mkdir()
    for name in ("adapter", "cache", "store"):
        shutil.copytree(place.stray_directory(name), place.run / name)
    (place.run / "settings.json").write_text('{"editor": "vi"}')
    return place.train("--fresh")


@bad(RUN_DIRECTORY, "no run directory", "--output")
def fresh_output_that_is_a_store(place):
    shutil.copytree(place.stock.run / "store", place.run)
    return place.train("--fresh")


@bad(RUN_DIRECTORY, "is no store", "new or empty directory")
def store_that_is_the_model_itself(place):
    return place.train("--store", str(place.own_model()))


@bad(RUN_DIRECTORY, "is no store", "new or empty directory")
def store_that_is_another_run(place):
    other = shutil.copytree(place.stock.run, place.root / "other")
    return place.train("--store", str(other))


@bad(RUN_DIRECTORY, "made with quantize none", "expected: quantize nf4", "another --store")
def store_of_other_settings(place):
    store = shutil.copytree(place.stock.run / "store", place.root / "store")
    return place.train("--store", str(store), "--quantize", "nf4")


@bad(RUN_DIRECTORY, "thesis.txt", "new or empty directory")
def store_that_holds_something_else(place):
    return place.train("--store", str(place.stray_directory("mine")))


@bad(RUN_DIRECTORY, "notes.txt", "--output")
def output_that_is_a_file(place):
    place.run = place.root / "notes.txt"
    place.run.write_text("remember the milk")
    return place.train()


@bad(RUN_DIRECTORY, "cannot create the directory", "Not a directory", "--output")
def output_below_a_file(place):
    (place.root / "notes.txt").write_text("remember the milk")
    place.run = place.root / "notes.txt" / "run"
    return place.train()


@bad(RUN_DIRECTORY, "run is not writable", "change its rights")
def output_that_is_not_writable(place):
    place.run.mkdir()
    allowed = os.access
    place.patch.setattr(os, "access", lambda path, mode: Path(path) != place.run and allowed(path, mode))
    return place.train()


@bad(RUN_DIRECTORY, "in use by another process", "wait for it to end")
def run_directory_in_use(place):
    hold = "import sys, lopt_lite.locks as l, pathlib as p\nwith l.locked(p.Path(sys.argv[1]), what=''): input(print('held'))"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(place.finished_run())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    place.cleanup.callback(holder.communicate, "\n", timeout=30)
    assert holder.stdout.readline() == "held\n"
    return place.train()


@bad(RUN_DIRECTORY, "--lr 0.0004, not 0.001", "go back to the old value", "--fresh", "another --output")
def another_learning_rate_for_a_finished_run(place):
    place.finished_run()
    return place.train("--lr", "1e-3")


@bad(RUN_DIRECTORY, "DATA ", "own.jsonl (the contents differ)", "go back to the old value", "--fresh")
def changed_data_for_a_finished_run(place):
    place.finished_run()
    place.own_data([GOOD_LINE] * 4)
    return place.train()


@bad(RUN_DIRECTORY, "MODEL ", "the contents differ", "go back to the old value", "--fresh")
def changed_model_for_a_finished_run(place):
    place.finished_run()
    place.change_weights(lambda tensors: tensors["model.norm.weight"].add_(1))
    return place.train()


@bad(INPUT, "own.jsonl is empty")
def fresh_with_bad_data_on_a_finished_run(place):
    place.finished_run()
    place.own_data(b"")
    return place.train("--fresh")


@bad(INPUT, "lacks lm_head.weight")
def fresh_with_an_incomplete_model_on_a_finished_run(place):
    place.finished_run()
    place.change_weights(lambda tensors: tensors.pop("lm_head.weight"))
    return place.train("--fresh")


@bad(RUN_DIRECTORY, "journal.jsonl is damaged at line 2", "--fresh", "backup")
def damaged_journal(place):
    journal = place.finished_run() / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], lines[1][5:], *lines[2:]]))
    return place.train()


@bad(RUN_DIRECTORY, "settings.json is not valid JSON", "--fresh")
def damaged_settings(place):
    os.truncate(place.finished_run() / "settings.json", 100)
    return place.train()


@bad(RUN_DIRECTORY, "its adapter is gone", "--fresh")
def adapter_deleted_from_a_finished_run(place):
    (place.finished_run() / "adapter" / "adapter_model.safetensors").unlink()
    return place.train()


@bad(RUN_DIRECTORY, "layer-00001.safetensors", "missing or has changed", "rebuilds it")
def store_shard_deleted_from_a_finished_run(place):
    (place.finished_run() / "store" / "layer-00001.safetensors").unlink()
    return place.train()


# -- memory and disk --------------------------------------------------------------------------------------------------


@bad(DOES_NOT_FIT, "the store needs", "1,000 are free", "free some space")
def nearly_full_disk(place):
    usage = namedtuple("usage", "total used free")
    place.patch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1000, 1000))
    return place.train()


@bad(DOES_NOT_FIT, "the disk is full", "layer-00000.safetensors", "give the same command again")
def disk_that_fills_up_while_the_store_is_written(place):
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name.startswith("layer-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    place.patch.setattr(os, "replace", full)
    return place.train()


@bad(RUN_DIRECTORY, "Read-only file system", "--output")
def read_only_disk(place):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    place.patch.setattr(Path, "mkdir", refuse)
    return place.train()


# -- commands that read a run -----------------------------------------------------------------------------------------


def reading(command: str, run: Path, place: Place) -> list[str]:
    more = {
        "evaluate": [str(place.stock.data)],
        "generate": ["--prompt", "Hi"],
        "export": [str(place.root / "out")],
        "status": [],
    }
    return [command, str(run), *more[command]]


for _command in ("evaluate", "generate", "export", "status"):

    def _on_a_stray(place, command=_command):
        return reading(command, place.stray_directory("mine"), place)

    _on_a_stray.__name__ = f"{_command}_of_no_run"
    bad(RUN_DIRECTORY, "mine is not a run directory", "lopt-lite train")(_on_a_stray)

for _command in ("evaluate", "generate", "export"):

    def _on_an_unfinished(place, command=_command):
        journal = place.finished_run() / "journal.jsonl"
        facts = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join(line for line in facts if json.loads(line)["fact"] != "adapter"))
        return reading(command, place.run, place)

    _on_an_unfinished.__name__ = f"{_command}_of_an_unfinished_run"
    bad(RUN_DIRECTORY, "is not finished", "lopt-lite status", "continue it with lopt-lite train")(_on_an_unfinished)


@bad(RUN_DIRECTORY, "journal.jsonl is damaged at line 1")
def status_of_a_run_with_a_damaged_journal(place):
    (place.finished_run() / "journal.jsonl").write_text("garbage\n")
    return ["status", str(place.run)]


@bad(RUN_DIRECTORY, "mine", "not an empty directory", "new directory")
def export_to_a_directory_that_is_not_empty(place):
    return ["export", str(place.stock.run), str(place.stray_directory("mine"))]


@bad(RUN_DIRECTORY, "mine", "thesis.txt", "new or empty directory")
def merged_export_to_a_directory_that_is_not_empty(place):
    return ["export", str(place.stock.run), str(place.stray_directory("mine")), "--format", "merged"]


@bad(RUN_DIRECTORY, "run is not empty and is no store", "new or empty directory")
def merged_export_into_the_run_itself(place):
    place.finished_run()
    return ["export", str(place.run), str(place.run), "--format", "merged"]


@bad(RUN_DIRECTORY, "out holds a finished checkpoint already", "new or empty directory")
def merged_export_over_an_earlier_one(place):
    arguments = ["export", str(place.stock.run), str(place.root / "out"), "--format", "merged"]
    assert main(arguments) == 0
    return arguments


@bad(RUN_DIRECTORY, "notes.txt", "new")
def merged_export_to_a_file(place):
    (place.root / "notes.txt").write_text("remember the milk")
    return ["export", str(place.stock.run), str(place.root / "notes.txt"), "--format", "merged"]


@bad(INPUT, "is not the one this run was trained from", "--model", "--onto quantized")
def merged_export_onto_another_model(place):
    place.change_weights(lambda tensors: tensors["model.norm.weight"].add_(1))
    options = ["--format", "merged", "--model", str(place.model)]
    return ["export", str(place.stock.run), str(place.root / "out"), *options]


@bad(INPUT, "'gone'", "--model", "--onto quantized")
def merged_export_after_the_model_was_deleted(place):
    change_json(place.finished_run() / "settings.json", model={"given": "gone", "origin": "gone", "fingerprint": "0"})
    return ["export", str(place.run), str(place.root / "out"), "--format", "merged"]


@bad(INPUT, "own.jsonl, line 1", "--skip-bad-lines")
def evaluate_on_bad_data(place):
    return ["evaluate", str(place.stock.run), str(place.own_data(["{"]))]


@bad(SETTINGS, "--prompt is empty", "the text to answer")
def generate_without_a_prompt(place):
    return ["generate", str(place.stock.run)]


# -- the tests --------------------------------------------------------------------------------------------------------


def files_below(root: Path) -> dict[Path, bytes]:
    """Content of every file but locks, which a running process may hold."""
    return {
        path: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name not in (LOCK_NAME, f"{LOCK_NAME}.pid")
    }


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{CODE_NAMES[CASES[name].code]}: {name}") for name in CASES])
def test_bad_input_is_explained_and_nothing_is_lost(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    arguments = case.prepare(place)
    before = files_below(place.root)
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()

    assert code == case.code, err
    assert out == ""
    assert "Traceback" not in err
    missing = [word for word in case.words if word not in err]
    assert not missing, f"{missing} not in:\n{err}"
    (start,) = (index for index, line in enumerate(err.splitlines()) if line.startswith("error: "))
    advice = err.splitlines()[start + 1 :]
    assert advice and all(line.startswith(("  expected: ", "  to fix: ")) for line in advice), err

    after = files_below(place.root)
    assert [path for path in before if after.get(path) != before[path]] == [], "changed or lost"
    if case.code in (SETTINGS, INPUT) and not case.found_at_work:
        assert set(after) == set(before), "something was written although the input cannot be used"


@pytest.mark.parametrize(
    "name",
    [
        "yaml_with_an_unknown_option",
        "forgotten_data",
        "truncated_safetensors",
        "bad_json_at_line_7",
        "nearly_full_disk",
        "another_learning_rate_for_a_finished_run",
        "status_of_no_run",
    ],
)
def test_with_json_the_error_is_the_one_document(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = CASES[name].prepare(place)
    capsys.readouterr()
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert set(document) == {"error", "exit_code", "found", "expected", "fix"}
    assert document["exit_code"] == code == CASES[name].code
    said = " ".join(filter(None, (document["found"], document["expected"], document["fix"])))
    assert all(word in said for word in CASES[name].words)
    assert document["found"] in err


def test_there_are_many_kinds() -> None:
    assert len(CASES) >= 60
    assert {case.code for case in CASES.values()} == set(CODE_NAMES)
