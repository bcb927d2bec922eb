"""Checkpoints: what is restored goes on exactly as if it had never stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lopt_lite.checkpoints.integrity import DamagedFileError
from lopt_lite.errors import LoptError, RunDirectoryError
from lopt_lite.training.checkpoint import (
    CheckpointDirectory,
    Cursor,
    load_tensors,
    read_cursor,
    restore_checkpoint,
    save_checkpoint,
)
from lopt_lite.training.trained import TrainedParameters
from tests.damage import flip_a_byte
from tests.rig import save_tensors


class _Toy:
    """A little network; its "head" alone is trained in a first phase, as a reconstruction head is."""

    def __init__(self, seed: int = 0, *, layers: bool = True) -> None:
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 6)
        self.parameters = {f"3.mlp.{n}": p for n, p in self.body.named_parameters()}
        self.trained = TrainedParameters(storage=None, per_layer=False)
        self.trained.add(3, dict(self.parameters))
        self.trained.add("head", {f"head.{n}": p for n, p in self.head.named_parameters()}, scaffolding=True)
        self.parameters |= {f"head.{n}": p for n, p in self.head.named_parameters()}
        self.trained.begin(scaffolding_only=not layers)

    def train(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            self.trained.begin_step(lambda group, step=step: 0.05 / (step + 1))
            (self.head(torch.tanh(self.body(x))) - x).square().mean().backward()
            self.trained.after_backward(3)
            self.trained.end_step(finite=True)

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.parameters.values()]

    def state(self) -> dict[str, torch.Tensor]:
        return {tensor.name: tensor.read().clone() for tensor in self.trained.state()}


def test_interrupted_training_equals_training_in_one_go(tmp_path):
    whole = _Toy()
    whole.train(range(12))
    first = _Toy()
    first.train(range(7))
    save_checkpoint(tmp_path / "c.safetensors", Cursor("train", 7), first.trained)
    second = _Toy(seed=1)
    restore_checkpoint(tmp_path / "c.safetensors", second.trained)
    second.train(range(7, 12))
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), second.values(), strict=True))


def test_adamw_state_comes_back_bit_by_bit(tmp_path):
    toy, other = _Toy(), _Toy(seed=1)
    toy.train(range(3))
    save_checkpoint(tmp_path / "c.safetensors", Cursor("train", 3), toy.trained)
    restore_checkpoint(tmp_path / "c.safetensors", other.trained)
    before, after = toy.state(), other.state()
    assert before.keys() == after.keys()
    assert {name.split(".")[0] for name in before} == {"step", "exp_avg", "exp_avg_sq"}
    for name, value in before.items():
        assert torch.equal(value, after[name])
        assert (value.dtype, value.shape) == (after[name].dtype, after[name].shape)


def test_a_phase_that_trains_a_part_keeps_the_state_of_that_part(tmp_path):
    """While the head is fitted the adapter has no optimiser state; it is saved and restored all the same."""
    toy, other = _Toy(layers=False), _Toy(seed=1, layers=False)
    toy.train(range(4))
    save_checkpoint(tmp_path / "c.safetensors", Cursor("head-fit", 4), toy.trained)
    restore_checkpoint(tmp_path / "c.safetensors", other.trained)
    assert all(torch.equal(a, b) for a, b in zip(toy.values(), other.values(), strict=True))
    assert other.state().keys() == toy.state().keys()
    assert all(".head." in name for name in other.state())


def test_a_next_phase_starts_with_new_optimizers(tmp_path):
    toy = _Toy(layers=False)
    toy.train(range(2))
    toy.trained.begin(scaffolding_only=False)
    assert not toy.state()
    toy.train(range(1))
    assert {float(v) for n, v in toy.state().items() if n.startswith("step.")} == {1.0}


def test_the_file_is_plain_safetensors_with_the_cursor_in_its_metadata(tmp_path):
    toy = _Toy()
    toy.train(range(1))
    save_checkpoint(tmp_path / "c.safetensors", Cursor("train", 1), toy.trained)
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert json.loads(file.metadata()["cursor"]) == {"phase": "train", "step": 1}
        for name, parameter in toy.parameters.items():
            assert torch.equal(file.get_tensor(f"parameter.{name}"), parameter)
    assert read_cursor(tmp_path / "c.safetensors") == Cursor("train", 1)


def test_tensors_of_every_kind_come_back_and_equal_tensors_make_equal_files(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).t(),
        "a": torch.randn(7, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    first = save_tensors(tmp_path / "1.safetensors", tensors)
    second = save_tensors(tmp_path / "2.safetensors", dict(reversed(tensors.items())))
    assert first == second
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    loaded = load_tensors(tmp_path / "1.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_checkpoint_of_other_parameters_is_refused_and_changes_nothing(tmp_path):
    toy, other = _Toy(), _Toy(seed=1)
    save_checkpoint(tmp_path / "c.safetensors", Cursor("train", 1), toy.trained)
    before = other.values()
    fewer = TrainedParameters(storage=None, per_layer=False)
    fewer.add("head", {n: p for n, p in other.parameters.items() if n != "head.bias"}, scaffolding=True)
    with pytest.raises(RunDirectoryError, match="other parameters") as caught:
        restore_checkpoint(tmp_path / "c.safetensors", fewer)
    assert "--fresh" in caught.value.fix
    assert all(torch.equal(a, b) for a, b in zip(before, other.values(), strict=True))


@pytest.mark.parametrize(
    "metadata", [None, {}, {"cursor": "nonsense"}, {"cursor": "[]"}, {"cursor": '{"phase": "train", "step": null}'}]
)
def test_a_file_without_a_cursor_is_no_checkpoint(tmp_path, metadata):
    save_tensors(tmp_path / "c.safetensors", {"x": torch.zeros(1)}, metadata)
    with pytest.raises(RunDirectoryError, match="not a checkpoint"):
        read_cursor(tmp_path / "c.safetensors")


def test_a_truncated_or_missing_checkpoint_is_an_error_that_names_it(tmp_path):
    toy = _Toy()
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, Cursor("train", 1), toy.trained)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LoptError, match=r"c\.safetensors"):
        restore_checkpoint(path, toy.trained)
    path.unlink()
    with pytest.raises(LoptError, match=r"c\.safetensors"):
        read_cursor(path)


def test_the_directory_keeps_only_the_checkpoint_named(tmp_path):
    toy = _Toy()
    directory = CheckpointDirectory(tmp_path / "checkpoint")
    directory.keep_only(None)  # nothing there yet: nothing to do
    names = [directory.save(Cursor("train", step), toy.trained).name for step in (1, 2, 3)]
    (tmp_path / "checkpoint" / ".train-00000004.safetensors.tmp").write_bytes(b"torn")
    directory.keep_only(names[1])
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == [names[1]]
    assert directory.path(names[1]) == tmp_path / "checkpoint" / names[1]
    directory.keep_only(None)
    assert list((tmp_path / "checkpoint").iterdir()) == []


def test_a_checkpoint_is_known_by_its_sha256(tmp_path):
    directory = CheckpointDirectory(tmp_path)
    name, sha256 = directory.save(Cursor("train", 1), _Toy().trained)
    assert sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    directory.check(name, sha256)
    flip_a_byte(tmp_path / name)
    directory.check(name, None)  # an earlier release noted none
    with pytest.raises(DamagedFileError, match=name):
        directory.check(name, sha256)
    (tmp_path / name).unlink()
    for noted in (sha256, None):
        with pytest.raises(DamagedFileError, match="is missing"):
            directory.check(name, noted)


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    toy = _Toy()
    directory = CheckpointDirectory(tmp_path)
    name = directory.save(Cursor("train", 1), toy.trained).name
    whole = Path(tmp_path / name).read_bytes()
    monkeypatch.setattr("lopt_lite.files.os.replace", _crash)
    toy.train(range(1))
    with pytest.raises(_Crash):
        directory.save(Cursor("train", 1), toy.trained)
    assert Path(tmp_path / name).read_bytes() == whole


class _Crash(BaseException):
    pass


def _crash(*arguments: object) -> None:
    raise _Crash
