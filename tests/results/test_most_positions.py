"""Models with a table of positions: data is cut to what it holds, and longer prompts are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import lopt_lite
from lopt_lite import EvaluateSettings, GenerateSettings, PlanSettings, TrainSettings
from lopt_lite.checkpoints.locate import describe_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.errors import SettingsError
from lopt_lite.events import Event, Notice
from lopt_lite.training.run_directory import RunPaths
from tests.tiny_models import ARCHITECTURES, make_config, make_data, make_model

POSITIONS = 64
OPTIONS = {"batch_size": 8, "quantize": "none", "dtype": "float32", "device": "cpu"}


def skeleton_of(config: transformers.PretrainedConfig, directory: Path) -> Skeleton:
    config.save_pretrained(directory)
    return Skeleton(describe_model(str(directory)), dtype=torch.float32)


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_models_with_a_table_of_positions_are_limited(architecture: str, tmp_path: Path) -> None:
    found = skeleton_of(make_config(architecture, 300), tmp_path).most_positions
    assert found == (512 if architecture in ("gpt2", "opt") else None)


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TABLES = {
    "gpt_neo": ("GPTNeoConfig", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, 64),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, 64),
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}, 64),
    "codegen": ("CodeGenConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}, 64),
    "biogpt": ("BioGptConfig", {"intermediate_size": 64}, 64),
    # Positions begin after the padding token's, and tokens have a table of kinds beside them.
    "roberta": ("RobertaConfig", {"is_decoder": True, "intermediate_size": 64, "pad_token_id": 1}, 62),
    "roberta padded with 0": ("RobertaConfig", {"is_decoder": True, "intermediate_size": 64, "pad_token_id": 0}, 63),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_rows_before_a_tables_first_position_do_not_count(name: str, tmp_path: Path) -> None:
    kind, own, most = TABLES[name]
    common = {"max_position_embeddings": POSITIONS, **SMALL}
    if "n_embd" in own or "num_layers" in own:
        common = {"max_position_embeddings": POSITIONS, "vocab_size": 300, "hidden_size": 32}
    if "n_embd" in own:
        common = {"vocab_size": 300}
    assert skeleton_of(getattr(transformers, kind)(**{**common, **own}), tmp_path).most_positions == most


@pytest.fixture(scope="module", params=["gpt2", "opt"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """A directory with a model, data with examples that are too long for it, and a run."""
    root = tmp_path_factory.mktemp(request.param)
    changes = {"n_positions" if request.param == "gpt2" else "max_position_embeddings": POSITIONS}
    model = make_model(root / "model", request.param, **changes)
    data = make_data(root / "data.jsonl", 14)
    with data.open("a", encoding="utf-8") as file:
        for line in ({"question": "Why? " * 100, "answer": "So."}, {"question": "Why?", "answer": "So. " * 100}):
            file.write(json.dumps(line) + "\n")
    events: list[Event] = []
    settings = TrainSettings(
        model=str(model),
        data=str(data),
        validation=str(data),
        retain=0.1,
        retain_data=str(data),
        output=str(root / "run"),
        **OPTIONS,  # type: ignore[arg-type]
    )
    lopt_lite.train(settings, on_event=events.append)
    return root, events


def test_training_cuts_examples_to_the_positions_and_says_so(trained: tuple[Path, list[Event]]) -> None:
    root, events = trained
    assert RunPaths(root / "run").adapter.is_dir()
    told = [text for text in notices(events) if "were cut to 64 tokens" in text]
    assert len(told) == 3, "training, held-out and anchoring examples"
    assert all("6 examples" in text and "--max-length 1024" in text and "positions" in text for text in told)


def test_a_shorter_max_length_is_what_cuts(trained: tuple[Path, list[Event]]) -> None:
    root, _ = trained
    events: list[Event] = []
    settings = EvaluateSettings(run=str(root / "run"), data=str(root / "data.jsonl"), max_length=40)
    lopt_lite.evaluate(settings, on_event=events.append)
    (told,) = [text for text in notices(events) if "were cut" in text]
    assert "cut to 40 tokens (--max-length 40)" in told


def test_evaluation_cuts_examples_to_the_positions_and_says_so(trained: tuple[Path, list[Event]]) -> None:
    root, _ = trained
    events: list[Event] = []
    outcome = lopt_lite.evaluate(
        EvaluateSettings(run=str(root / "run"), data=str(root / "data.jsonl"), max_length=2000), on_event=events.append
    )
    assert outcome.examples == 16
    assert any("6 examples were cut to 64 tokens" in text for text in notices(events))


def test_planning_counts_examples_as_they_will_be_cut_and_says_so(trained: tuple[Path, list[Event]]) -> None:
    root, _ = trained

    def longest(**options: int) -> tuple[int, list[str]]:
        events: list[Event] = []
        settings = PlanSettings(model=str(root / "model"), data=str(root / "data.jsonl"), device="cpu", **options)
        return lopt_lite.plan(settings, on_event=events.append).longest_tokens, notices(events)

    tokens, told = longest()
    assert tokens == POSITIONS
    assert any("more than 64 tokens will be cut" in text and "--max-length is 1,024" in text for text in told)
    tokens, told = longest(max_length=40)
    assert tokens == 40 and not any("positions" in text for text in told)


def test_a_prompt_that_leaves_too_few_positions_for_the_answer_is_refused(trained: tuple[Path, list[Event]]) -> None:
    root, _ = trained
    run, prompt = str(root / "run"), "Why?"
    with pytest.raises(SettingsError) as caught:
        lopt_lite.generate(GenerateSettings(run=run, prompt=prompt))
    assert "--max-new-tokens is 256" in str(caught.value) and "no more than 64 together" in str(caught.value)
    # What the message says to do works, to the last position.
    left = int(str(caught.value).split("To fix: --max-new-tokens ")[1].split(",")[0])
    assert lopt_lite.generate(GenerateSettings(run=run, prompt=prompt, max_new_tokens=left)).tokens <= left
    with pytest.raises(SettingsError):
        lopt_lite.generate(GenerateSettings(run=run, prompt=prompt, max_new_tokens=left + 1))
    with pytest.raises(SettingsError, match="To fix: give a shorter prompt"):
        lopt_lite.generate(GenerateSettings(run=run, prompt="Why? " * 100, max_new_tokens=1))
