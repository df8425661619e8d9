"""Values by document, by sample and by group: the same sums at every level, whatever the ledger's unit."""

import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_rows import DOMAINS, SOURCES, UNITS, Piece, Visit, expected, random_visits, told, total, write_ledger
from models import dataset, text_rows
from test_ledger import trained

from hf_datashapley import load_values


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_sums_match_at_every_level(random):
    targets = ["a", "b"]
    visits = random_visits(random, targets=2, ranks=2)
    chosen = {visit.sample_id for visit in visits if random.random() < 0.5}
    of_sample = expected(visits, lambda i, d, p: i)
    of_document = expected(visits, lambda i, d, p: d)
    of_piece = expected(visits, lambda i, d, p: (i, d))
    of_token = expected(visits, lambda i, d, p: (i, d, p if i in chosen else -1))
    of_domain = expected(visits, lambda i, d, p: (i, d), lambda unit: DOMAINS[unit[1]])
    of_source = expected(visits, lambda i, d, p: i, SOURCES.__getitem__)
    everything = total([row[2] for row in of_sample.values()])
    with tempfile.TemporaryDirectory() as folder:
        for unit in UNITS:
            here = Path(folder) / unit
            write_ledger(here, visits, unit, targets, with_tokens=chosen, cuts=[2, 5], ranks=2)
            own = load_values(here)
            keys = own.column_names[: own.column_names.index("updates")]
            assert told(own, keys, targets) == {"sample": of_sample, "document": of_piece, "token": of_token}[unit]
            levels = [own, load_values(here, by="sample_id"), load_values(here, by=SOURCES, key="sample_id")]
            assert told(levels[1], ["sample_id"], targets) == of_sample
            assert told(levels[2], ["group"], targets) == of_source
            if unit != "sample":
                levels += [load_values(here, by="document_id"), load_values(here, by=DOMAINS)]
                assert told(levels[3], ["document_id"], targets) == of_document
                assert told(levels[4], ["group"], targets) == of_domain
                counted = {group: 0 for group in of_domain}
                for document_id in of_document:
                    counted[DOMAINS[document_id]] += 1
                assert dict(zip(levels[4]["group"], levels[4]["documents"], strict=True)) == counted
            for level in levels:
                assert [sum(map(Fraction, level[f"value_{target}"])) for target in targets] == (everything or [0, 0])


