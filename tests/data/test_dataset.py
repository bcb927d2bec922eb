"""The data set and its batches, against plain loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lopt_lite.data import dataset
from lopt_lite.data.dataset import TokenizedDataset, collate
from lopt_lite.data.load import load_dataset
from lopt_lite.errors import DataError, StoppedError
from lopt_lite.events import Event, Progress
from tests.data.helpers import write_lines
from tests.data.tiny_tokenizers import make_tokenizer


def random_dataset(count: int, seed: int = 0) -> TokenizedDataset:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    tokens = torch.randint(5, 300, (total,), generator=generator).to(torch.int32)
    is_target = torch.rand(total, generator=generator) < 0.5
    is_target[offsets[:-1]] = False
    return TokenizedDataset(tokens, is_target, offsets)


@pytest.fixture(params=[2**20, 10, 1], ids="pieces of {} tokens".format)
def piece_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few examples are worked on in pieces as many are."""
    monkeypatch.setattr(dataset, "_PIECE_TOKENS", request.param)


@pytest.mark.usefixtures("piece_tokens")
def test_lengths_counts_and_examples() -> None:
    data = random_dataset(7)
    assert len(data) == 7
    for i in range(7):
        tokens, is_target = data.example(i)
        assert len(tokens) == data.lengths[i]
        assert is_target.sum() == data.target_counts[i]
        assert tokens.dtype == torch.int32 and is_target.dtype == torch.bool


@pytest.mark.usefixtures("piece_tokens")
def test_select_and_join() -> None:
    data = random_dataset(6)
    chosen = data.select([4, 0, 4])
    for row, i in enumerate([4, 0, 4]):
        assert torch.equal(chosen.example(row)[0], data.example(i)[0])
        assert torch.equal(chosen.example(row)[1], data.example(i)[1])
    parts = [data.select([0, 1]), data.select([]), data.select(torch.tensor([2, 3, 4, 5]))]
    whole, views = TokenizedDataset.join(parts)
    assert whole.fingerprint() == data.fingerprint()
    assert [view.fingerprint() for view in views] == [part.fingerprint() for part in parts]
    assert all(view.tokens.untyped_storage().data_ptr() == whole.tokens.data_ptr() for view in views[::2])
    assert [view.target_counts.tolist() for view in views] == [part.target_counts.tolist() for part in parts]
    alone, (view,) = TokenizedDataset.join([data])
    assert alone is view is data
    assert len(data.select([])) == 0


@pytest.mark.usefixtures("piece_tokens")
def test_beginnings() -> None:
    data = random_dataset(6)
    lengths = torch.tensor([2, 0, 1, 2, 0, int(data.lengths[5])])
    begun = data.beginnings(lengths)
    assert torch.equal(begun.lengths, lengths)
    for i, length in enumerate(lengths.tolist()):
        for part, whole in zip(begun.example(i), data.example(i), strict=True):
            assert torch.equal(part, whole[:length])
    assert data.beginnings(data.lengths).fingerprint() == data.fingerprint()


def test_the_fingerprint_sees_every_part() -> None:
    data = random_dataset(3)
    prints = {data.fingerprint(), data.select([0, 2, 1]).fingerprint(), data.select([0, 1]).fingerprint()}
    other = data.is_target.clone()
    other[1] = ~other[1]
    prints.add(TokenizedDataset(data.tokens, other, data.offsets).fingerprint())
    assert len(prints) == 4
    tokens = torch.tensor([1, 2, 3], dtype=torch.int32)
    fixed = TokenizedDataset(tokens, torch.tensor([False, True, True]), torch.tensor([0, 3]))
    assert fixed.fingerprint() == "cbc76f043c1cd5640c0d117dde298a1922aff79b1723f02eba69d28e5374921a"


def test_a_batch_is_padded_on_the_right_and_its_targets_are_shifted() -> None:
    data = random_dataset(9)
    indices = [3, 8, 0]
    batch = collate(data, indices, pad_token_id=2)
    longest = max(int(data.lengths[i]) for i in indices)
    assert batch.input_ids.shape == batch.targets.shape == batch.real.shape == (3, longest)
    assert batch.input_ids.dtype == batch.targets.dtype == batch.lengths.dtype == batch.examples.dtype == torch.int64
    for row, i in enumerate(indices):
        tokens, is_target = (part.tolist() for part in data.example(i))
        padding = longest - len(tokens)
        assert batch.input_ids[row].tolist() == tokens + [2] * padding
        assert batch.real[row].tolist() == [True] * len(tokens) + [False] * padding
        shifted = [t if target else -100 for t, target in zip(tokens, is_target, strict=True)][1:]
        assert batch.targets[row].tolist() == shifted + [-100] * (padding + 1)
    assert batch.tokens == int(data.lengths[indices].sum())
    assert batch.answer_tokens == int(data.target_counts[indices].sum())
    assert batch.examples.tolist() == indices


def test_a_split_is_deterministic_disjoint_and_complete() -> None:
    data = random_dataset(20)
    train, validation = data.split(0.25, seed=3)
    assert (len(train), len(validation)) == (15, 5)
    again = data.split(0.25, seed=3)
    assert (train.fingerprint(), validation.fingerprint()) == tuple(part.fingerprint() for part in again)
    assert data.split(0.25, seed=4)[1].fingerprint() != validation.fingerprint()
    rows = [part.example(i)[0].tolist() for part in (train, validation) for i in range(len(part))]
    assert sorted(rows) == sorted(data.example(i)[0].tolist() for i in range(20))


def test_a_split_leaves_something_on_both_sides() -> None:
    for fraction in (1e-6, 0.5, 1 - 1e-6):
        train, validation = random_dataset(2).split(fraction, seed=0)
        assert (len(train), len(validation)) == (1, 1)
    with pytest.raises(DataError, match="cannot be split"):
        random_dataset(1).split(0.5, seed=0)


def test_chunks_do_not_show_in_the_data_and_a_long_file_reports_progress(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    lines = [{"question": f"{i}", "answer": f"{i} " * (i % 7)} for i in range(1100)]
    events: list[Event] = []
    path = write_lines(tmp_path, *lines)
    data, _ = load_dataset(path, tokenizer, max_length=64, skip_bad_lines=False, on_event=events.append)
    assert len(data) == 1100
    for i in (0, 511, 512, 513, 1023, 1024, 1099):
        alone, _ = load_dataset(
            write_lines(tmp_path, lines[i], name="one.jsonl"),
            tokenizer,
            max_length=64,
            skip_bad_lines=False,
            on_event=lambda event: None,
        )
        assert data.select([i]).fingerprint() == alone.fingerprint()
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    assert progress[-1].done == progress[-1].total == path.stat().st_size


def test_reading_a_long_file_can_be_stopped_between_its_chunks(tmp_path: Path) -> None:
    path = write_lines(tmp_path, *({"question": f"{i}", "answer": f"{i}"} for i in range(2100)))
    events: list[Event] = []

    def stop_after_the_second() -> None:
        if len(events) == 2:
            raise StoppedError("enough")

    options = {"max_length": 64, "skip_bad_lines": False, "check": stop_after_the_second}
    with pytest.raises(StoppedError, match="enough"):
        load_dataset(path, make_tokenizer(), on_event=events.append, **options)
    assert [type(event) for event in events] == [Progress, Progress]
