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

Each rendering in 2 and 3 takes the longer the longer the conversation is, and there are as many as turns: what may be
spent on one conversation is limited (:class:`_Effort`).
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lopt_lite.data.formats import BadRecordError, Conversation, Message
from lopt_lite.data.template_limits import TemplateLimitError
from lopt_lite.data.templates import ChatTemplate, Span, TemplateRefusedError
from lopt_lite.data.tokenization import Encoded, token_range

#: Where a message has the tools that it calls; the second is the name that OpenAI's files had first.
_CALL_KEYS = ("tool_calls", "function_call")

#: How many messages may be rendered to find the answers of one conversation, each counted as often as it is rendered:
#: enough for 700 pairs of turns, which take some 15 seconds. A count, as it is the same on every machine.
_MOST_RENDERED = 2**20
#: For templates that take far longer for a message than others do.
_MOST_SECONDS = 120
#: With so many answers at most, comparing renderings is no slower than what spares it.
_FEW_ANSWERS = 2

#: How much of the conversation's text its first messages (their number) make, with or without a generation prompt; None
#: if what they make is not the beginning of that text.
PrefixLength = Callable[[int, bool], int | None]


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation's text, the character ranges of its answers, and what had to be done to get them."""

    text: str
    answers: tuple[Span, ...]
    unlocated: int
    system_merged: bool


class _Effort:
    """What has been spent on one conversation; asked before each rendering of it."""

    def __init__(self, conversation: Conversation, check: Callable[[], None]) -> None:
        self._answers, self._messages = len(conversation.trained_turns), len(conversation.messages)
        self._check = check
        self._left = _MOST_RENDERED
        self._started_s = time.monotonic()

    def reserve(self, count: int) -> None:
        """Take so many messages to be rendered off what may be spent, before the first of them.

        Raises
        ------
        BadRecordError
            There is not so much left.
        """
        self._left -= count
        if self._left < 0:
            raise BadRecordError(
                f"the conversation has {self._answers:,} answers among {self._messages:,} messages, and the chat "
                f"template would have to render {_MOST_RENDERED - self._left:,} messages to find them, the first ones "
                f"again with every answer; at most {_MOST_RENDERED:,} can be rendered (split the conversation into "
                "shorter ones)"
            )

    def begin(self) -> None:
        """Before a rendering.

        Raises
        ------
        BadRecordError
            Those before it took too long.
        """
        self._check()
        if time.monotonic() - self._started_s > _MOST_SECONDS:
            raise BadRecordError(
                f"the conversation has {self._answers:,} answers among {self._messages:,} messages, and to find them "
                f"the chat template ran for more than {_MOST_SECONDS} seconds, which is the most for one line (split "
                "the conversation into shorter ones)"
            )


def render_conversation(
    template: ChatTemplate,
    conversation: Conversation,
    *,
    most_characters: int | None = None,
    limit: str = "",
    check: Callable[[], None] = lambda: None,
) -> RenderedConversation:
    """Render a conversation and find its answers.

    A system message that the template refuses is put in front of the first user message.

    Parameters
    ----------
    most_characters:
        Most characters of its text, None for any number.
    limit:
        What sets ``most_characters``, for messages.
    check:
        Called before each rendering; may raise to stop.

    Raises
    ------
    TemplateRefusedError
        The template cannot express the conversation.
    BadRecordError
        The template leaves out tool calls, or the conversation is too long for it, or for ``most_characters``.
    ModelError
        The template takes too long for a short conversation as well, or makes too much of it.
    """
    effort = _Effort(conversation, check)
    render = partial(_render, template, effort=effort, most_characters=most_characters, limit=limit)
    try:
        try:
            return render(conversation, system_merged=False)
        except TemplateRefusedError:
            merged = _merge_system(conversation)
            if merged is None:
                raise
            try:
                return render(merged, system_merged=True)
            except TemplateRefusedError:
                pass  # the system message was not the reason: the first refusal is the one to tell
            raise
    except TemplateLimitError as error:
        # A short conversation was rendered in time when the template was looked at, but without a tool.
        if conversation.tools:
            template.check_limits(conversation.tools[:1])
        raise BadRecordError(
            f"{error.found}, which is the most for one rendering; this one has {len(conversation.messages):,} "
            "messages, and a short one was within that (split it into shorter ones, or bring a model with another chat "
            "template)"
        ) from error


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


