"""Finds the answers in a rendered conversation: which tokens are trained on.

No marker is ever searched for in text. An answer is found, in this order,

1. by the template's own generation marks,
2. by comparing renderings: the messages before the answer with a generation prompt, and the messages through the
   answer, are both prefixes of the whole conversation's text; the answer lies between their ends,
3. where a template rewrites earlier turns (as those that drop earlier reasoning do) and such a prefix breaks: by
   rendering the conversation once more with another content in that turn; the answer is what changed,

and then, on tokens, the end-of-turn token that follows is taken in, and blank text after it left out. A turn that
cannot be found so is not trained on, and counted.

Turns that are only context (of weight 0) are left out. Marks do not say whose they are: where there is such a turn,
the others are found by 2 or 3, and the marks within them are the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lopt_lite.data.formats import BadRecordError, Conversation, Message, Tool
from lopt_lite.data.templates import ChatTemplate, Span, TemplateRefusedError
from lopt_lite.data.tokenization import Encoded, token_range

#: Where a message has the tools that it calls; the second is the name that OpenAI's files had first.
_CALL_KEYS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation's text, the character ranges of its answers, and what had to be done to get them."""

    text: str
    answers: tuple[Span, ...]
    unlocated: int
    system_merged: bool


def render_conversation(template: ChatTemplate, conversation: Conversation) -> RenderedConversation:
    """Render a conversation and find its answers.

    A system message that the template refuses is put in front of the first user message.

    Raises
    ------
    TemplateRefusedError
        The template cannot express the conversation.
    BadRecordError
        The template leaves out tool calls.
    """
    try:
        return _render(template, conversation, system_merged=False)
    except TemplateRefusedError:
        merged = _merge_system(conversation)
        if merged is None:
            raise
        try:
            return _render(template, merged, system_merged=True)
        except TemplateRefusedError:
            pass  # the system message was not the reason: the first refusal is the one to tell
        raise


def answer_mask(template: ChatTemplate, encoded: Encoded, answers: Sequence[Span]) -> np.ndarray:
    """Which tokens are to be predicted: bool [tokens]. The first token never is: nothing comes before it."""
    ids = encoded.ids
    mask = np.zeros(len(ids), dtype=bool)
    for start, end in answers:
        first, last = token_range(template.tokenizer, encoded, start, end)
        # Blank text that the template puts after the end-of-turn token is not the model's to write.
        kept = last
        while kept > first and template.is_blank(ids[kept - 1]):
            kept -= 1
        if kept > first and template.is_control(ids[kept - 1]):
            last = kept
        else:
            following = last
            while following < len(ids) and template.is_blank(ids[following]):
                following += 1
            if following < len(ids) and ids[following] == template.end_of_turn_id:
                last = following + 1
        mask[first:last] = True
    mask[:1] = False
    return mask


def _render(template: ChatTemplate, conversation: Conversation, *, system_merged: bool) -> RenderedConversation:
    messages, tools, turns = conversation.messages, conversation.tools, conversation.trained_turns
    marks: list[Span] = []
    if template.has_generation_marks and conversation.first_trained == 0:
        text, marks = template.render_with_marks(messages, tools=tools)
    else:
        text = template.render(messages, tools=tools)
    _check_calls_are_shown(template, conversation, text)
    is_marked = any(start < end for start, end in marks)
    spans, unlocated = marks, 0
    if not is_marked or conversation.context:
        located = _locate(template, conversation, turns, text)
        spans = [span for span in located if span is not None]
        unlocated = len(located) - len(spans)
    if is_marked and conversation.context:
        spans = _within(marks, spans)
    if template.appends_eos and turns and turns[-1] == len(messages) - 1:
        # Tokenised, it directly follows the last answer, where answer_mask takes it in as the end of the turn.
        text += template.tokenizer.eos_token
    return RenderedConversation(text, tuple(spans), unlocated, system_merged)


