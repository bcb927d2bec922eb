"""Conversations of very many turns: what one line may take is limited, and reading can be stopped meanwhile."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from lopt_lite.data import answers, template_limits
from lopt_lite.data import load as load_module
from lopt_lite.data.answers import _within
from lopt_lite.data.load import load_dataset
from lopt_lite.data.templates import ChatTemplate
from lopt_lite.errors import DataError, StoppedError
from lopt_lite.events import Event, Progress
from tests.data import tiny_tokenizers as tt
from tests.data.helpers import load, trained_runs, write_lines
from tests.data.tiny_tokenizers import make_tokenizer

PAIR: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}]
SHORT = {"messages": PAIR}
LONG = {"messages": PAIR * 20}
#: Beginnings of a conversation have to be rendered again for each turn.
AHEAD = "{% for m in messages %}{% if loop.last %}{% endif %}{% endfor %}" + tt.CHATML
SHOWING_CALLS = AHEAD.replace("message['content'] +", "message['content'] + (message.tool_calls or '') | string +")


def loads_without_line_2(path: Path, tokenizer: Any, *said: str) -> None:
    """Line 2 of three, two of them good, is an error of the data that says so, and can be dropped."""
    with pytest.raises(DataError, match="line 2: ") as caught:
        load(path, tokenizer)
    for words in said:
        assert words in caught.value.found
    assert "--skip-bad-lines" in (caught.value.fix or "")
    dataset, report, notices = load(path, tokenizer, skip_bad_lines=True)
    assert (len(dataset), report.bad_lines, report.first_bad_lines) == (2, 1, [2])
    assert any(said[0] in text for text in notices)


def test_thousands_of_turns_are_rendered_a_few_times_where_one_rendering_tells_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendered again for each turn, these take minutes."""
    tokenizer = make_tokenizer(tt.CHATML)
    render, times = ChatTemplate.render, 0

    def counted(self: ChatTemplate, messages: Any, **options: Any) -> str:
        nonlocal times
        times += len(messages) > 2
        assert times <= 2
        return render(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    dataset, report, _ = load(write_lines(tmp_path, {"messages": PAIR * 2000}), tokenizer, max_length=2**17)
    assert trained_runs(dataset, tokenizer) == ["Yes.<|im_end|>"] * 2000
    assert (report.unlocated_turns, report.cut) == (0, 0)


def test_a_line_for_which_too_much_would_be_rendered_is_a_bad_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_MOST_RENDERED", 800)
    path = write_lines(tmp_path, SHORT, LONG, SHORT)
    rendered = "20 answers among 40 messages, and the chat template would have to render 820 messages to find them"
    loads_without_line_2(path, make_tokenizer(AHEAD), rendered, "at most 800 can", "split the conversation")
    monkeypatch.setattr(answers, "_MOST_RENDERED", 820)
    assert load(path, make_tokenizer(AHEAD))[1].examples == 3


def test_what_is_rendered_for_places_that_no_prefix_tells_counts_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_MOST_RENDERED", 700)
    unlike = tt.CHATML.replace("assistant\n' }}{% e", "assistant\n<think>\n' }}{% e")
    path = write_lines(tmp_path, SHORT, LONG, SHORT)
    loads_without_line_2(path, make_tokenizer(unlike), "20 answers among 40 messages", "at most 700 can be rendered")


def test_tool_calls_count_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_MOST_RENDERED", 1500)
    turns = [PAIR[0], {**PAIR[1], "tool_calls": [{"name": "add"}]}] * 20
    path = write_lines(tmp_path, SHORT, {"messages": turns}, LONG)
    loads_without_line_2(path, make_tokenizer(SHOWING_CALLS), "20 answers among 40 messages", "at most 1,500 can be")


def test_a_line_that_takes_too_long_in_all_is_a_bad_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started_s, render, slept_s = time.monotonic(), ChatTemplate.render, 0.0

    def slow(self: ChatTemplate, messages: Any, **options: Any) -> str:
        nonlocal slept_s
        slept_s += 0 if len(messages) < 10 else 50
        return render(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", slow)
    monkeypatch.setattr(time, "monotonic", lambda: started_s + slept_s)
    path = write_lines(tmp_path, SHORT, LONG, SHORT)
    said = ("20 answers among 40 messages", "ran for more than 120 seconds", "split the conversation")
    loads_without_line_2(path, make_tokenizer(AHEAD), *said)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}PUT{% endfor %}{% endfor %}"
ON_MANY = "{% if messages | length > 10 %}" + ENDLESS + "{% endif %}" + tt.CHATML


@pytest.mark.parametrize("tools", [[], [{"name": "add"}]])
def test_a_template_that_takes_a_short_conversation_is_not_to_blame_for_a_long_one(
    tools: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path, SHORT, {**LONG, "tools": tools}, SHORT)
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.5)
    said = ("the chat template ran for 0.5 seconds", "this one has 40 messages", "split it into shorter ones")
    loads_without_line_2(path, make_tokenizer(ON_MANY.replace("PUT", "")), *said)
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 30)
    monkeypatch.setattr(template_limits, "MOST_CHARACTERS", 10_000)
    said = ("the chat template makes more than 10,000 characters", "this one has 40 messages")
    loads_without_line_2(path, make_tokenizer(ON_MANY.replace("PUT", "{{ 'aaaa' }}")), *said)


