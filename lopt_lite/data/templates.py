"""Conversations to text by the tokenizer's chat template, or by a plain one where it has none.

The plain template, for base models, is (with the tokenizer's end-of-sequence token for ``EOS``)::

    SYSTEM TEXT

    ### Instruction:
    USER TEXT

    ### Response:
    ASSISTANT TEXT EOS

with one ``### Instruction:`` / ``### Response:`` pair for each turn, ``### Tool:`` for a tool's result, and the
beginning-of-sequence token in front if the tokenizer puts one there by itself. With a chat template, such a token is
there if and only if the template writes it, as in transformers.

Templates come from strangers; transformers renders them in a sandbox, and here their time and text are limited.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from lopt_lite.data.formats import Message, Tool
from lopt_lite.data.template_limits import limit_text, limited_time
from lopt_lite.data.tokenization import default_bos, encode_batch, token_range
from lopt_lite.data.turn_by_turn import is_turn_by_turn, render_turn_by_turn
from lopt_lite.errors import ModelError
from lopt_lite.text import one_line

_PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['tool_calls'] -%}"
    "{{- raise_exception('the tokenizer has no chat template, and the plain one cannot express tool calls') -}}"
    "{%- elif message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}"
    "{%- elif message['role'] == 'tool' -%}{{- '### Tool:\\n' + message['content'] + '\\n\\n' -}}"
    "{%- else -%}{{- '### Response:\\n' -}}"
    "{%- generation -%}{{- message['content'] + (eos_token or '') -}}{%- endgeneration -%}{{- '\\n\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}"
)

#: Put before a template that prints today's date: tokens must not change when a run is resumed tomorrow.
_PINNED_DATE = (
    "{% macro strftime_now(format) %}"
    "{{ format|replace('%-d','1')|replace('%d','01')|replace('%B','January')|replace('%b','Jan')|replace('%-m','1')"
    "|replace('%m','01')|replace('%Y','2025')|replace('%y','25')|replace('%A','Wednesday')|replace('%a','Wed')"
    "|replace('%H','00')|replace('%M','00')|replace('%S','00') }}"
    "{% endmacro %}\n"
)

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

#: What a template may raise on messages it was not written for: its own refusal, or Python's operators inside it.
#: RecursionError: messages and tools may hold lists within lists.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)

#: What a template is asked to show, to find out whether it shows tools at all.
_PROBED_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Nothing.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}

#: What every template is asked to render first: if it cannot be rendered in time, nothing can.
_PROBE: tuple[Message, ...] = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"})

Span = tuple[int, int]


class TemplateRefusedError(Exception):
    """The template cannot render these messages; the text is the template's reason. Caught in this room."""


