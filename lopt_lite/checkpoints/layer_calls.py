"""How a model calls its layers: proxies in their places note the arguments, which the real layers are given later."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: (index of the layer, positional arguments, keyword arguments) -> what the model is to get from the layer.
Note = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer for one batch, without the hidden state.

    ``hidden_keyword`` is None when the hidden state is the first positional argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_keyword: str | None

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Call ``layer`` on ``hidden`` [rows, tokens, hidden]; returns the new hidden state, same shape."""
        args, kwargs = [_own(value) for value in self.args], {name: _own(value) for name, value in self.kwargs.items()}
        if self.hidden_keyword is None:
            output = layer(hidden, *args, **kwargs)
        else:
            output = layer(*args, **{self.hidden_keyword: hidden}, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def _own(value: Any) -> Any:
    """A layer's own copy of a mapping that all layers are given.

    What it leaves there for others would keep its activations alive, and is not there when layers run one by one.
    """
    return copy.copy(value) if isinstance(value, MutableMapping) else value


@dataclass(frozen=True)
class Recording:
    """What one batch brings to the layers.

    Attributes
    ----------
    hidden:
        Input of the first layer, [rows, tokens, hidden] in the compute dtype; zeros when embeddings were not asked for.
    calls:
        One entry per layer of the model.
    """

    hidden: torch.Tensor
    calls: list[LayerCall]


class StopForward(BaseException):
    """Leaves the model's forward once the last layer's arguments are known. Not an Exception, so nothing catches it."""


def words_of(layer: nn.Module) -> dict[str, str]:
    """What a layer says of its own kind, by attribute (Nemotron-H's ``block_type``): models ask their layers for it."""
    return {name: value for name, value in vars(layer).items() if isinstance(value, str)}


class LayerProxy(nn.Module):
    """Stands in for one layer: has its arguments noted, and gives the model what the note says.

    Models may ask it what kind of layer it is (Nemotron-H's ``block_type``), but not for a part of it.

    Attributes
    ----------
    note:
        What is called in the layer's place.
    """

    def __init__(self, template: nn.Module, index: int, note: Note) -> None:
        super().__init__()
        self.note = note
        self._index = index
        self._told = words_of(template)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_told", ()):
            return self._told[name]
        raise AttributeError(
            f"a layer is asked for its {name!r}, which is not there while layers are driven one by one"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.note(self._index, args, kwargs)


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LayerCall, Any]:
    """Separate the hidden state from a layer's other arguments."""
    if args:
        return LayerCall(args[1:], dict(kwargs), None), args[0]
    rest = dict(kwargs)
    hidden = rest.pop("hidden_states", None)
    return LayerCall((), rest, "hidden_states"), hidden
