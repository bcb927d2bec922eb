"""What is checked on every kind of GPU: streamed gradients, and whole runs within a budget."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

import lopt_lite
from lopt_lite import TrainSettings
from lopt_lite.checkpoints.build_store import DTYPES, StoreBuilder
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.skeleton import Skeleton
from lopt_lite.checkpoints.store import Store
from lopt_lite.errors import DoesNotFitError
from lopt_lite.events import Event, Step
from lopt_lite.journal import read_facts
from lopt_lite.outcomes import TrainOutcome
from lopt_lite.residency.pool import LayerPool, MicroBatch, ResidentLayers
from lopt_lite.residency.streamed import StreamedLayers
from lopt_lite.training.adapters import adapter_parameters, attach_adapter, set_training
from tests.tiny_models import make_data, make_model

#: Large enough for memory to be about layers, small enough for seconds.
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
MIB = 2**20


def layer_gradients(
    directory: Path, device: torch.device, *, quantize: str, dtype: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Adapter gradients of one step of three micro-batches, of resident and of streamed layers."""
    model = make_model(directory / "model", "llama", dtype=torch.bfloat16, **SHAPE)
    store_directory = directory / "store"
    StoreBuilder(locate_model(str(model)), store_directory, quantize=quantize, dtype=dtype, device=device).build()
    skeleton = Skeleton(locate_model(str(store_directory)), dtype=DTYPES[dtype])
    store = Store(store_directory)
    skeleton.set_embedding_reader(lambda ids: store.embedding_rows(skeleton, ids))
    skeleton.place_root_tensors(store.root(skeleton), device)
    settings = TrainSettings(model="unused", data="unused")

    def attach(index: int, layer: torch.nn.Module) -> None:
        attach_adapter(layer, index, skeleton=skeleton, settings=settings)
        set_training(layer, True)
        generator = torch.Generator().manual_seed(index)
        for name, parameter in adapter_parameters(layer).items():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)

    def step(pool: LayerPool) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(2)
        batches = []
        for shape in ((3, 64), (2, 100), (1, 17)):
            recording = skeleton.record(torch.randint(3, 200, shape, generator=generator).to(device), embed=True)
            batches.append(MicroBatch(recording.hidden.to(device), recording.calls))

        def loss_backward(number: int, output: torch.Tensor) -> float:
            loss = output.float().square().mean() / (number + 1)
            loss.backward()
            return float(loss.detach())

        pool.accumulate(batches, loss_backward)
        return {
            f"{index}.{name}": parameter.grad.float().cpu()
            for index, layer in enumerate(pool.layers)
            for name, parameter in adapter_parameters(layer).items()
            if parameter.grad is not None
        }

    count = skeleton.layer_count
    resident = ResidentLayers(store, skeleton, 0, count, device=device, dequantize=False, on_layer=attach)
    expected = step(resident)
    resident.close()
    with StreamedLayers(store, skeleton, 0, count, device=device, on_layer=attach) as streamed:
        found = step(streamed)
    store.close()
    return expected, found


def largest_relative_difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Over all tensors: norm of the difference over norm of the expected."""
    assert expected and expected.keys() == found.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


class Runs:
    """Runs of one recipe on one device, each in a directory of its own, at the smallest budget that works.

    Parameters
    ----------
    directory:
        Where everything goes.
    device:
        As ``--device``.
    slack_bytes:
        What the budget has beyond the smallest.
    shape:
        Of the model.
    examples:
        In its data.
    """

    def __init__(
        self,
        directory: Path,
        device: str,
        *,
        slack_bytes: int = 0,
        shape: dict[str, int] | None = None,
        examples: int = 24,
    ) -> None:
        self._directory, self._device = directory, device
        self._model = make_model(directory / "model", "llama", dtype=torch.bfloat16, **(shape or SHAPE))
        self._data = make_data(directory / "data.jsonl", examples)
        self.budget_bytes = MIB
        try:
            self.train("too small")
        except DoesNotFitError as error:
            needed = re.search(r"(\d+)MiB", error.expected or "")
            assert needed, error
            self.budget_bytes = int(needed[1]) * MIB + slack_bytes
        else:
            raise AssertionError("a budget of 1 MiB was not refused")

    def train(self, name: str, on_event: Callable[[Event], None] = lambda event: None) -> TrainOutcome:
        """Train in the directory ``name``, or continue there."""
        return lopt_lite.train(
            TrainSettings(
                model=str(self._model),
                data=str(self._data),
                output=str(self._directory / name),
                store=str(self._directory / "store"),
                device=self._device,
                memory=f"{self.budget_bytes // MIB}MiB",
                blocks=2,
                epochs=2,
                batch_size=4,
                lora_dropout=0.1,
            ),
            on_event=on_event,
        )

    def interrupt(self, name: str, *, after_steps: int) -> None:
        """Train until so many optimiser steps are done, then as if Ctrl-C were pressed twice."""
        steps = []

        def count(event: Event) -> None:
            if isinstance(event, Step):
                steps.append(event)
            if len(steps) == after_steps:
                raise KeyboardInterrupt

        try:
            self.train(name, count)
        except KeyboardInterrupt:
            return
        raise AssertionError("the run was over before it was interrupted")

    def adapter(self, name: str) -> bytes:
        """The finished adapter's bytes."""
        return (self._directory / name / "adapter" / "adapter_model.safetensors").read_bytes()

    def streams(self, name: str) -> bool:
        """Whether the run streamed layers."""
        facts = read_facts(self._directory / name / "journal.jsonl")[0]
        (residence,) = [fact for fact in facts if fact["fact"] == "residence"]
        return "streamed" in residence["mode"]
