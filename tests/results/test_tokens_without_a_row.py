"""A tokenizer with a token more than the model's embedding has rows: every command says which text cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lopt_lite
from lopt_lite import EvaluateSettings, GenerateSettings, TrainSettings
from lopt_lite.errors import DataError
from lopt_lite.training.run_directory import RunPaths
from tests.data.tiny_tokenizers import make_tokenizer
from tests.tiny_models import make_data, make_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, good data, and data whose third line cannot be used."""
    root = tmp_path_factory.mktemp("rows")
    tokenizer = make_tokenizer()
    make_model(root / "model", "llama", tokenizer=tokenizer)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(root / "model")
    lines = make_data(root / "good.jsonl", 8).read_text(encoding="utf-8").splitlines()
    lines[2] = json.dumps({"question": "What is in <image>?", "answer": "Ducks."})
    (root / "bad.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def train(place: Path, output: str, data: str, **options: Any) -> int:
    settings = TrainSettings(
        model=str(place / "model"),
        data=str(place / data),
        output=str(place / output),
        batch_size=4,
        quantize="none",
        dtype="float32",
        device="cpu",
        **options,
    )
    return lopt_lite.train(settings).examples


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    train(place, "run", "good.jsonl")
    return place / "run"


@pytest.mark.parametrize("role", ["data", "validation", "retain_data"])
def test_training_names_the_line_before_anything_is_written(place: Path, role: str) -> None:
    others = {} if role == "data" else {role: str(place / "bad.jsonl")}
    if role == "retain_data":
        others["retain"] = 0.1
    with pytest.raises(DataError, match=r"bad.jsonl, line 3: the token '<image>'"):
        train(place, "refused", "bad.jsonl" if role == "data" else "good.jsonl", **others)
    assert not RunPaths(place / "refused").root.exists()


def test_training_goes_on_without_bad_lines_if_asked_to(place: Path) -> None:
    bad = str(place / "bad.jsonl")
    options = {"skip_bad_lines": True, "validation": bad, "retain": 0.1, "retain_data": bad}
    assert train(place, "skipping", "bad.jsonl", **options) == 7


def test_evaluation_names_or_drops_the_line(place: Path, run: Path) -> None:
    settings = {"run": str(run), "data": str(place / "bad.jsonl"), "device": "cpu"}
    with pytest.raises(DataError, match=r"bad.jsonl, line 3: the token '<image>'"):
        lopt_lite.evaluate(EvaluateSettings(**settings))
    assert lopt_lite.evaluate(EvaluateSettings(**settings, skip_bad_lines=True)).examples == 7


def test_a_prompt_with_such_a_token_is_refused(run: Path) -> None:
    with pytest.raises(DataError, match="the prompt cannot be used: the token '<image>'"):
        lopt_lite.generate(GenerateSettings(run=str(run), prompt="What is in <image>?", max_new_tokens=4))
