"""``--objective match``: the targets are what the unquantised layers make, and training comes closer to them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lopt_lite
from lopt_lite import PlanSettings, QuantizeSettings, TrainSettings
from lopt_lite.data.dataset import Batch
from lopt_lite.errors import DoesNotFitError, SettingsError, StoppedError
from lopt_lite.events import Event, Notice, Progress, Step
from lopt_lite.residency import choices
from lopt_lite.residency.pool import MicroBatch
from lopt_lite.training import activation_cache, matching, memory_choice, sequential
from lopt_lite.training.objectives import matching_loss
from lopt_lite.training.run_directory import RunPaths
from tests.rig import open_rig, residence
from tests.tiny_models import make_data, make_model
from tests.training.same_runs import assert_same

MIB = 2**20


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inputs")
    return make_model(directory / "model", "llama"), make_data(directory / "data.jsonl", 12)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards of targets for a few tiny examples, and sums in one order."""
    monkeypatch.setattr(activation_cache, "_SHARD_BYTES", 8 << 10)
    monkeypatch.setattr(matching, "FORWARD_ROWS", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _settings(inputs: tuple[Path, Path], output: Path, **changes: Any) -> TrainSettings:
    values: dict[str, Any] = {"dtype": "float32", "objective": "match", "batch_size": 4, "device": "cpu", **changes}
    return TrainSettings(model=str(inputs[0]), data=str(inputs[1]), output=str(output), **values)


def _train(settings: TrainSettings) -> list[Event]:
    told: list[Event] = []
    lopt_lite.train(settings, on_event=told.append)
    return told


def _early_steps(told: list[Event], block: int = 0) -> list[Step]:
    return [event for event in told if isinstance(event, Step) and event.block == block]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Batch, torch.Tensor]]:
    """Every batch whose targets were asked for, with them."""
    seen: list[tuple[Batch, torch.Tensor]] = []

    class Watched(matching.Targets):
        def of(self, batch: Batch) -> torch.Tensor:
            seen.append((batch, super().of(batch)))
            return seen[-1][1]

    monkeypatch.setattr(sequential, "Targets", Watched)
    return seen


def test_the_first_blocks_targets_are_the_hidden_states_of_plain_transformers(inputs, tmp_path, given):
    _train(_settings(inputs, tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(inputs[0], dtype=torch.float32)
    # Beside 4-bit weights, embeddings are stored in bfloat16; they are what enters.
    embedding = model.get_input_embeddings().weight
    embedding.data.copy_(embedding.data.bfloat16())
    assert sorted(e for batch, _ in given for e in batch.examples.tolist()) == list(range(12))
    for batch, targets in given:
        with torch.no_grad():
            hidden = model(batch.input_ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(targets[batch.real], hidden[batch.real], rtol=1e-5, atol=1e-5)
        assert not targets[~batch.real].any()


def test_a_later_blocks_targets_are_made_of_its_own_inputs(inputs, tmp_path, given):
    _train(_settings(inputs, tmp_path / "run", blocks=4, objective="none,none,match"))
    quantised = open_rig(inputs[0], tmp_path / "nf4", quantize="nf4", dtype="float32")
    plain = open_rig(inputs[0], tmp_path / "plain", quantize="none", dtype="float32")
    assert given
    for batch, targets in given:
        recording = quantised.skeleton.record(batch.input_ids, embed=True)
        with torch.no_grad(), quantised.layers(0, 2, dequantize=True) as below, plain.layers(2, 3) as block:
            entering = below.forward(MicroBatch(recording.hidden, recording.calls))
            expected = block.forward(MicroBatch(entering, recording.calls))
        torch.testing.assert_close(targets[batch.real], expected[batch.real], rtol=1e-5, atol=1e-5)


def test_the_first_loss_is_what_quantising_has_changed(inputs, tmp_path, given):
    told = _train(_settings(inputs, tmp_path / "run", batch_size=12))
    quantised = open_rig(inputs[0], tmp_path / "nf4", quantize="nf4", dtype="float32")
    differences = []
    for batch, targets in given:
        recording = quantised.skeleton.record(batch.input_ids, embed=True)
        with torch.no_grad(), quantised.layers(0, 2, dequantize=True) as block:
            output = block.forward(MicroBatch(recording.hidden, recording.calls))
        differences.append((output - targets)[batch.real].double())
    expected = torch.cat(differences).square().mean()
    (step,) = _early_steps(told)
    assert expected > 0
    assert step.loss == pytest.approx(float(expected), rel=1e-4)


def test_training_takes_back_part_of_what_quantising_has_changed(inputs, tmp_path):
    told = _train(_settings(inputs, tmp_path / "run", epochs=40, lr_early=3e-3))
    losses = [step.loss for step in _early_steps(told)]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_padding_and_the_size_of_micro_batches_do_not_matter():
    torch.manual_seed(0)
    output, target = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    real = torch.arange(6) < torch.tensor([6, 2, 5, 1])[:, None]
    tokens = int(real.sum())
    whole = matching_loss(output, target, real, tokens=tokens)
    parts = [matching_loss(output[i : i + 1], target[i : i + 1], real[i : i + 1], tokens=tokens) for i in range(4)]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)
    assert float(whole) == pytest.approx(float((output - target)[real].square().mean()), rel=1e-6)


# -- cut off ----------------------------------------------------------------------------------------------------------

_SHORT = {"blocks": 3, "objective": "match,match", "quantize": "nf4", "dtype": "bfloat16", "epochs": 2}


def test_stopped_at_any_moment_it_ends_with_the_same_bytes(inputs, tmp_path):
    """While layers are prepared, while targets are made of them, at each step."""
    _train(_settings(inputs, tmp_path / "reference", **_SHORT))
    seen: set[str] = set()
    stopped_at = []
    for _ in range(80):
        asked: list[Event] = []

        def stop_once(event: Event, asked: list[Event] = asked) -> None:
            place = str({k: v for k, v in event.to_json().items() if k in ("event", "block", "step", "task", "done")})
            if isinstance(event, (Step, Progress)) and place not in seen and not asked:
                seen.add(place)
                asked.append(event)
                os.kill(os.getpid(), signal.SIGINT)

        try:
            lopt_lite.train(_settings(inputs, tmp_path / "run", **_SHORT), on_event=stop_once)
        except StoppedError:
            stopped_at += [getattr(event, "task", "a step") for event in asked]
        else:
            break
    assert len(stopped_at) > 20
    assert {f"what the unquantised layers of block {number} make" for number in (1, 2)} <= set(stopped_at)
    assert_same(tmp_path / "run", tmp_path / "reference")
    assert not list((tmp_path / "run" / "cache").glob("*"))


def _stop_in_the_first_block(settings: TrainSettings) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Step):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError):
        lopt_lite.train(settings, on_event=stop)


