"""The dataset repo that holds a run's values: found or made, looked at, and changed by one commit.

A commit is all there or not at all, and is built upon the one that was looked at: what others have written in between
is not lost, the Hub refuses and the push begins anew. Files that are there already are not sent again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import DatasetInfo

from .. import __version__
from .source import check_repo_id


# By which a repo of values is known, and found by others.
TAG = "hf_datashapley"
CARD = "README.md"
# What a push writes, and what it clears away of an earlier one: these folders and the card.
FOLDERS = ("values", "history", "audit", "groups", "pictures")
NEW = {".gitattributes", ".gitignore", CARD, "LICENSE"}


@dataclass(frozen=True)
class Destination:
    """Where values go. The token is never printed.

    Attributes:
        repo_id: a dataset's.
        private: whether it is; None: as it is, or as the Hub makes a new one.
        revision: a branch, made from main where it is missing; None: main.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    token: str = field(default="", repr=False)

    @classmethod
    def of(cls, repo_id: str, private: bool | None, revision: str | None, token: str | None) -> Destination:
        """
        Raises:
            ValueError: the name is none of a repo's, there is no token, or no way to the Hub.
        """
        check_repo_id("repo_id", repo_id)
        if is_offline_mode():
            raise ValueError(f"{repo_id}: HF_HUB_OFFLINE=1 keeps this process from the Hub: unset it to push")
        token = token or get_token()
        if token is None:
            raise ValueError(
                f"{repo_id}: pushing needs a token with write access: log in (`hf auth login`), set HF_TOKEN, or give "
                "`token`"
            )
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise ValueError(
                f"{repo_id}: the token holds characters that no token has (a space, or a line break of the file it "
                "was read from): strip it"
            )
        return cls(repo_id, private, revision, token)

    def api(self) -> HfApi:
        return HfApi(token=self.token, library_name=TAG, library_version=__version__)

    def with_owner(self) -> Destination:
        """Who is the token's, where none is named."""
        owned = self.repo_id if "/" in self.repo_id else f"{self.api().whoami()['name']}/{self.repo_id}"
        return replace(self, repo_id=owned)


def find_repo(destination: Destination) -> DatasetInfo | None:
    """The dataset repo; None, there is none of that name yet.

    Raises:
        ValueError: it is not one to push these values to.
    """
    api, repo_id = destination.api(), destination.repo_id
    try:
        info = api.dataset_info(repo_id)
    except RepositoryNotFoundError:
        for kind in ("model", "space"):
            if api.repo_exists(repo_id, repo_type=kind):
                raise ValueError(
                    f"repo_id={repo_id!r} is a {kind}, and values go to a dataset repo: name another, "
                    f"{repo_id}-values, say"
                ) from None
        return None
    if destination.private is not None and info.private != destination.private:
        is_private = "private" if info.private else "public"
        raise ValueError(
            f"private={destination.private}: {repo_id} is {is_private} already: leave it out, change the repo's "
            "settings on the Hub, or name another repo"
        )
    return info


def push_folder(destination: Destination, folder: Path, message: str) -> CommitInfo:
    """The files of a folder become those of the repo, by one commit; none where they are the same.

    Raises:
        ValueError: the repo is not one to push these values to.
        HfHubHTTPError, HTTPError, RuntimeError: the Hub refused, or was not reached.
    """
    api, repo_id = destination.api(), destination.repo_id
    info = find_repo(destination)
    if info is None:
        api.create_repo(repo_id, repo_type="dataset", private=destination.private, exist_ok=True)
        info = api.dataset_info(repo_id)
    if destination.revision is not None:
        info = branch(api, repo_id, destination.revision)
    held = api.list_repo_files(repo_id, repo_type="dataset", revision=info.sha)
    check_ours(info, held)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = [path for path in held if path.split("/")[0] in FOLDERS and path not in files]
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, path) for name, path in files.items()),
            *(CommitOperationDelete(path, is_folder=False) for path in stale),
        ],
        repo_type="dataset",
        commit_message=message,
        revision=destination.revision,
        parent_commit=info.sha,
    )


def branch(api: HfApi, repo_id: str, revision: str) -> DatasetInfo:
    """Its head, made if need be."""
    try:
        return api.dataset_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
        return api.dataset_info(repo_id, revision=revision)


def check_ours(info: DatasetInfo, held: list[str]) -> None:
    """Raises: ValueError, the repo holds something else, a corpus, say, whose card would be lost."""
    others = sorted(set(held) - NEW)
    if others and TAG not in (info.tags or []):
        raise ValueError(
            f"{info.id} is a dataset of another kind (it holds {others[0]}, and its card has no tag {TAG!r}), which "
            "values would overwrite: name a repo of their own"
        )
