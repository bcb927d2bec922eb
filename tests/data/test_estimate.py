"""Counting tokens from a sample."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from lopt_lite.data import estimate
from lopt_lite.data.dataset import TokenizedDataset
from lopt_lite.data.estimate import estimate_data
from lopt_lite.data.load import load_dataset
from lopt_lite.errors import DataError
from tests.data.tiny_tokenizers import make_tokenizer


def write(path: Path, count: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            line = {"question": f"What is {i} + 1?" + " Please." * (i * 7 % 13), "answer": f"It is {i + 1}."}
            file.write(json.dumps(line) + "\n")
    return path


def truth(path: Path, max_length: int):
    dataset, _ = load_dataset(
        path, make_tokenizer(), max_length=max_length, skip_bad_lines=True, on_event=lambda event: None
    )
    return dataset


@pytest.mark.parametrize("max_length", [1024, 20])
def test_a_small_file_is_counted_exactly(tmp_path, max_length):
    path = write(tmp_path / "d.jsonl", 50)
    found, dataset = estimate_data(path, make_tokenizer(), max_length=max_length), truth(path, max_length)
    assert found.how == "counted"
    assert (found.examples, found.tokens) == (len(dataset), int(dataset.lengths.sum()))
    assert found.answer_tokens == int(dataset.target_counts.sum())
    assert found.longest == int(dataset.lengths.max())


def test_a_larger_file_is_sampled_and_comes_close(tmp_path):
    path = write(tmp_path / "d.jsonl", 1500)
    found, dataset = estimate_data(path, make_tokenizer(), max_length=1024), truth(path, 1024)
    assert found.how == "sampled"
    assert found.examples == len(dataset)
    assert found.tokens == pytest.approx(int(dataset.lengths.sum()), rel=0.05)
    assert found.answer_tokens == pytest.approx(int(dataset.target_counts.sum()), rel=0.1)
    assert found.longest == int(dataset.lengths.max())


def test_of_a_huge_file_only_stretches_are_read(tmp_path, monkeypatch):
    path = write(tmp_path / "d.jsonl", 3000)
    monkeypatch.setattr(estimate, "_SCANNED_BYTES", 48_000)
    found, dataset = estimate_data(path, make_tokenizer(), max_length=1024), truth(path, 1024)
    assert found.examples == pytest.approx(len(dataset), rel=0.1)
    assert found.tokens == pytest.approx(int(dataset.lengths.sum()), rel=0.1)


def test_without_a_tokenizer_bytes_are_counted(tmp_path):
    path = write(tmp_path / "d.jsonl", 30)
    found = estimate_data(path, None, max_length=1024)
    assert (found.how, found.examples) == ("from bytes", 30)
    assert found.tokens == pytest.approx(path.stat().st_size / estimate.BYTES_PER_TOKEN, rel=0.05)


def test_lines_that_cannot_be_used_do_not_matter_unless_all_are(tmp_path):
    path = write(tmp_path / "d.jsonl", 30)
    with path.open("a") as file:
        file.write("not json\n\n")
    assert estimate_data(path, make_tokenizer(), max_length=1024).tokens == int(truth(path, 1024).lengths.sum())
    path.write_text("not json\nneither\n")
    with pytest.raises(DataError, match="none of the 2 lines"):
        estimate_data(path, make_tokenizer(), max_length=1024)
    path.write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        estimate_data(path, None, max_length=1024)


def test_as_many_are_held_out_as_of_the_data_itself(tmp_path):
    whole = estimate_data(write(tmp_path / "d.jsonl", 40), None, max_length=1024)
    for examples, fraction in itertools.product((2, 3, 4, 5, 15, 24, 101), (1e-9, 0.01, 0.1, 0.25, 0.5, 0.9)):
        data = TokenizedDataset(torch.zeros(examples), torch.ones(examples).bool(), torch.arange(examples + 1))
        expected = [len(part) for part in data.split(fraction, seed=0)]
        parts = dataclasses.replace(whole, examples=examples).split(fraction, seed=0)
        assert [part.examples for part in parts] == expected, (examples, fraction)
    assert [part.examples for part in dataclasses.replace(whole, examples=1).split(0.1, seed=0)] == [1, 1]


def test_of_a_small_file_the_same_examples_are_held_out_as_of_the_data_itself(tmp_path):
    path = write(tmp_path / "d.jsonl", 50)
    found, dataset = estimate_data(path, make_tokenizer(), max_length=1024), truth(path, 1024)
    for part, expected in zip(found.split(0.2, seed=3), dataset.split(0.2, seed=3), strict=True):
        assert part.is_exact and part.lengths == tuple(expected.lengths.tolist())
        assert (part.tokens, part.longest) == (sum(part.lengths), max(part.lengths))
    larger = estimate_data(write(path, 1500), make_tokenizer(), max_length=1024)
    assert not larger.is_exact and not any(part.is_exact for part in larger.split(0.2, seed=3))
