"""Whole runs on a GPU that is only on paper: nothing of one device meets the other's, and the results are the CPU's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lopt_lite
import lopt_lite.results.evaluate
import lopt_lite.results.generate
import lopt_lite.training.run  # what a run imports lazily would be imported on the GPU
from lopt_lite import EvaluateSettings, GenerateSettings, TrainSettings
from tests.cuda.gpu_checks import Runs
from tests.cuda.paper_gpu import WrongDeviceError, paper_gpu
from tests.tiny_models import make_data, make_model

#: Rows of whole NF4 blocks: bitsandbytes' kernels for CPUs, which stand for a GPU's here, are wrong for others.
_WIDE_ENOUGH = {"hidden_size": 64, "intermediate_size": 128}
_STREAMED = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
_RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "dropout": {"lora_dropout": 0.1},
    "one block": {"blocks": 1},
    "own answers": {"retain_answers": 4},
    "reconstruct": {"objective": "reconstruct"},
    "match": {"objective": "match"},
    "joint": {"schedule": "joint", "objective": "reconstruct"},
    "full": {"tune": "full"},
    "full in float32": {"tune": "full", "dtype": "float32"},
    "the paper's": {"preset": "paper"},
    "float32": {"quantize": "none", "dtype": "float32"},
}


def test_what_a_gpu_refuses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with paper_gpu(monkeypatch) as gpu:
        there, here = torch.ones(3, 4, device=gpu), torch.ones(4, 5)
        with pytest.raises(WrongDeviceError):
            there @ here
        with pytest.raises(WrongDeviceError):
            there.numpy()
        with pytest.raises(WrongDeviceError):
            torch.cat([there, torch.ones(3, 4)])
        assert (there + torch.tensor(1.0)).device == gpu
        assert (there @ here.to(gpu)).cpu().device.type == "cpu"


def test_gradients_lie_where_what_they_are_of_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    with paper_gpu(monkeypatch) as gpu:
        here = torch.ones(4, 5, requires_grad=True)
        there = here.detach().to(gpu).requires_grad_()
        (there * here.to(gpu)).sum().backward()
        assert here.grad is not None and here.grad.device.type == "cpu"
        assert there.grad is not None and there.grad.device == gpu
        with pytest.raises(WrongDeviceError):
            _ForgetsTheDevice.apply(there).sum().backward()


class _ForgetsTheDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.full(gradient.shape, 2.0)


@pytest.mark.parametrize(
    ("kind", "recipe"), [*(("cuda", recipe) for recipe in _RECIPES), ("mps", "default"), ("mps", "full")]
)
def test_a_run_is_the_cpus(kind: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16, **_WIDE_ENOUGH)
    data = make_data(tmp_path / "data.jsonl", 8)

    def losses(device: str) -> tuple[float, ...]:
        run = tmp_path / device
        outcome = lopt_lite.train(
            TrainSettings(
                model=str(model),
                data=str(data),
                output=str(run),
                device=device,  # type: ignore[arg-type]
                epochs=1,
                batch_size=4,
                validation="0.2",
                **_RECIPES[recipe],
            )
        )
        measured = lopt_lite.evaluate(EvaluateSettings(run=str(run), data=str(data), device=device))  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # transformers has one for inputs that are not on model.device
            lopt_lite.generate(GenerateSettings(run=str(run), prompt="one two", max_new_tokens=3, device=device))  # type: ignore[arg-type]
        return outcome.final_train_loss, measured.base_loss, measured.tuned_loss

    expected = losses("cpu")
    with paper_gpu(monkeypatch, kind):
        found = losses(kind)
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_streamed_run_resumes_to_the_same_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with paper_gpu(monkeypatch):
        runs = Runs(tmp_path, "cuda", shape=_STREAMED, examples=8)
        whole = runs.train("whole")
        assert runs.streams("whole")
        runs.interrupt("resumed", after_steps=whole.steps // 2)
        runs.train("resumed")
    assert runs.adapter("resumed") == runs.adapter("whole")
