"""The activation cache gives back, bit by bit, what the block before it made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.shard_writer import ShardRecord
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.checkpoints.tokenizer import load_tokenizer, pad_token_id
from lopt_lite.data.dataset import TokenizedDataset, collate
from lopt_lite.data.load import load_dataset
from lopt_lite.errors import DoesNotFitError, LoptError, ModelError
from lopt_lite.events import Event
from lopt_lite.settings import Cache
from lopt_lite.training import activation_cache, cache_format
from lopt_lite.training.activation_cache import (
    ActivationCache,
    CacheLayout,
    RunBatches,
    drop_damaged,
    shard_name,
    write_cache,
)
from lopt_lite.training.block_inputs import CachedInputs, EmbeddedInputs
from lopt_lite.training.cache_format import CacheFormat, StoredError
from tests.damage import flip_a_byte
from tests.rig import CPU, Rig, open_rig
from tests.tiny_models import make_data, make_model

_HIDDEN = 8


def one_by_one(run_batch: Callable[[list[int]], torch.Tensor]) -> RunBatches:
    """What :func:`write_cache` takes, from something that runs one batch."""

    def run_batches(batches: list[list[int]], on_output: Callable[[int, torch.Tensor], None]) -> None:
        for number, batch in enumerate(batches):
            on_output(number, run_batch(batch))

    return run_batches


def into(numbers: list[int]) -> Callable[[int, StoredError, str], None]:
    """What :func:`write_cache` tells of durable shards, noting their numbers."""
    return lambda number, error, sha256: numbers.append(number)


def ignore(number: int, error: StoredError, sha256: str) -> None:
    """What :func:`write_cache` tells of durable shards, not minded."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few examples, so that there are several."""
    monkeypatch.setattr(activation_cache, "_SHARD_BYTES", 12 * _HIDDEN * 2)


