"""Held-out loss against time: reading a curve, and drawing several."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """Measurements (seconds, loss in nats per answer token) in order of time, straight lines between them."""

    name: str
    points: Sequence[tuple[float, float]]


def seconds_to(curve: Curve, loss: float) -> float | None:
    """When the curve first comes down to ``loss``; None if it never does.

    Loss falls ever more slowly: straight lines lie above the true curve, and tell too late rather than too early.
    """
    first_s, first_loss = curve.points[0]
    if first_loss <= loss:
        return first_s
    for (before_s, before), (after_s, after) in itertools.pairwise(curve.points):
        if after <= loss:
            return before_s + (after_s - before_s) * (before - loss) / (before - after)
    return None


def draw(path: Path, curves: Sequence[Curve], target: float | None) -> None:
    """Draw the curves to a PNG file, and ``target`` as a line across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for curve in curves:
        axes.plot(*zip(*curve.points, strict=True), marker="o", markersize=3, label=curve.name)
    if target is not None:
        axes.axhline(target, linestyle="--", linewidth=0.8, color="grey")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("held-out loss, nats per answer token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
