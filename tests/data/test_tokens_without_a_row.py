"""Lines with a token that the model's embedding has no row for are bad lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lopt_lite.data import load as loading
from lopt_lite.data.dataset import TokenizedDataset
from lopt_lite.data.load import LoadReport, load_dataset
from lopt_lite.errors import DataError
from lopt_lite.events import Event, Notice
from tests.data.helpers import write_lines
from tests.data.tiny_tokenizers import make_tokenizer

GOOD = {"question": "What?", "answer": "Nothing."}
IMAGE = {"question": "What is in <image>?", "answer": "Ducks."}


@pytest.fixture
def tokenizer() -> Any:
    made = make_tokenizer()
    made.add_tokens(["<image>"])
    return made


def load(path: Path, tokenizer: Any, **options: Any) -> tuple[TokenizedDataset, LoadReport, list[str]]:
    events: list[Event] = []
    options = {"max_length": 64, "skip_bad_lines": False, "embedding_rows": len(tokenizer) - 1, **options}
    dataset, report = load_dataset(path, tokenizer, on_event=events.append, **options)
    return dataset, report, [event.text for event in events if isinstance(event, Notice)]


@pytest.mark.parametrize("bad", [IMAGE, {"question": "What?", "answer": "<image>"}])
def test_the_line_and_the_token_are_named(bad: dict[str, str], tokenizer: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path, GOOD, "", GOOD, bad, GOOD)
    rows = len(tokenizer) - 1
    with pytest.raises(DataError, match=f"line 4: the token '<image>' has the id {rows}, .* {rows} rows") as caught:
        load(path, tokenizer)
    assert "--skip-bad-lines" in str(caught.value)
    assert len(load(path, tokenizer, embedding_rows=rows + 1)[0]) == 4
    assert len(load(path, tokenizer, embedding_rows=None)[0]) == 4


def test_plain_text_is_checked_too(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: the token '<image>'"):
        load(write_lines(tmp_path, {"text": "Ducks"}, {"text": "An <image> of ducks"}), tokenizer)


def test_such_lines_are_dropped_and_counted_in_the_order_of_the_file(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_CHUNK_EXAMPLES", 4)
    path = write_lines(tmp_path, GOOD, IMAGE, "not json", GOOD, "{", "[", "1", "2", IMAGE, GOOD)
    dataset, report, notices = load(path, tokenizer, skip_bad_lines=True)
    assert (len(dataset), report.examples, report.bad_lines) == (3, 3, 7)
    assert report.first_bad_lines == [2, 3, 5, 6, 7]
    assert any("7 of 10 lines" in text and "line 2: the token '<image>'" in text for text in notices)
    assert int(dataset.tokens.max()) < len(tokenizer) - 1


def test_a_token_that_is_cut_away_does_no_harm(tokenizer: Any, tmp_path: Path) -> None:
    line = {"question": "<image> " + "Why? " * 40, "answer": "So."}
    dataset, report, _ = load(write_lines(tmp_path, line), tokenizer, max_length=20)
    assert (len(dataset), report.cut) == (1, 1)


def test_when_no_line_is_left_it_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 2 lines .* can be used; line 1: the token '<image>'"):
        load(write_lines(tmp_path, IMAGE, IMAGE), tokenizer, skip_bad_lines=True)