class _Block:
    """Stands for a block: each example's output is a fixed random tensor; padding is filled with nonsense."""

    def __init__(self, lengths: list[int], dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.outputs = [torch.randn(n, _HIDDEN, generator=generator).to(dtype) for n in lengths]
        self.calls: list[list[int]] = []
        self.fail_at: int | None = None

    def __call__(self, examples: list[int]) -> torch.Tensor:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(examples)
        longest = max(len(self.outputs[i]) for i in examples)
        result = torch.full((len(examples), longest, _HIDDEN), float("nan"), dtype=self.outputs[0].dtype)
        for row, example in enumerate(examples):
            result[row, : len(self.outputs[example])] = self.outputs[example]
        return result


def _layout(
    lengths: list[int], dtype: torch.dtype = torch.bfloat16, max_tokens: int = 10, cache: Cache = "exact"
) -> CacheLayout:
    return CacheLayout(
        torch.tensor(lengths), hidden_size=_HIDDEN, dtype=dtype, max_tokens=max_tokens, max_rows=3, cache=cache
    )


_LENGTHS = [5, 1, 9, 3, 3, 7, 2, 30, 4, 6, 1]


def _stored(layout: CacheLayout, output: torch.Tensor) -> torch.Tensor:
    """The slow oracle of what comes back: token by token, number by number."""
    if layout.format.name == "exact":
        return output
    rows = []
    for token in output.float():
        scale = np.float32(token.abs().max()) / np.float32(127)
        values = [round(float(np.float32(x) / scale)) if scale else 0 for x in token.tolist()]
        rows.append([float(np.float32(v) * scale) for v in values])
    return torch.tensor(rows).to(output.dtype)


def _check_all(directory: Path, layout: CacheLayout, block: _Block, *, keep_bytes: int = 0) -> None:
    cache = ActivationCache(directory, layout, keep_bytes=keep_bytes)
    for examples in ([0], [7, 1, 2], [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [3, 3]):
        longest = max(_LENGTHS[i] for i in examples)
        hidden = cache.read(examples, longest)
        assert hidden.dtype == layout.format.dtype
        for row, example in enumerate(examples):
            length = _LENGTHS[example]
            assert torch.equal(hidden[row, :length], _stored(layout, block.outputs[example]))
            assert not hidden[row, length:].any()
    cache.close()


_FORMATS = pytest.mark.parametrize("cache", ["exact", "int8"])


@_FORMATS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_examples_in_any_order_come_back_bit_by_bit(tmp_path, dtype, cache):
    layout, block = _layout(_LENGTHS, dtype, cache=cache), _Block(_LENGTHS, dtype)
    finished: list[int] = []
    write_cache(tmp_path / "cache", layout, one_by_one(block), done=(), on_shard=into(finished))
    assert len(layout.shards) > 2
    assert finished == list(range(len(layout.shards)))
    _check_all(tmp_path / "cache", layout, block)


@_FORMATS
def test_of_longer_examples_the_beginning_is_read(tmp_path, cache):
    layout, block = _layout(_LENGTHS, cache=cache), _Block(_LENGTHS)
    write_cache(tmp_path, layout, one_by_one(block), done=(), on_shard=ignore)
    opened = ActivationCache(tmp_path, layout)
    for longest in (1, 2, max(_LENGTHS)):
        hidden = opened.read(range(len(_LENGTHS)), longest)
        for row, length in enumerate(_LENGTHS):
            there = min(length, longest)
            assert torch.equal(hidden[row, :there], _stored(layout, block.outputs[row])[:there])
            assert not hidden[row, there:].any()
    opened.close()


@_FORMATS
def test_the_files_hold_no_padding_and_are_as_large_as_announced(tmp_path, cache):
    layout, block = _layout(_LENGTHS, cache=cache), _Block(_LENGTHS)
    write_cache(tmp_path, layout, one_by_one(block), done=(), on_shard=ignore)
    tensors = [item for path in sorted(tmp_path.iterdir()) for item in load_file(path).items()]
    assert sum(len(t) for name, t in tensors if name.startswith("hidden.")) == sum(_LENGTHS)
    assert sum(t.numel() * t.itemsize for _, t in tensors) == layout.total_bytes
    assert not any(t.isnan().any() for _, t in tensors)
    assert layout.total_bytes == sum(_LENGTHS) * (_HIDDEN * 2 if cache == "exact" else _HIDDEN + 4)


@_FORMATS
def test_a_half_written_cache_goes_on_at_its_next_shard_and_ends_with_the_same_bytes(tmp_path, cache):
    layout = _layout(_LENGTHS, cache=cache)
    whole = _Block(_LENGTHS)
    write_cache(tmp_path / "whole", layout, one_by_one(whole), done=(), on_shard=ignore)
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    for cut in range(len(whole.calls)):
        directory, done = tmp_path / f"cut-{cut}", []
        first = _Block(_LENGTHS)
        first.fail_at = cut
        with pytest.raises(KeyboardInterrupt):
            write_cache(directory, layout, one_by_one(first), done=(), on_shard=into(done))
        again = _Block(_LENGTHS)
        write_cache(directory, layout, one_by_one(again), done=list(done), on_shard=into(done))
        assert again.calls == [batch for shard in layout.shards[_shard_of(layout, cut) :] for batch in shard]
        assert done == list(range(len(layout.shards)))
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == expected


def _shard_of(layout: CacheLayout, cut: int) -> int:
    """The shard that batch number ``cut`` belongs to."""
    owners = [n for n, batches in enumerate(layout.shards) for _ in batches]
    return owners[cut]


def test_a_shard_that_is_journalled_but_gone_is_made_again(tmp_path):
    layout = _layout(_LENGTHS)
    write_cache(tmp_path, layout, one_by_one(_Block(_LENGTHS)), done=(), on_shard=ignore)
    (tmp_path / shard_name(1)).unlink()
    again = _Block(_LENGTHS)
    write_cache(tmp_path, layout, one_by_one(again), done=range(len(layout.shards)), on_shard=ignore)
    assert again.calls == layout.shards[1]
    _check_all(tmp_path, layout, again)


def test_a_shard_that_is_there_but_not_journalled_is_written_again(tmp_path):
    """The fact comes after the file; a crash between them leaves a whole file that is not trusted."""
    layout, block = _layout(_LENGTHS), _Block(_LENGTHS)
    tmp_path.joinpath(shard_name(0)).write_bytes(b"something else")
    write_cache(tmp_path, layout, one_by_one(block), done=(), on_shard=ignore)
    _check_all(tmp_path, layout, block)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_shard_is_an_error_that_names_it(tmp_path, damage):
    layout = _layout(_LENGTHS)
    write_cache(tmp_path, layout, one_by_one(_Block(_LENGTHS)), done=(), on_shard=ignore)
    path = tmp_path / shard_name(1)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LoptError, match=shard_name(1)):
        ActivationCache(tmp_path, layout)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.integers(1, 64),
)
def test_examples_fill_the_shards_without_holes_or_overlap(lengths, max_tokens):
    layout = _layout(lengths, max_tokens=max_tokens)
    taken = [[False] * tokens for tokens in layout.shard_tokens]
    for example, length in enumerate(lengths):
        shard, start = layout.place(example)
        assert any(example in batch for batch in layout.shards[shard])
        for row in range(start, start + length):
            assert not taken[shard][row]
            taken[shard][row] = True
    assert all(all(rows) for rows in taken)
    assert layout.total_bytes == sum(lengths) * _HIDDEN * 2
    assert sorted(i for shard in layout.shards for batch in shard for i in batch) == list(range(len(lengths)))


