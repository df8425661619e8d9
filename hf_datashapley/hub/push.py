"""push_values_to_hub: a run's tables, card and pictures, written to a temporary folder and committed in one go."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from huggingface_hub import CommitInfo

from ..ledger.groups import By
from ..ledger.layout import find_ledger
from .card import write_card
from .failures import retried
from .repo import CARD, Destination, check_ours, find_repo, push_folder
from .source import Source, check_repo_id, inherited_license
from .tables import GroupsOf, Tables, write_tables


def push_values_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    by: By | None = None,
    dataset: Dataset | None = None,
    key: str | None = None,
    id_column: str | None = None,
    source_dataset: str | None = None,
    source_revision: str | None = None,
    source_license: str | None = None,
    model_id: str | None = None,
    to_step: int | None = None,
) -> CommitInfo:
    """Makes a dataset repo of a run's values, or brings one up to date, by one commit.

    Its configurations are `values`, `history`, `audit` (of a run with `audit_steps`) and `groups` (with `by`):
    `load_dataset(repo_id, "values", split="train")` gives the rows and types of `load_values(run)`. The card is
    written anew; what others have put into the repo beside these stays. Pushing the same again changes nothing. A
    failure on the way is tried again, four times, after 1, 2, 4 and 8 seconds, and the repo holds all of a push or
    nothing of it.

    Takes the room of the tables on the disk for a while, and memory for `values` and two million rows of the history.

    Args:
        run: a run's `output_dir`, or its `value_dir`.
        repo_id: "owner/name", or "name" of the token's owner.
        private: whether the repo is. None: as it is; a new one as the account makes them.
        revision: a branch, made from main where it is missing. None: main.
        token: with write access. None: that of `hf auth login`, or HF_TOKEN.
        by, dataset, key, id_column: what the configuration `groups` sums over, see `load_values`.
        source_dataset, source_revision: the dataset on the Hub that was trained on, which the card names.
        source_license: its licence, as the Hub calls it ("cc-by-4.0"), which the values inherit. None: what the
            dataset's card says, if it says any.
        model_id: the model repo of the run, which the card links to.
        to_step: the last update to push. None: of all.

    Raises:
        FileNotFoundError: there is no ledger.
        ValueError: the ledger is not finished, or the repo is not one for values, or the Hub refuses; the message
            names the cure. The token is in no message.
        ConnectionError: the Hub could not be reached.
    """
    directory = find_ledger(run)
    source = Source(source_dataset, source_revision, source_license)
    if model_id is not None:
        check_repo_id("model_id", model_id)
    if by is None and (dataset is not None or key is not None or id_column is not None):
        raise ValueError("dataset, key and id_column are for groups: give `by` too")
    destination, license = prepared(Destination.of(repo_id, private, revision, token), source)
    with TemporaryDirectory(prefix="datashapley-") as name:
        folder = Path(name)
        groups = None if by is None else GroupsOf(by, dataset, key, id_column)
        tables = write_tables(directory, folder, groups, to_step)
        pictures = drawn(tables, folder)
        card = write_card(tables, destination.repo_id, source, license, model_id, pictures)
        (folder / CARD).write_bytes(card.encode(errors="replace"))
        message = f"Values of {len(tables.updates)} updates"
        return retried(lambda: push_folder(destination, folder, message), destination.repo_id, destination.token)


def drawn(tables: Tables, folder: Path) -> list[str]:
    """Paths of the pictures in the folder: none without matplotlib (the extra "report")."""
    if find_spec("matplotlib") is None:
        return []
    from .pictures import draw_pictures

    return draw_pictures(tables, folder)


def check_values_repo(
    repo_id: str, private: bool | None, revision: str | None, token: str | None, source: Source
) -> str:
    """That values can go there when the run is over, as far as can be told before; makes nothing. Returns the full id.

    Raises:
        ValueError, ConnectionError: as `push_values_to_hub`.
    """
    destination, _ = prepared(Destination.of(repo_id, private, revision, token), source)
    return destination.repo_id


def prepared(destination: Destination, source: Source) -> tuple[Destination, dict[str, Any]]:
    """Where to, with the owner, and the licence: what can be refused before anything is read or made."""

    def prepare() -> tuple[Destination, dict[str, Any]]:
        owned = destination.with_owner()
        info = find_repo(owned)
        if info is not None:
            check_ours(info, [file.rfilename for file in info.siblings or []])
        return owned, inherited_license(owned.api(), source)

    return retried(prepare, destination.repo_id, destination.token)
