"""A block's inputs for every example, on disk: ragged, without padding.

The cache is a directory of safetensors shards. Shard ``n`` holds whole examples one after the other: ``hidden.n``
[tokens, hidden], and in the 8-bit format ``scale.n`` [tokens]. Which example lies where follows from the examples'
lengths alone (:class:`CacheLayout`), so nothing but the activations is stored, and a half-written cache continues at
its next shard.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import torch

from lopt_lite import files
from lopt_lite.checkpoints.header import Header, read_header
from lopt_lite.checkpoints.integrity import SILENT_S, DamagedFileError, check_file
from lopt_lite.checkpoints.shard_writer import TensorSpec, write_shard
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.data.batches import length_sorted_batches
from lopt_lite.errors import ModelError
from lopt_lite.events import Notice, OnEvent, Progress
from lopt_lite.journal import Fact
from lopt_lite.settings import Cache
from lopt_lite.training.background_writer import BackgroundWriter
from lopt_lite.training.cache_format import CacheFormat, StoredError

#: While a cache is written, two shards are in memory: one is filled, the one before it is written.
_SHARD_BYTES = 32 << 20

RunBatches = Callable[[list[list[int]], Callable[[int, torch.Tensor], None]], None]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def _tensor_name(part: str, number: int) -> str:
    return f"{part}.{number:05d}"


class CacheLayout:
    """Where each example's activations lie.

    Parameters
    ----------
    lengths:
        int64 [examples], tokens of each example.
    hidden_size, dtype:
        Shape and type of one token's activation.
    max_tokens, max_rows:
        Largest batch of the pass that writes the cache. A shard is made of whole batches, but which examples it holds
        does not depend on these limits.
    cache:
        How tokens are stored: see :class:`CacheFormat`.
    kept:
        int64 [examples], how many tokens of each example are stored; None for all. An example without any is in no
        batch.
    """

    def __init__(
        self,
        lengths: torch.Tensor,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        max_tokens: int,
        max_rows: int,
        cache: Cache = "exact",
        kept: torch.Tensor | None = None,
    ) -> None:
        self.lengths = lengths
        self.format = CacheFormat(cache, hidden_size, dtype)
        self.shards: list[list[list[int]]] = []
        self.shard_tokens: list[int] = []
        sizes: list[int] = lengths.tolist()
        self._kept: list[int] = sizes if kept is None else kept.tolist()
        self._place: list[tuple[int, int]] = [(0, 0)] * len(lengths)
        # Where an example lies may not depend on how much a machine takes at once: a run may go on on another one.
        for examples in self._shards_of(sizes):
            self.shard_tokens.append(0)
            for example in examples:
                self._place[example] = (len(self.shards), self.shard_tokens[-1])
                self.shard_tokens[-1] += self._kept[example]
            lengths_of_shard = [sizes[example] for example in examples]
            batches = length_sorted_batches(lengths_of_shard, max_tokens=max_tokens, max_rows=max_rows)
            self.shards.append([[examples[position] for position in batch] for batch in batches])
        self.total_bytes = self.shard_bytes(range(len(self.shards)))

    def _shards_of(self, sizes: list[int]) -> list[list[int]]:
        """All stored examples from short to long, in shards."""
        shards: list[list[int]] = []
        filled = _SHARD_BYTES
        for example in sorted((e for e, count in enumerate(self._kept) if count), key=sizes.__getitem__):
            if filled >= _SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(example)
            filled += self._kept[example] * self.format.token_bytes
        return shards

    def place(self, example: int) -> tuple[int, int]:
        """(shard, first row within the shard) of an example."""
        return self._place[example]

    def length(self, example: int) -> int:
        """Stored tokens of an example."""
        return self._kept[example]

    def shard_bytes(self, shards: Iterable[int]) -> int:
        """Bytes of the activations in some shards."""
        return sum(self.shard_tokens[shard] for shard in shards) * self.format.token_bytes

    def specs(self, shard: int) -> list[TensorSpec]:
        """The tensors of a shard's file, in file order."""
        return [
            TensorSpec(_tensor_name(spec.name, shard), spec.dtype, spec.shape)
            for spec in self.format.specs(self.shard_tokens[shard])
        ]


