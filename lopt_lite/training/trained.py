"""What a block trains: values, gradients and optimiser state, in memory or put aside layer by layer.

Parameters belong to groups: one per layer, one for each reconstruction head, and more for what is trained around the
layers. Each group has its own optimiser, so that a layer can be updated while the others are elsewhere. The update is

* global (LoRA, and the joint schedule): when all gradients of a step are there, they are clipped together at norm 1.0,
  and all groups step;
* per layer (full tuning of one block): a layer's gradients are clipped at norm 1.0 by themselves, and the layer steps,
  as soon as its backward pass is done; so there is never more than one layer's gradient where layers are worked on one
  by one.

Where things are changes no bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from lopt_lite.residency.spill import Spill
from lopt_lite.training.optimisation import (
    clipped_step,
    gradient_norm,
    make_optimizer,
    optimizer_state,
    rounded_step,
    set_optimizer_state,
)


@dataclass(frozen=True)
class _Away:
    """A tensor of an optimiser's state that is in the storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class _Group:
    """Parameters that are updated together.

    ``scaffolding``: they belong to training and not to the result. ``away``: their values are in the storage now.
    ``state_away``: for each parameter, what its optimiser remembers of it and does not hold itself at present; single
    numbers are kept at hand.
    """

    parameters: dict[str, nn.Parameter]
    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]
    scaffolding: bool = False
    optimizer: torch.optim.Optimizer | None = None
    away: bool = False
    state_away: dict[str, dict[str, torch.Tensor | _Away]] = field(default_factory=dict)
    norms: torch.Tensor | None = None


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint that is made when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


