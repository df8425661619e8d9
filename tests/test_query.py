"""Questions to the values of a run, held against plain pandas on the rows written; in a ledger, on the Hub."""

from fractions import Fraction
from random import Random

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from ledger_rows import Piece, Visit, rows_of, write_ledger
from published import publish

from hf_datashapley import Values
from hf_datashapley.ledger import stretches, sums
from hf_datashapley.query.published import load_config


TARGETS = ["code", "prose"]
COLUMNS = ["value_code", "value_prose"]
SOURCE = {document: f"source {document % 3}" if document % 4 else None for document in range(40)}


@pytest.fixture(scope="module")
def visits():
    """Nine updates of five rows, each with the end of one document and the beginning of the next."""
    random = Random(0)
    visits = []
    for step in range(1, 10):
        for sample in random.sample(range(19), 5):
            pieces = []
            for document, tokens in ((sample, 3), (sample + 1, 1 + sample % 2)):
                values = [[Fraction(random.randint(-999, 999), 1024) for _ in TARGETS] for _ in range(tokens)]
                pieces.append(Piece(document, 3 * len(pieces), values))
            visits.append(Visit(step, sample, pieces, rank=sample % 2))
    return visits


def written(visits, unit):
    """The rows of a ledger, as a pandas table."""
    rows = []
    for visit in visits:
        for keys, tokens, values in rows_of(visit, unit, range(0, 19, 2)):
            named = dict(zip(["sample_id", "document_id", "position"], keys, strict=False))
            named |= dict(zip(COLUMNS, map(float, values), strict=True))
            rows.append({"step": visit.step, "visit": id(visit), "tokens": tokens, **named})
    return pd.DataFrame(rows)


def of_units(rows, key):
    """Plain pandas: a visit of a sample is one update, and so is one of a document's part in a sample."""
    visit = ["visit"] if key == "sample_id" else ["visit", "document_id"]
    once = rows.groupby([key, *dict.fromkeys(visit)] if key not in visit else visit, as_index=False)[
        ["tokens", *COLUMNS]
    ].sum()
    found = once.groupby(key)[["tokens", *COLUMNS]].sum()
    found.insert(0, "updates", once.groupby(key).size())
    return found.reset_index()


def same(found, expected):
    assert list(found.columns) == list(expected.columns)
    pd.testing.assert_frame_equal(
        found.reset_index(drop=True), expected.reset_index(drop=True), check_dtype=False, rtol=0, atol=0
    )


