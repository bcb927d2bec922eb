"""Streamed layers give the bits that resident ones give, with one load per layer and pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lopt_lite.errors import RunDirectoryError
from lopt_lite.residency import pool
from lopt_lite.residency.choices import Residence
from lopt_lite.residency.pool import LayerPool, MicroBatch
from lopt_lite.residency.spill import Spill, SpillLimits
from lopt_lite.residency.streamed import StreamedLayers, spread
from lopt_lite.settings import TrainSettings
from lopt_lite.training.adapters import adapter_parameters, attach_adapter, set_training
from tests.rig import CPU, Rig, open_rig, residence
from tests.tiny_models import make_model

SETTINGS = TrainSettings(model="unused", data="unused", lora_dropout=0.2)


def _rig(tmp_path: Path, architecture: str, quantize: str) -> Rig:
    dtype = "bfloat16" if quantize == "nf4" else "float32"
    return open_rig(make_model(tmp_path / "m", architecture), tmp_path / "s", quantize=quantize, dtype=dtype)


def _with_adapter(rig: Rig, trained: range):  # type: ignore[no-untyped-def]
    def on_layer(index: int, layer: torch.nn.Module) -> None:
        if index in trained:
            attach_adapter(layer, index, skeleton=rig.skeleton, settings=SETTINGS)
            set_training(layer, True)
            for name, parameter in adapter_parameters(layer).items():
                if "lora_B" in name:
                    torch.manual_seed(index)
                    parameter.data.normal_(0, 0.05)

    return on_layer


def _batches(rig: Rig) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(2)
    batches = []
    for rows, tokens in ((3, 11), (2, 17), (1, 5)):
        recording = rig.skeleton.record(torch.randint(3, 200, (rows, tokens), generator=generator), embed=True)
        batches.append(MicroBatch(recording.hidden, recording.calls))
    return batches


def _step(rig: Rig, pool: LayerPool) -> tuple[float, dict[str, torch.Tensor | None]]:
    """One step's loss and adapter gradients."""

    def loss_backward(number: int, output: torch.Tensor) -> float:
        loss = output.float().square().mean() / (number + 1)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    loss = pool.accumulate(_batches(rig), loss_backward, lambda layer, part: 1000 * layer + part)
    gradients = {
        f"{index}.{name}": parameter.grad
        for index, layer in enumerate(pool.layers)
        for name, parameter in adapter_parameters(layer).items()
    }
    return loss, gradients


@pytest.mark.parametrize(
    "how", [{}, {"prefetch": False}, {"dequantize": True}, {"resident": {1, 3}}, {"boundaries": 0}]
)
@pytest.mark.parametrize("trained", [range(4), range(2, 4), range(1, 3), range(0)])
@pytest.mark.parametrize(
    ("architecture", "quantize"), [("llama", "none"), ("llama", "nf4"), ("gemma3_text", "nf4"), ("gpt_neox", "nf4")]
)
def test_streamed_gradients_are_the_resident_ones(
    architecture: str, quantize: str, trained: range, how: dict[str, Any], tmp_path: Path
) -> None:
    rig = _rig(tmp_path, architecture, quantize)
    attach = _with_adapter(rig, trained)
    with rig.layers(on_layer=attach) as resident:
        loss, expected = _step(rig, resident)
    if "boundaries" in how:
        how = {"boundaries": Spill(SpillLimits(how["boundaries"], 0), tmp_path, CPU)}
    with StreamedLayers(rig.store, rig.skeleton, 0, 4, device=CPU, on_layer=attach, **how) as streamed:
        streamed_loss, gradients = _step(rig, streamed)
    if "boundaries" in how and trained and trained.start < 3:
        assert how["boundaries"].written_bytes > 0
    assert streamed_loss == loss
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("first", [0, 1, 3])
def test_streamed_outputs_are_the_resident_ones(first: int, tmp_path: Path) -> None:
    rig = _rig(tmp_path, "llama", "nf4")
    batches = _batches(rig)
    with rig.layers(first, 4) as resident:
        expected = [resident.forward(batch) for batch in batches]
    outputs: dict[int, torch.Tensor] = {}
    with StreamedLayers(rig.store, rig.skeleton, first, 4, device=CPU) as streamed:
        streamed.forward_all(batches, outputs.__setitem__)
        alone = streamed.forward(batches[1])
    assert torch.equal(alone, expected[1])
    assert all(torch.equal(outputs[number], output) for number, output in enumerate(expected))


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_step_loads_each_layer_twice_and_the_turning_layer_once(prefetch: bool, tmp_path: Path) -> None:
    rig = _rig(tmp_path, "llama", "nf4")
    with StreamedLayers(
        rig.store, rig.skeleton, 0, 4, device=CPU, on_layer=_with_adapter(rig, range(4)), prefetch=prefetch
    ) as streamed:
        before = streamed.loads
        _step(rig, streamed)
        # Layer 2 is still in the other slab when the pass turns at layer 3; layer 0 is not.
        assert streamed.loads - before in (5, 6, 7)


def test_weights_do_not_stay_between_passes(tmp_path: Path) -> None:
    rig = _rig(tmp_path, "llama", "nf4")
    with StreamedLayers(rig.store, rig.skeleton, 0, 4, device=CPU) as streamed:
        streamed.forward(_batches(rig)[0])
        assert all(parameter.is_meta for layer in streamed.layers for parameter in layer.parameters())


def test_freed_memory_is_looked_at_at_every_layer_up_and_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = _rig(tmp_path, "llama", "nf4")
    attach = _with_adapter(rig, range(4))
    looks: list[int] = []
    monkeypatch.setattr(pool, "look", lambda: looks.append(1))
    with rig.layers(on_layer=attach) as resident:
        _step(rig, resident)
    # Three micro-batches up through four layers, and back to the inputs of all but the first.
    assert len(looks) == 3 * (4 + 3)
    looks.clear()
    with StreamedLayers(rig.store, rig.skeleton, 0, 4, device=CPU, on_layer=attach) as streamed:
        _step(rig, streamed)
    # Each but the top layer runs once more on the way down.
    assert len(looks) == 3 * (4 + 3 + 3)


def test_progress_moves_per_layer_within_a_step(tmp_path: Path) -> None:
    rig = _rig(tmp_path, "llama", "nf4")
    seen: list[tuple[int, int]] = []
    with StreamedLayers(
        rig.store,
        rig.skeleton,
        0,
        4,
        device=CPU,
        on_layer=_with_adapter(rig, range(4)),
        on_pass=lambda done, total: seen.append((done, total)),
    ) as streamed:
        _step(rig, streamed)
    assert seen == [(n, 7) for n in range(1, 8)]


def test_layers_that_stay_are_evenly_spread_and_the_top_one_is_first() -> None:
    assert spread(0, 8, 0) == set()
    assert spread(0, 8, 1) == {7}
    assert spread(0, 8, 2) == {3, 7}
    assert spread(4, 8, 4) == {4, 5, 6, 7}
    assert all(len(spread(2, 9, count)) == count for count in range(8))


def test_a_residence_comes_back_from_the_journal_and_another_releases_is_refused() -> None:
    decided = residence("streamed")
    assert Residence.from_json(decided.to_json()) == decided
    with pytest.raises(RunDirectoryError, match="head_slice_rows"):
        Residence.from_json({k: v for k, v in decided.to_json().items() if k != "head_slice_rows"})
