"""How many tokens a data file has, from a sample of its lines: for planning, in a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopt_lite.data.dataset import held_out_count, split_examples
from lopt_lite.data.json_lines import MAX_LINE_BYTES, Line, check_is_data_file, parse_line
from lopt_lite.errors import DataError
from lopt_lite.files import unreadable

#: Lines that are all tokenised: so many, or those of a file of so many bytes and lines.
_FEW_LINES, _COUNTED_BYTES, _COUNTED_LINES = 200, 1 << 20, 1000
#: Of more lines so many are tokenised, and of these so many are the file's longest.
_SAMPLED_LINES, _LONGEST_LINES = 200, 20
#: Of a larger file only so many bytes are looked at, in so many stretches.
_SCANNED_BYTES, _STRETCHES = 64 << 20, 16
#: Without a tokenizer: bytes of a line for one token, and the share of tokens that are answers.
BYTES_PER_TOKEN = 3.6
_ANSWER_SHARE = 0.5
#: Lengths that an estimate keeps.
_KEPT_LENGTHS = 1024


@dataclass(frozen=True)
class DataEstimate:
    """A data file in numbers.

    Attributes
    ----------
    examples, tokens, answer_tokens, longest:
        Examples, their tokens, those of them to be predicted, and the tokens of the longest example.
    lengths:
        Tokens of the examples, or of a spread sample of them.
    how:
        ``"counted"`` (all lines were tokenised), ``"sampled"``, or ``"from bytes"`` (there was no tokenizer).
    """

    examples: int
    tokens: int
    answer_tokens: int
    longest: int
    lengths: tuple[int, ...]
    how: str

    @property
    def is_exact(self) -> bool:
        """Whether ``lengths`` are those of all examples, in the order of the data."""
        return self.how == "counted" and len(self.lengths) == self.examples

    @property
    def has_prompts(self) -> bool:
        """Whether examples have tokens, beside the first, that are not to be learnt."""
        return self.tokens - self.answer_tokens > self.examples

    def shortest(self, most: int) -> tuple[int, ...]:
        """Tokens of the shortest examples, ``most`` at most, from short to long; a guess from a sample."""
        known = sorted(self.lengths)
        count = min(most, self.examples)
        if len(known) >= self.examples:
            return tuple(known[:count])
        return tuple(known[number * len(known) // self.examples] for number in range(count))

    def and_also(self, more: DataEstimate) -> DataEstimate:
        """Both together; how they were found out is that of the first."""
        return DataEstimate(
            examples=self.examples + more.examples,
            tokens=self.tokens + more.tokens,
            answer_tokens=self.answer_tokens + more.answer_tokens,
            longest=max(self.longest, more.longest),
            lengths=self.lengths + more.lengths,
            how=self.how,
        )

    def split(self, fraction: float, seed: int) -> tuple[DataEstimate, DataEstimate]:
        """Training and validation part, of as many examples as :meth:`TokenizedDataset.split` makes of them.

        They are the same examples, where all are known. Of a single one, which may be a guess, each part has one.
        """
        if self.is_exact and self.examples > 1:
            train, validation = split_examples(self.examples, fraction, seed)
            return self._of(train), self._of(validation)
        held_out = max(1, held_out_count(self.examples, fraction))
        return self._random(max(1, self.examples - held_out)), self._random(held_out)

    def _of(self, chosen: np.ndarray) -> DataEstimate:
        """The examples of these numbers; how many of their tokens are answers is a guess."""
        lengths = tuple(self.lengths[i] for i in chosen)
        tokens = sum(lengths)
        answer_tokens = max(1, round(self.answer_tokens * tokens / self.tokens))
        return DataEstimate(len(lengths), tokens, answer_tokens, max(lengths), lengths, self.how)

    def _random(self, count: int) -> DataEstimate:
        """So many random examples, at least one."""
        share = count / self.examples
        return DataEstimate(
            examples=count,
            tokens=max(1, round(self.tokens * share)),
            answer_tokens=max(1, round(self.answer_tokens * share)),
            longest=self.longest,
            lengths=self.lengths,
            how=self.how,
        )


def estimate_data(path: str | Path, tokenizer: Any | None, *, max_length: int) -> DataEstimate:
    """Look at a JSON Lines file.

    Parameters
    ----------
    tokenizer:
        A transformers tokenizer, None when there is none.
    max_length:
        Most tokens of an example; longer ones are cut.

    Raises
    ------
    DataError
        The file cannot be read, holds nothing, or nothing of what was looked at can be used.
    """
    path = Path(path)
    check_is_data_file(path)
    try:
        lines = list(_scan(path))
        if not lines:
            raise DataError(f"{path} is empty", expected="a JSON Lines file: one JSON object per line")
        sizes = np.array([size for _, size in lines])
        scale = max(1.0, path.stat().st_size / _SCANNED_BYTES)
        if tokenizer is None:
            lengths = np.clip(np.ceil(sizes / BYTES_PER_TOKEN), 1, max_length)
            return _estimate(lengths, scale, _ANSWER_SHARE, "from bytes")
        from lopt_lite.data.load import load_lines  # here, as chat templates need a library that takes a second

        chosen = _sample(sizes)
        dataset = load_lines(path, _read(path, [lines[i] for i in chosen]), tokenizer, max_length=max_length)
    except OSError as error:
        raise unreadable(error, path, "the data file", DataError) from error
    found = dataset.lengths.numpy()
    answer_share = float(dataset.target_counts.sum()) / float(found.sum())
    if len(chosen) == len(lines) and scale == 1:
        return _estimate(found, 1.0, answer_share, "counted")
    # Lines that cannot be used are few, and spread like the others; those that were cut say nothing of bytes.
    usable = len(found) / len(chosen)
    uncut = found < max_length
    per_token = sizes[chosen].mean() * usable / found.mean()
    if uncut.any() and len(found) == len(chosen):
        per_token = sizes[chosen][uncut].sum() / found[uncut].sum()
    lengths = np.clip(np.rint(sizes / per_token), 1, max(int(found.max()), 1))
    return _estimate(lengths, scale * usable, answer_share, "sampled", longest=int(found.max()))


def _estimate(
    lengths: np.ndarray, scale: float, answer_share: float, how: str, *, longest: int | None = None
) -> DataEstimate:
    tokens = max(1, round(float(lengths.sum()) * scale))
    spread = lengths[np.linspace(0, len(lengths) - 1, min(len(lengths), _KEPT_LENGTHS)).astype(int)]
    return DataEstimate(
        examples=max(1, round(len(lengths) * scale)),
        tokens=tokens,
        answer_tokens=max(1, round(tokens * answer_share)),
        longest=int(lengths.max()) if longest is None else longest,
        lengths=tuple(int(n) for n in spread),
        how=how,
    )


def _scan(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the lines that are not blank: all of them, or those of stretches spread over a large file."""
    total = path.stat().st_size
    with open(path, "rb") as file:
        if total <= _SCANNED_BYTES:
            yield from _lines_until(file, total)
            return
        for start in np.linspace(0, total - _SCANNED_BYTES // _STRETCHES, _STRETCHES).astype(int):
            file.seek(int(start))
            if start:
                file.readline(MAX_LINE_BYTES)
            yield from _lines_until(file, int(start) + _SCANNED_BYTES // _STRETCHES)


def _lines_until(file: Any, end: int) -> Iterator[tuple[int, int]]:
    offset = file.tell()
    while offset < end and (raw := file.readline(MAX_LINE_BYTES)):
        if not raw.isspace():
            yield offset, len(raw)
        offset += len(raw)


def _sample(sizes: np.ndarray) -> np.ndarray:
    """Numbers of lines to tokenise: all, or the longest ones and others spread over the file."""
    few = len(sizes) <= _COUNTED_LINES and int(sizes.sum()) <= _COUNTED_BYTES
    if few or len(sizes) <= _FEW_LINES:
        return np.arange(len(sizes))
    longest = np.argsort(sizes)[-_LONGEST_LINES:]
    spread = np.linspace(0, len(sizes) - 1, _SAMPLED_LINES - _LONGEST_LINES).astype(int)
    return np.unique(np.concatenate([longest, spread]))


def _read(path: Path, places: Sequence[tuple[int, int]]) -> Iterator[Line]:
    with open(path, "rb") as file:
        for number, (offset, size) in enumerate(places, start=1):
            file.seek(offset)
            raw = file.read(size).removeprefix(b"\xef\xbb\xbf").strip()
            record, problem = parse_line(raw)
            yield Line(number, offset + size, record, problem)
