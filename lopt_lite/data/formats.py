"""The shapes a line of data may have, and how each becomes a conversation.

================================  ==========================================================
keys of the line                  meaning
================================  ==========================================================
``messages``                      list of ``{"role", "content"}``; roles system, user, assistant, tool
``conversations``                 list of ``{"from", "value"}``; from: system, human, gpt, tool, ...
``prompt``, ``completion``        two strings, or two lists as in ``messages``
``instruction``, ``output``       with an optional ``input``, appended to the instruction after an empty line
``question``, ``answer``          strings
``query``, ``response``           strings
``problem``, ``solution``         strings
``text``                          plain text; every token is trained on
================================  ==========================================================

The first shape of this table whose keys a line has is the line's. Beside ``messages`` and ``conversations`` a line may
have ``tools`` (a list of objects, or its text as JSON), which go to the chat template, and ``system`` (text), which
becomes the first message; lists of ``prompt`` and ``completion`` may have ``tools``. Other keys are ignored.

A message may have ``weight``, as in OpenAI's files for fine-tuning: an assistant's turn of weight 0 is context and not
learnt; 1 is the default, and there is no other. Messages of other roles are never learnt, whatever their weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lopt_lite.data.json_lines import json_type, parse_json

Message = dict[str, Any]
Tool = dict[str, Any]

#: Names that data files use for the four roles a template knows.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}


class BadRecordError(Exception):
    """A line's content cannot be used; the text says why and is caught in this room."""


@dataclass(frozen=True)
class Conversation:
    """Messages with roles system, user, assistant or tool; assistant turns from ``first_trained`` on are trained.

    ``tools`` are descriptions of what the assistant may call, as the chat template wants them. ``context`` has the
    indices of assistant turns that are not trained although others after ``first_trained`` are.
    """

    messages: tuple[Message, ...]
    first_trained: int = 0
    tools: tuple[Tool, ...] = ()
    context: frozenset[int] = frozenset()

    @property
    def trained_turns(self) -> list[int]:
        """Indices of the messages that are trained."""
        turns = (i for i, m in enumerate(self.messages) if m["role"] == "assistant")
        return [i for i in turns if i >= self.first_trained and i not in self.context]


@dataclass(frozen=True)
class PlainText:
    """Text without roles, trained on as a whole."""

    text: str


Example = Conversation | PlainText


@dataclass(frozen=True)
class Format:
    """One row of the table above."""

    name: str
    keys: tuple[str, ...]
    parse: Callable[[dict[str, Any]], Example]


def detect_format(record: dict[str, Any]) -> Format | None:
    """The format whose keys ``record`` has, or None."""
    return next((known for known in FORMATS if has_keys(record, known)), None)


def has_keys(record: dict[str, Any], known: Format) -> bool:
    """Whether ``record`` has all keys that ``known`` asks for."""
    return all(key in record for key in known.keys)


def describe_formats() -> str:
    """All formats in one line, for messages."""
    return "; ".join("+".join(known.keys) for known in FORMATS)


