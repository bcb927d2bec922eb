"""The answers' places found from one rendering are those found by rendering every beginning of the conversation."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lopt_lite.data import answers, turn_by_turn
from lopt_lite.data.answers import RenderedConversation, render_conversation
from lopt_lite.data.formats import BadRecordError, Conversation
from lopt_lite.data.templates import ChatTemplate, TemplateRefusedError
from lopt_lite.data.turn_by_turn import is_turn_by_turn
from tests.data import tiny_tokenizers as tt
from tests.data.tiny_tokenizers import make_tokenizer

_LOOP = "{% for message in messages %}"
_TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
_END = "{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

#: Everything of them is known to look at nothing that comes later.
TURN_BY_TURN = {
    "chatml": tt.CHATML,
    "chatml with a default system message": tt.CHATML_WITH_DEFAULT_SYSTEM,
    "marked": tt.CHATML_MARKED,
    "marked without the end of turn": tt.CHATML_MARKED_SHORT,
    "llama 3": tt.LLAMA3,
    "gemma": tt.GEMMA,
    "llama 2": tt.LLAMA2,
    "plain": None,
    "dated": tt.DATED,
    "a prompt that no answer begins with": tt.CHATML.replace("assistant\n' }}{% e", "assistant\n<think>\n' }}{% e"),
    "a closing that only the last turn has": _LOOP + _TURN + _END + "{{ '<|im_end|>' }}" + _PROMPT,
    "turns that remember earlier ones": (
        "{% set ns = namespace(n=0) %}"
        + _LOOP
        + "{% if message['role'] == 'user' %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endif %}"
        + _TURN
        + _END
        + _PROMPT
    ),
    "a macro and loops of its own": (
        "{% macro words(text) %}{% for word in text.split(' ') %}{{ word }}{% if not loop.last %}{{ '_' }}{% endif %}"
        "{% endfor %}{% endmacro %}"
        + _LOOP
        + "{% if loop.index0 > 0 %}{{ '~' }}{% endif %}{{ message['role'] ~ ': ' }}{{ words(message['content']) }}"
        + _END
        + "{% if add_generation_prompt is defined and add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "turns that are left out": (
        _LOOP + "{% if message['content'] == '' %}{% continue %}{% endif %}" + _TURN + _END + _PROMPT
    ),
    "lines and blanks": (
        "{% for message in messages %}\n    {% if message['role'] == 'user' %}\n{{ message['content'] }}\n"
        "    {%- else -%}\n  {{ message['content'] }}</s>\n {% endif %}\n{% endfor %}\n"
    ),
}

#: The beginnings of a conversation may not be beginnings of its text, or nobody has shown that they are.
OTHERS = {
    "bare": tt.BARE,
    "qwen 3": tt.QWEN3,
    "qwen 3 thinking": tt.QWEN3_THINKING,
    "the last turn, by its name": _LOOP + "{% if loop['last'] %}{{ '!' }}{% endif %}" + _TURN + _END + _PROMPT,
    "the last turn, by the loop itself": (
        _LOOP + "{% set outer = loop %}{% if outer.last %}{{ '!' }}{% endif %}" + _TURN + _END + _PROMPT
    ),
    "the next turn": _LOOP + _TURN + "{{ (loop.nextitem or {'role': ''})['role'] }}" + _END + _PROMPT,
    "turns left": _LOOP + "{{ loop.revindex }}" + _TURN + _END + _PROMPT,
    "the number of messages": _LOOP + "{{ messages | length }}" + _TURN + _END + _PROMPT,
    "the last message": "{{ messages[-1]['role'] }}" + _LOOP + _TURN + _END + _PROMPT,
    "the second message": "{{ messages[1]['role'] if messages[1] is defined }}" + _LOOP + _TURN + _END + _PROMPT,
    "the message after this one": (
        _LOOP + _TURN + "{{ messages[loop.index]['role'] if loop.index < 5 and messages[loop.index] }}" + _END + _PROMPT
    ),
    "all messages but the first": "{% for message in messages[1:] %}" + _TURN + _END + _PROMPT,
    "messages by another name": "{% set all = messages %}{% for message in all %}" + _TURN + _END + _PROMPT,
    "two loops": _LOOP + "{{ message['role'][0] }}" + _END + _LOOP + _TURN + _END + _PROMPT,
    "a loop within the loop": _LOOP + "{% for m in messages %}{{ '.' }}{% endfor %}" + _TURN + _END + _PROMPT,
    "a loop in a condition": "{% if messages %}" + _LOOP + _TURN + _END + "{% endif %}" + _PROMPT,
    "a filtered loop": (
        "{% for message in messages if message['role'] != 'system' %}" + _TURN + "{% else %}{{ 'none' }}" + _END
    ),
    "a loop that is left": (
        _LOOP + "{% if message['content'] == 'Stop' %}{% break %}{% endif %}" + _TURN + _END + _PROMPT
    ),
    "the prompt within the turns": (
        _LOOP + _TURN + "{% if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}" + _END
    ),
    "turns that follow from the prompt": _LOOP + "{{ add_generation_prompt }}" + _TURN + _END + _PROMPT,
    "a closing that remembers": (
        "{% set ns = namespace(last='') %}"
        + _LOOP
        + _TURN
        + "{% set ns.last = message['content'] %}"
        + _END
        + "{{ ns.last }}"
        + _PROMPT
    ),
    "a closing that looks back": _LOOP + _TURN + _END + "{{ messages[0]['content'] }}" + _PROMPT,
    "messages that are changed": ("{% set messages = messages[:4] %}" + _LOOP + _TURN + _END + _PROMPT),
    "turns taken by turns": (
        "{% set marks = cycler('a', 'b') %}" + _LOOP + "{{ marks.next() }}" + _TURN + _END + _PROMPT
    ),
    "chance": _LOOP + "{{ [1, 1] | random }}" + _TURN + _END + _PROMPT,
}


def conversations(count: int = 25) -> list[Conversation]:
    """Of many shapes; some contents look like parts of other turns, or are empty."""
    draw = random.Random(0)
    contents = [
        "",
        " ",
        "a",
        "Stop",
        "assistant",
        "<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<think>\nhm\n</think>\n\nYes",
    ]
    made = []
    for i in range(count):
        roles = ["user", "assistant"] * draw.randrange(2, 8)
        if i % 3 == 1:
            roles = [draw.choice(["user", "assistant", "assistant", "tool"]) for _ in roles]
        if i % 4 == 2:
            roles = ["system", *roles]
        if i % 5 == 3:
            roles = roles[1:]
        messages = tuple(
            {"role": role, "content": draw.choice(contents) + draw.choice(["", "b", " c "])} for role in roles
        )
        context = frozenset(t for t, role in enumerate(roles) if role == "assistant" and i % 2 and draw.random() < 0.3)
        made.append(Conversation(messages, first_trained=draw.choice([0, 0, 3]), context=context))
    return made


def outcome(template: ChatTemplate, conversation: Conversation) -> RenderedConversation | str:
    """The rendered conversation, or why there is none."""
    try:
        return render_conversation(template, conversation)
    except (BadRecordError, TemplateRefusedError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("template", [*TURN_BY_TURN.values(), *OTHERS.values()], ids=[*TURN_BY_TURN, *OTHERS])
def test_the_places_are_those_of_the_plain_way(template: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    used = ChatTemplate(make_tokenizer(template))
    monkeypatch.setattr(answers, "_FEW_ANSWERS", 0)
    fast = [outcome(used, conversation) for conversation in conversations()]
    with monkeypatch.context() as plain:
        plain.setattr(ChatTemplate, "prefix_ends", lambda *_: None)
        slow = [outcome(used, conversation) for conversation in conversations()]
    assert fast == slow
    assert any(isinstance(one, RenderedConversation) and one.answers for one in fast)


@pytest.mark.parametrize("name", TURN_BY_TURN)
def test_all_beginnings_follow_from_one_rendering(name: str) -> None:
    template = ChatTemplate(make_tokenizer(TURN_BY_TURN[name]))
    assert is_turn_by_turn(template.source)
    pairs: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}] * 4
    found = template.prefix_ends(pairs, template.render(pairs))
    assert found is not None
    ends, closing, prompt = found
    for count in range(1, len(pairs) + 1):
        begun = template.render(pairs)[: ends[count]]
        assert template.render(pairs[:count]) == begun + closing
        assert template.render(pairs[:count], add_generation_prompt=True) == begun + prompt


@pytest.mark.parametrize("name", OTHERS)
def test_templates_that_may_look_ahead_are_rendered_again_for_each_turn(name: str) -> None:
    assert not is_turn_by_turn(ChatTemplate(make_tokenizer(OTHERS[name])).source)


def test_other_keys_than_role_and_content_are_not_given_to_a_template_as_they_are() -> None:
    """transformers gives reasoning two more names."""
    template = ChatTemplate(make_tokenizer(tt.CHATML))
    pairs: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3
    assert template.prefix_ends(pairs, template.render(pairs)) is not None
    pairs[1] = {**pairs[1], "reasoning": "hm"}
    assert template.prefix_ends(pairs, template.render(pairs)) is None


def test_a_tokenizer_with_its_own_way_with_templates_is_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(tt.CHATML)
    template = ChatTemplate(tokenizer)
    pairs: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3
    ours = type(tokenizer).apply_chat_template

    def apply(self: Any, *arguments: Any, **options: Any) -> str:
        return str(ours(self, *arguments, **options)) + "more" * options["add_generation_prompt"]

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", apply)
    assert template.prefix_ends(pairs, template.render(pairs)) is None


def test_without_the_compiled_template_nothing_is_known_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_by_turn, "compiled_template", lambda source: None)
    assert not is_turn_by_turn(tt.CHATML)
