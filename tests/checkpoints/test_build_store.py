"""What is said, and what is refused, when a store is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lopt_lite.checkpoints.build_store import StoreBuilder
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.matrices import told_by_layers
from lopt_lite.checkpoints.store import store_info
from lopt_lite.events import Notice
from tests.tiny_models import LATE_EXPERTS, make_model

CPU = torch.device("cpu")


def _builder(model: Path, store: Path, told: list[str] | None = None, **more: Any) -> StoreBuilder:
    def on_event(event: Any) -> None:
        if isinstance(event, Notice) and told is not None:
            told.append(event.text)

    values: dict[str, Any] = {"quantize": "none", "dtype": "bfloat16", **more}
    return StoreBuilder(locate_model(str(model)), store, device=CPU, on_event=on_event, **values)


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


@pytest.mark.parametrize(("architecture", "count"), [("llama", 0), ("mixtral", 1), ("gpt2", 1)])
def test_of_like_layers_it_is_told_once_for_each_layer(architecture: str, count: int, tmp_path: Path) -> None:
    told: list[str] = []
    _builder(make_model(tmp_path / "model", architecture), tmp_path / "store", told, quantize="nf4").build()
    assert len([text for text in told if " of each layer cannot be quantised" in text]) == count
    assert not [text for text in told if " of 4 layers" in text]


def test_names_of_the_same_layers_are_told_together() -> None:
    places = {"a": [0, 1], "b": [1], "c": [0, 1], "d": [0], "e": [1]}
    assert told_by_layers(places, 2) == "a, c of each layer and b, e of 1 of 2 layers and d of 1 of 2 layers"
