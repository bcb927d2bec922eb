"""Models that many tests of what is on the device share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rig import Rig, open_rig
from tests.tiny_models import make_model

OpenRig = Callable[..., Rig]


@pytest.fixture(scope="module")
def rig_of(tmp_path_factory: pytest.TempPathFactory) -> OpenRig:
    """Rigs by architecture, dtype and changes to the config; each is made once."""
    rigs: dict[str, Rig] = {}

    def get(architecture: str, dtype: str = "float32", quantize: str = "none", **changes: Any) -> Rig:
        key = repr((architecture, dtype, quantize, changes))
        if key not in rigs:
            home = tmp_path_factory.mktemp(architecture)
            # In bfloat16, so that every compute dtype starts from the same weights.
            model = make_model(home / "m", architecture, dtype=torch.bfloat16, **changes)
            rigs[key] = open_rig(model, home / "s", quantize=quantize, dtype=dtype)
        return rigs[key]

    return get
