"""From one row per unit to the few numbers that a report shows: by group, by document, over training.

A unit is a sample or, where samples hold several documents, a document. A group is a domain, or one type of planted
junk whatever its domain. Everything is a sum over units, so it is all `searchsorted` and `bincount` on whole columns:
a million units with five million history rows take seconds and no Python loop. The trade-off is that the numeric
columns are held in memory; texts never are, but for those shown.

Sizes, as suffixes: N units, D documents (of units that are samples; else the units), G groups, K targets, T updates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_datashapley.ledger.groups import COUNTED


Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_DOMAINS = 30  # the largest ones; the others are one group together


@dataclass(frozen=True)
class Corpus:
    """The valued units, in the order of their ids."""

    unit: str  # "sample" or "document"
    targets: list[str]  # K names; [""] for a single unnamed target
    groups: list[str]  # G names: domains, then types of junk, each by their share of tokens
    junk_groups: int  # so many of the last groups are planted junk
    id_N: Ints
    tokens_N: Floats
    value_KN: Floats  # nats of validation loss
    unit_row_N: Ints  # row in the `units` dataset, -1 without one
    group_N: Ints  # 0..G-1
    document_N: Ints  # 0..D-1
    first_unit_D: Ints  # 0..N-1; a document's title and group are its first unit's
    has_documents: bool  # whether units are samples of known documents; if not, each unit stands as one

    @property
    def tokens_D(self) -> Floats:
        return _sums(self.document_N, self.tokens_N, len(self.first_unit_D))

    @property
    def value_KD(self) -> Floats:
        return np.stack([_sums(self.document_N, value_N, len(self.first_unit_D)) for value_N in self.value_KN])


@dataclass(frozen=True)
class Totals:
    """Sums over groups. The standard errors are over documents, at a fixed number of tokens; nan for one document."""

    documents_G: Ints
    units_G: Ints
    tokens_G: Floats
    value_KG: Floats  # nats
    error_KG: Floats  # nats
    negative_KG: Floats  # share of units below zero

    def per_1000_tokens(self, nats_KG: Floats) -> Floats:
        return np.divide(nats_KG * 1000, self.tokens_G, out=np.zeros_like(nats_KG), where=self.tokens_G > 0)


@dataclass(frozen=True)
class Audit:
    """What values account for at A audited updates, against what these did to a target, in nats."""

    step_A: Ints
    samples_A: Floats
    carried_A: Floats  # by momentum and weight decay alone
    predicted_A: Floats
    actual_A: Floats

    @property
    def sums(self) -> list[float]:
        """Of samples, carried, predicted, actual."""
        return [float(x.sum()) for x in (self.samples_A, self.carried_A, self.predicted_A, self.actual_A)]


def target_column(target: str, stem: str = "value") -> str:
    return f"{stem}_{target}" if target else stem


def arrow_table(dataset: Dataset, columns: list[str]) -> pa.Table:
    return dataset.select_columns(columns).with_format("arrow")[:]


def read_corpus(values: Dataset, units: Dataset | None) -> Corpus:
    """Join values with what is known about their units. ValueError: no values, or a unit that `units` lacks."""
    if values.num_rows == 0:
        raise ValueError("values has no rows: there is nothing to report before the first update")
    columns = [name for name in values.column_names if name.startswith("value")]
    key = "sample_id" if "sample_id" in values.column_names else "document_id"
    rows = arrow_table(values, [key, "tokens", *columns])
    if not all(np.isfinite(rows[column].to_numpy()).all() for column in columns):
        raise ValueError("values holds null or non-finite values: read it with load_values, which never returns any")
    # A sample of documents, or a document of several samples or of tokens, has a row for each.
    sums = [(column, "sum") for column in ("tokens", *columns)]
    table = rows.group_by(key, use_threads=False).aggregate(sums).sort_by(key)
    id_N = table[key].to_numpy()
    tokens_N = table["tokens_sum"].to_numpy().astype(np.float64)
    value_KN = np.stack([table[f"{column}_sum"].to_numpy().astype(np.float64) for column in columns])

    known: dict[str, pa.ChunkedArray] = {}
    unit_row_N = np.full(len(id_N), -1)
    if units is not None:
        labels = [column for column in ("document_id", "domain", "junk") if column in units.column_names]
        unit_table = arrow_table(units, list(dict.fromkeys([key, *labels])))
        unit_row_N = _rows_of(id_N, unit_table[key].to_numpy(), key)
        known = {column: unit_table[column].take(pa.array(unit_row_N)) for column in labels}

    nothing = pa.nulls(len(id_N), pa.string())
    junk = known.get("junk", nothing).cast(pa.string())
    domain = known.get("domain", pc.fill_null(nothing, COUNTED[key])).cast(pa.string())
    # Planted junk counts under its type alone: its domain says where the words came from, not what the sample is.
    domain = pc.if_else(pc.is_valid(junk), None, pc.fill_null(domain, "no domain"))
    domains, domain_N = _group_by_size(domain, tokens_N)
    kinds, junk_N = _group_by_size(junk, tokens_N)
    document_id_N = known["document_id"].to_numpy() if "document_id" in known else id_N
    _, first_unit_D, document_N = np.unique(document_id_N, return_index=True, return_inverse=True)
    return Corpus(
        unit=key.removesuffix("_id"),
        targets=[column.removeprefix("value").removeprefix("_") for column in columns],
        groups=[*domains, *(f"junk: {kind}" for kind in kinds)],
        junk_groups=len(kinds),
        id_N=id_N,
        tokens_N=tokens_N,
        value_KN=value_KN,
        unit_row_N=unit_row_N,
        group_N=np.where(junk_N < 0, domain_N, junk_N + len(domains)),
        document_N=document_N,
        first_unit_D=first_unit_D,
        has_documents=key == "sample_id" and "document_id" in known,
    )


def _sums(index: Ints, weights: npt.NDArray[np.float64 | np.bool_], length: int) -> Floats:
    return np.bincount(index, weights=weights, minlength=length).astype(np.float64, copy=False)


def _rows_of(id_N: Ints, unit_id: Ints, key: str) -> Ints:
    order = np.argsort(unit_id, kind="stable")
    if (np.diff(unit_id[order]) == 0).any():
        raise ValueError(f"units has more than one row for a {key}: give it one row per {key.removesuffix('_id')}")
    found = np.searchsorted(unit_id, id_N, sorter=order).clip(max=max(len(unit_id) - 1, 0))
    row_N = order[found] if len(order) else np.zeros(len(id_N), dtype=np.int64)
    missing = id_N[unit_id[row_N] != id_N] if len(order) else id_N
    if len(missing):
        first = ", ".join(map(str, missing[:5]))
        raise ValueError(
            f"units lacks {len(missing)} of the {len(id_N)} {COUNTED[key]} with a value, {key} {first} first: "
            f"give it one row per {key.removesuffix('_id')}, or pass units=None"
        )
    return row_N


def _group_by_size(names: pa.Array | pa.ChunkedArray, tokens_N: Floats) -> tuple[list[str], Ints]:
    """The distinct names by falling number of tokens, and each sample's place among them (-1: null)."""
    encoded = pa.chunked_array([names] if isinstance(names, pa.Array) else names.chunks, pa.string())
    encoded = encoded.combine_chunks().dictionary_encode()
    distinct: list[str] = encoded.dictionary.to_pylist()
    code_N = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    tokens = _sums(code_N + 1, tokens_N, len(distinct) + 1)[1:]
    order = np.argsort(-tokens, kind="stable")
    place = np.full(len(distinct) + 1, -1)  # the last one is found by code -1
    place[order] = np.arange(len(distinct))
    ordered = [distinct[code] for code in order]
    if len(ordered) > MAX_DOMAINS:
        ordered[MAX_DOMAINS - 1 :] = [f"{len(ordered) - MAX_DOMAINS + 1} smaller ones"]
    return ordered, np.minimum(place, MAX_DOMAINS - 1)[code_N]