def _check_calls_are_shown(template: ChatTemplate, conversation: Conversation, text: str) -> None:
    """Refuse tool calls to be learnt that the template does not show: with other ones it makes the same ``text``.

    Such a turn would be an answer that ends without its calls, often an empty one. Asked turn by turn, as there are
    templates that show calls only in a turn without other content.

    Raises
    ------
    BadRecordError
        There is such a turn.
    """
    messages = conversation.messages
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for turn in conversation.trained_turns:
        number = assistants.index(turn) + 1
        calls = [key for key in _CALL_KEYS if messages[turn].get(key)]
        if not calls:
            continue
        changed = [*messages[:turn], _with_other_calls(messages[turn], calls), *messages[turn + 1 :]]
        try:
            other = template.render(changed, tools=conversation.tools)
        except TemplateRefusedError:
            continue  # it looks at the calls
        if other == text:
            raise BadRecordError(
                f"the {'plain' if template.is_plain else 'chat'} template does not show {calls[0]!r} of assistant turn "
                f"{number}, so the model would learn to end that turn without them (bring a model whose "
                "chat_template.jinja shows them, or write them into the turn's text and leave the key out)"
            )


def _with_other_calls(message: Message, keys: Sequence[str]) -> Message:
    """The message with calls of functions of another name; without calls that name no function."""
    # Not simply without calls: some templates write a mark that there are calls, and not the calls.
    changed = {**message, **{key: _renamed(message[key]) for key in keys}}
    return {key: value for key, value in changed.items() if key not in keys or value != message[key]}


def _renamed(calls: Any) -> Any:
    """A call, or a list of calls, as ``{"name"}`` or ``{"function": {"name"}}``, with a stand-in for every name."""
    if isinstance(calls, list):
        return [_renamed(call) for call in calls]
    if not isinstance(calls, dict):
        return calls
    changes = {"name": "\ue000" if calls["name"] != "\ue000" else "\ue001"} if "name" in calls else {}
    if "function" in calls:
        changes["function"] = _renamed(calls["function"])
    return {**calls, **changes}


def _within(marks: Sequence[Span], turns: Sequence[Span]) -> list[Span]:
    """The marks that share characters with one of the turns, and empty marks that lie in one or at its border."""
    return [
        (first, last)
        for first, last in marks
        if any((start < last and first < end) or start <= first == last <= end for start, end in turns)
    ]


def _locate(template: ChatTemplate, conversation: Conversation, turns: Sequence[int], text: str) -> list[Span | None]:
    located: list[Span | None] = []
    floor = 0
    for turn in turns:
        span = _locate_turn(template, conversation, turn, text)
        if span is not None and span[0] >= floor:
            floor = span[1]
            located.append(span)
        else:
            located.append(None)
    return located


def _locate_turn(template: ChatTemplate, conversation: Conversation, turn: int, text: str) -> Span | None:
    messages, tools = conversation.messages, conversation.tools
    prefix_length = partial(_prefix_length, template, tools=tools, text=text)
    start = prefix_length(messages[:turn], add_generation_prompt=True) if turn else None
    is_last = turn == len(messages) - 1
    end = len(text) if is_last else prefix_length(messages[: turn + 1], add_generation_prompt=False)
    if start is not None and end is not None and start <= end:
        return start, end
    content = template.content_range(messages, turn, text, tools=tools)
    if content is None:
        return None
    first = content[0] if start is None else min(start, content[0])
    last = content[1] if end is None else max(end, content[1])
    return first, last


def _prefix_length(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool],
    text: str,
    add_generation_prompt: bool,
) -> int | None:
    try:
        prefix = template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
    except TemplateRefusedError:
        return None
    return len(prefix) if text.startswith(prefix) else None


def _merge_system(conversation: Conversation) -> Conversation | None:
    messages = conversation.messages
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    user = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return replace(
        conversation,
        messages=(user, *messages[2:]),
        first_trained=max(0, conversation.first_trained - 1),
        context=frozenset(turn - 1 for turn in conversation.context),
    )