def write_cache(
    directory: Path,
    layout: CacheLayout,
    run_batches: RunBatches,
    *,
    done: Collection[int],
    on_shard: Callable[[int, StoredError, str], None],
    wanted: Collection[int] | None = None,
) -> None:
    """Write the shards that are missing, each while the batches after it are computed.

    Parameters
    ----------
    run_batches:
        Given the batches of example indices of all these shards, tells its callback each batch's number, in order, and
        activations [rows, longest, hidden], right-padded.
    done:
        Shards that are durable already.
    on_shard:
        Called in this thread, in order, with a shard's number, error and sha256 once it is durable; after an error or
        an interruption also for the shard that was being written.
    wanted:
        The shards to write; None for all.

    Raises
    ------
    DoesNotFitError, RunDirectoryError
        The disk is full or a file cannot be written.
    """
    files.make_directory(directory)
    of_these = range(len(layout.shards)) if wanted is None else sorted(wanted)
    missing = [n for n in of_these if n not in done or not (directory / shard_name(n)).is_file()]
    batches = [batch for number in missing for batch in layout.shards[number]]
    last_of_shard = []
    for number in missing:
        last_of_shard += [False] * (len(layout.shards[number]) - 1) + [True]
    remaining = iter(missing)
    filling: _Shard | None = None

    with BackgroundWriter() as writer:

        def keep(position: int, output: torch.Tensor) -> None:
            nonlocal filling
            writer.poll()
            if filling is None:
                filling = _Shard(layout, next(remaining))
            filling.add(batches[position], output)
            if last_of_shard[position]:
                shard, filling = filling, None
                writer.submit(functools.partial(shard.write, directory), functools.partial(_tell_of, shard, on_shard))

        run_batches(batches, keep)


def _tell_of(shard: _Shard, on_shard: Callable[[int, StoredError, str], None]) -> None:
    on_shard(shard.number, shard.error, shard.sha256)


class _Shard:
    """The content of one shard while it is filled."""

    def __init__(self, layout: CacheLayout, number: int) -> None:
        self.number = number
        self.error = StoredError()
        self.sha256 = ""
        self._layout = layout
        self._content = layout.format.empty(layout.shard_tokens[number])
        self._filled = 0

    def add(self, examples: Sequence[int], output: torch.Tensor) -> None:
        """Append the examples' rows of ``output`` [rows, longest, hidden]."""
        for row, example in enumerate(examples):
            end = self._filled + self._layout.length(example)
            into = {part: tensor[self._filled : end] for part, tensor in self._content.items()}
            self.error += self._layout.format.encode(output[row, : end - self._filled], into)
            self._filled = end

    def write(self, directory: Path) -> None:
        """Make the shard durable, and note the sha256 of its file."""
        tensors = ((_tensor_name(part, self.number), tensor) for part, tensor in self._content.items())
        path = directory / shard_name(self.number)
        self.sha256 = write_shard(path, self._layout.specs(self.number), tensors, metadata=None).sha256