def _string(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise BadRecordError(f"{key!r} is a JSON {json_type(value)}, not a string")
    return value


def _pair(user: str, assistant: str) -> Conversation:
    return Conversation(({"role": "user", "content": user}, {"role": "assistant", "content": assistant}))


def _pair_parser(prompt_key: str, answer_key: str) -> Callable[[dict[str, Any]], Example]:
    return lambda record: _pair(_string(record, prompt_key), _string(record, answer_key))


def _parse_instruction(record: dict[str, Any]) -> Example:
    instruction = _string(record, "instruction")
    # A missing or null input is what data files have where there is none.
    extra = _string(record, "input") if record.get("input") is not None else ""
    return _pair(f"{instruction}\n\n{extra}" if extra else instruction, _string(record, "output"))


def _parse_prompt_completion(record: dict[str, Any]) -> Example:
    if isinstance(record["prompt"], str) and isinstance(record["completion"], str):
        return _pair(record["prompt"], record["completion"])
    if not (isinstance(record["prompt"], list) and isinstance(record["completion"], list)):
        kinds = f"{json_type(record['prompt'])} and {json_type(record['completion'])}"
        raise BadRecordError(f"'prompt' and 'completion' are JSON {kinds}, not two strings or two lists of messages")
    prompt, completion = _parse_list(record, "prompt"), _parse_list(record, "completion")
    return _conversation([*prompt, *completion], first_trained=len(prompt), tools=_tools(record))


def _list_parser(key: str, role_key: str, content_key: str) -> Callable[[dict[str, Any]], Example]:
    def parse(record: dict[str, Any]) -> Example:
        messages = _with_system(record, _parse_list(record, key, role_key, content_key))
        return _conversation(messages, tools=_tools(record))

    return parse


def _conversation(messages: list[Message], *, tools: tuple[Tool, ...], first_trained: int = 0) -> Conversation:
    """The messages, of which some may have a weight. It says what is learnt, and is nothing for the chat template."""
    context = (i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") == 0)
    bare = ({key: value for key, value in m.items() if key != "weight"} for m in messages)
    return Conversation(tuple(bare), first_trained=first_trained, tools=tools, context=frozenset(context))


def _with_system(record: dict[str, Any], messages: list[Message]) -> list[Message]:
    # A missing, null or empty text is what data files have where there is none.
    text = _content(record["system"], "'system'") if record.get("system") is not None else ""
    if not text:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    if messages[0]["content"] != text:
        raise BadRecordError("the line has 'system' and begins with a system message that says something else")
    return messages


def _tools(record: dict[str, Any]) -> tuple[Tool, ...]:
    tools = record.get("tools")
    if isinstance(tools, str) and tools:
        # Tools differ in their keys, which tables with typed columns cannot hold: many data sets have them as text.
        tools, problem = parse_json(tools, "the text of 'tools'")
        if problem is not None:
            raise BadRecordError(problem)
    if not tools and (tools is None or isinstance(tools, str | list)):
        return ()
    if not isinstance(tools, list):
        raise BadRecordError(f"'tools' is a JSON {json_type(tools)}, not a list of tools")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise BadRecordError(f"tools[{i}] is a JSON {json_type(tool)}, not an object")
    return tuple(tools)


def _parse_list(
    record: dict[str, Any], key: str, role_key: str = "role", content_key: str = "content"
) -> list[Message]:
    turns = record[key]
    if not isinstance(turns, list):
        raise BadRecordError(f"{key!r} is a JSON {json_type(turns)}, not a list of messages")
    if not turns:
        raise BadRecordError(f"{key!r} is an empty list")
    return [_message(turn, f"{key}[{i}]", role_key, content_key) for i, turn in enumerate(turns)]


def _message(turn: Any, where: str, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRecordError(f"{where} is a JSON {json_type(turn)}, not an object")
    name = turn.get(role_key)
    if not isinstance(name, str):
        raise BadRecordError(f"{where} has no string {role_key!r}")
    role = ROLES.get(name)
    if role is None:
        raise BadRecordError(f"{where} has {role_key!r} {name!r}; known are {', '.join(ROLES)}")
    # What a template may want besides the text (tool_calls, name, reasoning_content, ...) goes to it as it is.
    rest = {k: v for k, v in turn.items() if k not in (role_key, content_key) and v is not None}
    _check_weight(rest.get("weight", 1), where)
    content = turn.get(content_key)
    if content is None and rest.get("tool_calls"):
        content = ""
    return {**rest, "role": role, "content": _content(content, f"{where}.{content_key}")}


def _check_weight(weight: Any, where: str) -> None:
    # True and False are numbers to Python; 0.0 and 1.0, as tables with missing values have them, are 0 and 1 in JSON.
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        found = f"a JSON {json_type(weight)}"
    elif weight in (0, 1):
        return
    else:
        found = repr(weight)[:20]
    raise BadRecordError(f"{where}.weight is {found}; it may be 0 (the turn is context and not learnt) or 1 (learnt)")


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        found = "missing or null" if content is None else f"a JSON {json_type(content)}"
        raise BadRecordError(f"{where} is {found}, not text")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else json_type(part)
            raise BadRecordError(f"{where} has a part of type {kind!r}; only text parts can be used")
    return "".join(texts)


FORMATS = (
    Format("messages", ("messages",), _list_parser("messages", "role", "content")),
    Format("conversations", ("conversations",), _list_parser("conversations", "from", "value")),
    Format("prompt+completion", ("prompt", "completion"), _parse_prompt_completion),
    Format("instruction+output", ("instruction", "output"), _parse_instruction),
    Format("question+answer", ("question", "answer"), _pair_parser("question", "answer")),
    Format("query+response", ("query", "response"), _pair_parser("query", "response")),
    Format("problem+solution", ("problem", "solution"), _pair_parser("problem", "solution")),
    Format("text", ("text",), lambda record: PlainText(_string(record, "text"))),
)
