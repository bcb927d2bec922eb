"""Matrices of a layer that are not the weights of its plain modules: fused experts, routers, convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lopt_lite.checkpoints.skeleton import Skeleton


def matrices_besides(
    skeleton: Skeleton, layers: Iterable[int], modules_of: Callable[[int], list[str]]
) -> dict[str, list[int]]:
    """Where there are matrices besides the weights of some modules.

    Parameters
    ----------
    layers:
        The layers to look at. All of them: in many models the first ones have no experts.
    modules_of:
        Gives the names (within the layer) of the modules of a layer.

    Returns
    -------
    dict
        From the name within the layer to the numbers of the layers that have it.
    """
    found: dict[str, list[int]] = {}
    for index in layers:
        weights = {f"{module}.weight" for module in modules_of(index)}
        for name, shape in skeleton.layer_parameters(index).items():
            if len(shape) >= 2 and name.endswith(("weight", "_proj")) and name not in weights:
                found.setdefault(name, []).append(index)
    return found


def told_by_layers(places: dict[str, list[int]], layers: int) -> str:
    """What :func:`matrices_besides` found among so many layers: ``a, b of each layer and c of 3 of 4 layers``."""
    together: dict[tuple[int, ...], list[str]] = {}
    for name, indices in places.items():
        together.setdefault(tuple(indices), []).append(name)
    return " and ".join(
        f"{', '.join(names)} of {'each layer' if len(indices) == layers else f'{len(indices)} of {layers} layers'}"
        for indices, names in together.items()
    )
