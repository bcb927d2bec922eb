"""Full tuning equals a plain loop over the whole model, and a trained layer's shard stands for the store's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import lopt_lite
from lopt_lite import TrainSettings
from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.tokenizer import load_tokenizer
from lopt_lite.data.batches import epoch_batches
from lopt_lite.data.dataset import TokenizedDataset, collate
from lopt_lite.data.load import load_dataset
from lopt_lite.errors import RunDirectoryError, SettingsError
from lopt_lite.events import Event, Step
from lopt_lite.recipe import ModelKind
from lopt_lite.residency.streamed import StreamedLayers
from lopt_lite.training import memory_choice
from lopt_lite.training.full import has_eight_bit_moments, own_weights, remarks, write_layers
from lopt_lite.training.optimisation import learning_rate
from lopt_lite.training.targets import tuning
from lopt_lite.training.trained import TrainedParameters
from tests.rig import CPU, open_rig, residence, save_tensors
from tests.tiny_models import EVERY_BLOCK_LEARNS, make_data, make_model

LR = 1e-3


def _train(tmp_path: Path, model: Path, **changes: Any) -> tuple[Path, list[Step]]:
    data = make_data(tmp_path / "data.jsonl", 20)
    values = {"tune": "full", "dtype": "float32", "epochs": 2, "batch_size": 4, "lr": LR}
    values |= {**EVERY_BLOCK_LEARNS, **changes}
    events: list[Event] = []
    run = tmp_path / "run"
    lopt_lite.train(TrainSettings(model=str(model), data=str(data), output=str(run), **values), on_event=events.append)
    return run, [event for event in events if isinstance(event, Step)]


def _dataset(tmp_path: Path, model: Path) -> TokenizedDataset:
    tokenizer = load_tokenizer(locate_model(str(model)))
    dataset, _ = load_dataset(
        tmp_path / "data.jsonl", tokenizer, max_length=1024, skip_bad_lines=False, on_event=lambda event: None
    )
    return dataset


def _plain_loop(
    tmp_path: Path, model: Path, *, trained: range, block: int, steps: int
) -> tuple[nn.Module, list[float], list[float]]:
    """Whole-model training by transformers and torch alone; clipping at 1.0 for each layer by itself."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain.requires_grad_(False)
    layers = [list(plain.model.layers[i].parameters()) for i in trained]
    for parameter in (p for layer in layers for p in layer):
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer], lr=0.0, weight_decay=0.0)
    dataset = _dataset(tmp_path, model)
    losses: list[float] = []
    norms: list[float] = []
    for epoch in range(2):
        for indices in epoch_batches(dataset.lengths, batch_size=4, seed=(0, "block", block, "train", epoch)):
            batch = collate(dataset, indices, 0)
            logits = plain(input_ids=batch.input_ids, attention_mask=batch.real.long()).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
            loss.backward()
            total = 0.0
            for layer in layers:
                norm = sum(float(p.grad.square().sum()) for p in layer) ** 0.5
                total += norm**2
                for parameter in layer:
                    parameter.grad *= min(1.0, 1.0 / (norm + 1e-6))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(len(losses), steps, LR)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            norms.append(total**0.5)
    return plain, losses, norms


@pytest.mark.parametrize(
    ("changes", "trained", "block"),
    [
        ({"blocks": 1}, range(4), 0),
        ({"blocks": 2, "objective": "none"}, range(1, 4), 1),
    ],
    ids=["one block", "the last of two blocks"],
)
@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_it_equals_a_plain_loop_over_the_whole_model(changes, trained, block, mode, tmp_path, monkeypatch):
    chosen = residence(mode, layers=len(trained))
    monkeypatch.setattr(memory_choice, "choose_residence", lambda *args, **kwargs: chosen)
    model = make_model(tmp_path / "model", "llama")
    run, steps = _train(tmp_path, model, **changes)
    assert len(steps) == 10
    plain, losses, norms = _plain_loop(tmp_path, model, trained=trained, block=block, steps=len(steps))
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-5)
    assert [step.grad_norm for step in steps] == pytest.approx(norms, rel=1e-4)
    assert losses[-1] < losses[0] - 0.2, "the recipe must learn something"
    assert max(norms) > 1, "clipping must have happened"
    tuned = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(tuned[name], value, rtol=1e-3, atol=1e-4)


def test_everything_around_the_layers_stays_as_it_is(tmp_path):
    model = make_model(tmp_path / "model", "llama-tied")
    run, _ = _train(tmp_path, model, blocks=2)
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) != (".layers." in name), name


