"""Tool calls are learnt where the chat template shows them; where it does not, the line cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lopt_lite.errors import DataError
from tests.data import tiny_tokenizers as tt
from tests.data.helpers import load, trained_runs, write_lines
from tests.data.tiny_tokenizers import make_tokenizer

CALLS = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
CHAT: list[dict[str, Any]] = [TURNS[0], TURNS[3]]

#: Shows the calls beside the content.
SHOWING = tt.CHATML.replace("message['content'] +", "message['content'] + (message.tool_calls or '') | string +")
SHOWING_MARKED = tt.CHATML_MARKED.replace(
    "{% generation %}{{ message['content'] +",
    "{% generation %}{{ message['content'] + (message.tool_calls or '') | string +",
)
#: Shows the calls of a turn that has no content, and the content alone of one that has.
ONE_OR_THE_OTHER = tt.CHATML.replace(
    "message['content'] +", "(message['content'] or message.tool_calls | default('') | string) +"
)
#: Writes that there are calls, and not which.
MARK_ALONE = tt.CHATML.replace(
    "message['content'] +", "('[TOOL_CALLS]' if message.tool_calls else '') + message['content'] +"
)
#: Refuses functions that it does not know.
REFUSING = (
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls[0].function.name != 'add' %}"
    "{{ raise_exception('an unknown function') }}{% endif %}{% endfor %}" + tt.CHATML
)


@pytest.mark.parametrize("template", [SHOWING, SHOWING_MARKED, ONE_OR_THE_OTHER])
@pytest.mark.parametrize("calls", [CALLS, [{"name": "add"}], [{"name": "\ue000"}], ["add"], {"function": "add"}, "add"])
def test_calls_that_are_shown_are_learnt(template: str, calls: Any, tmp_path: Path) -> None:
    """In whichever form they are written."""
    tokenizer = make_tokenizer(template)
    turns = [TURNS[0], {**TURNS[1], "tool_calls": calls}, *TURNS[2:]]
    dataset, report, notices = load(write_lines(tmp_path, {"messages": turns}), tokenizer)
    assert trained_runs(dataset, tokenizer) == [f"{calls}<|im_end|>", "It is 4.<|im_end|>"]
    assert report.bad_lines == 0 and notices == []


@pytest.mark.parametrize("template", [tt.CHATML, tt.CHATML_MARKED, tt.LLAMA3, tt.QWEN3, MARK_ALONE])
@pytest.mark.parametrize("content", [None, "", "Let me see."])
def test_calls_that_are_not_shown_are_refused_with_what_to_change(
    template: str, content: str | None, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(template)
    turns = [CHAT[0], CHAT[1], TURNS[0], {**TURNS[1], "content": content}, *TURNS[2:]]
    path = write_lines(tmp_path, {"messages": CHAT}, {"messages": turns}, {"messages": CHAT}, {"messages": turns})
    with pytest.raises(DataError) as caught:
        load(path, tokenizer)
    said = "line 2: the chat template does not show 'tool_calls' of assistant turn 2, so the model would learn to end"
    assert said in caught.value.found
    assert "chat_template.jinja" in caught.value.found and "leave the key out" in caught.value.found
    assert "--skip-bad-lines" in (caught.value.fix or "")

    dataset, report, notices = load(path, tokenizer, skip_bad_lines=True)
    assert (len(dataset), report.bad_lines, report.first_bad_lines) == (2, 2, [2, 4])
    (notice,) = notices
    assert "2 of 4 lines cannot be used and were dropped" in notice
    assert said in notice and "chat_template.jinja" in notice


def test_a_template_that_shows_calls_only_where_there_is_no_content_is_found_out(tmp_path: Path) -> None:
    turns = [TURNS[0], {**TURNS[1], "content": "Let me see."}, *TURNS[2:]]
    with pytest.raises(DataError, match="line 2: the chat template does not show 'tool_calls' of assistant turn 1"):
        load(write_lines(tmp_path, {"messages": TURNS}, {"messages": turns}), make_tokenizer(ONE_OR_THE_OTHER))


def test_conversations_are_looked_at_as_messages_are(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "", "tool_calls": CALLS}]
    with pytest.raises(DataError, match="line 1: the chat template does not show 'tool_calls' of assistant turn 1"):
        load(write_lines(tmp_path, {"conversations": turns, "system": "Be brief."}), make_tokenizer())


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": TURNS[:3], "completion": TURNS[3:]},
        {"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]},
    ],
)
def test_calls_that_are_only_context_need_not_be_shown(tmp_path: Path, line: dict[str, Any]) -> None:
    """Nothing is learnt of that turn, and the template decides what of a conversation a model sees."""
    tokenizer = make_tokenizer()
    dataset, _, _ = load(write_lines(tmp_path, line), tokenizer)
    assert trained_runs(dataset, tokenizer) == ["It is 4.<|im_end|>"]


@pytest.mark.parametrize(("template", "what"), [(tt.CHATML, "chat"), (None, "plain")])
def test_a_call_under_its_older_name_is_none_the_less_one(template: str | None, what: str, tmp_path: Path) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": "{}"}}]
    with pytest.raises(DataError, match=f"line 1: the {what} template does not show 'function_call' of assistant"):
        load(write_lines(tmp_path, {"messages": turns}), make_tokenizer(template))


def test_a_template_that_refuses_other_calls_looks_at_them(tmp_path: Path) -> None:
    _, report, _ = load(write_lines(tmp_path, {"messages": TURNS}), make_tokenizer(REFUSING))
    assert report.examples == 1


def test_empty_fields_are_no_calls(tmp_path: Path) -> None:
    lines = [{"messages": CHAT}, {"messages": [CHAT[0], {**CHAT[1], "tool_calls": [], "function_call": None}]}]
    for template in (tt.CHATML, None):
        dataset, _, _ = load(write_lines(tmp_path, *lines), make_tokenizer(template))
        assert dataset.example(0)[0].tolist() == dataset.example(1)[0].tolist()


def test_a_system_message_that_is_merged_does_not_hide_calls(tmp_path: Path) -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    line = {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}
    with pytest.raises(DataError, match="line 1: the chat template does not show 'tool_calls' of assistant turn 1"):
        load(write_lines(tmp_path, line), make_tokenizer(no_system + tt.CHATML))
    tokenizer = make_tokenizer(no_system + SHOWING)
    dataset, report, _ = load(write_lines(tmp_path, line), tokenizer)
    assert trained_runs(dataset, tokenizer) == [f"{CALLS}<|im_end|>", "It is 4.<|im_end|>"]
    assert report.system_merged == 1
