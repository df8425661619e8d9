"""`datashapley report RUN`: what the command line says about reports. The work is in `hf_datashapley.report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from .config_files import add_common_options, parse


DESCRIPTION = """\
Who helped, who hurt: a run's values on one HTML page.

Reads the ledger of a run and writes a page that needs nothing but a browser: totals by group, value over training, how
values are spread, the documents that helped and hurt each target most. With the data beside it the page shows their
text, and with values of tokens (value_unit="token") each token in the colour of its value."""

EPILOG = """\
examples:
  datashapley report out                                                    ids and numbers only
  datashapley report out --dataset rows.parquet                             samples, with the columns title and text
  datashapley report out --documents corpus.parquet --group_column source   documents and their sources
  datashapley report out --dataset packed --documents corpus.jsonl --tokenizer gpt2   and their tokens, coloured

packed is a folder that Dataset.save_to_disk wrote: the rows that the run was trained on."""


@dataclass
class ReportConfig:
    """The options of `datashapley report`."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "The rows that were trained on: a folder of Dataset.save_to_disk, a Parquet or a JSONL file. "
            "Columns: input_ids; title, text and a group, where samples have the values."
        },
    )
    documents: str | None = field(
        default=None,
        metadata={
            "help": "The corpus, a row for each document, in the same forms; columns text, title, a group. Where it "
            "has no column of ids, its rows are numbered from 0, as pack_documents numbers them."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Decodes the tokens of --dataset: a folder, or a name on the Hub."}
    )
    output: str | None = field(default=None, metadata={"help": "The page. Default: report.html in RUN."})
    group_column: str | None = field(
        default=None,
        metadata={"help": "What to sum over: source, say. Default: the column domain, if there is one."},
    )
    sample_id_column: str | None = field(
        default=None,
        metadata={"help": "Ids of the rows of --dataset. Default: sample_id; without it, the rows are numbered."},
    )
    document_id_column: str | None = field(
        default=None,
        metadata={"help": "Ids of the documents, of each token in --dataset, in --documents. Default: document_id."},
    )


def parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        ReportConfig,
        prog="datashapley report",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="A run's output_dir, or its value_dir.")
    add_common_options(parser)
    return parser


def run(arguments: Sequence[str]) -> None:
    """Parses and writes the page.

    Raises:
        SystemExit: `--help`, or an argument that argparse refuses.
        ImportError: the extra "report" is not installed.
        OSError: there is no ledger, or the page cannot be written.
        ValueError: what is given does not fit the run; the message names it and the cure.
    """
    settings = parse(parser(), ReportConfig, arguments)
    directory, output = settings.pop("run"), settings.pop("output")

    # Here, so that `--help` does not load torch.
    import datasets
    from transformers.utils import logging

    from ..report.run import Sources, report_run

    # What cannot be read is said by this command, once.
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.set_verbosity_error()
    print(report_run(directory, Sources(**settings), output))