def test_more_messages_than_the_characters_allow_are_not_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "_MOST_CHARACTERS", 300)
    monkeypatch.setattr(load_module, "_MOST_CHARACTERS_PER_TOKEN", 0)
    path = write_lines(tmp_path, SHORT, LONG, SHORT)
    render = ChatTemplate.render

    def few(self: ChatTemplate, messages: Any, **options: Any) -> str:
        assert len(messages) < 40
        return render(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", few)
    loads_without_line_2(path, make_tokenizer(), "40 messages; at most 37 can be used (--max-length 4096)")


@pytest.mark.parametrize("template", [tt.CHATML, tt.BARE])
def test_a_text_that_is_too_long_is_found_out_before_its_answers_are_looked_for(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(template)
    length = len(ChatTemplate(tokenizer).render(LONG["messages"])) + len("</s>" if template == tt.BARE else "")
    monkeypatch.setattr(load_module, "_MOST_CHARACTERS", length)
    monkeypatch.setattr(load_module, "_MOST_CHARACTERS_PER_TOKEN", 0)
    path = write_lines(tmp_path, SHORT, LONG, SHORT)
    assert load(path, tokenizer)[1].examples == 3
    monkeypatch.setattr(load_module, "_MOST_CHARACTERS", length - 1)
    locate = answers._locate

    def of_short_ones(template: Any, conversation: Any, *others: Any) -> Any:
        assert len(conversation.messages) == 2
        return locate(template, conversation, *others)

    monkeypatch.setattr(answers, "_locate", of_short_ones)
    said = f"the conversation has {length:,} characters; at most {length - 1:,} can be used (--max-length 4096)"
    loads_without_line_2(path, tokenizer, said)


def asked_until_stopped(path: Path, calls: int, tokenizer: Any) -> int:
    """How often reading asks whether to stop, where the answer is yes at that of the ``calls``."""
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == calls:
            raise StoppedError("enough")

    with pytest.raises(StoppedError):
        load_dataset(path, tokenizer, max_length=4096, skip_bad_lines=True, check=check, on_event=lambda event: None)
    return asked


def test_reading_can_be_stopped_before_each_line_good_or_bad_and_within_a_long_one(tmp_path: Path) -> None:
    lines = [{"text": "a"}, {"text": 5}, "{", {"text": "b"}]
    path = write_lines(tmp_path, *lines)
    for calls in range(1, 5):
        assert asked_until_stopped(path, calls, make_tokenizer()) == calls
    path = write_lines(tmp_path, LONG)
    # One for each rendering: two for each answer, but the end of the last.
    assert asked_until_stopped(path, 40, make_tokenizer(AHEAD)) == 40


def test_progress_is_told_between_lines_that_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path, SHORT, "{", SHORT)
    events: list[Event] = []
    monkeypatch.setattr(load_module, "_PROGRESS_SECONDS", -1.0)
    load_dataset(path, make_tokenizer(), max_length=64, skip_bad_lines=True, on_event=events.append)
    done = [event.done for event in events if isinstance(event, Progress)]
    size = path.stat().st_size
    assert done == [size // 2 - 1, size // 2 + 1, size]


def test_marks_within_turns_are_found_as_by_comparing_all_with_all() -> None:
    draw = random.Random(1)
    for _ in range(300):
        borders = sorted(draw.randrange(30) for _ in range(2 * draw.randrange(6)))
        turns = list(zip(borders[::2], borders[1::2], strict=True))
        marks = [(first, first + draw.randrange(8)) for first in (draw.randrange(30) for _ in range(6))]
        assert _within(marks, turns) == [
            (first, last)
            for first, last in marks
            if any((start < last and first < end) or start <= first == last <= end for start, end in turns)
        ]