def test_own_weights_of_a_streamed_layer_do_not_lie_in_the_slabs(tmp_path):
    """The memory a layer was loaded into is used again for the next one."""
    rig = open_rig(make_model(tmp_path / "model"), tmp_path / "store", quantize="none", dtype="float32")
    found: dict[int, dict[str, nn.Parameter]] = {}

    def attach(index: int, layer: nn.Module) -> None:
        found[index] = own_weights(layer)

    with StreamedLayers(rig.store, rig.skeleton, 0, 4, device=CPU, on_layer=attach) as pool:
        for index, parameters in found.items():
            stored = rig.store.layer(rig.skeleton, index)
            assert parameters.keys() == stored.keys()
            assert all(torch.equal(parameters[name], value) for name, value in stored.items())
            assert all(p.requires_grad for p in pool.layers[index].parameters())
        reads = pool.loads
        pool.forward_all([], lambda number, output: None)
        assert pool.loads == reads, "trained layers are not loaded any more"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_written_layers_stand_for_those_of_the_store(architecture, tmp_path):
    rig = open_rig(make_model(tmp_path / "model", architecture), tmp_path / "store", quantize="none", dtype="float32")
    trained = TrainedParameters(storage=None, per_layer=True)
    changed: dict[int, dict[str, torch.Tensor]] = {}

    def attach(index: int, layer: nn.Module) -> None:
        parameters = own_weights(layer)
        for parameter in parameters.values():
            parameter.data += 1
        trained.add(index, {f"{index}.{name}": p for name, p in parameters.items()})
        changed[index] = {name: p.detach().clone() for name, p in parameters.items()}

    rig.layers(1, 3, on_layer=attach).close()
    shards = {index: tmp_path / f"{index}.safetensors" for index in (1, 2)}
    write_layers(trained, shards, store=rig.store, skeleton=rig.skeleton)
    overlay = rig.store.overlaid(shards.values())
    for index in range(4):
        base, found = rig.store.layer(rig.skeleton, index), overlay.layer(rig.skeleton, index)
        assert found.keys() == base.keys() == overlay.layer_names(rig.skeleton, index)
        view = overlay.layer_view(rig.skeleton, index)
        assert view.nbytes == rig.store.layer_view(rig.skeleton, index).nbytes
        buffer = torch.empty(view.nbytes, dtype=torch.uint8)
        view.read_into(buffer)
        for name, value in found.items():
            expected = changed[index][name] if name in changed.get(index, {}) else base[name]
            assert torch.equal(value, expected), name
            place = view.tensors[name]
            assert torch.equal(buffer[place.start : place.end].view(place.dtype).view(place.shape), expected)
            assert place.start % 16 == 0 or place.end - place.start < 16
    assert torch.equal(overlay.head(rig.skeleton)[0], rig.store.head(rig.skeleton)[0])
    overlay.close()


def test_a_shard_with_part_of_a_layer_is_refused(tmp_path):
    rig = open_rig(make_model(tmp_path / "model"), tmp_path / "store", quantize="none", dtype="float32")
    layer = {rig.skeleton.layer_prefix(1) + n: t for n, t in rig.store.layer(rig.skeleton, 1).items()}
    name, value = layer.popitem()
    save_tensors(tmp_path / "part.safetensors", layer)
    with pytest.raises(RunDirectoryError, match="does not hold the same tensors"):
        rig.store.overlaid([tmp_path / "part.safetensors"])
    save_tensors(tmp_path / "more.safetensors", {**layer, name: value, "stranger": value})
    with pytest.raises(RunDirectoryError, match="does not hold the same tensors"):
        rig.store.overlaid([tmp_path / "more.safetensors"])


def _settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"model": "m", "data": "d", "tune": "full", **changes})


def test_moments_have_8_bits_in_bfloat16_where_there_is_such_an_optimiser(tmp_path):
    mps = torch.device("mps")
    assert has_eight_bit_moments(_settings(), CPU)
    assert not has_eight_bit_moments(_settings(), mps)
    assert not has_eight_bit_moments(_settings(dtype="float32"), CPU)
    assert not has_eight_bit_moments(_settings(tune="lora"), CPU)
    assert "MPS" in remarks(_settings(), mps)[0]
    assert not remarks(_settings(), CPU)
    assert not remarks(_settings(tune="lora"), mps)
    skeleton = open_rig(make_model(tmp_path / "m"), tmp_path / "s", quantize="none", dtype="float32").skeleton
    planned = tuning(skeleton, _settings(device="cpu"))
    assert planned.rank is None
    assert planned.eight_bit
    assert not tuning(skeleton, _settings(device="cpu", dtype="float32")).eight_bit


def test_defaults_follow_what_is_tuned():
    full, lora = _settings(), _settings(tune="lora")
    assert (full.quantize, full.lr) == ("none", 2e-5)
    assert full.early_lr(ModelKind("LlamaForCausalLM", 64, 4)) == pytest.approx(2e-6)
    assert (lora.quantize, lora.lr) == ("nf4", None), "an adapter's rate depends on the model"
    assert _settings(quantize="none", lr=2e-5).result_settings() == full.result_settings()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantize": "nf4"}, "--quantize nf4"),
        ({"lora_r": 8}, "--lora-r"),
        ({"lora_alpha": 8.0}, "--lora-alpha"),
        ({"lora_dropout": 0.1}, "--lora-dropout"),
        ({"lora_targets": "q_proj"}, "--lora-targets"),
    ],
)
def test_what_means_nothing_without_an_adapter_is_refused(changes, said):
    with pytest.raises(SettingsError, match=said):
        _settings(**changes)
