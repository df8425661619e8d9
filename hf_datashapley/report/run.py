"""A run's ledger, and whatever else is known of its data, as one page.

What has a value on the page is what a reader thinks of as one text: the document where the ledger knows documents,
else the sample. A document's value is the sum of its pieces', whichever samples they are in, and of its tokens'.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from datasets.table import InMemoryTable
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_datashapley.ledger import load_audit, load_updates, load_value_history, load_values
from hf_datashapley.ledger.layout import find_ledger, read_manifest
from hf_datashapley.report.aggregate import Ints, arrow_table
from hf_datashapley.report.report import write_report
from hf_datashapley.report.rows import TrainingRows
from hf_datashapley.report.sources import GROUP, described, read_dataset, with_ids
from hf_datashapley.report.texts import DOCUMENT, SAMPLE, text_reader, token_texts_of


@dataclass(frozen=True)
class Sources:
    """What is known beside the ledger; the names of columns as in `ShapleyConfig`, None: the usual ones.

    Attributes:
        dataset: the rows that were trained on.
        documents: the corpus, a row for each document.
        tokenizer: of the rows' tokens.
        group_column: of `documents`, or of `dataset` where samples have the values.
    """

    dataset: str | None = None
    documents: str | None = None
    tokenizer: str | None = None
    group_column: str | None = None
    sample_id_column: str | None = None
    document_id_column: str | None = None


def report_run(run: str, sources: Sources, output: str | None = None) -> Path:
    """Writes the page; returns where it is, `report.html` in `run` if nothing else is asked for.

    Raises:
        FileNotFoundError: `run` holds no ledger.
        ValueError: what is known of the data does not fit the ledger.
    """
    directory = find_ledger(run)
    values, history, key = values_of_texts(directory)
    rows = None if sources.dataset is None else read_dataset(sources.dataset, "--dataset")
    documents = None if sources.documents is None else read_dataset(sources.documents, "--documents")
    check_document_column(sources.document_id_column, [known for known in (rows, documents) if known is not None])
    if rows is not None:
        rows = rows_with_ids(rows, sources)
    units = units_of(sources, rows, documents, key, arrow_table(values, [key])[key].to_numpy())
    read_text, token_texts = None, None
    if sources.tokenizer is not None:
        if rows is None:
            raise ValueError(
                f"--tokenizer {sources.tokenizer} decodes the tokens of the rows that the run was trained on: name "
                "these by --dataset"
            )
        training, tokenizer = TrainingRows.of(rows), load_tokenizer(sources.tokenizer)
        read_text = text_reader(directory, key, training, tokenizer)
        token_texts = token_texts_of(directory, key, training, tokenizer)

    manifest = read_manifest(directory)
    path = Path(output) if output is not None else Path(run) / "report.html"
    write_report(
        path,
        values=values,
        history=history,
        updates=load_updates(directory),
        units=units,
        settings={"value_unit": manifest["unit"], **printable(manifest["settings"])},
        cost={},
        title=f"{manifest['settings'].get('model', 'A run')} in {Path(run).resolve().name}",
        audit=load_audit(directory),
        group=sources.group_column or GROUP,
        read_text=read_text,
        token_texts=token_texts,
    )
    return path


def printable(settings: dict[str, Any]) -> dict[str, object]:
    """Those that are set."""
    shown: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {number}" for key, number in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value is not None:
            shown[name] = value
    return shown


def values_of_texts(directory: Path) -> tuple[Dataset, Dataset, str]:
    """Values and their history, and the key of what has a value on the page.

    Padding has the document -1, and so has everything in a ledger of tokens that knows no documents.
    """
    if read_manifest(directory)["unit"] == "sample":
        return load_values(directory), load_value_history(directory), SAMPLE
    values = load_values(directory, by=DOCUMENT)
    if not (arrow_table(values, [DOCUMENT])[DOCUMENT].to_numpy() >= 0).any():
        return load_values(directory, by=SAMPLE), load_value_history(directory), SAMPLE
    return _of_documents(values), _of_documents(load_value_history(directory)), DOCUMENT


def _of_documents(table: Dataset) -> Dataset:
    rows = arrow_table(table, table.column_names)
    return Dataset(InMemoryTable(rows.filter(pc.field(DOCUMENT) >= 0)))


def check_document_column(column: str | None, known: list[Dataset]) -> None:
    """Raises: ValueError, it was asked for, and no file has it."""
    if column is not None and not any(column in dataset.column_names for dataset in known):
        raise ValueError(
            f"--document_id_column {column}: neither --dataset nor --documents has such a column: name the one with "
            "the documents' ids, or leave it out"
        )


def units_of(
    sources: Sources, rows: Dataset | None, documents: Dataset | None, key: str, valued: Ints
) -> Dataset | None:
    """What is known of the documents, or samples, that have values: `units` as `write_report` takes it.

    Raises:
        ValueError: it does not fit the run, or what is asked for is in no file.
    """
    if documents is not None and key == SAMPLE:
        raise ValueError(
            f"--documents {sources.documents}: this run's values are of samples, not of documents: put titles, texts "
            "and groups into columns of --dataset, or train with value_unit='document'"
        )
    if documents is not None:
        option = f"--documents {sources.documents}"
        corpus = with_ids(documents, sources.document_id_column or DOCUMENT, False, DOCUMENT, option)
        return described(corpus, DOCUMENT, sources.group_column, valued, option)
    if rows is not None and key == SAMPLE:
        return described(rows, SAMPLE, sources.group_column, valued, f"--dataset {sources.dataset}")
    if sources.group_column is not None:
        raise ValueError(
            f"--group_column {sources.group_column}: name the file that has this column, by "
            + ("--documents" if key == DOCUMENT else "--dataset")
        )
    return None


def rows_with_ids(rows: Dataset, sources: Sources) -> Dataset:
    """The rows trained on, with their ids in `sample_id` and those of their tokens' documents in `document_id`."""
    sample, document = sources.sample_id_column, sources.document_id_column
    rows = with_ids(rows, sample or SAMPLE, sample is not None, SAMPLE, f"--dataset {sources.dataset}")
    if document is None or document == DOCUMENT or document not in rows.column_names:
        return rows
    others = rows.remove_columns(DOCUMENT) if DOCUMENT in rows.column_names else rows
    return others.rename_column(document, DOCUMENT)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises: ValueError, there is none of that name."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--tokenizer {name} cannot be loaded ({str(error).splitlines()[0]}): name a folder with a "
            "tokenizer.json, or a model of the Hub"
        ) from error
