"""What a chat template, which may be a stranger's, can take: seconds, and characters of text.

The sandbox that transformers renders templates in keeps them from attributes and files; a loop may still run for ever,
or put out text until memory is full.
"""

from __future__ import annotations

import contextlib
import io
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
from transformers.utils import chat_template_utils

from lopt_lite.errors import ModelError

#: For one rendering of a conversation; real templates take milliseconds.
MOST_SECONDS = 10
#: A line of data may be as long.
MOST_CHARACTERS = 64 * 2**20

_FIX = "bring a model with a sound chat template, or put your own into its chat_template.jinja"


class TemplateLimitError(ModelError):
    """A template took too long or made too much of one conversation.

    Where it has been seen to take a short one, :mod:`lopt_lite.data.answers` blames the conversation instead.
    """


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """Stop what runs in the context after :data:`MOST_SECONDS`.

    Where the system has no such timer (Windows), or outside the main thread, there is no limit.

    Raises
    ------
    TemplateLimitError
        The time is over.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    over: TemplateLimitError | None = None

    def stop(number: int, frame: Any) -> None:
        nonlocal over
        over = TemplateLimitError(f"the chat template ran for {MOST_SECONDS} seconds on one conversation", fix=_FIX)
        raise over

    handler = signal.signal(signal.SIGALRM, stop)
    started_s = time.monotonic()
    left_s, every_s = signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    except Exception as error:
        # Jinja looks up where in the template an error was raised, and fails with another where it finds no line there.
        if over is not None and error is not over:
            raise over from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left_s:
            # There is one such timer in a process, and it was somebody's.
            left_s = max(left_s - (time.monotonic() - started_s), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left_s, every_s)


def compiled_template(template: str) -> jinja2.Template | None:
    """The compiled ``template`` that transformers keeps and renders with; it has no public way to it.

    None with a release that keeps it elsewhere.

    Raises
    ------
    jinja2.TemplateError
        It is not valid Jinja.
    """
    compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
    return None if compiled is None else compiled(template)


def limit_text(template: str) -> None:
    """Make transformers stop joining what ``template`` puts out at :data:`MOST_CHARACTERS`.

    It then raises :class:`TemplateLimitError`. A release of which the compiled template is not known has no such limit.
    """
    compiled = compiled_template(template)
    if compiled is not None:
        compiled.environment.concat = _joined  # type: ignore[method-assign]


def write_limited(pieces: Iterable[str], text: io.StringIO) -> None:
    """Write ``pieces`` to ``text``, up to :data:`MOST_CHARACTERS`.

    Raises
    ------
    TemplateLimitError
        There are more.
    """
    # Not a list: a hundred million pieces of one character each would take gigabytes.
    for piece in pieces:
        text.write(piece)
        if text.tell() > MOST_CHARACTERS:
            raise TemplateLimitError(
                f"the chat template makes more than {MOST_CHARACTERS:,} characters of one conversation", fix=_FIX
            )


def _joined(pieces: Iterable[str]) -> str:
    text = io.StringIO()
    write_limited(pieces, text)
    return text.getvalue()
