"""Where the device runs out of memory, the step is done in smaller pieces, and a resumed run does the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lopt_lite_cli.main import main
from safetensors.torch import load_file

import lopt_lite
from lopt_lite import TrainSettings
from lopt_lite.checkpoints.layer_calls import LayerCall
from lopt_lite.errors import DoesNotFitError, StoppedError
from lopt_lite.events import Event, Notice, Step
from lopt_lite.journal import read_facts
from lopt_lite.training import memory_choice
from lopt_lite.training.metrics import read_metrics
from lopt_lite.training.trained import TrainedParameters
from tests.rig import residence
from tests.tiny_models import EVERY_BLOCK_LEARNS, make_data, make_model

PLANNED_TOKENS = 160

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its data."""
    directory = tmp_path_factory.mktemp("inputs")
    return make_model(directory / "model", "llama"), make_data(directory / "data.jsonl", 24)


@pytest.fixture
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the layers are."""
    chosen = residence(request.param, micro_batch_tokens=PLANNED_TOKENS)
    monkeypatch.setattr(memory_choice, "choose_residence", lambda *args, **kwargs: chosen)


class Device:
    """A device whose memory suffices for ``tokens`` at once where there are gradients, from call ``since`` on.

    ``error`` is what its allocator raises.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int, *, since: int = 0, error: str = "cuda") -> None:
        self.tokens, self.calls, self.failures = tokens, 0, 0
        run = LayerCall.run

        def limited(call: LayerCall, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            # Planning runs layers without values, which take no memory.
            if torch.is_grad_enabled() and not hidden.is_meta:
                self.calls += 1
                if self.calls > since and hidden.shape[0] * hidden.shape[1] > self.tokens:
                    self.failures += 1
                    if error == "cuda":
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                    raise RuntimeError("MPS backend out of memory (MPS allocated: 5.70 GB)")
            return run(call, layer, hidden)

        monkeypatch.setattr(LayerCall, "run", limited)


def _settings(inputs: tuple[Path, Path], output: Path, **changes: Any) -> TrainSettings:
    model, data = inputs
    values: dict[str, Any] = {"blocks": 2, "epochs": 2, "batch_size": 8, "quantize": "none", "dtype": "float32"}
    return TrainSettings(
        model=str(model), data=str(data), output=str(output), **{**values, **EVERY_BLOCK_LEARNS, **changes}
    )


def _losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def _facts(run: Path) -> list[dict[str, Any]]:
    return [fact for fact in read_facts(run / "journal.jsonl")[0] if fact["fact"] == "out-of-memory"]


@pytest.mark.parametrize(
    ("mode", "changes", "error"),
    [
        ("resident", {}, "cuda"),
        ("streamed", {}, "mps"),
        ("offloaded", {}, "cuda"),
        ("recomputed", {"schedule": "joint"}, "cuda"),
        ("resident", {"retain": 1.0, "retain_tokens": 4}, "mps"),
        ("streamed", {"retain": 1.0, "retain_tokens": 4, "schedule": "joint"}, "cuda"),
    ],
    indirect=["mode"],
)
def test_the_step_is_done_in_halves_with_the_same_gradient(inputs, tmp_path, monkeypatch, mode, changes, error):
    lopt_lite.train(_settings(inputs, tmp_path / "roomy", **changes))
    events: list[Event] = []
    with monkeypatch.context() as patch:
        device = Device(patch, 90, since=9, error=error)
        lopt_lite.train(_settings(inputs, tmp_path / "tight", **changes), on_event=events.append)
    assert device.failures
    (fact,) = _facts(tmp_path / "tight")
    assert fact["micro_batch_tokens"] <= PLANNED_TOKENS // 2
    (said,) = [event.text for event in events if isinstance(event, Notice) and "out of memory" in event.text]
    assert f"at most {fact['micro_batch_tokens']}" in said and f"instead of {PLANNED_TOKENS}" in said
    assert device.failures == 1, "the smaller size must hold for all that follows"
    losses, expected = _losses(tmp_path / "tight"), _losses(tmp_path / "roomy")
    assert losses == pytest.approx(expected, rel=1e-4)
    roomy, tight = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("roomy", "tight"))
    for name, tensor in roomy.items():
        assert torch.allclose(tight[name], tensor, atol=2e-4), name


@pytest.mark.parametrize("mode", ["resident"], indirect=True)
@pytest.mark.parametrize("stop_after", [1, 6, 9])
def test_a_resumed_run_does_each_step_in_the_same_pieces(inputs, tmp_path, monkeypatch, mode, stop_after):
    """The second start has memory enough, and still does what the first one had to do, from where it had to."""
    with monkeypatch.context() as patch:
        Device(patch, 90, since=40)
        lopt_lite.train(_settings(inputs, tmp_path / "whole"))
    assert _facts(tmp_path / "whole")[0]["step"] > 0

    steps = 0

    def stop(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, Step)
        if isinstance(event, Step) and steps == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    settings = _settings(inputs, tmp_path / "cut")
    with monkeypatch.context() as patch:
        device = Device(patch, 90, since=40)
        with pytest.raises(StoppedError):
            lopt_lite.train(settings, on_event=stop)
        before = device.calls
    with monkeypatch.context() as patch:
        Device(patch, 90, since=max(0, 40 - before))
        lopt_lite.train(settings)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("mode", ["resident"], indirect=True)
def test_one_example_that_is_too_much_is_refused_and_the_run_goes_on_with_more_memory(
    inputs, tmp_path, monkeypatch, mode, capsys
):
    model, data = inputs
    arguments = [
        "train",
        str(model),
        str(data),
        "--output",
        str(tmp_path / "run"),
        "--batch-size",
        "8",
        "--objective",
        "reconstruct",
    ]
    with monkeypatch.context() as patch:
        Device(patch, 4, since=30)
        assert main(arguments) == 4
    said = capsys.readouterr().err
    assert "out of memory with one example" in said and "to fix" in said
    assert main(arguments) == 0


@pytest.mark.parametrize("mode", ["streamed"], indirect=True)
def test_a_step_that_is_half_done_is_begun_again_from_the_checkpoint(inputs, tmp_path, monkeypatch, mode):
    """Full tuning updates layer by layer: what was updated cannot be undone but by a new start."""
    settings = _settings(inputs, tmp_path / "run", tune="full", lr=1e-3, checkpoint_every="0s")
    after_backward = TrainedParameters.after_backward
    with monkeypatch.context() as patch:
        device = Device(patch, 10_000)

        def shrink(trained: TrainedParameters, index: int) -> None:
            # Another program takes memory when the upper layer of the first step is updated.
            after_backward(trained, index)
            device.tokens = 90 if trained.updated_in_step else 10_000

        patch.setattr(TrainedParameters, "after_backward", shrink)
        with pytest.raises(DoesNotFitError, match="same command again"):
            lopt_lite.train(settings)
        assert device.failures == 1
    (fact,) = _facts(tmp_path / "run")
    lopt_lite.train(settings)
    assert len(_losses(tmp_path / "run")) == 3 * (1 + 2 + 2)
    assert _facts(tmp_path / "run") == [fact]
