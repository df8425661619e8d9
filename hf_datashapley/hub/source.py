"""The dataset that values speak about, and its licence, which they inherit. What is not known is not guessed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id


# What a dataset card says of its licence; the last two where it is called "other".
LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Source:
    """
    Attributes:
        dataset: its id on the Hub.
        revision: the commit, branch or tag that was trained on.
        license: as the Hub calls it ("apache-2.0"). None: what the dataset's card says, if it says any.

    Raises:
        ValueError: there is a revision or a licence, and no dataset that they are of; or it cannot be on the Hub.
    """

    dataset: str | None = None
    revision: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        for name, given in (("source_revision", self.revision), ("source_license", self.license)):
            if given is not None and self.dataset is None:
                raise ValueError(f"{name}={given!r} is that of a dataset: name it by source_dataset")
        if self.dataset is not None:
            check_repo_id("source_dataset", self.dataset)


def inherited_license(api: HfApi, source: Source) -> dict[str, Any]:
    """The fields of a card that say the licence, none where it is not known.

    Raises:
        ValueError: the Hub has to be asked, and knows no such dataset.
    """
    if source.license is not None:
        return {"license": source.license}
    if source.dataset is None:
        return {}
    try:
        info = api.dataset_info(source.dataset, revision=source.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = "" if source.revision is None else f" with a revision {source.revision!r}"
        raise ValueError(
            f"source_dataset={source.dataset!r}: the Hub shows no such dataset{at}, so its licence is not known: "
            "correct it, take a token that may read it, or say the licence by source_license"
        ) from error
    card = {} if info.card_data is None else info.card_data.to_dict()
    return {name: card[name] for name in LICENSE_FIELDS if card.get(name)}


def check_repo_id(name: str, repo_id: str) -> None:
    """Raises: ValueError, the setting of this name is no repo's id."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{name}={repo_id!r} is no name of a repo: give 'owner/name', or 'name' alone") from error
    if repo_id.startswith(("datasets/", "models/", "spaces/")):
        raise ValueError(f"{name}={repo_id!r}: leave {repo_id.split('/')[0]}/ out")