def totals(corpus: Corpus, group_N: Ints, groups: int) -> Totals:
    """Sums by `group_N`: `corpus.group_N`, or zeros for the whole corpus as one group.

    With x_d and t_d a document's value and tokens, r = sum x / sum t, and n documents in the group, the standard
    error of its value is that of a ratio at its number of tokens: sqrt( n / (n - 1) * sum (x_d - r t_d)^2 ).
    """
    group_D = group_N[corpus.first_unit_D]
    tokens_D = corpus.tokens_D
    documents_G = np.bincount(group_D, minlength=groups)
    units_G = np.bincount(group_N, minlength=groups)
    tokens_G = _sums(group_N, corpus.tokens_N, groups)
    value_KG, error_KG, negative_KG = [], [], []
    for value_N, value_D in zip(corpus.value_KN, corpus.value_KD, strict=True):
        value_G = _sums(group_N, value_N, groups)
        rate_G = np.divide(value_G, tokens_G, out=np.zeros(groups), where=tokens_G > 0)
        square_G = _sums(group_D, (value_D - rate_G[group_D] * tokens_D) ** 2, groups)
        n_G = documents_G.astype(np.float64)
        error_KG.append(np.sqrt(np.divide(n_G * square_G, n_G - 1, out=np.full(groups, np.nan), where=n_G > 1)))
        value_KG.append(value_G)
        negative_KG.append(_sums(group_N, value_N < 0, groups) / np.maximum(units_G, 1))
    return Totals(documents_G, units_G, tokens_G, np.stack(value_KG), np.stack(error_KG), np.stack(negative_KG))


def value_over_training(corpus: Corpus, history: Dataset, step_T: Ints) -> Floats:
    """Cumulated value of each group after each update, nats [K, G, T]."""
    columns = [target_column(target) for target in corpus.targets]
    key = f"{corpus.unit}_id"
    table = arrow_table(history, [key, "step", *columns])
    unit = np.searchsorted(corpus.id_N, table[key].to_numpy())
    update = np.searchsorted(step_T, table["step"].to_numpy())
    groups, updates = len(corpus.groups), len(step_T)
    cell = corpus.group_N[unit] * updates + update
    summed = [_sums(cell, table[column].to_numpy(), groups * updates) for column in columns]
    return np.stack(summed).reshape(len(columns), groups, updates).cumsum(axis=2)


def read_audits(audit: Dataset, targets: list[str]) -> dict[str, Audit]:
    """By target, if it was audited. Updates after which a loss was not finite are left out."""
    table = arrow_table(audit, audit.column_names).sort_by("step")
    numbers = [table[name].to_numpy() for name in ("samples", "carried", "predicted", "actual")]
    finite = np.isfinite(numbers).all(axis=0)
    audits = {}
    for target in targets:
        kept = finite & pc.equal(table["target"], target or "validation").to_numpy()
        if kept.any():
            audits[target] = Audit(table["step"].to_numpy()[kept], *(column[kept] for column in numbers))
    return audits