@pytest.fixture(params=["ledger", "published"])
def place(request, tmp_path_factory, visits, monkeypatch):
    """Opens values of a unit, read in stretches of a few rows."""
    monkeypatch.setattr(stretches, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(sums, "ROWS_AT_ONCE", 7)
    folder = tmp_path_factory.mktemp("run")

    def opened(unit, **settings):
        if not (folder / unit).exists():
            write_ledger(
                folder / unit / "values", visits, unit, TARGETS, with_tokens=range(0, 19, 2), cuts=[4, 9], ranks=2
            )
            publish(folder / unit / "values", folder / f"{unit}-copy")
        return Values.open(folder / (unit if request.param == "ledger" else f"{unit}-copy"), **settings)

    return opened


@pytest.mark.parametrize("unit", ["sample", "document", "token"])
def test_units_and_totals(place, visits, unit):
    rows, values = written(visits, unit), place(unit)
    assert values.targets == TARGETS and values.columns == COLUMNS
    keys = ["sample_id"] if unit == "sample" else ["sample_id", "document_id"]
    assert values.key == keys[-1]
    for key in keys:
        expected = of_units(rows, key)
        same(values.units(key).to_pandas(), expected)
        counted = {"sample_id": "samples", "document_id": "documents"}[key]
        assert values.total(key) == {counted: len(expected), **expected.drop(columns=key).sum().to_dict()}
    assert values.total() == values.total(keys[-1])


def summed(units):
    """By source; one that is not known is None, and the last."""
    source = units["document_id"].map(SOURCE).fillna("unknown")
    sums = units.groupby(source)[["updates", "tokens", *COLUMNS]].sum()
    sums.insert(0, "documents", units.groupby(source).size())
    sums = sums.reset_index(names="source")
    return sums.assign(source=sums["source"].astype(object).where(sums["source"] != "unknown", None))


def test_by_group(place, visits):
    corpus = Dataset.from_dict({"document_id": list(SOURCE), "source": list(SOURCE.values())})
    rows, values = written(visits, "document"), place("document")
    expected = summed(of_units(rows, "document_id"))
    assert values.by_group("source", corpus).to_list() == expected.to_dict("records")
    assert values.by_group(SOURCE).rename_column("group", "source").to_list() == expected.to_dict("records")
    same(values.by_group("sample_id").to_pandas(), of_units(rows, "sample_id"))


@pytest.mark.parametrize("windows", [1, 4, 9, 100])
def test_over_time(place, visits, windows):
    rows, values = written(visits, "document"), place("document")
    found = values.over_time(windows).to_pandas()
    edges = list(zip(found["from_step"], found["to_step"], strict=True))
    assert edges[0][0] == 1 and edges[-1][1] == 9 and len(edges) == min(windows, 9)
    assert all(a[1] + 1 == b[0] for a, b in zip(edges, edges[1:], strict=False))
    sizes = [last - first + 1 for first, last in edges]
    assert max(sizes) - min(sizes) <= 1
    by_source = values.over_time(windows, SOURCE).to_list()
    for row, (first, last) in zip(found.itertuples(), edges, strict=True):
        units = of_units(rows[rows["step"].between(first, last)], "document_id")
        assert row.documents == len(units) and row.updates == units["updates"].sum()
        assert [row.value_code, row.value_prose] == units[COLUMNS].sum().tolist()
        own = [row for row in by_source if (row["from_step"], row["to_step"]) == (first, last)]
        own = [{name: row[name] for name in row if not name.endswith("_step")} for row in own]
        assert own == summed(units).rename(columns={"source": "group"}).to_dict("records")


def test_windows_of_updates_and_updates_that_weigh_the_same(place, visits):
    rows = written(visits, "document")
    some = rows[rows["step"].between(3, 6)]
    same(place("document", from_step=3, to_step=6).units().to_pandas(), of_units(some, "document_id"))
    pieces = some.groupby(["step", "sample_id", "document_id"], as_index=False)[COLUMNS].sum()
    found = place("document", from_step=3, to_step=6, normalize="update").total()
    for column in COLUMNS:
        magnitude = pieces[column].abs().groupby(pieces["step"]).sum()
        expected = (pieces[column].groupby(pieces["step"]).sum() / magnitude).sum()
        np.testing.assert_allclose(found[column], expected, rtol=1e-12)
    assert {row["from_step"] for row in place("document", from_step=3, to_step=6).over_time(2)} == {3, 5}


@pytest.mark.parametrize("per_token", [False, True])
def test_top_and_bottom(place, visits, per_token):
    corpus = Dataset.from_dict({"text": [f"document {d}" for d in range(40)]})
    units = of_units(written(visits, "document"), "document_id")
    units["score"] = units["value_prose"] / (units["tokens"] if per_token else 1)
    values = place("document")
    for ask, ascending in ((values.top, False), (values.bottom, True)):
        expected = units.sort_values(["score", "document_id"], ascending=[ascending, True]).head(5)
        found = ask(5, "prose", per_token=per_token)
        same(found.to_pandas(), expected.drop(columns="score"))
        texts = ask(5, "prose", per_token=per_token, dataset=corpus)
        assert texts.column_names == ["text", "updates", "tokens", *COLUMNS]
        assert texts["text"][:] == [f"document {d}" for d in expected["document_id"]]
        assert texts["value_prose"][:] == found["value_prose"][:]
    assert len(values.top(1000, "code")) == len(units)


def test_equal_ones_come_by_their_ids(tmp_path):
    visits = [Visit(1, sample, [Piece(0, 0, [[Fraction(sample % 2)]])]) for sample in (5, 3, 8, 2, 7)]
    write_ledger(tmp_path, visits, "sample", [""])
    values = Values.open(tmp_path)
    assert values.top(4)["sample_id"][:] == [3, 5, 7, 2]
    assert values.bottom(4)["sample_id"][:] == [2, 8, 3, 5]


def test_join(place, visits):
    """Row numbers, or ids in any order; documents that were never seen; two rows of one document."""
    units = of_units(written(visits, "document"), "document_id").set_index("document_id")
    values = place("document")
    order = np.random.default_rng(0).permutation(40)
    for corpus in (
        Dataset.from_dict({"text": [str(d) for d in range(40)]}),
        Dataset.from_dict({"text": [str(d) for d in order], "document_id": order}),
        Dataset.from_dict({"text": ["3", "39", "3", *map(str, range(20))], "document_id": [3, 39, 3, *range(20)]}),
        Dataset.from_dict({"text": [str(d) for d in range(40)]}).select(range(30)),
    ):
        before = corpus.to_dict()
        found = values.join(corpus)
        assert corpus.to_dict() == before
        assert found.column_names == [*corpus.column_names, "updates", "tokens", *COLUMNS]
        for row in found:
            document = int(row["text"])
            for column in ("updates", "tokens", *COLUMNS):
                expected = units[column].get(document)
                assert row[column] == expected or (row[column] is None and expected is None)
    ids = Dataset.from_dict({"uid": [4, 99]})
    assert values.join(ids, id_column="uid")["updates"][:] == [units["updates"][4], None]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda values: values.top(3), "target: this run has values for code, prose: name the one that is meant"),
        (lambda values: values.top(3, "law"), "target='law'.*code, prose"),
        (lambda values: values.bottom(0, "code"), "n=0"),
        (lambda values: values.over_time(0), "windows=0"),
        (lambda values: values.units("position"), "key='position'.*sample_id, document_id"),
        (lambda values: values.by_group({1: "a"}), "documents with values have no group"),
        (lambda values: values.join([{"text": "a"}]), "dataset is a list.*Dataset"),
        (lambda values: values.join(Dataset.from_dict({"text": ["a"] * 9})), "11 of the 20 documents.*numbers"),
        (lambda values: values.join(Dataset.from_dict({"document_id": [77]})), "20 of the 20 documents.*other ids"),
        (lambda values: values.join(Dataset.from_dict({"document_id": [[1], [2]]})), "holds lists.*key='sample_id'"),
        (lambda values: values.join(Dataset.from_dict({"document_id": ["1"]})), "not an integer in each row"),
        (lambda values: values.join(Dataset.from_dict({"a": [1]}), id_column="b"), "id_column='b' is no column"),
        (lambda values: values.join(Dataset.from_dict({"tokens": [1] * 40})), "column 'tokens' already: rename it"),
    ],
)
def test_what_cannot_be_asked(place, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(place("document"))


def test_an_unnamed_target(tmp_path):
    write_ledger(tmp_path, [Visit(1, 0, [Piece(0, 0, [[Fraction(1)]])])], "sample", [""])
    assert Values.open(tmp_path).total() == {"samples": 1, "updates": 1, "tokens": 1, "value": 1.0}
    with pytest.raises(ValueError, match="target='code'.*has no name: leave target out"):
        Values.open(tmp_path).top(1, "code")


def test_a_part_of_the_corpus_may_be_joined_and_it_is_said(place, caplog):
    found = place("document").join(Dataset.from_dict({"document_id": [3, 4]}))
    assert None not in found["updates"][:]
    assert "18 of the 20 documents with values have no row in the dataset" in caplog.text


def test_tokens_without_documents_are_known_by_samples(tmp_path):
    """Everything has the document -1."""
    visits = [Visit(1, sample, [Piece(-1, 0, [[Fraction(1)], [Fraction(sample)]])]) for sample in range(3)]
    write_ledger(tmp_path, visits, "token", [""], with_tokens=[0, 1, 2])
    values = Values.open(tmp_path)
    assert values.key == "sample_id"
    assert values.by_group({0: "a", 1: "a", 2: "b"})["value"][:] == [3.0, 3.0]
    assert values.top(1)["sample_id"][:] == [2]


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here holds no ledger"):
        Values.open(tmp_path / "nothing-here")
    with pytest.raises(ValueError, match="nobody/nothing: its config 'values' cannot be loaded.*push_values_to_hub"):
        Values.open("nobody/nothing")
    (tmp_path / "values").mkdir()
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "values" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="cannot be loaded|columns text, which are not those of values"):
        Values.open(tmp_path)
    write_ledger(tmp_path / "run", [], "sample", [""])
    with pytest.raises(ValueError, match="revision='v1'"):
        Values.open(tmp_path / "run", revision="v1")
    with pytest.raises(ValueError, match="no values yet"):
        Values.open(tmp_path / "run").over_time()
    assert Values.open(tmp_path / "run").total() == {"samples": 0, "updates": 0, "tokens": 0, "value": 0.0}


