"""Chat templates that write one message after the other: all beginnings of a conversation from one rendering.

Where answers are found by comparing renderings, each of them needs the text of the messages before it. To render those
again for each answer takes time quadratic in turns. Many templates come down to ::

    START {% for message in messages %} TURN {% endfor %} END

with a START that looks at no message but the first, a TURN that looks at nothing that comes later (as ``loop.last``
does), and an END that follows from nothing but whether there is to be a generation prompt. Then the text of the first n
messages is what the whole conversation's rendering has put out when it asks for the message after them, and END.

Whether a template is one of these is read from its syntax tree, in which everything is refused that is not known to
keep to this: to miss such a template costs time, to take another one for it would cost labels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import nodes

from lopt_lite.data.formats import Message
from lopt_lite.data.template_limits import compiled_template, write_limited

#: What START and TURN may consist of. ``{% break %}`` is not among it: it makes later messages come to nothing.
_PARTS = frozenset(
    {
        nodes.Add,
        nodes.And,
        nodes.Assign,
        nodes.AssignBlock,
        nodes.CallBlock,
        nodes.Compare,
        nodes.Concat,
        nodes.CondExpr,
        nodes.Const,
        nodes.Continue,
        nodes.Dict,
        nodes.ExtensionAttribute,
        nodes.For,
        nodes.If,
        nodes.Keyword,
        nodes.List,
        nodes.Macro,
        nodes.Mod,
        nodes.NSRef,
        nodes.Neg,
        nodes.Not,
        nodes.Operand,
        nodes.Or,
        nodes.Output,
        nodes.Pair,
        nodes.Slice,
        nodes.Sub,
        nodes.TemplateData,
        nodes.Test,
        nodes.Tuple,
    }
)
#: What END may consist of, besides names that the template does not set.
_END_PARTS = frozenset(
    {
        nodes.Add,
        nodes.And,
        nodes.Compare,
        nodes.Concat,
        nodes.CondExpr,
        nodes.Const,
        nodes.If,
        nodes.Name,
        nodes.Not,
        nodes.Operand,
        nodes.Or,
        nodes.Output,
        nodes.TemplateData,
        nodes.Test,
    }
)
#: Functions that make the same of the same; others (``lipsum``, ``cycler``) are random or remember.
_FUNCTIONS = frozenset({"dict", "namespace", "raise_exception", "range"})
#: What a loop over the messages may be asked: nothing of it looks ahead.
_LOOP_FACTS = frozenset({"first", "index", "index0"})
#: By these names a template reaches all messages, or what is said of the whole conversation.
_WHOLE = frozenset({"messages", "self", "add_generation_prompt"})


def is_turn_by_turn(source: str) -> bool:
    """Whether the template ``source`` (sound Jinja) is known to be of the kind that this module is about."""
    compiled = compiled_template(source)
    if compiled is None:
        return False
    tree = compiled.environment.parse(source)
    places = [i for i, node in enumerate(tree.body) if isinstance(node, nodes.For) and _is_messages(node.iter)]
    if len(places) != 1:
        return False
    loop = tree.body[places[0]]
    assert isinstance(loop, nodes.For)
    start, end = tree.body[: places[0]], tree.body[places[0] + 1 :]
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    if loop.test is not None or loop.else_ or loop.recursive or "loop" in own:
        return False
    own |= {macro.name for macro in tree.find_all(nodes.Macro)}
    functions = _FUNCTIONS | {macro.name for macro in tree.find_all(nodes.Macro)}
    return all(_looks_back(node, functions) for node in [*start, loop.target, *loop.body]) and all(
        _is_of_end(node, own) for node in end
    )


def render_turn_by_turn(
    source: str, messages: Sequence[Message], variables: Mapping[str, Any]
) -> tuple[str, list[int]] | None:
    """The text of ``messages`` with a template that is turn by turn, and how much of it is there before each of them.

    Parameters
    ----------
    messages:
        As the template is to see them.
    variables:
        What else it sees, by name.

    Returns
    -------
    The text, and as many numbers of characters as there are messages and one more, the last for what is there after all
    of them; None where they were not asked for one by one.

    Raises
    ------
    TemplateLimitError
        The text is longer than a template may make it.
    Exception
        What a template raises that refuses the messages.
    """
    compiled = compiled_template(source)
    if compiled is None:
        return None
    text = io.StringIO()
    watched = _Watched(messages, text)
    # A generator runs on only when what it has put out so far is written.
    write_limited(compiled.generate(messages=watched, **variables), text)
    return (text.getvalue(), watched.begins) if len(watched.begins) == len(messages) + 1 else None


class _Watched(list[Message]):
    """Messages that note how long ``text`` is whenever the next of them is asked for."""

    def __init__(self, messages: Sequence[Message], text: io.StringIO) -> None:
        super().__init__(messages)
        self.begins: list[int] = []
        self._text = text

    def __iter__(self) -> Iterator[Message]:
        for message in super().__iter__():
            self.begins.append(self._text.tell())
            yield message
        self.begins.append(self._text.tell())


def _is_messages(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "messages"


def _looks_back(node: nodes.Node, functions: frozenset[str], *, in_own_loop: bool = False) -> bool:
    """Whether nothing in ``node`` depends on later messages, how many there are, or the generation prompt.

    ``in_own_loop``: ``loop`` is not the one over the messages.
    """
    if isinstance(node, nodes.Name):
        return node.name not in _WHOLE and (node.name != "loop" or in_own_loop)
    if isinstance(node, nodes.Getattr):
        if isinstance(node.node, nodes.Name) and node.node.name == "loop" and not in_own_loop:
            return node.attr in _LOOP_FACTS
    elif isinstance(node, nodes.Getitem):
        if _is_messages(node.node):
            # There is always a first message.
            return isinstance(node.arg, nodes.Const) and type(node.arg.value) is int and node.arg.value == 0
    elif isinstance(node, nodes.Call):
        if isinstance(node.node, nodes.Name) and node.node.name not in functions:
            return False
    elif isinstance(node, nodes.Filter):
        if node.name == "random":
            return False
    elif isinstance(node, nodes.For):
        if node.recursive or node.test is not None:
            return False
        outside = [node.target, node.iter, *node.else_]
        return all(_looks_back(part, functions, in_own_loop=in_own_loop) for part in outside) and all(
            _looks_back(part, functions, in_own_loop=True) for part in node.body
        )
    elif type(node) not in _PARTS:
        return False
    return all(_looks_back(child, functions, in_own_loop=in_own_loop) for child in node.iter_child_nodes())


def _is_of_end(node: nodes.Node, own: set[str]) -> bool:
    if type(node) not in _END_PARTS:
        return False
    if isinstance(node, nodes.Name) and node.name in own | {"messages", "self", "loop"}:
        return False
    return all(_is_of_end(child, own) for child in node.iter_child_nodes())