def test_sums_match_to_rounding(tmp_path):
    """Values of any size: the fractions are what float32 holds, sums are float64, and the same in every reading."""
    random = np.random.default_rng(0)
    drawn = iter(np.float32(random.standard_normal(400) * 10.0 ** random.integers(-9, 3, size=400)).tolist())
    visits, sizes = [], []
    for step in range(1, 21):
        for sample_id in range(10):
            values = [[Fraction(next(drawn))] for _ in range(2)]
            visits.append(Visit(step, sample_id, [Piece(sample_id // 2, 0, values)]))
            sizes.append(Visit(step, sample_id, [Piece(sample_id // 2, 0, [[abs(value)] for (value,) in values])]))
    write_ledger(tmp_path, visits, "token", [""], with_tokens=range(10))
    for by, unit_of in (
        (None, lambda i, d, p: (i, d, p)),
        ("document_id", lambda i, d, p: d),
        ("sample_id", lambda i, d, p: i),
        ({d: d % 2 for d in range(5)}, lambda i, d, p: d % 2),
        ({d: "all" for d in range(5)}, lambda i, d, p: "all"),
    ):
        found = load_values(tmp_path, by=by)["value"][:]
        sums, bounds = ([row[2][0] for _, row in sorted(expected(of, unit_of).items())] for of in (visits, sizes))
        assert all(abs(Fraction(a) - b) <= 1e-15 * c for a, b, c in zip(found, sums, bounds, strict=True))
        assert load_values(tmp_path, by=by)["value"][:] == found


@pytest.fixture
def documents(tmp_path):
    """Three documents in two samples; document 7 goes on in the second. One update."""
    nats = [[[Fraction(value)]] for value in (1, 2, 4, 8)]
    visits = [
        Visit(1, 20, [Piece(5, 0, nats[0]), Piece(7, 1, nats[1])]),
        Visit(1, 21, [Piece(7, 0, nats[2]), Piece(6, 1, nats[3])]),
    ]
    write_ledger(tmp_path / "ledger", visits, "document", [""])
    return tmp_path / "ledger"


def test_forms_of_groups(documents):
    """Whatever says it, the group of documents 5 and 6 is "a", that of 7 is null; other documents are no matter."""
    corpus = Dataset.from_dict({"document_id": [7, 1, 6, 5], "domain": [None, "b", "a", "a"]})
    by_row = [None] * 5 + ["a", "a", None, "b"]
    expect = {"documents": [2, 1], "updates": [2, 2], "tokens": [2, 2], "value": [9.0, 6.0]}
    for name, arguments in (
        ("group", {"by": {5: "a", 6: "a", 7: None, 1: "b"}}),
        ("domain", {"by": "domain", "dataset": corpus}),
        ("domain", {"by": "domain", "dataset": corpus.select([3, 2, 0])}),
        ("domain", {"by": "domain", "dataset": corpus.rename_column("document_id", "id"), "id_column": "id"}),
        ("domain", {"by": "domain", "dataset": Dataset.from_dict({"domain": by_row})}),
        ("domain", {"by": corpus.to_pandas().set_index("document_id")["domain"]}),
        ("domain", {"by": corpus.to_pandas().set_index("document_id")["domain"].astype("category")}),
        ("group", {"by": by_row}),
        ("group", {"by": tuple(by_row)}),
        ("group", {"by": np.array(by_row, dtype=object)}),
        ("group", {"by": pa.array(by_row)}),
        ("group", {"by": Dataset.from_dict({"domain": by_row})["domain"]}),
    ):
        found = load_values(documents, **arguments)
        assert found.column_names == [name, "documents", "updates", "tokens", "value"]
        assert found[:] == {name: ["a", None], **expect}
    numbered = load_values(documents, by=np.array([0, 0, 0, 0, 0, 2, 1, 2]))
    assert numbered[:] == {
        "group": [1, 2],
        "documents": [1, 2],
        "updates": [1, 3],
        "tokens": [1, 3],
        "value": [8.0, 7.0],
    }
    unknown = load_values(documents, by=dict.fromkeys([5, 6, 7]))
    assert unknown[:] == {"group": [None], "documents": [3], "updates": [4], "tokens": [4], "value": [15.0]}


def test_groups_of_samples_in_a_ledger_of_documents(documents):
    rows = Dataset.from_dict({"sample_id": [21, 20], "source": ["y", "x"], "document_id": [[7, 6], [5, 7]]})
    expect = {"source": ["x", "y"], "samples": [1, 1], "updates": [1, 1], "tokens": [2, 2], "value": [3.0, 12.0]}
    assert load_values(documents, by="source", dataset=rows, key="sample_id")[:] == expect
    with pytest.raises(ValueError, match="'document_id' is not an integer in each row.*mapping"):
        load_values(documents, by="source", dataset=rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "domain"}, "by='domain'.*known by sample_id, document_id.*`dataset`.*mapping"),
        ({"by": "position"}, "by='position'.*known by sample_id, document_id"),
        ({"by": {5: "a"}}, "2 of the 3 documents with values have no group in 'group', document_id 6, 7 first.*None"),
        ({"by": ["a"]}, "3 of the 3 documents with values have no group"),
        ({"by": {}}, "3 of the 3 documents with values have no group"),
        ({"by": {20: "a"}, "key": "sample_id"}, "1 of the 2 samples with values have no group.*sample_id 21 first"),
        ({"by": {5: "a", 6: 1, 7: "a"}}, "not of one type.*strings"),
        ({"by": {5: ["a"], 6: [], 7: []}}, "one group.*list"),
        ({"by": {"5": "a"}}, "ids of the groups 'group' are <U1.*integers"),
        ({"by": {5, 6, 7}}, "by is a set: give a column's name"),
        ({"by": pd.Series(["a", "b", "a"], index=[5, 5, 6])}, "1 ids have more than one group in 'group', 5 first"),
        ({"by": pd.Series(["a"] * 3, index=[5, 6, 7], name="value")}, "another column 'value'.*another name"),
        ({"by": "url", "dataset": Dataset.from_dict({"domain": ["a"]})}, "by='url' is not a column.*domain"),
        ({"by": "domain", "dataset": [{"domain": "a"}]}, "a list has no columns"),
        ({"by": {5: "a"}, "dataset": Dataset.from_dict({"domain": ["a"]})}, "dataset is for.*by is a dict"),
        ({"dataset": Dataset.from_dict({"domain": ["a"]})}, "give `by` too"),
        ({"key": "sample_id"}, "give `by` too"),
        ({"by": "d", "dataset": Dataset.from_dict({"d": ["a"]}), "id_column": "id"}, "id_column='id' is no column"),
        ({"by": {5: "a"}, "id_column": "id"}, "id_column='id' is no column"),
        ({"by": "sample_id", "key": "sample_id"}, "by='sample_id' gives a row for each"),
        ({"by": {5: "a"}, "key": "position"}, "key='position'.*sample_id, document_id"),
        (
            {"by": "d", "dataset": Dataset.from_dict({"d": ["a", "b"], "document_id": [5, None]})},
            "'document_id' is not an integer in each row.*1 null",
        ),
    ],
)
def test_what_is_no_grouping(documents, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_values(documents, **arguments)


def test_ids_that_stand_twice_with_one_group(documents):
    """As in a table of the samples that documents were cut into."""
    pieces = Dataset.from_dict({"document_id": [7, 5, 7, 6], "domain": ["a", "b", "a", "b"]})
    assert load_values(documents, by="domain", dataset=pieces)["value"][:] == [6.0, 9.0]


def test_a_ledger_of_samples_has_no_documents(tmp_path):
    write_ledger(tmp_path, [Visit(1, 3, [Piece(0, 0, [[Fraction(1)]])])], "sample", [""])
    assert load_values(tmp_path, by="sample_id")[:] == load_values(tmp_path)[:]
    with pytest.raises(ValueError, match="by='document_id': this ledger's rows are known by sample_id:"):
        load_values(tmp_path, by="document_id")


def test_a_ledger_without_updates_has_no_groups(tmp_path):
    write_ledger(tmp_path, [], "token", ["a"])
    for arguments in ({}, {"by": "document_id"}, {"by": {1: "a"}}, {"normalize": "update"}):
        assert len(load_values(tmp_path, **arguments)) == 0


def test_a_trainers_values_by_a_column(tmp_path):
    """Of the rows that it trained on, which are known by an id column of any name; or of another dataset."""
    rows = dataset(text_rows(8)).add_column("source", list("abcaabca"))
    for column, ids in ((None, range(8)), ("sample_id", range(10, 18)), ("uid", range(107, 99, -1))):
        train = rows if column is None else rows.add_column(column, list(ids))
        trainer = trained(tmp_path / str(column), train_dataset=train, sample_id_column=column or "sample_id")
        trainer.train()
        source_of = dict(zip(ids, rows["source"], strict=True))
        sums = dict.fromkeys("abc", 0.0)
        for row in trainer.value_history(from_step=2):
            sums[source_of[row["sample_id"]]] += row["value"]
        found = trainer.values(from_step=2, by="source")
        assert found["source"][:] == ["a", "b", "c"]
        assert sum(found["updates"]) == 8
        np.testing.assert_allclose(found["value"], list(sums.values()), rtol=1e-12)
        assert trainer.values(from_step=2, by=source_of)["value"][:] == found["value"][:]
        assert len(trainer.values(by="sample_id")) == len(trainer.values()) == 8
    with pytest.raises(ValueError, match="by='url' is not a column of the dataset"):
        trainer.values(by="url")
    with pytest.raises(ValueError, match="by='source': this ledger's rows are known by sample_id"):
        trainer.values(by="source", key="document_id")