class TrainedParameters:
    """Everything a block trains. See :class:`~lopt_lite.residency.pool.LayerState` for what the layers' pool tells it.

    Parameters
    ----------
    storage:
        Where layers' parameters and state are while their layer is not worked on; None keeps them in place.
    per_layer:
        Whether layers are updated one by one during the backward pass.
    eight_bit:
        See :func:`make_optimizer`.
    """

    def __init__(self, *, storage: Spill | None, per_layer: bool, eight_bit: bool = False) -> None:
        self._storage, self._per_layer, self._eight_bit = storage, per_layer, eight_bit
        self._groups: dict[int | str, _Group] = {}
        self._layers_train = False
        self._rate: Callable[[int | str], float] = _no_rate
        self._seed = 0
        self._update_norms: list[torch.Tensor] = []

    # -- what there is ------------------------------------------------------------------------------------------------

    def add(self, group: int | str, parameters: dict[str, nn.Parameter], *, scaffolding: bool = False) -> None:
        """Take ``parameters`` (by their names in checkpoints) under control: a layer's, or (a word) something else's.

        They must be in their place and hold their values. Of a layer that trains nothing there are none.

        Parameters
        ----------
        scaffolding:
            They are a reconstruction head's, and may be trained while everything else rests.
        """
        if not parameters:
            return
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self._groups[group] = _Group(
            parameters,
            {name: p.shape for name, p in parameters.items()},
            {name: p.dtype for name, p in parameters.items()},
            scaffolding,
        )

    def begin(self, *, scaffolding_only: bool) -> None:
        """A new stretch of training begins, with new optimisers: of everything, or of reconstruction heads alone."""
        self._layers_train = not scaffolding_only
        for name, group in self._groups.items():
            trains = group.scaffolding or not scaffolding_only
            for parameter in group.parameters.values():
                parameter.requires_grad_(trains)
                parameter.grad = None
            self._forget_state(group)
            group.optimizer = (
                make_optimizer(group.parameters.values(), eight_bit=self._eight_bit and isinstance(name, int))
                if trains
                else None
            )

    # -- one step -----------------------------------------------------------------------------------------------------

    def begin_step(self, rate: Callable[[int | str], float], *, seed: int = 0) -> None:
        """A step begins. ``rate``: learning rate of a group; ``seed`` is for what is rounded at random in the step."""
        self._rate, self._seed = rate, seed
        self._update_norms = []

    def enter(self, index: int) -> None:
        """Bring the values of a layer's parameters in."""
        group = self._groups.get(index)
        if group is not None and group.away:
            assert self._storage is not None
            for name, parameter in group.parameters.items():
                parameter.data = self._storage.peek(("parameter", name))
            group.away = False

    def leave(self, index: int) -> None:
        """Let go of them; nothing has changed them since they were put aside."""
        group = self._groups.get(index)
        if group is None or self._storage is None:
            return
        for name, parameter in group.parameters.items():
            if ("parameter", name) not in self._storage:
                self._storage.put(("parameter", name), parameter)
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        group.away = True

    def after_backward(self, index: int) -> None:
        """A layer's gradients are complete: update it, or put them aside, or leave them where they are."""
        group = self._groups.get(index)
        if group is None or not self._layers_train:
            return
        if self._per_layer:
            norms = gradient_norm(_gradients(group))
            norm = torch.linalg.vector_norm(norms)
            self._update_norms.append(norm)
            if math.isfinite(float(norm)):
                self._update(index, group, norm)
            _drop_gradients(group)
        elif self._storage is not None:
            group.norms = gradient_norm(_gradients(group))
            for name, parameter in group.parameters.items():
                # None of what the loss does not depend on: what only chooses (an indexer, a router's bias).
                if parameter.grad is not None:
                    self._storage.replace(("gradient", name), parameter.grad)
                elif ("gradient", name) in self._storage:
                    self._storage.forget(("gradient", name))  # of a step that was abandoned
            _drop_gradients(group)

    def end_step(self, *, finite: bool) -> float:
        """Update everything that is not updated yet; returns the norm of all gradients before clipping.

        A norm that is not finite, or ``finite`` being False, leaves the parameters untouched.
        """
        waiting = {name: group for name, group in self._groups.items() if group.optimizer is not None}
        if self._per_layer:
            waiting = {name: group for name, group in waiting.items() if not isinstance(name, int)}
        norms = [g.norms if g.norms is not None else gradient_norm(_gradients(g)) for g in waiting.values()]
        if self._per_layer:
            total = _together([*reversed(self._update_norms), *norms])
            units = [torch.linalg.vector_norm(norm) for norm in norms]
        else:
            total = _together(norms)
            units = [total] * len(waiting)
        # Looked at before any update is queued, since reading a number waits for the device.
        if self._per_layer:
            good = [math.isfinite(float(norm)) for norm in units]
        else:
            good = [math.isfinite(float(total))] * len(waiting)
        for (name, group), norm, is_good in zip(waiting.items(), units, good, strict=True):
            if finite and is_good:
                self._update_where_it_is(name, group, norm)
            _drop_gradients(group)
            group.norms = None
        # It may refer to whoever trains, who refers to this.
        self._rate = _no_rate
        return float(total) if finite else math.nan

    @property
    def updated_in_step(self) -> bool:
        """Whether a layer was updated already in this step, so that the step cannot be begun again."""
        return bool(self._update_norms)

    def abandon_step(self) -> None:
        """Forget the gradients of a step that came to nothing."""
        for group in self._groups.values():
            _drop_gradients(group)
            group.norms = None

    def _update_where_it_is(self, key: int | str, group: _Group, norm: torch.Tensor) -> None:
        if not group.away:
            self._update(key, group, norm)
            return
        assert self._storage is not None
        for name, parameter in group.parameters.items():
            parameter.data = self._storage.take(("parameter", name))
            has_gradient = ("gradient", name) in self._storage
            parameter.grad = self._storage.take(("gradient", name)) if has_gradient else None
        self._update(key, group, norm)
        for name, parameter in group.parameters.items():
            self._storage.replace(("parameter", name), parameter)
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    def _update(self, key: int | str, group: _Group, norm: torch.Tensor) -> None:
        """One optimiser step of a group whose values and gradients are in place."""
        assert group.optimizer is not None
        self._bring_state(group)
        if torch.bfloat16 in group.dtypes.values():
            rounded_step(group.optimizer, group.parameters, norm=norm, lr=self._rate(key), seed=self._seed)
        else:
            clipped_step(group.optimizer, norm=norm, lr=self._rate(key))
        self._put_state_aside(group)
        if self._storage is not None and self._per_layer:
            for name, parameter in group.parameters.items():
                if ("parameter", name) in self._storage:
                    self._storage.replace(("parameter", name), parameter)

    # -- the optimisers' state ----------------------------------------------------------------------------------------

    def _bring_state(self, group: _Group) -> None:
        assert group.optimizer is not None
        for name, parameter in group.parameters.items():
            if name in group.state_away:
                state = {key: self._fetch(name, key, value) for key, value in group.state_away[name].items()}
                set_optimizer_state(group.optimizer, parameter, state)

    def _fetch(self, name: str, key: str, value: torch.Tensor | _Away) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value
        assert self._storage is not None
        return self._storage.peek(("state", key, name))

    def _put_state_aside(self, group: _Group) -> None:
        if self._storage is None or not self._belongs_to_a_layer(group):
            return
        assert group.optimizer is not None
        for name, parameter in group.parameters.items():
            away: dict[str, torch.Tensor | _Away] = {}
            for key, value in optimizer_state(group.optimizer, parameter).items():
                if value.dim() == 0:
                    away[key] = value
                else:
                    self._storage.replace(("state", key, name), value)
                    away[key] = _Away(value.dtype, tuple(value.shape))
            if away:
                group.state_away[name] = away
            group.optimizer.state.pop(parameter, None)

    def _forget_state(self, group: _Group) -> None:
        for name, values in group.state_away.items():
            for key, value in values.items():
                if isinstance(value, _Away) and self._storage is not None:
                    self._storage.forget(("state", key, name))
        group.state_away.clear()

    def _belongs_to_a_layer(self, group: _Group) -> bool:
        return any(group is found and isinstance(name, int) for name, found in self._groups.items())

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def parameters(self, groups: Callable[[int | str], bool] = lambda name: True) -> Iterator[SavedTensor]:
        """The values, by name, wherever they are."""
        for key, group in self._groups.items():
            if groups(key):
                for name in group.parameters:
                    read = partial(self._value, group, name)
                    yield SavedTensor(name, group.dtypes[name], tuple(group.shapes[name]), read)

    def state(self) -> Iterator[SavedTensor]:
        """Everything the optimisers remember, named ``KEY.PARAMETER``."""
        for group in self._groups.values():
            if group.optimizer is None:
                continue
            for name, parameter in group.parameters.items():
                held = group.state_away.get(name) or optimizer_state(group.optimizer, parameter)
                for key, value in held.items():
                    read = partial(self._fetch, name, key, value)
                    yield SavedTensor(f"{key}.{name}", value.dtype, tuple(value.shape), read)

    def restore(self, read: Callable[[str], torch.Tensor], state_names: dict[str, list[str]]) -> None:
        """Put the values of a checkpoint back.

        Parameters
        ----------
        read:
            Reads the tensor of a name as :meth:`parameters` (after ``parameter.``) and :meth:`state` (after
            ``optimizer.``) gave it.
        state_names:
            For each parameter, the keys of its optimiser state.
        """
        for key, group in self._groups.items():
            for name, parameter in group.parameters.items():
                value = read(f"parameter.{name}")
                if group.away:
                    assert self._storage is not None
                    self._storage.replace(("parameter", name), value.to(parameter.device))
                else:
                    parameter.data.copy_(value)
            if group.optimizer is None:
                continue
            for name, parameter in group.parameters.items():
                state = {k: read(f"optimizer.{k}.{name}") for k in state_names.get(name, ())}
                if state:
                    set_optimizer_state(group.optimizer, parameter, state)
            if isinstance(key, int):
                self._put_state_aside(group)

    def _value(self, group: _Group, name: str) -> torch.Tensor:
        if group.away:
            assert self._storage is not None
            return self._storage.peek(("parameter", name))
        return group.parameters[name].detach()


def _no_rate(group: int | str) -> float:
    return 0.0


def _gradients(group: _Group) -> list[torch.Tensor]:
    return [p.grad if p.grad is not None else torch.zeros(1, device=p.device) for p in group.parameters.values()]


def _drop_gradients(group: _Group) -> None:
    for parameter in group.parameters.values():
        parameter.grad = None


def _together(norms: list[torch.Tensor]) -> torch.Tensor:
    """The norm of everything whose parts have these norms."""
    if not norms:
        return torch.zeros(())
    # What is trained around the layers may be on another device.
    return torch.linalg.vector_norm(torch.cat([norm.reshape(-1).to(norms[0].device) for norm in norms]))