# -- 8 bits -----------------------------------------------------------------------------------------------------------


def _through_8_bits(hidden: torch.Tensor) -> tuple[torch.Tensor, StoredError]:
    form = CacheFormat("int8", hidden.shape[1], hidden.dtype)
    stored = form.empty(len(hidden))
    error = form.encode(hidden, stored)
    return form.decode(stored), error


def _relative(hidden: torch.Tensor, difference: torch.Tensor) -> float:
    """Root mean square over tokens of the length of the error over that of the token."""
    tokens = difference.double().norm(dim=1) / hidden.double().norm(dim=1)
    return float(tokens.square().mean().sqrt())


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 70), st.floats(-30, 30))
def test_no_value_is_further_off_than_half_a_step_of_its_token(seed, tokens, hidden_size, magnitude):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=generator) * 10**magnitude
    back, error = _through_8_bits(hidden)
    step = hidden.abs().amax(dim=1, keepdim=True).double() / 127
    difference = (back.double() - hidden.double()).abs()
    assert (difference <= 0.5001 * step).all()
    assert error.relative == pytest.approx(_relative(hidden, difference), rel=1e-3, abs=1e-7)


def test_a_token_with_huge_values_coarsens_itself_alone():
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    expected, _ = _through_8_bits(hidden)
    spoilt = hidden.clone()
    spoilt[2, 5] = 3e4
    back, error = _through_8_bits(spoilt)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(back[others], expected[others])
    assert back[2, 5] == pytest.approx(3e4, rel=1e-6)
    assert error.relative == pytest.approx(_relative(spoilt, back - spoilt), rel=1e-3)
    assert error.relative > 0.005, "one token must not hide the others' errors"


def test_zeros_and_tiny_values_are_safe():
    hidden = torch.zeros(4, 8)
    hidden[1] = 1e-45
    hidden[2] = torch.linspace(-3e-44, 3e-44, 8)
    back, _ = _through_8_bits(hidden)
    assert not back[0].any()
    assert back.isfinite().all()
    assert back.abs().max() < 1e-42
    assert _through_8_bits(torch.zeros(2, 8))[1].relative == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_comes_back_as_such_and_is_not_counted(bad):
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    _, expected = _through_8_bits(hidden[[0, 2]])
    hidden[1, 3] = bad
    back, error = _through_8_bits(hidden)
    assert back[1].isnan().all()
    assert back[[0, 2]].isfinite().all()
    assert error.relative == pytest.approx(expected.relative)


def test_values_are_brought_into_8_bits_a_few_at_a_time_with_the_same_result(monkeypatch):
    hidden = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, whole_error = _through_8_bits(hidden)
    monkeypatch.setattr(cache_format, "_CHUNK_ELEMENTS", 24)
    back, error = _through_8_bits(hidden)
    assert torch.equal(back, whole)
    assert error.relative == pytest.approx(whole_error.relative)