def drop_damaged(
    directory: Path,
    layout: CacheLayout,
    facts: Iterable[Fact],
    *,
    what: str,
    check: Callable[[], None],
    on_event: OnEvent,
) -> list[int]:
    """Compare the shards of a finished cache with what was noted of them, and delete those that are damaged.

    Parameters
    ----------
    facts:
        What the journal says of the shards, oldest first: ``shard`` and ``sha256``. Earlier releases noted no sha256.
    what:
        What the cache holds, for the user.
    check:
        Called between shards; may raise to stop.

    Returns
    -------
    list of int
        Shards that are missing now, to be written again. The user is told of each.
    """
    noted = {int(fact["shard"]): fact.get("sha256") for fact in facts}
    missing = []
    told_s = time.monotonic()
    for number in range(len(layout.shards)):
        path = directory / shard_name(number)
        try:
            if noted.get(number) is not None:
                check_file(path, str(noted[number]), fix="start anew with --fresh", on_event=on_event)
            elif not path.is_file():
                raise DamagedFileError(f"{path} is missing")
        except DamagedFileError as error:
            on_event(Notice(text=f"{error.found}; this part of {what} is computed again"))
            files.remove_file(path)
            missing.append(number)
        if time.monotonic() - told_s >= SILENT_S:
            told_s = time.monotonic()
            on_event(Progress(task=f"checking {what}", done=number + 1, total=len(layout.shards), unit="shards"))
        check()
    return missing


class ActivationCache:
    """Reads a finished cache by batch. May be used from several threads.

    Parameters
    ----------
    keep_bytes:
        Host memory that may be used to keep the cache: if it fits whole, each shard is read once.
    shards:
        The shards that are there and will be read; None for all.

    Raises
    ------
    ModelError
        A shard is missing or damaged, or belongs to another layout.
    """

    def __init__(
        self, directory: Path, layout: CacheLayout, *, keep_bytes: int = 0, shards: Collection[int] | None = None
    ) -> None:
        self._layout = layout
        headers = {}
        for number in range(len(layout.shards)) if shards is None else shards:
            header = read_header(directory / shard_name(number))
            _check_shard(header, layout.specs(number))
            headers.update(dict.fromkeys(header.tensors, header))
        self._tensors = TensorFiles(headers)
        self._keeps = layout.total_bytes <= keep_bytes
        self._kept: dict[str, torch.Tensor] = {}
        self._keeping = threading.Lock()

    def read(self, examples: Sequence[int], longest: int) -> torch.Tensor:
        """Activations [rows, longest, hidden] on the CPU, zeros at padding; of longer examples the beginning."""
        layout = self._layout
        parts = [spec.name for spec in layout.format.specs(0)]
        hidden = torch.zeros(len(examples), longest, layout.format.hidden_size, dtype=layout.format.dtype)
        for row, example in enumerate(examples):
            shard, start = layout.place(example)
            length = min(layout.length(example), longest)
            stored = {part: self._rows(_tensor_name(part, shard), start, start + length) for part in parts}
            hidden[row, :length] = layout.format.decode(stored)
        return hidden

    def rows(self, examples: Sequence[int]) -> torch.Tensor:
        """The stored activations of some examples one after the other, [tokens, hidden] on the CPU; exact format."""
        layout = self._layout
        parts = [torch.empty(0, layout.format.hidden_size, dtype=layout.format.dtype)]
        for example in examples:
            shard, start = layout.place(example)
            if length := layout.length(example):
                parts.append(self._rows(_tensor_name("hidden", shard), start, start + length))
        return torch.cat(parts)

    def close(self) -> None:
        """Close the shard files and let go of what was kept."""
        self._kept.clear()
        self._tensors.close()

    def _rows(self, name: str, start: int, end: int) -> torch.Tensor:
        if not self._keeps:
            return self._tensors.read_range(name, start, end)
        with self._keeping:
            if name not in self._kept:
                self._kept[name] = self._tensors.read(name)
            return self._kept[name][start:end]


def _check_shard(header: Header, specs: Sequence[TensorSpec]) -> None:
    expected = {spec.name: (spec.dtype, spec.shape) for spec in specs}
    found = {name: (info.dtype, tuple(info.shape)) for name, info in header.tensors.items()}
    if found != expected:
        raise ModelError(
            f"{header.path} holds {_listed(found)}", expected=_listed(expected), fix="start anew with --fresh"
        )


def _listed(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    parts = [f"{name} ({str(dtype).removeprefix('torch.')} {list(shape)})" for name, (dtype, shape) in tensors.items()]
    return ", ".join(parts) or "nothing"
