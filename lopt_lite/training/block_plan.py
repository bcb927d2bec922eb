"""Cutting the layers into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lopt_lite.errors import SettingsError


@dataclass(frozen=True)
class Block:
    """Layers ``first`` to ``end`` (exclusive) between two gradient boundaries, and what they learn."""

    index: int
    first: int
    end: int
    objective: str


def plan_blocks(layers: int, objectives: tuple[str, ...], last_layers: int | None = None) -> list[Block]:
    """Cut ``layers`` layers into ``len(objectives)`` blocks.

    Each block gets ``layers // blocks`` layers and the first ``layers % blocks`` one more, as in LoPT's official code;
    or the last one gets ``last_layers``, and the others share what is left in this way.

    Raises
    ------
    SettingsError
        There are more blocks than layers, or the last one leaves too few for the others.
    """
    count = len(objectives)
    if count > layers:
        raise SettingsError(f"--blocks is {count}, and the model has {layers} layers", expected=f"at most {layers}")
    sizes = _shares(layers, count)
    if last_layers is not None and count > 1:
        most = layers - (count - 1)
        if last_layers > most:
            raise SettingsError(
                f"--last-layers is {last_layers}, and the model has {layers} layers in {count} blocks",
                expected=f"at most {most}",
            )
        sizes = [*_shares(layers - last_layers, count - 1), last_layers]
    blocks, first = [], 0
    for index, (size, objective) in enumerate(zip(sizes, objectives, strict=True)):
        blocks.append(Block(index, first, first + size, objective))
        first += size
    return blocks


def check_something_learns(blocks: Sequence[Block], trained_parameters: Sequence[int], lora_targets: str) -> None:
    """See that there is something to train in every block that learns.

    Parameters
    ----------
    trained_parameters:
        Of each layer.

    Raises
    ------
    SettingsError
        No layer of a block has a module that ``--lora-targets`` names.
    """
    for block in blocks:
        if block.objective != "none" and not any(trained_parameters[block.first : block.end]):
            raise SettingsError(
                f"--lora-targets is {lora_targets}, and layers {block.first + 1} to {block.end}, which are block "
                f"{block.index + 1}, have no such module",
                expected="modules that each block has",
                fix="name others, or use fewer --blocks or more --last-layers",
            )


def _shares(layers: int, count: int) -> list[int]:
    """``count`` numbers that add up to ``layers``, the first ones larger by one where they cannot be the same."""
    return [layers // count + (1 if index < layers % count else 0) for index in range(count)]


@dataclass(frozen=True)
class Stage:
    """Blocks that are trained at the same time: one, or (the joint schedule) all of them."""

    index: int
    blocks: tuple[Block, ...]

    @property
    def first(self) -> int:
        """The first layer."""
        return self.blocks[0].first

    @property
    def end(self) -> int:
        """The layer after the last one."""
        return self.blocks[-1].end

    @property
    def objective(self) -> str:
        """What the blocks learn, in a word."""
        return self.blocks[0].objective if len(self.blocks) == 1 else "joint"

    @property
    def name(self) -> str:
        """``block 2``, or ``blocks 1 to 4``; numbers from 1."""
        numbers = [str(block.index + 1) for block in self.blocks]
        return f"block {numbers[0]}" if len(numbers) == 1 else f"blocks {numbers[0]} to {numbers[-1]}"

    def block_of(self, layer: int) -> Block:
        """The block that a layer belongs to."""
        return next(block for block in self.blocks if block.first <= layer < block.end)


def plan_stages(blocks: Sequence[Block], schedule: str) -> list[Stage]:
    """The order in which blocks are trained: one after the other, or all at once."""
    if schedule == "joint":
        return [Stage(0, tuple(blocks))]
    return [Stage(block.index, (block,)) for block in blocks]