def test_damaged_targets_are_made_again(inputs, tmp_path):
    _train(_settings(inputs, tmp_path / "reference", **_SHORT))
    settings = _settings(inputs, tmp_path / "run", **_SHORT)
    _stop_in_the_first_block(settings)
    shards = sorted(RunPaths(tmp_path / "run").targets(0).iterdir())
    assert len(shards) > 2
    content = bytearray(shards[1].read_bytes())
    content[-3] ^= 1
    shards[1].write_bytes(bytes(content))
    shards[2].unlink()
    texts = [event.text for event in _train(settings) if isinstance(event, Notice)]
    for path in shards[1:3]:
        assert sum(str(path) in text and "is computed again" in text for text in texts) == 1
    result = Path("adapter", "adapter_model.safetensors")
    assert (tmp_path / "run" / result).read_bytes() == (tmp_path / "reference" / result).read_bytes()


@pytest.mark.parametrize("mode", ["resident", "streamed", "partly streamed"])
def test_targets_are_the_same_wherever_the_layers_are(inputs, tmp_path, monkeypatch, mode):
    def shards(name: str) -> dict[str, bytes]:
        _stop_in_the_first_block(_settings(inputs, tmp_path / name))
        return {path.name: path.read_bytes() for path in RunPaths(tmp_path / name).targets(0).iterdir()}

    expected = shards("reference")
    chosen = residence(mode, micro_batch_tokens=choices._ROOMY_TOKENS[0])
    monkeypatch.setattr(memory_choice, "choose_residence", lambda *args, **kwargs: chosen)
    assert shards("run") == expected


# -- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"), [({"quantize": "none"}, "--quantize none"), ({"schedule": "joint"}, "--schedule joint")]
)
def test_where_there_is_nothing_to_match_it_is_refused(changes, words):
    with pytest.raises(SettingsError, match=words):
        TrainSettings(model="m", data="d", objective="match", **changes)
    TrainSettings(model="m", data="d", objective="match", blocks=1, **changes)


def test_a_model_whose_weights_have_4_bits_already_is_refused(inputs, tmp_path):
    store = tmp_path / "store"
    lopt_lite.quantize(QuantizeSettings(model=str(inputs[0]), store=str(store), device="cpu"))
    with pytest.raises(SettingsError, match="have 4 bits already"):
        _train(_settings((store, inputs[1]), tmp_path / "run"))
    with pytest.raises(SettingsError, match="have 4 bits already"):
        lopt_lite.plan(PlanSettings(model=str(store), data=str(inputs[1]), objective="match"))
    assert not (tmp_path / "run").exists()


# -- the plan ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose unquantised layers are large beside everything else."""
    from tests.tiny_models import make_config

    directory = tmp_path_factory.mktemp("wide")
    make_config(
        "llama", 512, hidden_size=1024, intermediate_size=8192, num_attention_heads=8, num_hidden_layers=4
    ).save_pretrained(directory)
    return directory


def _plan(wide: Path, data: Path, **changes: Any) -> Any:
    return lopt_lite.plan(PlanSettings(model=str(wide), data=str(data), device="cpu", **changes))


def test_the_plan_counts_time_and_disk_of_targets_and_memory_of_unquantised_layers(wide, inputs):
    matched, frozen = _plan(wide, inputs[1], objective="match"), _plan(wide, inputs[1], objective="none")
    assert matched.blocks[0].targets_s > 0
    assert [block.targets_s for block in matched.blocks[1:]] == [0]
    layer_bytes = 2 * (2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 8192)
    assert matched.disk.caches_bytes - frozen.disk.caches_bytes > 2 * layer_bytes
    # Whole layers in two slabs take more than what training needs beside 4-bit ones.
    assert matched.memory.smallest_budget_bytes - frozen.memory.smallest_budget_bytes > layer_bytes // 2


def test_a_budget_too_small_for_unquantised_layers_is_refused_before_anything_is_written(wide, inputs):
    smallest = _plan(wide, inputs[1], objective="match").memory.smallest_budget_bytes // MIB
    enough_without = _plan(wide, inputs[1], objective="none").memory.smallest_budget_bytes // MIB
    with pytest.raises(DoesNotFitError, match=f"at least --memory {smallest}MiB"):
        _plan(wide, inputs[1], objective="match", memory=f"{enough_without}MiB")
    tight = _plan(wide, inputs[1], objective="match", memory=f"{smallest}MiB").memory
    # What is said is of the whole run: the pass that makes targets needs more than training does.
    training = _plan(wide, inputs[1], objective="none", memory=f"{smallest}MiB").memory
    assert training.predicted_bytes < tight.predicted_bytes <= smallest * MIB
