"""`datashapley report`: runs with more and more of the data beside them, and what is said where that does not fit."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from packed_documents import prepare_documents
from prepared import two_groups
from test_report import Page
from token_ledgers import Run, make_run
from torch.optim import SGD

from hf_datashapley import load_values
from hf_datashapley.cli.main import main


TEXTS = ["one text", "another text, and it goes on in the next row", "the third", "a fourth text, the last one"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("documents"), TEXTS, unit="document")


def page_of(folder: Path | str, output: Path, *arguments: str) -> Page:
    assert main(["report", str(folder), "--output", str(output), *arguments]) == 0
    return Page(output)


def words(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


def test_ids_only(tmp_path, documents, capsys):
    """Of the run's folder or of its ledger; a document in two rows is one."""
    page = page_of(documents.folder, tmp_path / "new" / "page.html")
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'page.html'}\n"
    assert "4 documents, " in words(page) and "document 1" in words(page)
    assert set(page.rows) == {"documents", "all"}
    values = load_values(documents.folder / "values")
    assert page.rows["all"][0] == "4" and int(float(page.rows["all"][1])) == sum(values["tokens"])
    for k, target in enumerate(documents.targets):
        assert float(page.rows["all"][2 + 3 * k]) == pytest.approx(sum(values[f"value_{target}"]))
    assert main(["report", str(documents.folder / "values")]) == 0
    assert Page(documents.folder / "values" / "report.html").rows == page.rows


def test_groups_sum_what_the_ledger_holds(tmp_path, documents):
    page = page_of(
        documents.folder, tmp_path / "page.html", "--documents", documents.documents, "--group_column", "source"
    )
    corpus = Dataset.from_parquet(documents.documents)
    expected = load_values(documents.folder / "values", by="source", dataset=corpus)
    assert set(page.rows) == {*expected["source"], "all"}
    for row in expected:
        cells = [float(cell) for cell in page.rows[row["source"]]]
        assert cells[:2] == [row["documents"], row["tokens"]]
        assert [cells[2], cells[5]] == pytest.approx([row["value_code"], row["value_prose"]])
    assert "Every source" in page.text and "title 1" in page.text and TEXTS[1] in page.text


def test_every_document_has_a_value_for_each_target(tmp_path, documents):
    page = page_of(documents.folder, tmp_path / "page.html", "--documents", documents.documents)
    heads = re.findall(r'class="document-facts">.*?</span>\n', page.source, re.DOTALL)
    assert len(heads) == 2 * len(TEXTS)
    assert ["prose" in head for head in heads] == [True] * len(TEXTS) + [False] * len(TEXTS)


def test_texts_from_the_rows_alone(tmp_path, documents):
    page = page_of(
        documents.folder, tmp_path / "page.html", "--dataset", documents.rows, "--tokenizer", documents.tokenizer
    )
    assert all(text in page.text for text in TEXTS)
    assert "Token by token" not in page.text


@pytest.mark.parametrize("form", ["folder", "parquet", "jsonl"])
def test_samples_with_their_columns(tmp_path, form):
    """Ids in a column of another name, rows in another order."""
    run = make_run(tmp_path, TEXTS, unit="sample", targets=[""])
    known = {"number": [2, 1, 0], "text": list("cba"), "title": ["row 2", "row 1", "row 0"], "domain": list("xyx")}
    rows = Dataset.from_dict(known)
    path = tmp_path / {"folder": "rows", "parquet": "rows.parquet", "jsonl": "rows.jsonl"}[form]
    {"folder": rows.save_to_disk, "parquet": rows.to_parquet, "jsonl": rows.to_json}[form](str(path))
    page = page_of(run.folder, tmp_path / "page.html", "--dataset", str(path), "--sample_id_column", "number")
    assert set(page.rows) == {"x", "y", "all"} and "3 samples, " in words(page)
    values = load_values(tmp_path / "values")["value"]
    assert float(page.rows["y"][2]) == pytest.approx(values[1])
    best = max(range(3), key=lambda i: values[i])
    assert re.search(rf"row {best} x|row {best} y", words(page))