def _render(
    template: ChatTemplate,
    conversation: Conversation,
    *,
    system_merged: bool,
    effort: _Effort,
    most_characters: int | None,
    limit: str,
) -> RenderedConversation:
    messages, tools, turns = conversation.messages, conversation.tools, conversation.trained_turns
    marks: list[Span] = []
    effort.begin()
    if template.has_generation_marks and conversation.first_trained == 0:
        text, marks = template.render_with_marks(messages, tools=tools)
    else:
        text = template.render(messages, tools=tools)
    appended = ""
    if template.appends_eos and turns and turns[-1] == len(messages) - 1:
        # Tokenised, it directly follows the last answer, where answer_mask takes it in as the end of the turn.
        appended = template.tokenizer.eos_token
    length = len(text) + len(appended)
    # Before the answers are looked for, which takes far longer.
    if most_characters is not None and length > most_characters:
        raise BadRecordError(
            f"the conversation has {length:,} characters; at most {most_characters:,} can be used ({limit})"
        )
    _check_calls_are_shown(template, conversation, text, effort)
    is_marked = any(start < end for start, end in marks)
    spans, unlocated = marks, 0
    if not is_marked or conversation.context:
        located = _locate(template, conversation, turns, text, effort)
        spans = [span for span in located if span is not None]
        unlocated = len(located) - len(spans)
    if is_marked and conversation.context:
        spans = _within(marks, spans)
    return RenderedConversation(text + appended, tuple(spans), unlocated, system_merged)


def _check_calls_are_shown(template: ChatTemplate, conversation: Conversation, text: str, effort: _Effort) -> None:
    """Refuse tool calls to be learnt that the template does not show: with other ones it makes the same ``text``.

    Such a turn would be an answer that ends without its calls, often an empty one. Asked turn by turn, as there are
    templates that show calls only in a turn without other content.

    Raises
    ------
    BadRecordError
        There is such a turn, or there are too many turns with calls.
    """
    messages = conversation.messages
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    number_of = {turn: number for number, turn in enumerate(assistants, start=1)}
    with_calls = [turn for turn in conversation.trained_turns if any(messages[turn].get(key) for key in _CALL_KEYS)]
    effort.reserve(len(with_calls) * len(messages))
    for turn in with_calls:
        calls = [key for key in _CALL_KEYS if messages[turn].get(key)]
        changed = [*messages[:turn], _with_other_calls(messages[turn], calls), *messages[turn + 1 :]]
        effort.begin()
        try:
            other = template.render(changed, tools=conversation.tools)
        except TemplateRefusedError:
            continue  # it looks at the calls
        if other == text:
            raise BadRecordError(
                f"the {'plain' if template.is_plain else 'chat'} template does not show {calls[0]!r} of assistant turn "
                f"{number_of[turn]}, so the model would learn to end that turn without them (bring a model whose "
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
    """The marks that share characters with one of the turns, and empty marks that lie in one or at its border.

    ``turns`` are in order, and none begins before the one before it ends.
    """
    ends = [end for _, end in turns]
    kept = []
    for first, last in marks:
        # The turns that end before the mark, and those that begin after it, are many.
        for i in range(bisect.bisect_left(ends, first), len(turns)):
            start, end = turns[i]
            if start > last:
                break
            if (start < last and first < end) or start <= first == last <= end:
                kept.append((first, last))
                break
    return kept


def _locate(
    template: ChatTemplate, conversation: Conversation, turns: Sequence[int], text: str, effort: _Effort
) -> list[Span | None]:
    located: list[Span | None] = []
    floor = 0
    prefix_length = _prefix_lengths(template, conversation, turns, text, effort)
    for turn in turns:
        span = _locate_turn(template, conversation, turn, text, prefix_length, effort)
        if span is not None and span[0] >= floor:
            floor = span[1]
            located.append(span)
        else:
            located.append(None)
    return located


def _locate_turn(
    template: ChatTemplate,
    conversation: Conversation,
    turn: int,
    text: str,
    prefix_length: PrefixLength,
    effort: _Effort,
) -> Span | None:
    messages = conversation.messages
    start = prefix_length(turn, True) if turn else None
    is_last = turn == len(messages) - 1
    end = len(text) if is_last else prefix_length(turn + 1, False)
    if start is not None and end is not None and start <= end:
        return start, end
    effort.reserve(len(messages))
    effort.begin()
    content = template.content_range(messages, turn, text, tools=conversation.tools)
    if content is None:
        return None
    first = content[0] if start is None else min(start, content[0])
    last = content[1] if end is None else max(end, content[1])
    return first, last


def _prefix_lengths(
    template: ChatTemplate, conversation: Conversation, turns: Sequence[int], text: str, effort: _Effort
) -> PrefixLength:
    """How to find out how much of ``text`` the messages before and through each of ``turns`` make."""
    if len(turns) > _FEW_ANSWERS and not conversation.tools:
        effort.begin()
        known = template.prefix_ends(conversation.messages, text)
        if known is not None:
            ends, closing, prompt = known

            def known_length(count: int, add_generation_prompt: bool) -> int | None:
                added = prompt if add_generation_prompt else closing
                return ends[count] + len(added) if text.startswith(added, ends[count]) else None

            return known_length

    effort.reserve(sum(turn + turn + 1 for turn in turns))

    def rendered_length(count: int, add_generation_prompt: bool) -> int | None:
        effort.begin()
        try:
            prefix = template.render(
                conversation.messages[:count],
                tools=conversation.tools,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateRefusedError:
            return None
        return len(prefix) if text.startswith(prefix) else None

    return rendered_length


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
