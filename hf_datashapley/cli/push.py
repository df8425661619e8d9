"""`datashapley push RUN REPO_ID`: what the command line says about pushing. The work is in `hf_datashapley.hub`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser

from .config_files import add_common_options, parse


DESCRIPTION = """\
Share a run's values on the Hub, beside the dataset they speak about.

Makes a dataset repo, or brings one up to date, with the configurations values, history, audit (of runs with
audit_steps) and groups (with --group_column), and a card that says what was valued, how to load it and join it with
the data, and what its licence is. All of it is one commit; pushing again sends what has changed.

The token is that of `hf auth login`, or HF_TOKEN: an option would show it to everyone on the machine."""

EPILOG = """\
examples:
  datashapley push out me/corpus-values --private
  datashapley push out me/corpus-values --source_dataset me/corpus --model_id me/gpt2-corpus
  datashapley push out me/corpus-values --dataset rows.parquet --group_column domain      samples by domain
  datashapley push out me/corpus-values --documents corpus.jsonl --group_column source    documents by source

What was pushed is loaded by
  load_dataset("me/corpus-values", "values", split="train")"""


@dataclass
class PushConfig:
    """The options of `datashapley push`."""

    private: bool = field(
        default=False,
        metadata={"help": "Make the repo a private one. Default: as it is; a new one as your account makes them."},
    )
    revision: str | None = field(default=None, metadata={"help": "A branch, made where it is missing. Default: main."})
    source_dataset: str | None = field(
        default=None, metadata={"help": "The dataset on the Hub that the run was trained on, which the card names."}
    )
    source_revision: str | None = field(default=None, metadata={"help": "Its commit, branch or tag."})
    source_license: str | None = field(
        default=None,
        metadata={
            "help": "Its licence, which the values inherit: cc-by-4.0, say. Default: what the dataset's card says."
        },
    )
    model_id: str | None = field(
        default=None, metadata={"help": "The model on the Hub that the run trained, which the card links to."}
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "For groups of samples: the rows that were trained on, a folder of Dataset.save_to_disk, a "
            "Parquet or a JSONL file."
        },
    )
    documents: str | None = field(
        default=None, metadata={"help": "For groups of documents: the corpus, a row for each, in the same forms."}
    )
    group_column: str | None = field(
        default=None, metadata={"help": "What to sum over, a column of --dataset or --documents: source, say."}
    )
    sample_id_column: str | None = field(
        default=None,
        metadata={"help": "Ids of the rows of --dataset. Default: sample_id; without it, the rows are numbered."},
    )
    document_id_column: str | None = field(
        default=None,
        metadata={"help": "Ids of --documents. Default: document_id; without it, the rows are numbered."},
    )


def parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        PushConfig,
        prog="datashapley push",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="A run's output_dir, or its value_dir.")
    parser.add_argument("repo_id", metavar="REPO_ID", help="The dataset repo: owner/name, or a name of your own.")
    add_common_options(parser)
    return parser


def run(arguments: Sequence[str]) -> None:
    """Parses and pushes; prints where to.

    Raises:
        SystemExit: `--help`, or an argument that argparse refuses.
        OSError: there is no ledger, or the Hub cannot be reached.
        ValueError: what is asked for cannot be done; the message names it and the cure.
    """
    settings = parse(parser(), PushConfig, arguments)
    directory, repo_id = settings.pop("run"), settings.pop("repo_id")
    settings["private"] = settings["private"] or None
    names = ("dataset", "documents", "group_column", "sample_id_column", "document_id_column")
    groups = groups_of(*(settings.pop(name) for name in names))

    # Here, so that `--help` does not load torch.
    from ..hub import push_values_to_hub
    from ..hub.model_card import link_values

    pushed = push_values_to_hub(directory, repo_id, **groups, **settings)
    print(pushed.repo_url)
    if link_values(directory, pushed.repo_url.repo_id):
        print(f"The model card in {directory} links to it")


def groups_of(
    dataset: str | None,
    documents: str | None,
    column: str | None,
    sample_id_column: str | None,
    document_id_column: str | None,
) -> dict[str, Any]:
    """As `push_values_to_hub` takes them.

    Raises:
        ValueError: one of a file and its column is missing, or there are two files.
    """
    if dataset is not None and documents is not None:
        raise ValueError("--dataset is for groups of samples and --documents for those of documents: give one of them")
    for file, option, ids in (
        (dataset, "--dataset", sample_id_column),
        (documents, "--documents", document_id_column),
    ):
        if ids is not None and file is None:
            raise ValueError(f"{ids!r} is a column of {option}: name the file, too")
        if file is not None and column is None:
            raise ValueError(f"{option} {file}: name the column to sum over by --group_column")
    if dataset is None and documents is None:
        if column is not None:
            raise ValueError(
                f"--group_column {column}: name the file that has this column, by --dataset or --documents"
            )
        return {}

    from ..report.sources import read_dataset

    if dataset is not None:
        rows = read_dataset(dataset, "--dataset")
        return {"by": column, "dataset": rows, "key": "sample_id", "id_column": sample_id_column}
    rows = read_dataset(str(documents), "--documents")
    return {"by": column, "dataset": rows, "key": "document_id", "id_column": document_id_column}
