"""``tools`` beside messages reach the chat template, ``system`` becomes the first message, answers stay the answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lopt_lite.data import template_limits
from lopt_lite.data.templates import ChatTemplate
from lopt_lite.errors import DataError, ModelError
from tests.data import tiny_tokenizers as tt
from tests.data.helpers import load, trained_runs, whole_text, write_lines
from tests.data.tiny_tokenizers import make_tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
SHOWN = json.dumps(TOOLS)
TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Second answer."},
]
SHAREGPT = [{"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in TURNS]

IN_FRONT = "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
#: Looks into each tool by itself: whether transformers looks into them too depends on its version.
INTO_DEPTH = (
    "{% macro look(x) %}{% if x.a is mapping %}{{ look(x.a) }}{% endif %}{% endmacro %}"
    "{% for tool in tools or [] %}{{ look(tool) }}{% endfor %}"
) + IN_FRONT
#: Tools stand before the last question, as Mistral's do, so that no earlier part of a conversation is a prefix of it.
LATE = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for message in messages %}{% if tools and loop.index0 == ns.last %}"
    "{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
) + tt.CHATML.removeprefix("{% for message in messages %}")
#: Shows the tools in the system message alone.
WITHIN_SYSTEM = tt.CHATML.replace(
    "message['content'] +",
    "message['content'] + (tools | tojson if tools and message['role'] == 'system' else '') +",
)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (IN_FRONT + tt.CHATML, "<|im_end|>"),
        (IN_FRONT + tt.CHATML_MARKED, "<|im_end|>"),
        (IN_FRONT + tt.CHATML_MARKED_SHORT, "<|im_end|>"),
        (IN_FRONT + tt.QWEN3, "<|im_end|>"),
        (IN_FRONT + tt.LLAMA3, "<|eot_id|>"),
        (LATE, "<|im_end|>"),
    ],
    ids=["chatml", "marked", "marked without the end of turn", "qwen3", "llama 3", "before the last question"],
)
def test_tools_are_shown_to_the_model_and_only_answers_are_trained(template: str, end: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template)
    lines = [{"messages": TURNS, "tools": TOOLS}, {"messages": TURNS, "tools": SHOWN}, {"messages": TURNS}]
    dataset, report, notices = load(write_lines(tmp_path, *lines), tokenizer)
    for index in range(3):
        assert (SHOWN in whole_text(dataset, tokenizer, index)) == (index < 2)
        first, second = trained_runs(dataset, tokenizer, index)
        assert first == f"First answer.{end}"
        assert second.removeprefix("<think>\n\n</think>\n\n") == f"Second answer.{end}"
    assert report.unlocated_turns == 0 and notices == []
    assert dataset.example(0)[0].tolist() == dataset.example(1)[0].tolist()


def test_the_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(IN_FRONT + tt.CHATML)
    dataset, _, _ = load(write_lines(tmp_path, {"messages": TURNS, "tools": TOOLS}), tokenizer)
    expected: Any = tokenizer.apply_chat_template(TURNS, tools=TOOLS, return_dict=True)  # type: ignore[arg-type]
    tokens = dataset.example(0)[0].tolist()
    assert tokens == expected["input_ids"][: len(tokens)] and len(tokens) >= len(expected["input_ids"]) - 1


@pytest.mark.parametrize(
    "line",
    [
        {"messages": TURNS, "tools": TOOLS, "system": "Be brief."},
        {"conversations": SHAREGPT, "tools": TOOLS, "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT], "tools": TOOLS, "system": "Be brief."},
        {"prompt": [{"role": "system", "content": "Be brief."}, *TURNS[:3]], "completion": TURNS[3:], "tools": TOOLS},
    ],
    ids=["messages", "conversations", "system twice", "prompt and completion"],
)
def test_every_format_with_messages_takes_them(line: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = make_tokenizer(IN_FRONT + tt.CHATML)
    dataset, _, notices = load(write_lines(tmp_path, line), tokenizer)
    assert whole_text(dataset, tokenizer).startswith(
        f"<|im_start|>system\n{SHOWN}<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<"
    )
    assert trained_runs(dataset, tokenizer)[-1] == "Second answer.<|im_end|>"
    assert notices == []


@pytest.mark.parametrize("nothing", [None, "", [], "[]", "null"])
def test_empty_fields_are_no_fields(nothing: object, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("{% if tools is not none %}{{ raise_exception('tools') }}{% endif %}" + tt.CHATML)
    system = nothing if nothing in (None, "", []) else None
    line = {"conversations": SHAREGPT, "tools": nothing, "system": system}
    dataset, _, notices = load(write_lines(tmp_path, line), tokenizer)
    assert whole_text(dataset, tokenizer).startswith("<|im_start|>user\nHello") and notices == []


WRONG = {
    "number": ({"tools": 5}, "'tools' is a JSON number, not a list of tools"),
    "false": ({"tools": False}, "'tools' is a JSON boolean, not a list of tools"),
    "object": ({"tools": {}}, "'tools' is a JSON object, not a list of tools"),
    "no JSON": ({"tools": "add, subtract"}, "the text of 'tools' is not valid JSON"),
    "object as text": ({"tools": "{}"}, "'tools' is a JSON object, not a list of tools"),
    "half a character in the text": ({"tools": '[{"name": "\\ud800"}]'}, "the text of 'tools' has half of a surrogate"),
    "deep text": ({"tools": "[" * 200_000}, "the text of 'tools' is JSON that is nested too deeply"),
    "names": ({"tools": [TOOLS[0], "add"]}, r"tools\[1\] is a JSON string, not an object"),
    "system number": ({"system": 5}, "'system' is a JSON number, not text"),
    "system object": ({"system": {"content": "a"}}, "'system' is a JSON object, not text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_fields_of_the_wrong_type_name_the_line(name: str, tmp_path: Path) -> None:
    fields, problem = WRONG[name]
    path = write_lines(tmp_path, {"conversations": SHAREGPT}, {"conversations": SHAREGPT, **fields})
    with pytest.raises(DataError, match=f"line 2: {problem}"):
        load(path, make_tokenizer(IN_FRONT + tt.CHATML))
    assert load(path, make_tokenizer(), skip_bad_lines=True)[1].bad_lines == 1


def test_two_system_messages_that_differ_are_refused(tmp_path: Path) -> None:
    line = {"conversations": [{"from": "system", "value": "Be long."}, *SHAREGPT], "system": "Be brief."}
    with pytest.raises(DataError, match=r"line 1: .*'system' and begins with a system message"):
        load(write_lines(tmp_path, line), make_tokenizer())


def test_a_system_text_that_the_template_refuses_joins_the_first_question_and_tools_stay(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tt.GEMMA.replace("{{ bos_token }}", "{{ bos_token }}{{ tools | tojson }}"))
    line = {"conversations": SHAREGPT, "system": "Be brief.", "tools": TOOLS}
    dataset, report, _ = load(write_lines(tmp_path, line), tokenizer)
    assert f"<s>{SHOWN}<start_of_turn>user\nBe brief.\n\nHello<" in whole_text(dataset, tokenizer)
    assert report.system_merged == 1
    assert trained_runs(dataset, tokenizer) == ["First answer.<end_of_turn>", "Second answer.<end_of_turn>"]


@pytest.mark.parametrize(("template", "what"), [(tt.CHATML, "the chat template"), (None, "the plain template")])
def test_tools_that_are_not_shown_are_told_once(template: str | None, what: str, tmp_path: Path) -> None:
    lines = [{"messages": TURNS, "tools": TOOLS}] * 3 + [{"messages": TURNS}]
    _, report, notices = load(write_lines(tmp_path, *lines), make_tokenizer(template))
    (told,) = [text for text in notices if "tools" in text]
    assert told.startswith(f"data.jsonl: {what} does not show tools; those of 3 conversations")
    assert report.tools_not_shown == 3
    _, _, notices = load(write_lines(tmp_path, lines[-1]), make_tokenizer(template))
    assert not any("tools" in text for text in notices)


def test_a_template_that_shows_tools_in_the_system_message_alone_is_known_to_show_them() -> None:
    assert ChatTemplate(make_tokenizer(WITHIN_SYSTEM)).shows_tools
    assert not ChatTemplate(make_tokenizer(tt.GEMMA)).shows_tools


def test_a_tokenizer_with_a_template_for_tools_uses_it_where_there_are_some(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": tt.CHATML, "tool_use": "{{ tools | tojson }}" + tt.LLAMA3}
    lines = [{"messages": TURNS}, {"messages": TURNS, "tools": TOOLS}]
    dataset, _, notices = load(write_lines(tmp_path, *lines), tokenizer)
    assert trained_runs(dataset, tokenizer, 0) == ["First answer.<|im_end|>", "Second answer.<|im_end|>"]
    assert whole_text(dataset, tokenizer, 1).startswith(SHOWN)
    assert trained_runs(dataset, tokenizer, 1) == ["First answer.<|eot_id|>", "Second answer.<|eot_id|>"]
    assert notices == []


def test_what_a_template_makes_of_tools_has_the_same_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}PUT{% endfor %}{% endfor %}"
    for put, problem in (("{{ 'aaaaaaaa' }}", "makes more than"), ("{% if i %}{% endif %}", "ran for")):
        monkeypatch.setattr(template_limits, "MOST_SECONDS", 30 if put.startswith("{{") else 0.2)
        monkeypatch.setattr(template_limits, "MOST_CHARACTERS", 100_000)
        endless = "{% if tools and tools[0]['name'] == 'endless' %}" + loop.replace("PUT", put) + "{% endif %}"
        for template in (endless + tt.CHATML, {"default": tt.CHATML, "tool_use": endless + tt.CHATML}):
            tokenizer = make_tokenizer()
            tokenizer.chat_template = template
            with pytest.raises(ModelError, match=problem):
                load(write_lines(tmp_path, {"messages": TURNS, "tools": [{"name": "endless"}]}), tokenizer)


@pytest.fixture
def default_recursion_limit() -> Iterator[None]:
    """Python's own; libraries raise it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


def test_tools_nested_too_deeply_for_a_template_are_refused(tmp_path: Path, default_recursion_limit: None) -> None:
    tool: Any = {}
    for _ in range(900):
        tool = {"a": tool}
    path = write_lines(tmp_path, {"messages": TURNS}, {"messages": TURNS, "tools": [{"name": "f", "a": tool}]})
    with pytest.raises(DataError, match="line 2: the chat template refuses the conversation"):
        load(path, make_tokenizer(INTO_DEPTH + tt.CHATML))
