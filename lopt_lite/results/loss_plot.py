"""The picture of a run: its losses and learning rate, step by step, one panel above the other."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lopt_lite.results.stage_steps import Curve, StageSteps, is_finite
from lopt_lite.step_counts import StepCounts
from lopt_lite.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_IN, _LOSS_IN, _RATE_IN = 8.0, 2.3, 0.9
#: Pixels per inch; fewer for runs of very many blocks, whose picture would be tens of thousands of pixels high.
_DPI, _DPI_OF_MANY, _MANY_IN = 120, 60, 100.0
#: The smooth line is a mean over this share of the steps, drawn from this many steps on.
_SMOOTHED_SHARE, _SMOOTHED_FROM_STEPS = 40, 60
_RAW, _SMOOTH, _HELD_OUT, _SKIPPED, _RATE = "#9cc3e0", "#1f6fb2", "#d1590a", "#c01c28", "#5f6b76"


def draw_losses(stages: Sequence[StageSteps], held_out: Mapping[int, float], step_counts: StepCounts) -> bytes | None:
    """Draw all steps so far.

    Parameters
    ----------
    held_out:
        Held-out losses by epoch, 0 being before training; they stand in the panel of the last stage.

    Returns
    -------
    bytes or None
        A PNG file; None before the first step.
    """
    begun = [stage for stage in stages if stage.lines]
    if not begun:
        return None
    # Imported here: it takes half a second, and only the report needs it. No pyplot, which would choose a screen.
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(stage, curve) for stage in begun for curve in stage.curves()]
    heights = [_RATE_IN if curve.name == "learning rate" else _LOSS_IN for _, curve in panels]
    with matplotlib.style.context("default"):
        size = (_WIDTH_IN, sum(heights) + 0.3 * len(begun))
        figure = Figure(figsize=size, dpi=_DPI_OF_MANY if size[1] > _MANY_IN else _DPI, layout="constrained")
        FigureCanvasAgg(figure)
        all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for number, (axes, (stage, curve)) in enumerate(zip(all_axes, panels, strict=True)):
            is_last_of_run = stage is stages[-1] and curve.learns_task
            _draw_curve(axes, stage, curve, held_out if is_last_of_run else {}, step_counts)
            if number == 0 or panels[number - 1][0] is not stage:
                # Settings may hold any text, and fonts have no glyphs for some.
                title = plain(f"{stage.name}: {stage.objective}").encode("ascii", "backslashreplace").decode()
                axes.set_title(title, loc="left", fontsize=11, fontweight="bold", parse_math=False)
            if number + 1 == len(panels) or panels[number + 1][0] is not stage:
                axes.set_xlabel("step", fontsize=9)
            else:
                axes.tick_params(labelbottom=False)
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


def _draw_curve(
    axes: Axes, stage: StageSteps, curve: Curve, held_out: Mapping[int, float], step_counts: StepCounts
) -> None:
    """One panel; its legend names what is drawn beside the values of single steps."""
    from matplotlib.ticker import MaxNLocator

    steps = len(curve.values)
    numbers = range(1, steps + 1)
    fit = stage.phase("head-fit")
    fit_steps = 0 if fit is None else len(fit.lines)
    if fit_steps:
        axes.axvspan(0.5, fit_steps + 0.5, color="#eef1f4", zorder=0, label="the head is fitted first")
    if curve.name == "learning rate":
        axes.plot(numbers, curve.values, color=_RATE, linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.yaxis.get_offset_text().set_fontsize(8)
    else:
        _draw_losses(axes, curve.values)
        skipped = [position for position, line in enumerate(stage.lines, start=1) if not is_finite(line)]
        for position in skipped:
            label = "skipped: not finite" if position == skipped[0] else None
            axes.axvline(position, color=_SKIPPED, linewidth=1, linestyle=":", zorder=1, label=label)
    points = [
        (fit_steps + step_counts.at_end_of(epoch), loss)
        for epoch, loss in sorted(held_out.items())
        if math.isfinite(loss)
    ]
    if points:
        where, losses = zip(*points, strict=True)
        axes.plot(
            where,
            losses,
            "D--",
            color=_HELD_OUT,
            markersize=5,
            linewidth=1,
            label="held-out loss",
            zorder=4,
            clip_on=False,
        )
    axes.set_xlim(0 if points or steps > 1 else 0.5, steps + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("\n".join(part for part in (curve.name, curve.unit) if part), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="#d9dee3", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if curve.name != "learning rate" and axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False, loc="upper right")


def _draw_losses(axes: Axes, values: Sequence[float]) -> None:
    """The losses of single steps, and where there are many a smooth line through them."""
    import numpy

    losses = numpy.asarray(values, dtype=float)
    numbers = numpy.arange(1, len(losses) + 1)
    finite = numpy.isfinite(losses)
    if finite.any() and losses[finite].min() > 0 and losses[finite].max() > 20 * losses[finite].min():
        axes.set_yscale("log")
    if len(losses) < _SMOOTHED_FROM_STEPS:
        axes.plot(numbers, losses, color=_SMOOTH, linewidth=1.4, marker="o", markersize=2.5)
        return
    axes.plot(numbers, losses, color=_RAW, linewidth=0.8)
    axes.plot(numbers, _smoothed(losses), color=_SMOOTH, linewidth=1.8, label="mean of neighbouring steps")


def _smoothed(losses: Any) -> Any:
    """Mean of the finite values around each step; not a number where the step itself has none."""
    import numpy

    width = 2 * (len(losses) // (2 * _SMOOTHED_SHARE)) + 1
    finite = numpy.isfinite(losses)
    window = numpy.ones(width)
    sums = numpy.convolve(numpy.where(finite, losses, 0.0), window, mode="same")
    counts = numpy.convolve(finite.astype(float), window, mode="same")
    return numpy.where(finite, sums / numpy.maximum(counts, 1.0), numpy.nan)
