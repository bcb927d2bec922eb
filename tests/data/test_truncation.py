"""What is kept of an example that is too long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lopt_lite.data.truncation import shorten
from lopt_lite.errors import DataError
from tests.data import tiny_tokenizers as tt
from tests.data.helpers import load, trained_runs, whole_text, write_lines
from tests.data.tiny_tokenizers import make_tokenizer

BOS = 1


def cut(ids: list[int], targets: list[int], max_length: int) -> tuple[list[int], list[int]]:
    kept, mask = shorten(np.array(ids, np.int32), np.array(targets, bool), max_length, BOS)
    return kept.tolist(), kept[mask].tolist()


def test_the_front_of_the_prompt_goes_first() -> None:
    assert cut([2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 1], 4) == ([4, 5, 6, 7], [6, 7])


def test_the_leading_bos_and_the_last_prompt_token_stay() -> None:
    assert cut([BOS, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 1], 4) == ([BOS, 5, 6, 7], [6, 7])
    assert cut([BOS, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 1], 3) == ([BOS, 5, 6], [6])


def test_answers_that_are_too_long_are_cut_at_the_end() -> None:
    assert cut([2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 1, 1], 3) == ([3, 4, 5], [4, 5])


def test_nothing_follows_the_last_target() -> None:
    assert cut([2, 3, 4, 5, 6, 7], [0, 1, 0, 0, 0, 0], 100) == ([2, 3], [3])
    assert cut([2, 3, 4, 5, 6, 7], [0, 1, 0, 0, 0, 1], 4) == ([2, 3], [3])


def test_a_prompt_of_one_token_is_kept() -> None:
    assert cut([2, 3, 4], [0, 1, 1], 2) == ([2, 3], [3])


def test_cut_examples_are_counted_and_keep_their_answer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.LLAMA3)
    path = write_lines(tmp_path, {"question": "long " * 50, "answer": "4"}, {"question": "short", "answer": "5"})
    dataset, report, notices = load(path, tokenizer, max_length=40)
    assert (report.cut, report.dropped, report.examples) == (1, 0, 2)
    assert dataset.lengths[0] == 40
    assert trained_runs(dataset, tokenizer) == ["4<|eot_id|>"]
    assert whole_text(dataset, tokenizer).startswith("<s>")
    assert any("1 examples were cut to 40 tokens" in text for text in notices)


def test_examples_without_an_answer_are_dropped_and_counted(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.CHATML)
    user = {"role": "user", "content": "a"}
    good = {"messages": [user, {"role": "assistant", "content": "b"}]}
    dataset, report, notices = load(write_lines(tmp_path, {"messages": [user]}, good), tokenizer)
    assert (len(dataset), report.dropped) == (1, 1)
    assert any("1 examples were dropped" in text for text in notices)
    with pytest.raises(DataError, match="none of the 2 examples") as caught:
        load(write_lines(tmp_path, {"messages": [user]}, {"messages": [user]}), tokenizer)
    assert "--max-length" in str(caught.value)
