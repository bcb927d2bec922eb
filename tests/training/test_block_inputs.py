"""What is read ahead is what would have been read, and no more is kept than was announced."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.tokenizer import load_tokenizer, pad_token_id
from lopt_lite.data.dataset import Batch, collate
from lopt_lite.data.load import load_dataset
from lopt_lite.errors import ModelError
from lopt_lite.training import activation_cache
from lopt_lite.training.activation_cache import ActivationCache, CacheLayout, shard_name, write_cache
from lopt_lite.training.block_inputs import CachedInputs, EmbeddedInputs
from tests.rig import CPU, Rig, open_rig
from tests.tiny_models import make_data, make_model


class _Place:
    """A model, batches of its data, and a cache of random activations."""

    def __init__(self, directory: Path, rig: Rig, batches: list[Batch], layout: CacheLayout) -> None:
        self.directory, self.rig, self.batches, self.layout = directory, rig, batches, layout

    def inputs(self, **kwargs: int) -> CachedInputs:
        return CachedInputs(self.rig.skeleton, CPU, self.directory, self.layout, **kwargs)


@pytest.fixture(params=["exact", "int8"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Place:
    monkeypatch.setattr(activation_cache, "_SHARD_BYTES", 4 << 10)
    model = make_model(tmp_path / "model")
    rig = open_rig(model, tmp_path / "store", quantize="none", dtype="float32")
    tokenizer = load_tokenizer(locate_model(str(model)))
    dataset, _ = load_dataset(
        make_data(tmp_path / "data.jsonl", 12), tokenizer, max_length=256, skip_bad_lines=False, on_event=lambda e: None
    )
    layout = CacheLayout(
        dataset.lengths,
        hidden_size=rig.skeleton.hidden_size,
        dtype=torch.float32,
        max_tokens=100,
        max_rows=4,
        cache=request.param,
    )
    generator = torch.Generator().manual_seed(0)

    def run_batches(batches, on_output):
        for number, batch in enumerate(batches):
            longest = max(layout.length(i) for i in batch)
            on_output(number, torch.randn(len(batch), longest, layout.format.hidden_size, generator=generator))

    write_cache(tmp_path / "cache", layout, run_batches, done=(), on_shard=lambda n, e, s: None)
    pad = pad_token_id(tokenizer)
    batches = [collate(dataset, examples, pad) for examples in ([3, 1], [0], [11, 5, 7], [2, 2], [8, 4], [10])]
    return _Place(tmp_path / "cache", rig, batches, layout)


class _Disk:
    """Watches the reads of a cache, by thread, and holds those of other threads until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read, self.here = ActivationCache.read, threading.get_ident()
        self.ahead: list[list[int]] = []
        self.direct: list[list[int]] = []
        self.go = threading.Event()

        def watched(cache: ActivationCache, examples: list[int], longest: int) -> torch.Tensor:
            if threading.get_ident() == self.here:
                self.direct.append(list(examples))
            else:
                self.ahead.append(list(examples))
                assert self.go.wait(60)
            return read(cache, examples, longest)

        monkeypatch.setattr(ActivationCache, "read", watched)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Disk]:
    watched = _Disk(monkeypatch)
    yield watched
    watched.go.set()


def _named(batches: list[Batch]) -> list[list[int]]:
    return [batch.examples.tolist() for batch in batches]


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_with_and_without_reading_ahead_the_bits_are_the_same(place, keep_bytes):
    plain = place.inputs()
    expected = [plain.micro_batch(batch).hidden for batch in place.batches]
    plain.close()
    inputs = place.inputs(keep_bytes=keep_bytes)
    for begin in range(0, len(place.batches), 2):
        inputs.read_ahead(place.batches[begin : begin + 3])
        for number in (begin, begin + 1):
            assert torch.equal(inputs.micro_batch(place.batches[number]).hidden, expected[number])
    inputs.read_ahead(place.batches)
    for number in (4, 0, 3, 3, 5):
        assert torch.equal(inputs.micro_batch(place.batches[number]).hidden, expected[number])
    inputs.close()


def test_batches_are_read_in_the_order_announced_before_they_are_asked_for(place, disk):
    disk.go.set()
    inputs = place.inputs()
    inputs.read_ahead(place.batches)
    inputs.read_ahead(place.batches)  # what is announced already is not read again
    for future in list(inputs._reader._ahead.values()):
        future.result(60)
    assert disk.ahead == _named(place.batches)
    for batch in place.batches:
        inputs.micro_batch(batch)
    assert disk.direct == []
    assert inputs.ahead_count == len(place.batches)
    assert not inputs._reader._ahead
    inputs.close()


def test_a_batch_whose_reading_has_not_begun_is_read_at_once(place, disk):
    inputs = place.inputs()
    inputs.read_ahead(place.batches)
    inputs.micro_batch(place.batches[2])
    assert disk.direct == [[11, 5, 7]]
    disk.go.set()
    inputs.close()
    assert [11, 5, 7] not in disk.ahead


def test_announcing_again_drops_what_was_not_used(place, disk):
    disk.go.set()
    inputs = place.inputs()
    inputs.read_ahead(place.batches[:3])
    inputs.read_ahead(place.batches[2:4])
    assert list(inputs._reader._ahead) == [
        (tuple(b.examples.tolist()), b.input_ids.shape[1]) for b in place.batches[2:4]
    ]
    inputs.micro_batch(place.batches[0])
    assert disk.direct == [[3, 1]]
    inputs.read_ahead([])
    assert not inputs._reader._ahead
    inputs.close()


def test_the_same_examples_in_another_width_are_another_batch(place):
    batch = place.batches[0]
    wider = Batch(
        examples=batch.examples,
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, 3)),
        lengths=batch.lengths,
        targets=torch.nn.functional.pad(batch.targets, (0, 3), value=-100),
    )
    inputs = place.inputs()
    inputs.read_ahead([batch])
    hidden = inputs.micro_batch(wider).hidden
    assert hidden.shape[1] == batch.input_ids.shape[1] + 3
    assert not hidden[:, -3:].any()
    inputs.close()


def test_what_cannot_be_read_ahead_is_an_error_when_it_is_asked_for(place):
    inputs = place.inputs()
    for number in range(len(place.layout.shards)):
        path = place.directory / shard_name(number)
        path.write_bytes(path.read_bytes()[:-1])
    inputs.read_ahead(place.batches[:1])
    with pytest.raises(ModelError, match="shard-"):
        inputs.micro_batch(place.batches[0])
    inputs.close()


def test_closing_stops_the_reader(place, disk):
    before = threading.active_count()
    inputs = place.inputs()
    inputs.read_ahead(place.batches)
    disk.go.set()
    inputs.close()
    assert threading.active_count() == before


def test_embedded_inputs_take_the_hint_and_stay_the_same(place):
    inputs = EmbeddedInputs(place.rig.skeleton, CPU)
    expected = [inputs.micro_batch(batch).hidden for batch in place.batches]
    inputs.read_ahead(place.batches)
    for batch, hidden in zip(place.batches, expected, strict=True):
        assert torch.equal(inputs.micro_batch(batch).hidden, hidden)
    inputs.close()
