"""A block's inputs for every example, on disk: ragged, without padding.

The cache is a directory of safetensors shards. Shard ``n`` holds one tensor ``hidden.n`` [tokens, hidden] with whole
examples one after the other. Which example lies where follows from the examples' lengths alone (:class:`CacheLayout`),
so nothing but the activations is stored, and a half-written cache continues at its next shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from lopt_lite import files
from lopt_lite.checkpoints.header import read_header
from lopt_lite.checkpoints.shard_writer import TensorSpec, write_shard
from lopt_lite.checkpoints.tensors import TensorFiles
from lopt_lite.data.batches import length_sorted_batches

_SHARD_BYTES = 64 << 20

RunBatches = Callable[[list[list[int]], Callable[[int, torch.Tensor], None]], None]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def _tensor_name(number: int) -> str:
    return f"hidden.{number:05d}"


class CacheLayout:
    """Where each example's activations lie.

    Parameters
    ----------
    lengths:
        int64 [examples], tokens of each example.
    hidden_size, dtype:
        Shape and type of one token's activation.
    max_tokens, max_rows:
        Largest batch of the pass that writes the cache; a shard holds whole batches.
    """

    def __init__(
        self, lengths: torch.Tensor, *, hidden_size: int, dtype: torch.dtype, max_tokens: int, max_rows: int
    ) -> None:
        self.lengths = lengths
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.shards: list[list[list[int]]] = []
        self.shard_tokens: list[int] = []
        self._place: list[tuple[int, int]] = [(0, 0)] * len(lengths)
        token_bytes = hidden_size * dtype.itemsize
        for batch in length_sorted_batches(lengths, max_tokens=max_tokens, max_rows=max_rows):
            if not self.shards or self.shard_tokens[-1] * token_bytes >= _SHARD_BYTES:
                self.shards.append([])
                self.shard_tokens.append(0)
            self.shards[-1].append(batch)
            for example in batch:
                self._place[example] = (len(self.shards) - 1, self.shard_tokens[-1])
                self.shard_tokens[-1] += int(lengths[example])
        self.total_bytes = sum(self.shard_tokens) * token_bytes

    def place(self, example: int) -> tuple[int, int]:
        """(shard, first row within the shard) of an example."""
        return self._place[example]


def write_cache(
    directory: Path,
    layout: CacheLayout,
    run_batches: RunBatches,
    *,
    done: Sequence[int],
    on_shard: Callable[[int], None],
) -> None:
    """Write the shards that are missing.

    Parameters
    ----------
    run_batches:
        Given a shard's batches of example indices, tells its callback each batch's number, in order, and activations
        [rows, longest, hidden], right-padded.
    done:
        Shards that are durable already.
    on_shard:
        Called with a shard's number once it is durable.
    """
    files.make_directory(directory)
    for number, batches in enumerate(layout.shards):
        if number in done and (directory / shard_name(number)).is_file():
            continue
        spec = TensorSpec(_tensor_name(number), layout.dtype, (layout.shard_tokens[number], layout.hidden_size))

        def content(spec: TensorSpec = spec, batches: list[list[int]] = batches) -> Iterator[tuple[str, torch.Tensor]]:
            rows = torch.empty(spec.shape, dtype=spec.dtype)
            start = 0

            def keep(position: int, output: torch.Tensor) -> None:
                nonlocal start
                output = output.to("cpu", spec.dtype)
                for row, example in enumerate(batches[position]):
                    length = int(layout.lengths[example])
                    rows[start : start + length] = output[row, :length]
                    start += length

            run_batches(batches, keep)
            yield spec.name, rows

        write_shard(directory / shard_name(number), [spec], content(), metadata=None)
        on_shard(number)


class ActivationCache:
    """Reads a finished cache by batch.

    Raises
    ------
    ModelError
        A shard is missing or damaged.
    """

    def __init__(self, directory: Path, layout: CacheLayout) -> None:
        self._layout = layout
        headers = {}
        for number in range(len(layout.shards)):
            header = read_header(directory / shard_name(number))
            headers.update(dict.fromkeys(header.tensors, header))
        self._tensors = TensorFiles(headers)

    def read(self, examples: Sequence[int], longest: int) -> torch.Tensor:
        """Activations [rows, longest, hidden] on the CPU, zeros at padding."""
        layout = self._layout
        hidden = torch.zeros(len(examples), longest, layout.hidden_size, dtype=layout.dtype)
        for row, example in enumerate(examples):
            shard, start = layout.place(example)
            length = int(layout.lengths[example])
            hidden[row, :length] = self._tensors.read_range(_tensor_name(shard), start, start + length)
        return hidden

    def close(self) -> None:
        """Close the shard files."""
        self._tensors.close()
