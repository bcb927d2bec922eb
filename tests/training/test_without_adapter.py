"""Matrices that no adapter can go on are named before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lopt_lite
from lopt_lite.events import Notice
from lopt_lite.settings import TrainSettings
from tests.tiny_models import make_data, make_model


def _told(tmp_path: Path, architecture: str, config: dict[str, Any], **changes: Any) -> list[str]:
    """What a run says of matrices that adapters cannot go on."""
    told: list[str] = []
    model = make_model(tmp_path / "model", architecture, **config)
    values = {"quantize": "none", "dtype": "float32", "device": "cpu", "retain": 0.0, "max_steps": 1, **changes}
    settings = TrainSettings(
        model=str(model), data=str(make_data(tmp_path / "data.jsonl", 6)), output=str(tmp_path / "run"), **values
    )
    lopt_lite.train(settings, on_event=lambda event: told.append(event.text) if isinstance(event, Notice) else None)
    return [text for text in told if "plain linear layers" in text]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_experts_without_an_adapter_are_told_once(quantize: str, tmp_path: Path) -> None:
    (notice,) = _told(tmp_path, "qwen3_moe", {}, quantize=quantize, blocks=1)
    assert notice.startswith("mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight of the trained layers")
    assert "get no adapter" in notice and "--tune full" in notice


@pytest.mark.parametrize(
    ("architecture", "config", "changes"),
    [
        ("llama", {}, {}),
        ("gpt2", {}, {}),
        ("qwen3_moe", {}, {"tune": "full"}),
        ("qwen3_moe", {}, {"lora_targets": "q_proj"}),
        # The last layer alone is trained, and has no experts.
        ("qwen3_moe", {"mlp_only_layers": [3]}, {"last_layers": 1}),
    ],
)
def test_nothing_is_told_where_nothing_is_left_out(
    architecture: str, config: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    assert not _told(tmp_path, architecture, config, **changes)
