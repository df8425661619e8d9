"""The card's pictures: PNG files on white, which a page shows whatever its colours. Importing this needs matplotlib.

The report's pictures take the colours of its page, and a card cannot give any; hence these, few and plain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .tables import Tables, arrow


FOLDER = "pictures"
BARS = 30
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a target may be called $x
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "savefig.facecolor": "white",
}


def draw_pictures(tables: Tables, folder: Path) -> list[str]:
    """Writes them; returns their paths in the folder."""
    drawn = {"value_over_training": over_training, "values": spread}
    if tables.groups is not None:
        drawn["groups"] = group_bars
    if len(tables.audit):
        drawn["audit"] = audit_pairs
    (folder / FOLDER).mkdir()
    with matplotlib.rc_context(STYLE):
        for name, draw in drawn.items():
            figure = Figure(figsize=(7.0, 3.2), layout="constrained")
            draw(figure.subplots(), tables)
            # The same tables give the same file: nothing of the date or of versions.
            figure.savefig(folder / FOLDER / f"{name}.png", dpi=120, metadata={"Software": None})
    return [f"{FOLDER}/{name}.png" for name in drawn]


def over_training(axes: Axes, tables: Tables) -> None:
    step = np.arange(1, tables.step_totals.shape[1] + 1)
    shown = np.unique(np.linspace(0, len(step) - 1, 600).round().astype(int))
    for target, total in zip(tables.targets, tables.step_totals.cumsum(1), strict=True):
        axes.plot(step[shown], total[shown], label=target or "validation", linewidth=1.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("update")
    axes.set_ylabel("values so far, nats")
    axes.legend(frameon=False)


def spread(axes: Axes, tables: Tables) -> None:
    """Units by value; the extreme half per cent on either side is left out."""
    units = arrow(tables.values)
    values = [units[column].to_numpy() for column in tables.value_columns]
    low = min(0.0, *(np.quantile(value, 0.005) for value in values))
    high = max(0.0, *(np.quantile(value, 0.995) for value in values))
    edges = np.linspace(low, high if high > low else low + 1.0, 80)
    for target, value in zip(tables.targets, values, strict=True):
        axes.stairs(np.histogram(value, edges)[0], edges, label=target or "validation", linewidth=1.4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"value of a {tables.manifest['unit']}, nats")
    axes.set_ylabel("how many")
    axes.legend(frameon=False)


def group_bars(axes: Axes, tables: Tables) -> None:
    """By the first target: all groups, or the best and the worst."""
    assert tables.groups is not None
    groups = arrow(tables.groups)
    value_G = groups[tables.value_columns[0]].to_numpy()
    order = np.argsort(value_G, kind="stable")
    if len(order) > BARS:
        order = np.concatenate([order[: BARS // 2], order[-(BARS // 2) :]])
    names = groups[tables.groups.column_names[0]].to_pylist()
    called = ["unknown" if names[g] is None else str(names[g])[:24] for g in order]
    axes.barh(np.arange(len(order)), value_G[order], height=0.7, color=np.where(value_G[order] < 0, "C3", "C0"))
    axes.set_yticks(np.arange(len(order)), called)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"value for {tables.targets[0] or 'validation'}, nats")


def audit_pairs(axes: Axes, tables: Tables) -> None:
    audit = arrow(tables.audit)
    target_A = np.asarray(audit["target"].to_pylist())
    step_A, predicted_A, actual_A = (audit[name].to_numpy() for name in ("step", "predicted", "actual"))
    for color, target in enumerate(dict.fromkeys(target_A.tolist())):
        own = target_A == target
        axes.plot(step_A[own], actual_A[own], f"C{color % 10}o", markersize=3.5, label=f"{target}, measured")
        axes.plot(step_A[own], predicted_A[own], f"C{color % 10}x", markersize=5, label=f"{target}, by the values")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("update")
    axes.set_ylabel("loss taken away, nats")
    axes.legend(frameon=False)
