"""What layers that nobody has trained make of the examples, cached: shard by shard, each a durable fact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lopt_lite import files
from lopt_lite.checkpoints.store import Store
from lopt_lite.data.dataset import Batch, TokenizedDataset, collate
from lopt_lite.events import Progress
from lopt_lite.residency.block_major import WAITING, pass_blocks
from lopt_lite.residency.choices import Residence
from lopt_lite.training.activation_cache import CacheLayout, drop_damaged, shard_name, write_cache
from lopt_lite.training.block_inputs import BlockInputs
from lopt_lite.training.cache_format import StoredError
from lopt_lite.training.workbench import Workbench

#: About so many padded tokens pass through all blocks before the next ones do: enough to make loading blocks cheap.
_PORTION_TOKENS = 65536


class UntouchedPass:
    """A cache of what untouched layers make of the examples, and how far it is.

    The journal has a fact for each shard (``shard_fact``) and one when all are there (``fact``).

    Parameters
    ----------
    directory, layout:
        The cache.
    fact, shard_fact, keys:
        Names of the facts, and what else is in them.
    what:
        What the cache holds, for the user.
    dataset:
        The examples, or beginnings of them.
    """

    def __init__(
        self,
        bench: Workbench,
        directory: Path,
        layout: CacheLayout,
        *,
        fact: str,
        shard_fact: str,
        what: str,
        dataset: TokenizedDataset,
        **keys: Any,
    ) -> None:
        self._bench, self._directory, self._layout, self._dataset = bench, directory, layout, dataset
        self._fact, self._shard_fact, self._keys, self._what = fact, shard_fact, keys, what
        self._finished_before = bench.journal.last(fact, **keys) is not None

    def stands(self) -> bool:
        """Whether the cache is whole. Damaged shards of one that was finished are deleted, to be written again."""
        if not self._finished_before:
            return False
        bench = self._bench
        facts = bench.journal.all(self._shard_fact, **self._keys)
        return not drop_damaged(
            self._directory, self._layout, facts, what=self._what, check=bench.stop.check, on_event=bench.on_event
        )

    def write(
        self,
        store: Store,
        ranges: Sequence[tuple[int, int]],
        inputs: BlockInputs,
        *,
        residence: Residence,
        rows_of: Callable[[Batch, torch.Tensor], torch.Tensor],
    ) -> None:
        """Pass the examples through the layers of ``store`` and write the shards that are missing.

        Parameters
        ----------
        ranges:
            (first layer, end layer) of each part that is loaded at once; ``inputs`` are those of the first.
        residence:
            Where these layers are meanwhile.
        rows_of:
            Of a batch's outputs [rows, longest, hidden] those that are kept, moved to the front: [rows, most, hidden].

        Raises
        ------
        StoppedError, DoesNotFitError
            See :func:`write_cache`.
        """
        bench, layout = self._bench, self._layout
        journalled = {int(fact["shard"]) for fact in bench.journal.all(self._shard_fact, **self._keys)}
        done = {number for number in journalled if (self._directory / shard_name(number)).is_file()}
        files.require_free_space(
            bench.paths.root,
            layout.shard_bytes(n for n in range(len(layout.shards)) if n not in done) + files.BESIDE_BYTES,
            what=f"the cache of {self._what}",
        )
        total = len(ranges) * sum(len(batches) for batches in layout.shards)
        passed = len(ranges) * sum(len(layout.shards[number]) for number in done)

        def on_pass() -> None:
            nonlocal passed
            bench.stop.check()
            passed += 1
            bench.on_event(Progress(task=self._what, done=passed, total=total, unit="batches"))

        def run_batches(batches: list[list[int]], on_output: Callable[[int, torch.Tensor], None]) -> None:
            for begin, end in _portions(batches, layout.lengths):
                collated = [collate(self._dataset, batch, bench.pad_token_id) for batch in batches[begin:end]]

                def take(
                    number: int, output: torch.Tensor, begin: int = begin, collated: list[Batch] = collated
                ) -> None:
                    on_output(begin + number, rows_of(collated[number], output))

                pass_blocks(
                    store,
                    bench.skeleton,
                    collated,
                    ranges,
                    inputs.micro_batch,
                    take,
                    device=bench.device,
                    residence=residence,
                    spill_limits=WAITING,
                    spill_directory=bench.paths.root,
                    on_pass=on_pass,
                )

        def on_shard(number: int, error: StoredError, sha256: str) -> None:
            bench.journal.add(self._shard_fact, **self._keys, shard=number, name=shard_name(number), sha256=sha256)

        write_cache(self._directory, layout, run_batches, done=done, on_shard=on_shard)
        if not self._finished_before:
            bench.journal.add(self._fact, **self._keys)


def _portions(batches: Sequence[Sequence[int]], lengths: torch.Tensor) -> list[tuple[int, int]]:
    """Stretches of ``batches`` with about :data:`_PORTION_TOKENS` padded tokens each."""
    portions: list[tuple[int, int]] = []
    begin = tokens = 0
    for number, batch in enumerate(batches):
        tokens += len(batch) * max(int(lengths[example]) for example in batch)
        if tokens >= _PORTION_TOKENS or number == len(batches) - 1:
            portions.append((begin, number + 1))
            begin, tokens = number + 1, 0
    return portions
