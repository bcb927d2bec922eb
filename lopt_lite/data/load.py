"""A data file to a tokenised data set: the whole way, and an account of what was cut, dropped or skipped."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopt_lite.data.answers import RenderedConversation, answer_mask, render_conversation
from lopt_lite.data.dataset import TokenizedDataset
from lopt_lite.data.formats import (
    BadRecordError,
    Example,
    Format,
    PlainText,
    describe_formats,
    detect_format,
    has_keys,
)
from lopt_lite.data.json_lines import Line, check_is_data_file, read_json_lines
from lopt_lite.data.templates import ChatTemplate, TemplateRefusedError
from lopt_lite.data.tokenization import default_bos, encode_batch, token_without_row
from lopt_lite.data.truncation import length_through_last_target, shorten
from lopt_lite.errors import DataError
from lopt_lite.events import Notice, OnEvent, Progress

#: Texts are tokenised together: at most so many examples, and about so many characters. A tokenizer takes some 250
#: bytes for each character while it is at work.
_CHUNK_EXAMPLES = 512
_CHUNK_CHARACTERS = 2**18
#: A conversation of more characters than this, or than so many for each token of ``max_length``, cannot be used.
_MOST_CHARACTERS = 2**20
_MOST_CHARACTERS_PER_TOKEN = 16
#: No template that tells who speaks makes less of a message: more messages than this allows need not be rendered.
_FEWEST_CHARACTERS_PER_MESSAGE = 8
#: How far the file is, is told at least so often, between examples.
_PROGRESS_SECONDS = 2.0

_LINES_NAMED = 5


@dataclass
class LoadReport:
    """What became of the lines of a data file.

    Attributes
    ----------
    format:
        Name of the format found, such as ``messages`` or ``question+answer``.
    lines:
        Lines that are not blank.
    examples:
        Examples to train on.
    bad_lines:
        Lines dropped because they cannot be used (only with ``skip_bad_lines``).
    cut:
        Examples shortened to ``max_length``.
    dropped:
        Examples left out because no token of them can be trained on.
    system_merged:
        Conversations whose system message went into the first user message, because the template refuses it.
    tools_not_shown:
        Conversations with tools that the template does not show.
    unlocated_turns:
        Assistant turns that could not be found in the template's output and are not trained on.
    first_bad_lines:
        Numbers of the first few bad lines.
    """

    format: str = ""
    lines: int = 0
    examples: int = 0
    bad_lines: int = 0
    cut: int = 0
    dropped: int = 0
    system_merged: int = 0
    unlocated_turns: int = 0
    tools_not_shown: int = 0
    first_bad_lines: list[int] = field(default_factory=list)


def load_dataset(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    most_positions: int | None = None,
    embedding_rows: int | None = None,
    skip_bad_lines: bool,
    check: Callable[[], None] = lambda: None,
    on_event: OnEvent,
) -> tuple[TokenizedDataset, LoadReport]:
    """Read, render, tokenise and label a JSON Lines file.

    Parameters
    ----------
    path:
        The file; :mod:`lopt_lite.data.formats` lists what its lines may hold.
    tokenizer:
        A transformers tokenizer.
    max_length:
        Most tokens of an example. Of a longer one the front of the prompt is cut (all tokens before the first
        answer but the beginning-of-sequence token and the last), and if that is not enough, the end.
    most_positions:
        Most tokens that the model can see, None where it has no such limit; if that is less, it takes the place of
        ``max_length``.
    embedding_rows:
        Rows of the model's embedding, None where they are not known: a line that needs a token beyond them cannot be
        used.
    skip_bad_lines:
        Drop and count lines that cannot be used instead of raising.
    check:
        Called before each line, and before each rendering of a conversation; may raise to stop.
    on_event:
        Told how far a long file is, and in sentences what was cut, dropped, merged or skipped.

    Raises
    ------
    DataError
        The file cannot be read, a line cannot be used or has another format than the file, or nothing in the file
        can be trained on.
    ModelError
        The tokenizer's chat template is broken.
    """
    path = Path(path)
    check_is_data_file(path)
    loader = _Loader(
        path,
        tokenizer,
        max_length,
        skip_bad_lines,
        most_positions=most_positions,
        embedding_rows=embedding_rows,
        check=check,
    )
    total_bytes = path.stat().st_size
    done_bytes = 0
    for done_bytes in loader.run(read_json_lines(path)):
        on_event(Progress(task=f"Reading {path.name}", done=done_bytes, total=total_bytes, unit="bytes"))
        check()
    if 0 < done_bytes < total_bytes:
        on_event(Progress(task=f"Reading {path.name}", done=total_bytes, total=total_bytes, unit="bytes"))
    dataset = loader.dataset()
    for text in loader.notices():
        on_event(Notice(text=text))
    return dataset, loader.report


def load_lines(path: str | Path, lines: Iterable[Line], tokenizer: Any, *, max_length: int) -> TokenizedDataset:
    """As :func:`load_dataset`, of some ``lines`` of a file alone. Lines that cannot be used are left out.

    Raises
    ------
    DataError
        None of the lines can be used.
    ModelError
        The tokenizer's chat template is broken.
    """
    loader = _Loader(Path(path), tokenizer, max_length, skip_bad_lines=True)
    for _ in loader.run(lines):
        pass
    return loader.dataset()


class _Growing:
    """An array that values are added to: many small ones, and one of all at the end, would take twice the memory."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._values = np.empty(0, dtype)
        self._count = 0

    def add(self, values: np.ndarray) -> None:
        end = self._count + len(values)
        if end > len(self._values):
            # By an eighth, as room that is not used yet counts as well.
            self._values.resize(max(end, len(self._values) * 9 // 8, 2**16), refcheck=False)
        self._values[self._count : end] = values
        self._count = end

    def take(self) -> np.ndarray:
        """All of them; nothing can be added any more."""
        values, self._values = self._values, np.empty(0, self._values.dtype)
        values.resize(self._count, refcheck=False)
        return values


@dataclass(frozen=True)
class _Rendered:
    """What a line holds, as text."""

    line: int
    content: RenderedConversation | PlainText
    #: For which template, and so for which control tokens.
    template: ChatTemplate
    has_tools: bool


class _Loader:
    def __init__(
        self,
        path: Path,
        tokenizer: Any,
        max_length: int,
        skip_bad_lines: bool,
        *,
        most_positions: int | None = None,
        embedding_rows: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.max_length = min(max_length, most_positions or max_length)
        # What sets the limit, as a part of a sentence.
        self.limit = f"--max-length {max_length}"
        if self.max_length < max_length:
            self.limit = f"the model has no more positions, and {self.limit} is more"
        self.embedding_rows = embedding_rows
        self.skip_bad_lines = skip_bad_lines
        self.check = check
        self.report = LoadReport()
        self.template = ChatTemplate(tokenizer)
        self.default_bos = default_bos(tokenizer)
        self.format: Format | None = None
        self.format_line = 0
        self.first_problem: str | None = None
        self.lengths: list[int] = []
        self.ids, self.masks = _Growing(np.dtype(np.int32)), _Growing(np.dtype(bool))

    def run(self, lines: Iterable[Line]) -> Iterator[int]:
        """Work through the file's lines; yields the bytes done after each chunk but the last, and every few seconds."""
        pending: list[_Rendered] = []
        characters = 0
        told_s = time.monotonic()
        for line in lines:
            self.check()
            self.report.lines += 1
            try:
                rendered = self._render(line.number, self._parse(line))
            except (BadRecordError, TemplateRefusedError) as error:
                self._bad_line(line.number, str(error))
            else:
                pending.append(rendered)
                characters += len(rendered.content.text)
            is_full = len(pending) >= _CHUNK_EXAMPLES or characters >= _CHUNK_CHARACTERS
            if is_full:
                self._tokenize(pending)
                pending, characters = [], 0
            if is_full or time.monotonic() - told_s > _PROGRESS_SECONDS:
                yield line.end_byte
                told_s = time.monotonic()
        self.check()
        self._tokenize(pending)

    def dataset(self) -> TokenizedDataset:
        report = self.report
        if report.lines == 0:
            raise DataError(f"{self.path} is empty", expected="a JSON Lines file: one JSON object per line")
        if report.lines == report.bad_lines:
            raise DataError(
                f"none of the {report.lines} lines of {self.path} can be used; {self.first_problem}",
                expected=f"lines with the keys of one known format: {describe_formats()}",
            )
        if not self.lengths:
            raise DataError(
                f"none of the {report.dropped} examples of {self.path} has a token to train on",
                expected=f"an assistant message that the chat template shows, within {self.max_length:,} tokens "
                f"({self.limit})",
                fix="check that the conversations have assistant messages, and not all of weight 0, raise "
                "--max-length, or check the tokenizer's chat template",
            )
        offsets = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        return TokenizedDataset(
            tokens=torch.from_numpy(self.ids.take()),
            is_target=torch.from_numpy(self.masks.take()),
            offsets=torch.from_numpy(offsets),
        )

    def notices(self) -> Iterator[str]:
        report, name, template = self.report, self.path.name, self.template
        if report.bad_lines:
            numbers = ", ".join(map(str, report.first_bad_lines))
            more = ", ..." if report.bad_lines > len(report.first_bad_lines) else ""
            yield (
                f"{name}: {report.bad_lines} of {report.lines} lines cannot be used and were dropped "
                f"(lines {numbers}{more}); {self.first_problem}."
            )
        if report.format != "text":
            if template.is_plain:
                yield "The tokenizer has no chat template; a plain one is used (### Instruction: / ### Response:)."
            if template.appends_eos and not template.is_plain:
                yield (
                    "The chat template ends an answer without a control token; "
                    f"{self.tokenizer.eos_token!r} is added after the last answer of each conversation."
                )
            if template.pins_date:
                yield "The chat template prints the date; 1 January 2025 is used, so that resumed runs see the same."
        if self.tokenizer.eos_token_id is None:
            yield "The tokenizer has no end-of-sequence token; the model may not learn where to stop."
        if report.system_merged:
            yield (
                f"{name}: the chat template refuses system messages; in {report.system_merged} conversations the "
                "system message was put in front of the first user message."
            )
        if report.tools_not_shown:
            what = "the plain template" if template.is_plain else "the chat template"
            yield (
                f"{name}: {what} does not show tools; those of {report.tools_not_shown} conversations ('tools') are "
                "left out."
            )
        if report.unlocated_turns:
            yield (
                f"{name}: {report.unlocated_turns} assistant turns could not be found in what the chat template "
                "makes of them, and are not trained on."
            )
        if report.cut:
            yield f"{name}: {report.cut} examples were cut to {self.max_length:,} tokens ({self.limit})."
        if report.dropped:
            yield f"{name}: {report.dropped} examples were dropped, because no token of them can be trained on."

    def _parse(self, line: Line) -> Example:
        if line.record is None:
            raise BadRecordError(line.problem or "the line cannot be used")
        known = self.format
        if known is None:
            known = detect_format(line.record)
            if known is None:
                raise BadRecordError(
                    f"no known format has the keys {_name_keys(line.record)}; known are {describe_formats()}"
                )
        elif not has_keys(line.record, known):
            other = detect_format(line.record)
            if other is None:
                raise BadRecordError(
                    f"the format {known.name!r} (line {self.format_line}) needs {known.keys}, and the "
                    f"line has the keys {_name_keys(line.record)}"
                )
            raise BadRecordError(
                f"the line has the format {other.name!r}, and the file has {known.name!r} (line {self.format_line})"
            )
        example = known.parse(line.record)
        if self.format is None:
            # The first usable line decides.
            self.format, self.format_line, self.report.format = known, line.number, known.name
        return example

    def _render(self, line: int, example: Example) -> _Rendered:
        most = max(_MOST_CHARACTERS, _MOST_CHARACTERS_PER_TOKEN * self.max_length)
        if isinstance(example, PlainText):
            # Its end would be cut anyway.
            return _Rendered(line, PlainText(example.text[:most]), self.template, has_tools=False)
        template = self.template.with_tools if example.tools else self.template
        most_messages = most // _FEWEST_CHARACTERS_PER_MESSAGE
        if len(example.messages) > most_messages:
            raise BadRecordError(
                f"the conversation has {len(example.messages):,} messages; at most {most_messages:,} can be used "
                f"({self.limit})"
            )
        try:
            rendered = render_conversation(template, example, most_characters=most, limit=self.limit, check=self.check)
        except TemplateRefusedError as error:
            raise TemplateRefusedError(f"the chat template refuses the conversation: {error}") from error
        return _Rendered(line, rendered, template, has_tools=bool(example.tools))

    def _bad_line(self, number: int, problem: str) -> None:
        if not self.skip_bad_lines:
            raise DataError(
                f"{self.path}, line {number}: {problem}",
                fix="correct the line, or drop such lines with --skip-bad-lines",
            )
        first = self.report.first_bad_lines
        # What is wrong with a line's tokens is found out later than what is wrong with the text of lines after it.
        bisect.insort(first, number)
        del first[_LINES_NAMED:]
        if first[0] == number:
            self.first_problem = f"line {number}: {problem}"
        self.report.bad_lines += 1

    def _tokenize(self, pending: list[_Rendered]) -> None:
        eos = self.tokenizer.eos_token_id
        chunk = encode_batch(self.tokenizer, [item.content.text for item in pending])
        # Once for all of them, as hardly any file has such a token.
        largest = max((max(encoded.ids, default=0) for encoded in chunk), default=0)
        is_outside = self.embedding_rows is not None and largest >= self.embedding_rows
        for item, encoded in zip(pending, chunk, strict=True):
            rendered = item.content
            if isinstance(rendered, PlainText):
                ids = encoded.ids
                if ids[:1] != self.default_bos:
                    ids = self.default_bos + ids
                if eos is not None and ids[-1:] != [eos]:
                    ids = [*ids, eos]
                mask = np.ones(len(ids), dtype=bool)
                mask[:1] = False
            else:
                ids = encoded.ids
                mask = answer_mask(item.template, encoded, rendered.answers)
            length = length_through_last_target(mask)
            kept = shorten(
                np.array(ids[:length], dtype=np.int32), mask[:length], self.max_length, self.tokenizer.bos_token_id
            )
            problem = token_without_row(self.tokenizer, kept[0], self.embedding_rows) if is_outside else None
            if problem is not None:
                self._bad_line(item.line, problem)
                continue
            if isinstance(rendered, RenderedConversation):
                self.report.system_merged += rendered.system_merged
                self.report.unlocated_turns += rendered.unlocated
                self.report.tools_not_shown += item.has_tools and not item.template.shows_tools
            self._keep(*kept, is_cut=length > self.max_length)

    def _keep(self, ids: np.ndarray, mask: np.ndarray, *, is_cut: bool) -> None:
        if not mask.any():
            self.report.dropped += 1
            return
        self.report.cut += is_cut
        self.report.examples += 1
        self.lengths.append(len(ids))
        self.ids.add(ids)
        self.masks.add(mask)


def _name_keys(record: dict[str, Any]) -> str:
    keys = [repr(key[:40]) for key in list(record)[:8]]
    return (", ".join(keys) or "(none)") + (", ..." if len(record) > 8 else "")