def test_each_shard_tells_its_own_error_and_they_add_up_to_that_of_the_whole(tmp_path):
    layout, block = _layout(_LENGTHS, cache="int8"), _Block(_LENGTHS)
    told: dict[int, StoredError] = {}
    write_cache(
        tmp_path,
        layout,
        one_by_one(block),
        done=(),
        on_shard=lambda *told_of: told.update([told_of[:2]]),
    )
    outputs = torch.cat(block.outputs).double()
    stored = torch.cat([_stored(layout, output) for output in block.outputs]).double()
    expected = _relative(outputs, stored - outputs)
    assert 0.001 < expected < 0.02
    assert StoredError.total(error.to_json() for error in told.values()).relative == pytest.approx(expected, rel=1e-4)
    again: dict[int, StoredError] = {}
    write_cache(
        tmp_path,
        layout,
        one_by_one(block),
        done=(0,),
        on_shard=lambda *told_of: again.update([told_of[:2]]),
    )
    assert again == {number: error for number, error in told.items() if number != 0}


# -- in memory --------------------------------------------------------------------------------------------------------


@_FORMATS
def test_a_cache_that_fits_is_read_once_and_another_each_time(tmp_path, cache, monkeypatch):
    layout, block = _layout(_LENGTHS, cache=cache), _Block(_LENGTHS)
    write_cache(tmp_path, layout, one_by_one(block), done=(), on_shard=ignore)
    read, read_range = TensorFiles.read, TensorFiles.read_range
    whole: list[str] = []
    parts: list[str] = []
    monkeypatch.setattr(TensorFiles, "read", lambda self, name: (whole.append(name), read(self, name))[1])
    monkeypatch.setattr(
        TensorFiles, "read_range", lambda self, name, *rows: (parts.append(name), read_range(self, name, *rows))[1]
    )
    _check_all(tmp_path, layout, block, keep_bytes=layout.total_bytes)
    assert not parts
    assert len(whole) == len(set(whole)) == len(layout.shards) * (1 if cache == "exact" else 2)
    _check_all(tmp_path, layout, block, keep_bytes=layout.total_bytes - 1)
    assert len(whole) == len(set(whole))
    assert len(parts) > len(layout.shards)


def test_a_cache_of_another_layout_is_refused(tmp_path):
    write_cache(tmp_path, _layout(_LENGTHS), one_by_one(_Block(_LENGTHS)), done=(), on_shard=ignore)
    with pytest.raises(ModelError, match=r"hidden\.00000 \(bfloat16") as caught:
        ActivationCache(tmp_path, _layout(_LENGTHS, cache="int8"))
    assert "scale.00000" in caught.value.expected


def test_of_a_finished_cache_damaged_and_missing_shards_are_dropped_told_of_and_written_again(tmp_path):
    lengths = _LENGTHS * 2
    layout, block = _layout(lengths), _Block(lengths)
    assert len(layout.shards) > 4
    facts: list[dict[str, Any]] = []

    def on_shard(number: int, error: StoredError, sha256: str) -> None:
        facts.append({"fact": "cache-shard", "shard": number, "sha256": sha256})

    write_cache(tmp_path, layout, one_by_one(block), done=(), on_shard=on_shard)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    told: list[Event] = []

    def dropped() -> list[int]:
        return drop_damaged(
            tmp_path, layout, facts, what="the inputs of block 2", check=lambda: None, on_event=told.append
        )

    assert (dropped(), told) == ([], [])
    flip_a_byte(tmp_path / shard_name(1))
    (tmp_path / shard_name(3)).unlink()
    facts[4]["sha256"] = None  # as an earlier release noted it
    flip_a_byte(tmp_path / shard_name(4))
    assert dropped() == [1, 3]
    assert [shard_name(n) in event.text for n, event in zip((1, 3), told, strict=True)] == [True, True]
    assert not (tmp_path / shard_name(1)).exists()
    again = _Block(lengths)
    write_cache(tmp_path, layout, one_by_one(again), done=(), on_shard=ignore, wanted=[1, 3])
    assert again.calls == layout.shards[1] + layout.shards[3]
    for number in (1, 3):
        assert (tmp_path / shard_name(number)).read_bytes() == whole[shard_name(number)]