def test_a_real_run_of_documents(tmp_path):
    trainer, _, _ = prepare_documents(tmp_path, "gpt2", two_groups(SGD))
    trainer.train()
    names = [f"author {i % 2}" for i in range(13)]
    Dataset.from_dict({"author": names, "text": [f"text {i}" for i in range(13)]}).to_json(tmp_path / "corpus.jsonl")
    arguments = ["--documents", str(tmp_path / "corpus.jsonl"), "--group_column", "author"]
    page = page_of(Path(trainer.value_dir), tmp_path / "page.html", *arguments)
    assert set(page.rows) == {"author 0", "author 1", "all"}
    for row in trainer.values(by=dict(enumerate(names))):
        assert float(page.rows[row["group"]][2]) == pytest.approx(row["value"], rel=1e-6)
    assert "GPT2LMHeadModel" in page.text and "document" in page.text


REFUSED = {
    "no ledger": (["{other}"], "holds no ledger of values.*name the output_dir or the value_dir"),
    "no file": (["{run}", "--documents", "{run}/gone.jsonl"], "--documents .*gone.jsonl: there is no such file"),
    "no dataset": (["{run}", "--documents", "{run}/values"], "cannot be read.*save_to_disk"),
    "other kind": (["{run}", "--documents", "{run}/values/ledger.txt"], "ends in .parquet or .jsonl"),
    "broken": (["{run}", "--documents", "{run}/broken.parquet"], "broken.parquet cannot be read"),
    "several": (["{run}", "--dataset", "{run}/splits"], "several datasets: name the folder of one, .*/train"),
    "too few": (["{run}", "--documents", "{run}/few.jsonl"], "lacks 3 of the 4 documents.*document_id 1 first"),
    "twice": (["{run}", "--documents", "{run}/twice.jsonl"], "ids in more than one row, document_id 1 first"),
    "not integers": (["{run}", "--documents", "{run}/texts.jsonl"], "'document_id' is not an integer in each row"),
    "no group": (["{run}", "--documents", "{run}/few.jsonl", "--group_column", "url"], "no such column but .*text"),
    "group of nothing": (["{run}", "--group_column", "source"], "name the file that has this column, by --documents"),
    "no rows": (["{run}", "--tokenizer", "{tokenizer}"], "name these by --dataset"),
    "no tokenizer": (["{run}", "--dataset", "{rows}", "--tokenizer", "{run}/values"], "cannot be loaded"),
    "no tokens": (["{run}", "--dataset", "{run}/few.jsonl", "--tokenizer", "{tokenizer}"], "no column input_ids"),
    "no ids": (["{run}", "--dataset", "{rows}", "--sample_id_column", "n"], "no column 'n'.*--sample_id_column"),
    "no document ids": (
        ["{run}", "--dataset", "{rows}", "--documents", "{run}/few.jsonl", "--document_id_column", "n"],
        "--document_id_column n: neither",
    ),
}


@pytest.fixture(scope="module")
def places(documents, tmp_path_factory) -> dict[str, str]:
    folder = documents.folder
    (folder / "values" / "ledger.txt").write_text("")
    (folder / "broken.parquet").write_text("no Parquet")
    Dataset.from_dict({"text": ["a"]}).to_json(folder / "few.jsonl")
    Dataset.from_dict({"text": ["a", "b"], "document_id": [1, 1]}).to_json(folder / "twice.jsonl")
    Dataset.from_dict({"text": ["a", "b"], "document_id": ["x", "y"]}).to_json(folder / "texts.jsonl")
    datasets.DatasetDict(train=Dataset.from_dict({"a": [1]})).save_to_disk(folder / "splits")
    return {
        "run": str(folder),
        "rows": documents.rows,
        "tokenizer": documents.tokenizer,
        "other": str(tmp_path_factory.mktemp("empty")),
    }


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_said_in_a_line(places, capsys, case):
    arguments, message = REFUSED[case]
    assert main(["report", *(argument.format(**places) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert said.startswith("datashapley report: ") and said.count("\n") == 2, said


def test_documents_of_a_run_of_samples_are_refused(tmp_path, capsys):
    run = make_run(tmp_path, TEXTS, unit="sample")
    assert main(["report", str(tmp_path), "--documents", run.documents]) == 2
    assert "values are of samples, not of documents" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--group_column" in said and "examples:" in said and "RUN" in said
