"""Tensors put aside come back bit for bit, wherever they were, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lopt_lite.residency.spill import Spill, SpillLimits

CPU = torch.device("cpu")


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"t{i}": torch.randn(3, 5 + i % 3, 8, generator=generator).bfloat16() for i in range(9)}
    return {**made, "float": torch.randn(7, generator=generator), "empty": torch.empty(0, 4), "bool": torch.ones(3) > 0}


@pytest.mark.parametrize("device_bytes", [0, 300, 10**9])
def test_everything_comes_back_bit_for_bit(device_bytes: int, tmp_path: Path) -> None:
    with Spill(SpillLimits(device_bytes, 0), tmp_path, CPU) as spill:
        for _ in range(3):
            for key, tensor in _tensors().items():
                spill.put(key, tensor)
            for key, tensor in reversed(_tensors().items()):
                back = spill.take(key)
                assert back.dtype == tensor.dtype and torch.equal(back, tensor)
        assert spill.is_empty
        assert (spill.written_bytes == 0) == (device_bytes == 10**9)
    assert not list(tmp_path.iterdir())


def test_places_in_the_file_are_used_again(tmp_path: Path) -> None:
    with Spill(SpillLimits(0, 0), tmp_path, CPU) as spill:
        for number in range(100):
            spill.put(number, torch.full((64,), float(number)))
            assert torch.equal(spill.take(number), torch.full((64,), float(number)))
        assert spill._end <= 2 * 64 * 4


def test_limits_count_what_is_kept_now(tmp_path: Path) -> None:
    with Spill(SpillLimits(256, 0), tmp_path, CPU) as spill:
        for _ in range(4):
            spill.put("a", torch.zeros(64))
            spill.take("a")
        assert spill.written_bytes == 0
        spill.put("a", torch.zeros(64))
        spill.put("b", torch.zeros(64))
        assert spill.written_bytes == 256


def test_a_key_cannot_be_used_twice(tmp_path: Path) -> None:
    with Spill(SpillLimits(256, 0), tmp_path, CPU) as spill:
        spill.put("a", torch.zeros(1))
        with pytest.raises(ValueError, match="put aside already"):
            spill.put("a", torch.zeros(1))
