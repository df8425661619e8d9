"""What came out: values of documents, a table of domains, and how well value ranks.

A document's value is the sum of its rows' values. Documents are *ranked* by value per loss token trained on: a sum
ranks by length first, and the question to a document is what it is worth at the same training cost. This was fixed
before any outcome was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from numpy.typing import NDArray


Floats = NDArray[np.float64]


def value_columns(values: Dataset) -> dict[str, str]:
    """Target -> its column."""
    return {name.removeprefix("value_"): name for name in values.column_names if name.startswith("value_")}


def label(values: Dataset, units: Dataset) -> Dataset:
    """Values of samples with what is known of each: `sample_id`, `document_id`, `domain`, `junk`, `title`, `updates`,
    `tokens`, then `value_<target>`."""
    about = {unit["sample_id"]: unit for unit in units.remove_columns("text")}
    rows = [about[row["sample_id"]] | row for row in values]
    features = {name: units.features[name] for name in units.column_names if name != "text"} | dict(values.features)
    return Dataset.from_list(rows, features=Features(features))


def document_values(samples: Dataset) -> Dataset:
    """Labelled values, summed over the rows of each document: `document_id`, `domain`, `junk`, `title`, `tokens` (loss
    tokens, over all visits), then `value_<target>`, nats, and `rows`."""
    columns = list(value_columns(samples).values())
    documents: dict[int, dict[str, Any]] = {}
    for row in samples:
        first = {name: row[name] for name in ("document_id", "domain", "junk", "title")}
        document = documents.setdefault(row["document_id"], first | dict.fromkeys(("rows", "tokens", *columns), 0))
        document["rows"] += 1
        for name in ("tokens", *columns):
            document[name] += row[name]
    kept = {name: samples.features[name] for name in ("document_id", "domain", "junk", "title", "tokens", *columns)}
    features = Features({**kept, "rows": Value("int64")})
    return Dataset.from_list([documents[number] for number in sorted(documents)], features=features)


def auc(higher: Floats, lower: Floats) -> float:
    """The share of pairs, one of each, in which `higher` has the greater value; a tie counts half. NaN if either is
    empty."""
    if not len(higher) or not len(lower):
        return float("nan")
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, side="left")
    below_or_tied = np.searchsorted(ordered, higher, side="right")
    return float((below + below_or_tied).mean() / 2 / len(lower))


def ranking(documents: Dataset, target: str) -> tuple[float, float, float]:
    """AUC of value per token for a target: its own domain above the other domains, its own domain above planted junk,
    and real text of every domain above planted junk."""
    per_token = np.array(documents[f"value_{target}"]) / np.maximum(np.array(documents["tokens"]), 1)
    junk = np.array([kind is not None for kind in documents["junk"]], dtype=bool)
    own = (np.array(documents["domain"]) == target) & ~junk
    pairs = ((own, ~own & ~junk), (own, junk), (~junk, junk))
    over_domains, over_junk, any_over_junk = (auc(per_token[higher], per_token[lower]) for higher, lower in pairs)
    return over_domains, over_junk, any_over_junk


def ranking_table(documents: Dataset, targets: Sequence[str]) -> list[list[str]]:
    header = ["target", "own domain over other domains", "own domain over junk", "(any domain over junk)"]
    rows = [[target, *("-" if np.isnan(a) else f"{a:.2f}" for a in ranking(documents, target))] for target in targets]
    return [header, *rows]


def loss_table(updates: Dataset, samples: Dataset, targets: Sequence[str]) -> list[list[str]]:
    """Measured validation loss at the start and, as every update draws other rows, the mean of the last tenth; beside
    it the sum of all values."""
    table = [["target", "at the start", "at the end", "fell by", "sum of values"]]
    for target in targets:
        losses = np.array(updates[f"validation_loss_{target}"], dtype=np.float64)
        end = float(np.nanmean(losses[-max(1, len(losses) // 10) :]))
        total = float(np.sum(samples[f"value_{target}"]))
        table.append([target, *(f"{nats:.2f}" for nats in (losses[0], end, losses[0] - end, total))])
    return table


def audit_table(audit: Dataset, targets: Sequence[str]) -> list[list[str]]:
    """Sums over the audited updates: what values and momentum account for, and what was measured, in nats."""
    table = [["target", "sum of values", "momentum, decay", "predicted", "measured"]]
    for target in targets:
        rows = [row for row in audit if row["target"] == target]
        sums = (sum(row[name] for row in rows) for name in ("samples", "carried", "predicted", "actual"))
        table.append([target, *(f"{nats:+.3f}" for nats in sums)])
    return table


def domain_table(documents: Dataset) -> list[list[str]]:
    """Cells of the table domain x target, with its two header rows and the sum over all domains at the end."""
    columns = value_columns(documents)
    labels = list(zip(documents["domain"], documents["junk"], strict=True))
    names = [domain if kind is None else f"{domain}: {kind}" for domain, kind in labels]
    planted = {name: kind is not None for name, (_, kind) in zip(names, labels, strict=True)}
    tokens = np.array(documents["tokens"], dtype=np.float64)
    header = ["", "", "share of"] + [cell for target in columns for cell in (f"value for {target}", "per")]
    table = [header, ["domain", "documents", "tokens"] + ["total", "1k tokens"] * len(columns)]
    groups = sorted(planted, key=lambda name: (planted[name], -tokens[np.array(names) == name].sum()))
    for group in [*groups, None]:
        members = np.ones(len(names), dtype=bool) if group is None else np.array(names) == group
        share = tokens[members].sum() / max(tokens.sum(), 1)
        cells = [group or "all", f"{members.sum():,}", f"{share:.1%}"]
        for column in columns.values():
            total = np.array(documents[column])[members].sum()
            cells += [f"{total:+.3f}", f"{1000 * total / max(tokens[members].sum(), 1):+.4f}"]
        table.append(cells)
    return table


def align(table: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """The cells as lines of text: the first column to the left, the others to the right if they are numbers."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:], strict=True):
            cells.append(cell.rjust(width) if numbers else cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
