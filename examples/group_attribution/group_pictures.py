"""Pictures of the tables: each against the size of groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from group_junk import JunkFinding
from group_removal import PRUNED_BY, RANDOM, SAME_SOURCE, Mean, Removal
from group_runtime import ROUTES, TIMED, Seconds
from group_setting import GROUPINGS, GroupAttribution
from group_values import METHODS, Cell, method_of_groups


GROUPING_COLORS = dict(zip(GROUPINGS, ("#7a8491", "#c08a0a", "#0b6aa8", "#b0363b"), strict=True))
METHOD_COLORS = dict(zip(TIMED, ("#0b6aa8", "#c04d0a", "#2d7d46", "#8a6bb8"), strict=True))
ROUTE_LINES = dict(zip(ROUTES, ("-", "--"), strict=True))
KNOWN_LINES = {RANDOM: (":", "#626a75"), SAME_SOURCE: ("-.", "#1d2127")}


@contextmanager
def panels(lines: int, columns: int, path: Path, **shared: Any) -> Iterator[list[list[Axes]]]:
    """Axes of a figure that is written at the end, with one legend for all."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.7 * columns, 0.9 + 2.3 * lines), dpi=100, layout="constrained")
        found = figure.subplots(lines, columns, squeeze=False, **shared)
        yield found.tolist()
        named: dict[str, Any] = {}
        for axes in found.flat:
            for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(name, handle)
        figure.legend(
            list(named.values()), list(named), loc="outside upper center", ncols=min(len(named), 4), frameon=False
        )
        figure.savefig(path)


def by_size(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.grid(color="#dfe1e2", linewidth=0.6)
    axes.set_axisbelow(True)


def draw_line(axes: Axes, sizes: Sequence[int], found: Sequence[Mean], **style: Any) -> None:
    errors = [mean.error if len(mean.found_R) > 1 else 0.0 for mean in found]
    axes.errorbar(sizes, [mean.mean for mean in found], errors, marker="o", markersize=3.5, linewidth=1.3, **style)


def draw_known(axes: Axes, removal: Removal, fraction: float, last: bool = False) -> None:
    for name, (line, color) in KNOWN_LINES.items():
        mean = removal.rise_without_known(name, fraction, last)
        axes.axhline(mean.mean, color=color, linestyle=line, linewidth=1, label=name)


def cells_of(method: str, grouping: str, sizes: Sequence[int]) -> list[Cell]:
    return [Cell(method, grouping if size > 1 else "rows", size) for size in sizes]


def draw_removal(config: GroupAttribution, removal: Removal, path: Path) -> None:
    """A line of panels for each part that is removed, a column for each method."""
    sizes = [1, *config.sizes]
    with panels(len(config.fractions), len(METHODS), path, sharex=True, sharey="row") as grid:
        for line, fraction in zip(grid, config.fractions, strict=True):
            for axes, method in zip(line, METHODS, strict=True):
                for grouping in GROUPINGS:
                    found = [removal.rise_without_top(cell, fraction) for cell in cells_of(method, grouping, sizes)]
                    draw_line(axes, sizes, found, color=GROUPING_COLORS[grouping], label=f"groups: {grouping}")
                draw_known(axes, removal, fraction)
                by_size(axes, sizes)
            line[0].set_ylabel(f"rise without {fraction:.0%}, nats")
        for axes, method in zip(grid[0], METHODS, strict=True):
            axes.set_title(method)
        for axes in grid[-1]:
            axes.set_xlabel("rows of a group")


def draw_application(config: GroupAttribution, removal: Removal, finding: JunkFinding, path: Path) -> None:
    """Above what pruning does, a panel for each part dropped; below how well junk is found, one for each method."""
    sizes = [1, *config.sizes]
    with panels(2, max(len(config.pruned), len(METHODS)), path) as (above, below):
        for axes, part in zip(above, config.pruned, strict=False):
            for method in METHODS:
                found = [removal.rise_without_bottom(cell, part) for cell in cells_of(method, PRUNED_BY, sizes)]
                draw_line(axes, sizes, found, color=METHOD_COLORS[method], label=method)
            draw_known(axes, removal, part, last=True)
            by_size(axes, sizes)
            axes.set_title(f"without the lowest {part:.0%}")
        for axes, method in zip(below, METHODS, strict=False):
            for grouping in GROUPINGS:
                found_auc = [finding.auc(cell) for cell in cells_of(method, grouping, sizes)]
                axes.plot(
                    sizes,
                    found_auc,
                    color=GROUPING_COLORS[grouping],
                    label=f"groups: {grouping}",
                    marker="o",
                    markersize=3.5,
                )
            axes.axhline(finding.by_loss, color="#1d2127", linewidth=1, linestyle="--", label="by the rows' own loss")
            by_size(axes, sizes)
            axes.set_title(f"junk, {method}")
            axes.set_xlabel("rows of a group")
            axes.set_ylim(0.2, 1.0)
        above[0].set_ylabel("rise of the loss, nats")
        below[0].set_ylabel("AUC")


def draw_runtime(config: GroupAttribution, seconds: Seconds, path: Path) -> None:
    """How much faster than the loop, than rows by themselves; and how much is stored."""
    sizes = [1, *config.sizes]
    with panels(1, 3, path) as (line,):
        for method in TIMED:
            for route in ROUTES:
                own = [timed for size in sizes if (timed := seconds.of(method, route, size)) is not None]
                if not own:
                    continue
                style: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.3}
                style |= {"color": METHOD_COLORS[method], "linestyle": ROUTE_LINES[route]}
                style["label"] = f"{method}, {route}"
                loop, rows = (
                    seconds.loop(method, config.checkpoints),
                    seconds.of(method_of_groups(method), "summed", 1),
                )
                line[0].plot([timed.size for timed in own], [loop / timed.cpu for timed in own], **style)
                if rows is not None:
                    line[1].plot([timed.size for timed in own], [rows.cpu / timed.cpu for timed in own], **style)
                stored = [timed for timed in own if timed.stored]
                line[2].plot([timed.size for timed in stored], [timed.stored / 2**20 for timed in stored], **style)
        titles = ("times as fast as the loop", "times as fast as rows by themselves", "stored, MiB")
        for axes, title in zip(line, titles, strict=True):
            by_size(axes, sizes)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(title)
            axes.set_xlabel("rows of a group")
