"""The activation cache gives back, bit by bit, what the block before it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lopt_lite.checkpoints.locate import locate_model
from lopt_lite.checkpoints.tokenizer import load_tokenizer, pad_token_id
from lopt_lite.data.dataset import TokenizedDataset, collate
from lopt_lite.data.load import load_dataset
from lopt_lite.errors import LoptError
from lopt_lite.training import activation_cache
from lopt_lite.training.activation_cache import ActivationCache, CacheLayout, RunBatches, shard_name, write_cache
from lopt_lite.training.block_inputs import CachedInputs, EmbeddedInputs
from tests.rig import CPU, Rig, open_rig
from tests.tiny_models import make_data, make_model

_HIDDEN = 8


def one_by_one(run_batch: Callable[[list[int]], torch.Tensor]) -> RunBatches:
    """What :func:`write_cache` takes, from something that runs one batch."""

    def run_batches(batches: list[list[int]], on_output: Callable[[int, torch.Tensor], None]) -> None:
        for number, batch in enumerate(batches):
            on_output(number, run_batch(batch))

    return run_batches


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


def _layout(lengths: list[int], dtype: torch.dtype = torch.bfloat16, max_tokens: int = 10) -> CacheLayout:
    return CacheLayout(torch.tensor(lengths), hidden_size=_HIDDEN, dtype=dtype, max_tokens=max_tokens, max_rows=3)


_LENGTHS = [5, 1, 9, 3, 3, 7, 2, 30, 4, 6, 1]


def _check_all(directory: Path, layout: CacheLayout, block: _Block) -> None:
    cache = ActivationCache(directory, layout)
    for examples in ([0], [7, 1, 2], [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [3, 3]):
        longest = max(_LENGTHS[i] for i in examples)
        hidden = cache.read(examples, longest)
        assert hidden.dtype == layout.dtype
        for row, example in enumerate(examples):
            length = _LENGTHS[example]
            assert torch.equal(hidden[row, :length], block.outputs[example])
            assert not hidden[row, length:].any()
    cache.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_examples_in_any_order_come_back_bit_by_bit(tmp_path, dtype):
    layout, block = _layout(_LENGTHS, dtype), _Block(_LENGTHS, dtype)
    finished: list[int] = []
    write_cache(tmp_path / "cache", layout, one_by_one(block), done=(), on_shard=finished.append)
    assert len(layout.shards) > 2
    assert finished == list(range(len(layout.shards)))
    _check_all(tmp_path / "cache", layout, block)


def test_the_files_hold_no_padding_and_are_as_large_as_announced(tmp_path):
    layout, block = _layout(_LENGTHS), _Block(_LENGTHS)
    write_cache(tmp_path, layout, one_by_one(block), done=(), on_shard=lambda n: None)
    tensors = [t for path in sorted(tmp_path.iterdir()) for t in load_file(path).values()]
    assert sum(t.shape[0] for t in tensors) == sum(_LENGTHS)
    assert sum(t.numel() * t.itemsize for t in tensors) == layout.total_bytes
    assert not any(t.isnan().any() for t in tensors)


def test_a_half_written_cache_goes_on_at_its_next_shard_and_ends_with_the_same_bytes(tmp_path):
    layout = _layout(_LENGTHS)
    whole = _Block(_LENGTHS)
    write_cache(tmp_path / "whole", layout, one_by_one(whole), done=(), on_shard=lambda n: None)
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    for cut in range(len(whole.calls)):
        directory, done = tmp_path / f"cut-{cut}", []
        first = _Block(_LENGTHS)
        first.fail_at = cut
        with pytest.raises(KeyboardInterrupt):
            write_cache(directory, layout, one_by_one(first), done=(), on_shard=done.append)
        again = _Block(_LENGTHS)
        write_cache(directory, layout, one_by_one(again), done=list(done), on_shard=done.append)
        assert again.calls == [batch for shard in layout.shards[_shard_of(layout, cut) :] for batch in shard]
        assert done == list(range(len(layout.shards)))
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == expected


def _shard_of(layout: CacheLayout, cut: int) -> int:
    """The shard that batch number ``cut`` belongs to."""
    owners = [n for n, batches in enumerate(layout.shards) for _ in batches]
    return owners[cut]


def test_a_shard_that_is_journalled_but_gone_is_made_again(tmp_path):
    layout = _layout(_LENGTHS)
    write_cache(tmp_path, layout, one_by_one(_Block(_LENGTHS)), done=(), on_shard=lambda n: None)
    (tmp_path / shard_name(1)).unlink()
    again = _Block(_LENGTHS)
    write_cache(tmp_path, layout, one_by_one(again), done=range(len(layout.shards)), on_shard=lambda n: None)
    assert again.calls == layout.shards[1]
    _check_all(tmp_path, layout, again)


def test_a_shard_that_is_there_but_not_journalled_is_written_again(tmp_path):
    """The fact comes after the file; a crash between them leaves a whole file that is not trusted."""
    layout, block = _layout(_LENGTHS), _Block(_LENGTHS)
    tmp_path.joinpath(shard_name(0)).write_bytes(b"something else")
    write_cache(tmp_path, layout, one_by_one(block), done=(), on_shard=lambda n: None)
    _check_all(tmp_path, layout, block)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_shard_is_an_error_that_names_it(tmp_path, damage):
    layout = _layout(_LENGTHS)
    write_cache(tmp_path, layout, one_by_one(_Block(_LENGTHS)), done=(), on_shard=lambda n: None)
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

        write_cache(tmp_path / "cache", layout, one_by_one(run_batch), done=(), on_shard=lambda n: None)
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

        write_cache(tmp_path / "cache", layout, one_by_one(run_batch), done=(), on_shard=lambda n: None)
    cached = CachedInputs(rig.skeleton, CPU, tmp_path / "cache", layout)
    batch = collate(dataset, [4, 9, 1], pad)
    with rig.layers(2, 4) as second_half:
        hidden = second_half.forward(cached.micro_batch(batch))
    got = torch.stack([rig.skeleton.logits(row) for row in hidden])
    expected = rig.logits(batch.input_ids)
    torch.testing.assert_close(got[batch.real], expected[batch.real], rtol=0, atol=1e-5)
    cached.close()
