"""The link from a run's model card to its values."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, constants

from .repo import CARD


HEADING = "## Values of the training data"


def link_values(folder: str | Path, repo_id: str) -> bool:
    """Ends the model card in a run's output_dir, where `Trainer` has written one, with a link to the values' repo.

    Whether there is one. A link that is there already is replaced.
    """
    path = Path(folder) / CARD
    if not path.is_file():
        return False
    content = path.read_text(encoding="utf-8")
    tags = ModelCard(content, ignore_metadata_errors=True).data.get("tags") or []
    if "generated_from_trainer" not in tags:
        return False  # a README of another kind
    body, *_ = content.split(f"\n{HEADING}\n")
    link = f"[{repo_id}]({constants.ENDPOINT}/datasets/{repo_id})"
    told = f"What each part of the training data did to the validation loss, measured while it trained: {link}."
    path.write_text(f"{body.rstrip()}\n\n{HEADING}\n\n{told}\n", encoding="utf-8")
    return True
