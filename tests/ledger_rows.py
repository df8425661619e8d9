"""Ledgers written row by row, and what they should say: loops over visits, in exact fractions.

A visit is what happened: in an update, a sample was trained on, whose documents have loss tokens with values. Values
are multiples of 1/1024 that a float32 holds exactly, and so are their sums.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from hf_datashapley.ledger.layout import (
    FORMAT,
    MANIFEST,
    Part,
    unit_keys,
    updates_schema,
    value_columns,
    values_schema,
)


Row: TypeAlias = tuple[int, int, list[Fraction]]  # updates, tokens, value for each target


@dataclass(frozen=True)
class Piece:
    document_id: int
    position: int  # of its first loss token
    values: list[list[Fraction]]  # of each loss token, for each target


@dataclass(frozen=True)
class Visit:
    step: int
    sample_id: int
    pieces: list[Piece]
    rank: int = 0


UNITS = ("sample", "document", "token")
DOMAINS = {0: "web", 1: "code", 2: None, 3: "web", 4: None, 5: "prose"}
SOURCES = {sample_id: f"part {sample_id % 3}" for sample_id in range(50)}


def rows_of(visit: Visit, unit: str, with_tokens: Collection[int]) -> list[tuple[list[int], int, list[Fraction]]]:
    """Keys, tokens and values of the rows that a visit has in a ledger of `unit`."""
    rows = []
    for piece in visit.pieces:
        if unit == "token" and visit.sample_id in with_tokens:
            for place, values in enumerate(piece.values):
                rows.append(([visit.sample_id, piece.document_id, piece.position + place], 1, values))
        else:
            keys = [visit.sample_id, piece.document_id, -1][: len(unit_keys(unit))]
            rows.append((keys, len(piece.values), total(piece.values)))
    if unit == "sample":
        return [([visit.sample_id], sum(row[1] for row in rows), total([row[2] for row in rows]))]
    return rows


def total(values: list[list[Fraction]]) -> list[Fraction]:
    return [sum(column, Fraction()) for column in zip(*values, strict=True)]


def write_ledger(
    directory: Path,
    visits: list[Visit],
    unit: str,
    targets: list[str],
    *,
    with_tokens: Collection[int] = (),
    cuts: list[int] | None = None,
    ranks: int = 1,
) -> None:
    """`cuts` are the updates that parts end with; the last one ends the run."""
    directory.mkdir(parents=True, exist_ok=True)
    manifest = {"format": FORMAT, "targets": [name for name in targets if name], "unit": unit, "settings": {}}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    names = unit_keys(unit)
    first = 1
    for last in cuts or [max((visit.step for visit in visits), default=0)]:
        for rank in range(ranks if last else 0):
            rows: list[dict[str, Any]] = []
            for visit in visits:
                if first <= visit.step <= last and visit.rank == rank:
                    for keys, tokens, values in rows_of(visit, unit, with_tokens):
                        named = dict(zip(names, keys, strict=True))
                        nats = dict(zip(value_columns(targets), map(float, values), strict=True))
                        rows.append({"step": visit.step, "tokens": tokens, **named, **nats})
            part = Part(directory, "values", first, last, rank, ranks)
            pq.write_table(pa.Table.from_pylist(rows, schema=values_schema(targets, unit)), part.path)
        if last:
            steps = [{"step": step} for step in range(first, last + 1)]
            part = Part(directory, "updates", first, last, 0, ranks)
            pq.write_table(pa.Table.from_pylist(steps, schema=updates_schema(targets)), part.path)
        first = last + 1


def magnitudes(visits: list[Visit], unit: str) -> dict[int, list[Fraction]]:
    """For each update and target the sum of |value| over samples, or documents in samples."""
    of_unit: dict[tuple[int, ...], list[list[Fraction]]] = defaultdict(list)
    for visit in visits:
        for piece in visit.pieces:
            of_unit[visit.step, visit.sample_id, 0 if unit == "sample" else piece.document_id].append(
                total(piece.values)
            )
    found: dict[int, list[list[Fraction]]] = defaultdict(list)
    for (step, *_), values in of_unit.items():
        found[step].append([abs(value) for value in total(values)])
    return {step: total(values) for step, values in found.items()}


def expected(
    visits: list[Visit],
    unit_of: Callable[[int, int, int], Any],
    row_of: Callable[[Any], Any] = lambda unit: unit,
    divisors: dict[int, list[Fraction]] | None = None,
) -> dict[Any, Row]:
    """Updates, tokens and values of each row, where `unit_of` names the unit of a sample, document and position.

    A visit counts once for each unit in it.
    """
    updates: Counter = Counter()
    tokens: Counter = Counter()
    values: dict[Any, list[list[Fraction]]] = defaultdict(list)
    for visit in visits:
        units = set()
        for piece in visit.pieces:
            for place, nats in enumerate(piece.values):
                unit = unit_of(visit.sample_id, piece.document_id, piece.position + place)
                units.add(unit)
                tokens[row_of(unit)] += 1
                divisor = divisors[visit.step] if divisors else [Fraction(1)] * len(nats)
                values[row_of(unit)].append([v / (d or 1) for v, d in zip(nats, divisor, strict=True)])
        updates.update(map(row_of, units))
    return {row: (updates[row], tokens[row], total(found)) for row, found in values.items()}


def told(table: Dataset, keys: list[str], targets: Sequence[str] = ("",)) -> dict[Any, Row]:
    """A table that was read back, as `expected` gives it, in the table's order."""
    rows = {}
    for row in table:
        found = tuple(row[key] for key in keys)
        nats = [Fraction(row[column]) for column in value_columns(list(targets))]
        rows[found[0] if len(keys) == 1 else found] = (row["updates"], row["tokens"], nats)
    assert len(rows) == len(table)
    return rows


def random_visits(random: Random, targets: int = 1, steps: int = 5, ranks: int = 1) -> list[Visit]:
    """Documents that go on in other samples, samples visited twice in an update, updates of zeros, empty ones."""
    layouts = {}
    for sample_id in random.sample(range(50), k=4):
        position, layout = random.randrange(3), []
        for document_id in random.sample(range(6), k=random.randint(1, 3)):
            tokens = random.randint(1, 3)
            layout.append((document_id, position, tokens))
            position += tokens
        layouts[sample_id] = layout
    visits = []
    for step in range(1, steps + 1):
        size = random.choice([0, 1, 4096])
        for _ in range(random.randint(0, 5)):
            sample_id = random.choice(list(layouts))
            pieces = [
                Piece(d, p, [[Fraction(random.randint(-size, size), 1024) for _ in range(targets)] for _ in range(n)])
                for d, p, n in layouts[sample_id]
            ]
            visits.append(Visit(step, sample_id, pieces, random.randrange(ranks)))
    return visits