def test_a_cache_can_be_opened_in_part(tmp_path):
    layout, block = _layout(_LENGTHS), _Block(_LENGTHS)
    write_cache(tmp_path, layout, one_by_one(block), done=(), on_shard=ignore, wanted=[1])
    assert [path.name for path in tmp_path.iterdir()] == [shard_name(1)]
    cache = ActivationCache(tmp_path, layout, shards=[1])
    examples = layout.shards[1][0]
    hidden = cache.read(examples, max(_LENGTHS[i] for i in examples))
    for row, example in enumerate(examples):
        assert torch.equal(hidden[row, : _LENGTHS[example]], block.outputs[example])
    cache.close()


# -- while the next thing computes ------------------------------------------------------------------------------------


class _SlowDisk:
    """Stands for ``write_shard``: each write waits until it is let go, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write = activation_cache.write_shard
        self.started: list[str] = []
        self.written: list[str] = []
        self.go = threading.Semaphore(0)
        self.fail_at: int | None = None
        monkeypatch.setattr(activation_cache, "write_shard", self)

    def __call__(self, path: Path, *args: Any, **kwargs: Any) -> ShardRecord:
        self.started.append(path.name)
        assert self.go.acquire(timeout=60)
        if self.fail_at == len(self.written):
            raise DoesNotFitError("the disk is full")
        record = self._write(path, *args, **kwargs)
        self.written.append(path.name)
        return record


def test_batches_are_computed_while_a_shard_is_written_and_only_one_shard_waits(tmp_path, monkeypatch):
    layout, block = _layout(_LENGTHS), _Block(_LENGTHS)
    disk, done = _SlowDisk(monkeypatch), []
    first, second = (len(batches) for batches in layout.shards[:2])
    threads: set[int] = set()

    def on_shard(number: int, error: StoredError, sha256: str) -> None:
        assert shard_name(number) in disk.written
        threads.add(threading.get_ident())
        done.append(number)

    def run_batches(batches: list[list[int]], on_output: Callable[[int, torch.Tensor], None]) -> None:
        for number, batch in enumerate(batches):
            if number == first + second - 1:
                # All of the second shard but its last batch came while the first one was not yet written.
                assert (disk.written, done) == ([], [])
                disk.go.release()
            if number >= first + second:
                assert len(done) >= len(disk.started) - 1
                disk.go.release()
            on_output(number, block(batch))
        disk.go.release()
        disk.go.release()

    write_cache(tmp_path, layout, run_batches, done=(), on_shard=on_shard)
    assert done == list(range(len(layout.shards)))
    assert threads == {threading.get_ident()}
    _check_all(tmp_path, layout, block)


def test_an_error_of_the_writer_ends_the_pass_and_nothing_after_it_counts_as_done(tmp_path, monkeypatch):
    layout, block = _layout(_LENGTHS), _Block(_LENGTHS)
    disk, done = _SlowDisk(monkeypatch), []
    disk.fail_at = 0
    for _ in layout.shards:
        disk.go.release()
    threads = threading.active_count()
    with pytest.raises(DoesNotFitError, match="the disk is full"):
        write_cache(tmp_path, layout, one_by_one(block), done=(), on_shard=into(done))
    assert done == []
    assert len(block.calls) <= len(layout.shards[0]) + len(layout.shards[1]), "the pass must not go on to its end"
    assert threading.active_count() == threads


def test_a_failing_last_write_is_an_error_too(tmp_path, monkeypatch):
    layout, done = _layout(_LENGTHS), []
    disk = _SlowDisk(monkeypatch)
    disk.fail_at = len(layout.shards) - 1
    for _ in layout.shards:
        disk.go.release()
    with pytest.raises(DoesNotFitError, match="the disk is full"):
        write_cache(tmp_path, layout, one_by_one(_Block(_LENGTHS)), done=(), on_shard=into(done))
    assert done == list(range(len(layout.shards) - 1))


def test_an_interruption_waits_for_the_shard_that_is_being_written_and_counts_it(tmp_path, monkeypatch):
    layout, block = _layout(_LENGTHS), _Block(_LENGTHS)
    disk, done = _SlowDisk(monkeypatch), []
    block.fail_at = len(layout.shards[0])
    threading.Timer(0.2, disk.go.release).start()
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, layout, one_by_one(block), done=(), on_shard=into(done))
    assert done == [0]
    assert disk.written == [shard_name(0)]


def test_of_an_interruption_and_a_failing_write_the_interruption_is_told(tmp_path, monkeypatch):
    layout, block = _layout(_LENGTHS), _Block(_LENGTHS)
    disk, done = _SlowDisk(monkeypatch), []
    block.fail_at, disk.fail_at = len(layout.shards[0]), 0
    threading.Timer(0.2, disk.go.release).start()
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, layout, one_by_one(block), done=(), on_shard=into(done))
    assert done == []


# -- with a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gemma3_text"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Rig, TokenizedDataset, int]:
    model = make_model(tmp_path / "model", request.param)
    rig = open_rig(model, tmp_path / "store", quantize="none", dtype="float32")
    tokenizer = load_tokenizer(locate_model(str(model)))
    dataset, _ = load_dataset(
        make_data(tmp_path / "data.jsonl", 12), tokenizer, max_length=256, skip_bad_lines=False, on_event=lambda e: None
    )
    return rig, dataset, pad_token_id(tokenizer)


@torch.no_grad()
def test_a_cached_input_is_the_recomputed_one(opened, tmp_path):
    rig, dataset, pad = opened
    hidden_size = rig.skeleton.hidden_size
    layout = CacheLayout(dataset.lengths, hidden_size=hidden_size, dtype=torch.float32, max_tokens=150, max_rows=4)
    embedded = EmbeddedInputs(rig.skeleton, CPU)
    with rig.layers(0, 2) as first_half:

        def run_batch(examples: list[int]) -> torch.Tensor:
            return first_half.forward(embedded.micro_batch(collate(dataset, examples, pad)))

        write_cache(tmp_path / "cache", layout, one_by_one(run_batch), done=(), on_shard=ignore)
        cached = CachedInputs(rig.skeleton, CPU, tmp_path / "cache", layout)
        for batch_of_writing in (b for shard in layout.shards for b in shard):
            batch = collate(dataset, batch_of_writing, pad)
            hidden = cached.micro_batch(batch).hidden
            assert torch.equal(hidden[batch.real], run_batch(batch_of_writing)[batch.real])
            assert not hidden[~batch.real].any()
        for examples in ([11, 0, 5], [3]):
            batch = collate(dataset, examples, pad)
            torch.testing.assert_close(
                cached.micro_batch(batch).hidden[batch.real], run_batch(examples)[batch.real], rtol=0, atol=1e-5
            )
        cached.close()


@torch.no_grad()
def test_going_on_from_the_cache_gives_the_logits_of_the_whole_model(opened, tmp_path):
    """Masks, positions and rotary embeddings of a later block are those of a pass from the beginning."""
    rig, dataset, pad = opened
    layout = CacheLayout(
        dataset.lengths, hidden_size=rig.skeleton.hidden_size, dtype=torch.float32, max_tokens=150, max_rows=4
    )
    embedded = EmbeddedInputs(rig.skeleton, CPU)
    with rig.layers(0, 2) as first_half:

        def run_batch(examples: list[int]) -> torch.Tensor:
            return first_half.forward(embedded.micro_batch(collate(dataset, examples, pad)))

        write_cache(tmp_path / "cache", layout, one_by_one(run_batch), done=(), on_shard=ignore)
    cached = CachedInputs(rig.skeleton, CPU, tmp_path / "cache", layout)
    batch = collate(dataset, [4, 9, 1], pad)
    with rig.layers(2, 4) as second_half:
        hidden = second_half.forward(cached.micro_batch(batch))
    got = torch.stack([rig.skeleton.logits(row) for row in hidden])
    expected = rig.logits(batch.input_ids)
    torch.testing.assert_close(got[batch.real], expected[batch.real], rtol=0, atol=1e-5)
    cached.close()