class ChatTemplate:
    """How one tokenizer writes conversations.

    Attributes
    ----------
    source:
        The template in use, as Jinja text.
    is_plain:
        Whether it is the plain one of this module.
    has_generation_marks:
        Whether it says itself what is an answer (``{% generation %}``).
    pins_date:
        Whether it prints the date; it is then always given 1 January 2025.
    end_of_turn_id:
        The control token after an answer, None if there is none.
    appends_eos:
        Whether the template ends an answer without a control token, so that the end-of-sequence token is to be
        added after the last one; without that, a model never learns to stop.

    Parameters
    ----------
    for_tools:
        Take the template that the tokenizer has for conversations with tools, if it has one of its own for them.

    Raises
    ------
    ModelError
        The tokenizer's template is not valid Jinja, takes too long or puts out too much, or it has several and none is
        the default.
    """

    def __init__(self, tokenizer: Any, *, for_tools: bool = False) -> None:
        self.tokenizer = tokenizer
        self.is_plain = not tokenizer.chat_template
        if self.is_plain:
            self.source = ("{{- bos_token -}}" if default_bos(tokenizer) else "") + _PLAIN_TEMPLATE
        else:
            try:
                self.source = tokenizer.get_chat_template(tools=[] if for_tools else None)
            except ValueError as error:
                raise ModelError(
                    f"the tokenizer's chat template cannot be chosen: {error}",
                    fix="give it one template named 'default' in chat_template.jinja or tokenizer_config.json",
                ) from error
        self.pins_date = "strftime_now" in self.source
        if self.pins_date:
            self.source = _PINNED_DATE + self.source
        self.has_generation_marks = _GENERATION_MARK.search(self.source) is not None
        self._control_ids = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()
        }
        self.is_blank = functools.lru_cache(maxsize=None)(self._is_blank)
        self.end_of_turn_id: int | None = None
        self.appends_eos = False
        self._find_end_of_turn()

    @functools.cached_property
    def with_tools(self) -> ChatTemplate:
        """The template for conversations with tools: this one, unless the tokenizer has another for them."""
        own = self.tokenizer.chat_template
        return ChatTemplate(self.tokenizer, for_tools=True) if isinstance(own, dict) and "tool_use" in own else self

    @functools.cached_property
    def shows_tools(self) -> bool:
        """Whether a conversation's tools change its text."""
        user: Message = {"role": "user", "content": "Hello"}
        system: Message = {"role": "system", "content": "Be kind."}
        shown = []
        for probe in ([user], [system, user]):
            with contextlib.suppress(TemplateRefusedError):
                shown.append(self.render(probe, tools=[_PROBED_TOOL]) != self.render(probe))
        # One that refuses all of this says so when it is given the conversations themselves.
        return any(shown) or not shown

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> str:
        """The text of ``messages`` (at least one).

        With ``continue_final_message`` the last one is the beginning of an answer, and the text ends where it ends.

        Raises
        ------
        TemplateRefusedError
            The template cannot express them.
        """
        try:
            with limited_time():
                return self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    chat_template=self.source,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                )
        except _TEMPLATE_ERRORS as error:
            raise TemplateRefusedError(one_line(str(error))) from error

    def render_with_marks(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> tuple[str, list[Span]]:
        """The text of ``messages``, and the character ranges that the template marks as generated.

        Raises
        ------
        TemplateRefusedError
            The template cannot express them.
        """
        try:
            with limited_time():
                texts, spans = render_jinja_template(
                    conversations=[list(messages)],
                    tools=list(tools) or None,
                    chat_template=self.source,
                    return_assistant_tokens_mask=True,
                    **self.tokenizer.special_tokens_map,
                )
        except _TEMPLATE_ERRORS as error:
            raise TemplateRefusedError(one_line(str(error))) from error
        return texts[0], spans[0]

    def check_limits(self, tools: Sequence[Tool]) -> None:
        """Render a short conversation with ``tools``.

        Raises
        ------
        ModelError
            The template takes too long for it, or makes too much of it.
        """
        with contextlib.suppress(TemplateRefusedError):
            self.render(_PROBE, tools=tools)

    @functools.cached_property
    def _is_turn_by_turn(self) -> bool:
        return is_turn_by_turn(self.source)

    def prefix_ends(self, messages: Sequence[Message], text: str) -> tuple[list[int], str, str] | None:
        """Where the texts of the first 0, 1, ... ``messages`` (without tools) end within ``text``, that of all of them.

        Returns
        -------
        The numbers of characters, what :meth:`render` puts after them, and what it puts there with a generation prompt
        (for at least one message). None where that cannot be known from ``text``, for each number of messages.
        """
        # Messages of other keys, and tools, are not given to the template as they are: transformers changes some.
        if not self._is_turn_by_turn or any(message.keys() != {"role", "content"} for message in messages):
            return None
        variables = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            with limited_time():
                found = render_turn_by_turn(self.source, messages, {**self.tokenizer.special_tokens_map, **variables})
            # The tokenizer may have a way of its own with templates.
            if found is None or found[0] != self.render(messages, add_generation_prompt=True):
                return None
        except (TemplateRefusedError, *_TEMPLATE_ERRORS):
            return None
        prompt_text, ends = found
        if text[: ends[-1]] != prompt_text[: ends[-1]]:
            return None
        return ends, text[ends[-1] :], prompt_text[ends[-1] :]

    def content_range(
        self, messages: Sequence[Message], turn: int, text: str, *, tools: Sequence[Tool] = ()
    ) -> Span | None:
        """Where the content of ``messages[turn]`` lies in their ``text``: what changes when the content does.

        None when the template does not show the content, or cannot be asked.
        """
        content = messages[turn]["content"]
        # A character that the content does not have, so that the first and the last character differ.
        stand_in = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in content)
        changed = [*messages[:turn], {**messages[turn], "content": stand_in}, *messages[turn + 1 :]]
        try:
            other = self.render(changed, tools=tools)
        except TemplateRefusedError:
            return None
        if other == text:
            return None
        start = common_prefix_length(text, other)
        room = min(len(text), len(other)) - start
        tail = common_prefix_length(text[: -room - 1 : -1], other[: -room - 1 : -1]) if room else 0
        return start, len(text) - tail

    def is_control(self, token_id: int) -> bool:
        """Whether a token is one of the tokenizer's special or added ones (``<|im_end|>``), not a piece of text."""
        return token_id in self._control_ids

    def _is_blank(self, token_id: int) -> bool:
        return not self.is_control(token_id) and not self.tokenizer.decode([token_id]).strip()

    def _find_end_of_turn(self) -> None:
        # Asked from the template, not looked up by name: the first control token after the content of a last answer.
        # What is wrong with the template is said by rendering with it.
        with contextlib.suppress(jinja2.TemplateError):
            limit_text(self.source)
        try:
            text = self.render(_PROBE)
        except TemplateRefusedError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                raise ModelError(
                    f"the tokenizer's chat template is not valid Jinja: {error}",
                    fix="repair chat_template.jinja (or chat_template in tokenizer_config.json)",
                ) from error
            self.end_of_turn_id = self.tokenizer.eos_token_id
            return
        self.end_of_turn_id = self.tokenizer.eos_token_id
        content = self.content_range(_PROBE, 1, text)
        if content is None:
            return
        encoded = encode_batch(self.tokenizer, [text])[0]
        _, after = token_range(self.tokenizer, encoded, *content)
        while after < len(encoded.ids) and self.is_blank(encoded.ids[after]):
            after += 1
        if after < len(encoded.ids) and self.is_control(encoded.ids[after]):
            self.end_of_turn_id = encoded.ids[after]
            return
        self.appends_eos = self.tokenizer.eos_token_id is not None


def load_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids that ask the model to answer ``prompt``: one user turn and the head of an answer, as in training.

    Raises
    ------
    ModelError
        The tokenizer's template is broken or refuses a plain user turn.
    """
    template = ChatTemplate(tokenizer)
    try:
        text = template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    except TemplateRefusedError as error:
        raise ModelError(f"the tokenizer's chat template refuses the prompt: {error}") from error
    return encode_batch(tokenizer, [text])[0].ids


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the template's end-of-turn token and the end-of-sequence token, without repeats.

    Raises
    ------
    ModelError
        The tokenizer's template is broken.
    """
    found = (ChatTemplate(tokenizer).end_of_turn_id, tokenizer.eos_token_id)
    return list(dict.fromkeys(token_id for token_id in found if token_id is not None))


def common_prefix_length(a: str, b: str) -> int:
    """How many characters two strings share at their start (bisection, so that long texts are compared quickly)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
