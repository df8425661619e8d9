"""`datashapley select RUN`: what the command line says about selections. The work is in `hf_datashapley.curation`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import HfArgumentParser

from .config_files import add_common_options, parse


if TYPE_CHECKING:
    from datasets import Dataset


DESCRIPTION = """\
The corpus without what hurt: rows kept or dropped by what they did in a run.

Writes the rows that are kept, with all their columns and their value beside them (nats of validation loss, positive
helped; null where a row was never trained on), and prints what went, by source. The original is not altered. One of
--drop_negative, --keep_fraction and --min_value says what is kept.

Judged is each document, where the run's values know documents, or else each sample; with --by SOURCE each source as a
whole, by the sum of its values. A value is what a row did in the whole run: long ones and those that were visited more
often did more, so --per_token judges by value per loss token."""

EPILOG = """\
examples:
  datashapley select out --dataset corpus.parquet --drop_negative
  datashapley select out --dataset corpus.parquet --keep_fraction 0.7 --per_token --target code --output code.parquet
  datashapley select out --dataset rows --min_value=-1e-5          a number that begins with a minus needs the =
  datashapley select out --dataset corpus.jsonl --by source --keep_fraction 0.5      the better half of the sources
  datashapley select me/corpus-values --dataset me/corpus --split train --drop_negative --output curated
  datashapley select out --config select.yaml                      dataset: corpus.parquet, keep_fraction: 0.7, ...

Documents that were packed into rows are judged as documents: --dataset is the corpus that was packed, whose rows are
numbered from 0 where it has no column document_id, as pack_documents numbers them."""


@dataclass
class SelectConfig:
    """The options of `datashapley select`."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "What was trained on, documents or samples: a folder of Dataset.save_to_disk, a Parquet or a "
            "JSONL file, or a dataset on the Hub. Without ids, its rows are numbered from 0."
        },
    )
    split: str = field(default="train", metadata={"help": "Of a dataset on the Hub. Default: train."})
    drop_negative: bool = field(default=False, metadata={"help": "Keep what has a value of 0 or more."})
    keep_fraction: float | None = field(
        default=None,
        metadata={"help": "Keep this fraction of the documents (samples, sources) that have a value: the best."},
    )
    min_value: float | None = field(default=None, metadata={"help": "Keep what has at least this value, in nats."})
    target: str | None = field(
        default=None, metadata={"help": "Whose loss; needed where the run has several validation targets."}
    )
    per_token: bool = field(default=False, metadata={"help": "Judge by value per loss token that was trained on."})
    by: str | None = field(
        default=None,
        metadata={"help": "A column: judge its groups as wholes, all rows of one kept or dropped together."},
    )
    unvisited: Literal["keep", "drop"] = field(
        default="keep",
        metadata={"help": "What becomes of rows that were never trained on, and so have no value. Default: keep."},
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "Where to: a name that ends in .parquet, or that of a folder, for Dataset.save_to_disk. Default: "
            "the folder curated in RUN."
        },
    )
    value_column: str = field(default="value", metadata={"help": "What the added column is called. Default: value."})
    group_column: str | None = field(
        default=None,
        metadata={"help": "What the summary is by. Default: as --by, or else source or domain, if there is one."},
    )
    key: Literal["document_id", "sample_id"] | None = field(
        default=None,
        metadata={"help": "What the rows of --dataset are. Default: documents, where the run's values know these."},
    )
    id_column: str | None = field(
        default=None, metadata={"help": "Their ids. Default: document_id (or sample_id), if there is one."}
    )


def parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        SelectConfig,
        prog="datashapley select",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="A run's output_dir or its value_dir, or a dataset repo on the Hub that `datashapley push` wrote.",
    )
    add_common_options(parser)
    return parser


def run(arguments: Sequence[str]) -> None:
    """Parses, selects, writes and prints what went.

    Raises:
        SystemExit: `--help`, or an argument that argparse refuses.
        OSError: there is no ledger, or the selection cannot be written.
        ValueError: what is given does not fit the run; the message names it and the cure.
    """
    settings = parse(parser(), SelectConfig, arguments)
    run, output = settings.pop("run"), settings.pop("output")
    source, split = settings.pop("dataset"), settings.pop("split")
    if source is None:
        raise ValueError("--dataset is missing: name the documents, or samples, that the run was trained on")
    if output is None and not Path(run).is_dir():
        raise ValueError(f"--output is missing, and {run} is no folder to write into: name a file or folder")

    # Here, so that `--help` does not load torch.
    import datasets
    from transformers.utils import logging

    from ..curation import select
    from ..curation.writing import check_output
    from ..query import Values

    # What cannot be read is said by this command, once.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.set_verbosity_error()
    path = Path(run, "curated") if output is None else Path(output)
    check_output(path)
    values = Values.open(run)
    selection = select(values, source_dataset(source, split), **settings)
    selection.write(path)
    print(f"{selection.summary}\n\n{path}")


def source_dataset(source: str, split: str) -> Dataset:
    """A file or folder, or a split of a dataset on the Hub.

    Raises:
        ValueError: it cannot be read.
    """
    import datasets

    from ..query.values import REPO
    from ..report.sources import read_dataset

    if Path(source).exists() or not REPO.fullmatch(source):
        return read_dataset(source, "--dataset")
    try:
        return datasets.load_dataset(source, split=split)
    except (datasets.exceptions.DatasetsError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"--dataset {source} is no file or folder, and split {split!r} of such a dataset on the Hub cannot be "
            f"loaded ({str(error).splitlines()[0]})"
        ) from error
