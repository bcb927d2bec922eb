"""Cutting the layers into blocks."""

from __future__ import annotations

from dataclasses import dataclass

from lopt_lite.errors import SettingsError


@dataclass(frozen=True)
class Block:
    """Layers ``first`` to ``end`` (exclusive) between two gradient boundaries, and what they learn."""

    index: int
    first: int
    end: int
    objective: str


def plan_blocks(layers: int, objectives: tuple[str, ...]) -> list[Block]:
    """Cut ``layers`` layers into ``len(objectives)`` blocks.

    Each block gets ``layers // blocks`` layers and the first ``layers % blocks`` one more, as in LoPT's official code.

    Raises
    ------
    SettingsError
        There are more blocks than layers.
    """
    count = len(objectives)
    if count > layers:
        raise SettingsError(f"--blocks is {count}, and the model has {layers} layers", expected=f"at most {layers}")
    blocks, first = [], 0
    for index, objective in enumerate(objectives):
        end = first + layers // count + (1 if index < layers % count else 0)
        blocks.append(Block(index, first, end, objective))
        first = end
    return blocks
