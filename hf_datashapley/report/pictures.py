"""The report's pictures: arrays in, one inline SVG each, drawn by matplotlib and coloured by the page.

Text stays text and colours are stand-ins that become the page's CSS variables, so that one drawing serves light, dark
and print, in the page's own font. Each picture is half a page wide: two stand side by side on a desk and one fills a
phone. Lines are labelled at their ends, and a sign is always written, so that no colour has to be told apart.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_datashapley.report.aggregate import Audit, Floats, Ints
from hf_datashapley.report.nats import NatScale


WIDTH = 4.5  # inches
_STEPS = [1, 2, 5, 10]  # ticks at round numbers
LINES = 8  # so many line colours can be told apart at all
PAIRS = 60  # so many updates can be told apart
_VARIABLES = ("ink", "muted", "grid", "helped", "hurt", *(f"line-{i}" for i in range(LINES)))
_STAND_IN = {name: f"#0000{index:02x}" for index, name in enumerate(_VARIABLES, start=1)}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_datashapley",
    "text.parse_math": False,  # a domain may be called $x
    "font.size": 8.0,
    "text.color": _STAND_IN["ink"],
    "axes.edgecolor": _STAND_IN["grid"],
    "axes.labelcolor": _STAND_IN["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": _STAND_IN["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": _STAND_IN["grid"],
    "ytick.color": _STAND_IN["grid"],
    "xtick.labelcolor": _STAND_IN["muted"],
    "ytick.labelcolor": _STAND_IN["muted"],
    "ytick.major.size": 0.0,
    "xtick.major.size": 3.0,
}


def group_bars(names: Sequence[str], value_G: Floats, error_G: Floats, scale: NatScale) -> str:
    """A bar for each group with its standard error and its number, the best on top."""
    order = np.argsort(value_G, kind="stable")
    value, error = value_G[order] * scale.factor, error_G[order] * scale.factor
    rows = np.arange(len(order))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 0.35 + 0.235 * len(order)))
        axes = figure.subplots()
        colors = [_STAND_IN["helped" if x >= 0 else "hurt"] for x in value]
        axes.barh(rows, value, height=0.56, color=colors, linewidth=0)
        known = ~np.isnan(error)
        axes.errorbar(
            value[known], rows[known], xerr=error[known], fmt="none", ecolor=_STAND_IN["ink"], elinewidth=1, capsize=2
        )
        axes.axvline(0, color=_STAND_IN["muted"], linewidth=0.8)
        axes.set_yticks(rows, [_short(names[g]) for g in order], color=_STAND_IN["ink"])
        axes.set_ylim(-0.6, len(order) - 0.4)
        for row, group in enumerate(order):
            number = scale.signed(value_G[group])
            if known[row]:
                number += f" ± {scale.size(error_G[group])}"
            axes.text(1.04, row, number, transform=axes.get_yaxis_transform(), va="center")
        axes.spines["bottom"].set_visible(False)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        _frame(figure, axes, left=1.4, right=1.05)
        return _svg(figure)


def cumulated_lines(
    step_T: Ints, names: Sequence[str], value_GT: Floats, named: Sequence[int], scale: NatScale
) -> str:
    """Cumulated value over training; the groups in `named` are coloured and labelled, the others stay grey."""
    shown = np.unique(np.linspace(0, len(step_T) - 1, 300).round().astype(int))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 2.5))
        axes = figure.subplots()
        axes.axhline(0, color=_STAND_IN["muted"], linewidth=0.8)
        lines = value_GT[:, shown] * scale.factor
        for group in sorted(set(range(len(names))) - set(named)):
            axes.plot(step_T[shown], lines[group], color=_STAND_IN["grid"], linewidth=0.8)
        for color, group in enumerate(named):
            axes.plot(step_T[shown], lines[group], color=_STAND_IN[f"line-{color}"], linewidth=1.5)
        axes.grid(axis="y")
        axes.set_xlim(step_T[0], max(step_T[-1], step_T[0] + 1))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        _frame(figure, axes, left=0.4, right=1.4, below="update")
        _label_ends(axes, [lines[group, -1] for group in named], [names[group] for group in named])
        return _svg(figure)


def histogram(unit: str, value_N: Floats, scale: NatScale) -> str:
    """Samples or documents by value; the extreme half per cent on either side is counted, not drawn."""
    low, high = np.quantile(value_N, [0.005, 0.995])
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / 60 or 1.0
    edges = np.arange(np.floor(low / width), max(np.ceil(high / width), 1) + 1) * width  # 0 is an edge
    count, _ = np.histogram(value_N, edges)
    beyond = len(value_N) - count.sum()
    below = f"value of a {unit}, {scale.unit}" + (f"  ({beyond:,} more lie outside)" if beyond else "")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 2.0))
        axes = figure.subplots()
        colors = [_STAND_IN["helped" if left >= -width / 2 else "hurt"] for left in edges[:-1]]
        axes.bar(edges[:-1] * scale.factor, count, width=width * scale.factor * 0.9, align="edge", color=colors)
        axes.axvline(0, color=_STAND_IN["muted"], linewidth=0.8)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        negative = (value_N < 0).mean()
        positive = (value_N > 0).mean()
        axes.text(0, 1.02, f"− {negative:.0%} hurt", transform=axes.transAxes, color=_STAND_IN["hurt"])
        axes.text(1, 1.02, f"+ {positive:.0%} helped", transform=axes.transAxes, color=_STAND_IN["helped"], ha="right")
        _frame(figure, axes, left=0.45, right=0.1, below=below, above=0.2)
        return _svg(figure)


def loss_lines(names: Sequence[str], losses: Sequence[tuple[Ints, Floats]], skipped: Ints) -> str:
    """(step, loss in nats) of each target as measured, and its running mean on top; skipped updates are ticked."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 2.5))
        axes = figure.subplots()
        ends = []
        for color, (step, loss) in enumerate(losses):
            shown = np.unique(np.linspace(0, len(step) - 1, 600).round().astype(int))
            line = _STAND_IN[f"line-{color % LINES}"]
            axes.plot(step[shown], loss[shown], color=line, linewidth=0.7, alpha=0.35)
            window = max(len(loss) // 25, 1)
            total = np.concatenate([[0.0], loss.cumsum()])
            right = np.minimum(np.arange(len(loss)) + window // 2 + 1, len(loss))
            left = np.maximum(np.arange(len(loss)) - window // 2, 0)
            mean = (total[right] - total[left]) / (right - left)
            axes.plot(step[shown], mean[shown], color=line, linewidth=1.6)
            ends.append(float(mean[-1]))
        if len(skipped):
            axes.plot(
                skipped, np.zeros(len(skipped)), "|", color=_STAND_IN["hurt"], transform=axes.get_xaxis_transform()
            )
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.margins(x=0)
        _frame(figure, axes, left=0.4, right=1.2, below="update")
        _label_ends(axes, ends, names)
        return _svg(figure)


def audit_pairs(audit: Audit, scale: NatScale) -> str:
    """Each audited update's predicted decrease of the loss beside the measured one, the gap drawn between them."""
    updates = len(audit.step_A)
    shown = np.unique(np.linspace(0, updates - 1, PAIRS).round().astype(int))
    step, predicted, actual = audit.step_A[shown], audit.predicted_A[shown], audit.actual_A[shown]
    below = "update" + (f"  ({len(shown)} of {updates:,} are drawn)" if len(shown) < updates else "")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 2.5))
        axes = figure.subplots()
        axes.axhline(0, color=_STAND_IN["muted"], linewidth=0.8)
        axes.vlines(step, predicted * scale.factor, actual * scale.factor, color=_STAND_IN["line-1"], linewidth=1)
        axes.plot(step, actual * scale.factor, "o", color=_STAND_IN["ink"], markersize=3.2, label="measured")
        axes.plot(
            step,
            predicted * scale.factor,
            "D",
            color=_STAND_IN["line-1"],
            markersize=5.5,
            markerfacecolor="none",
            markeredgewidth=1,
            label="predicted",
        )
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderpad=0, handletextpad=0.2)
        _frame(figure, axes, left=0.45, right=0.1, below=below, above=0.22)
        return _svg(figure)


