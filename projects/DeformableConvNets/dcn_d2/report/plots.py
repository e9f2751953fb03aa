# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Curves and bars as SVG text to put into a page. Lines and letters have the page's own colour, light or dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .history import Series

# Distinguishable on white and on black, and for most people who do not tell red from green.
COLORS = ("#3b82c4", "#e07b39", "#2fa084", "#c4538a", "#8b6fc9", "#b8932b", "#5aa9e6", "#d6604d", "#7f8c8d", "#6b9e3c")
INK = "#010203"  # stands for the colour of the page's text until the SVG is complete
MOST_POINTS = 800
_numbers = itertools.count()


def draw(size: tuple[float, float], plot: Callable[[Any], None], label: str) -> str:
    """Gives the SVG of a figure.

    Args:
        size: (width, height) in inches.
        plot: draws into a figure of matplotlib.
        label: says to people who do not see it what it shows; it is HTML already.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    style: Any = {key: INK for key in ink} | {
        "svg.fonttype": "none",  # letters stay letters
        "svg.hashsalt": str(next(_numbers)),  # figures of one page must not share names
        "text.parse_math": False,  # a $ in the name of a class is a $
        "font.size": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.18,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL).replace(
        INK, "currentColor"
    )
    head = f'<svg role="img" aria-label="{label}" style="max-width:{size[0] * 96:.0f}px" '
    return re.sub(
        r'<svg( [^>]*?) width="[^"]*"',
        rf"{head}\1",
        re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1),
        count=1,
    )


def draw_losses(
    losses: Mapping[str, Series], validation: Mapping[str, Series], rate: Series | None, starts: Iterable[int]
) -> str:
    """Draws losses over the iterations, and below them the learning rate.

    Args:
        losses: of training, by name; total_loss is drawn strongest.
        validation: losses on held-out data.
        rate: the learning rate.
        starts: the iterations at which training was resumed.
    """

    def plot(figure: Any) -> None:
        axes = figure.subplots(2 if rate else 1, sharex=True, height_ratios=[3, 1] if rate else None, squeeze=False)[
            :, 0
        ]
        names = sorted(losses, key=lambda name: (name != "total_loss", name))
        for color, name in zip(itertools.cycle(COLORS), names):
            x, y = _with_gaps(*losses[name].thinned(MOST_POINTS))
            axes[0].plot(x, y, color=color, linewidth=1.8 if name == "total_loss" else 1.0, label=name)
        for color, name in zip(itertools.cycle(COLORS[::-1]), sorted(validation)):
            series = validation[name]
            axes[0].plot(series.iterations, series.values, "o--", color=color, markersize=3, linewidth=1.2, label=name)
        values = np.concatenate([np.array(series.values) for series in [*losses.values(), *validation.values()]])
        values = values[np.isfinite(values)]
        if len(values):  # a few large values of the first iterations would press all others flat
            axes[0].set_ylim(0, max(np.percentile(values, 99) * 1.1, values[-len(values) // 2 :].max() * 1.05, 1e-9))
        axes[0].set_ylabel("loss")
        columns = _legend_columns([*losses, *validation], 9)
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)
        if rate:
            axes[1].plot(*rate.thinned(MOST_POINTS), color=COLORS[0], linewidth=1.2)
            axes[1].set_ylabel("learning rate")
            axes[1].set_ylim(bottom=0)
        axes[-1].set_xlabel("iteration")
        for start in starts:
            for one in axes:
                one.axvline(start, color=INK, linestyle=":", linewidth=0.9)
            axes[0].annotate("resumed", (start, 1), xycoords=("data", "axes fraction"), fontsize=7, va="top", ha="left")

    return draw((9, 4.4), plot, "losses and learning rate over the iterations")


def _legend_columns(names: Iterable[str], width: float) -> int:
    """Gives how many columns of a legend fit into a figure of so many inches: a wider one is cut off."""
    longest = max(map(len, names), default=1) * 5 + 46  # in points: letters of 8 points, the line and the gaps
    return min(6, max(1, int((width * 72 - 40) // longest)))


def _with_gaps(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interrupts a line where iterations are missing: more than five times as many as usual."""
    if len(x) < 3:
        return x, y
    steps = np.diff(x)
    places = np.flatnonzero(steps > 5 * np.median(steps)) + 1
    return np.insert(x, places, np.nan), np.insert(y, places, np.nan)


def draw_progress(series: Mapping[str, Series], starts: Iterable[int]) -> str:
    """Draws results of evaluations over the iterations."""

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        for color, name in zip(itertools.cycle(COLORS), series):
            axes.plot(
                series[name].iterations, series[name].values, "o-", color=color, markersize=4, linewidth=1.4, label=name
            )
        for start in starts:
            axes.axvline(start, color=INK, linestyle=":", linewidth=0.9)
        axes.set(xlabel="iteration", ylabel="percent", ylim=(0, None))
        axes.legend(loc="best")

    return draw((9, 3.2), plot, "results of evaluations over the iterations")


def draw_curves(recalls: np.ndarray, curves: Mapping[str, np.ndarray], title: str) -> str:
    """Draws precision over recall, one line for each name."""

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        for number, (name, precision) in enumerate(curves.items()):
            line = "-" if number < len(COLORS) else "--"
            axes.plot(recalls, precision, line, color=COLORS[number % len(COLORS)], linewidth=1.5, label=name)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(title, fontsize=10)
        outside = len(curves) > 6
        axes.legend(loc="center left" if outside else "lower left", bbox_to_anchor=(1, 0.5) if outside else None)

    return draw((6.2 if len(curves) > 6 else 4.4, 3.4), plot, "precision over recall")


def draw_bars(names: Sequence[str], values: Sequence[float], title: str) -> str:
    """Draws one horizontal bar for each name, the first one on top; values are in percent."""

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        shown = np.nan_to_num(np.array(values, dtype=float))
        bars = axes.barh(range(len(names)), shown, color=COLORS[0], height=0.72)
        labels = ["not measured" if np.isnan(value) else f"{value:.1f}" for value in values]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set_yticks(range(len(names)), [name if len(name) <= 32 else f"{name[:31]}…" for name in names])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set(xlim=(0, max(10.0, shown.max(initial=0) * 1.15)), xlabel="percent")
        axes.set_title(title, fontsize=10)

    return draw((4.4, 0.9 + 0.24 * max(2, len(names))), plot, "bars")