def test_units_on_the_hub_need_no_history(tmp_path, visits, monkeypatch):
    write_ledger(tmp_path / "run", visits, "document", TARGETS, ranks=2)
    publish(tmp_path / "run", tmp_path / "copy")
    asked = []

    def load_dataset(repo, config, revision):
        asked.append((repo, config, revision))
        return DatasetDict(train=load_config(str(tmp_path / "copy"), config, None))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, values = written(visits, "document"), Values.open("me/corpus-values", revision="v1")
    same(values.units().to_pandas(), of_units(rows, "document_id"))
    assert asked == [("me/corpus-values", "values", "v1")]
    same(values.units("sample_id").to_pandas(), of_units(rows, "sample_id"))
    assert asked[1:] == [("me/corpus-values", "history", "v1")]


def test_a_copy_that_is_not_whole(tmp_path, visits):
    write_ledger(tmp_path / "run", visits, "document", TARGETS, ranks=2)
    publish(tmp_path / "run", tmp_path / "copy")
    for path in (tmp_path / "copy" / "history").iterdir():
        path.unlink()
    same(Values.open(tmp_path / "copy").units().to_pandas(), of_units(written(visits, "document"), "document_id"))
    with pytest.raises(ValueError, match="config 'history' cannot be loaded"):
        Values.open(tmp_path / "copy").units("sample_id")