def _frame(figure: Figure, axes: Axes, left: float, right: float, below: str = "", above: float = 0.08) -> None:
    """Fixed margins in inches: labels are of unknown fonts, and pictures side by side must line up."""
    width, height = figure.get_size_inches()
    bottom = 0.45 if below else 0.25
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - above / height)
    axes.set_xlabel(below, labelpad=3)


def _label_ends(axes: Axes, ends: Sequence[float], labels: Sequence[str]) -> None:
    """Write each label at the height where its line ends, apart from each other."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.145 * axes.figure.dpi / axes.bbox.height  # a line of text, in inches
    order = np.argsort(ends, kind="stable")
    place = np.array(ends, dtype=np.float64)[order]
    for i in range(1, len(place)):
        place[i] = max(place[i], place[i - 1] + gap)
    if len(place) and place[-1] > high:
        place[-1] = high
        for i in range(len(place) - 2, -1, -1):
            place[i] = min(place[i], place[i + 1] - gap)
    for y, line in zip(place, order, strict=True):
        color = _STAND_IN[f"line-{line % LINES}"]
        axes.text(1.02, y, _short(labels[line]), transform=axes.get_yaxis_transform(), va="center", color=color)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's font draws the text, not matplotlib's
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = buffer.getvalue()
    width, height = figure.get_size_inches() * 72
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {width:g} {height:g}">', text[text.index("<svg") :], count=1)
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # the same names in every picture
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    return re.sub(
        r"((?:fill|stroke): )#0000([0-9a-f]{2})", lambda m: f"{m[1]}var(--{_VARIABLES[int(m[2], 16) - 1]})", text
    )
