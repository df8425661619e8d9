"""The settings that all estimators share, and how rows and a member's model are read by them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from transformers import default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from ..ghost.capture import Capture
from ..loss_tokens import IGNORED, shifts_labels
from ..ranks import Ranks
from ..trainer.batches import IdColumns
from ..trainer.boundaries import row_documents
from ..trainer.packed import check_documents_apart, check_samples_apart, packs_samples
from .activations import fused_activations
from .corpus import Corpus, Reading, Unit
from .grouping import Grouping
from .losses import check_token_losses, token_losses, without_cache
from .measures import moved
from .projection import ProjectionKind


Collator = Callable[[list[Any]], Any]
StoreDtype = Literal["float32", "float16"]
# Text of a setting that is printed; of others, what they are.
LONGEST = 60


@dataclass(repr=False)
class Settings:
    """
    Args:
        members: the trained model; or a list of them, or an ensemble (`CheckpointEnsemble`, `DropoutEnsemble`,
            `LoraEnsemble`), over which scores are averaged. They are left as they were.
        projection_dim: features of each unit's gradient, shared out among the parameters or sketched together (see
            `projection`); None: no projection, scores are exact.
        projection: "logra", both sides of each weight's gradient projected (the cheapest); "sjlt", a sparse sign
            matrix over the whole gradient, with the noise of a dense one; "rademacher", the dense one (slow); "auto":
            "sjlt" for small models, else "logra".
        modules: which modules' parameters count, as PEFT's `target_modules`; None: every one that requires a gradient.
        unit: "sample", "document" (rows of `pack_documents`) or "token" (its own loss, a backward pass for each).
        partition: groups of samples, or of documents, that are the units instead.
        batch_size: rows of a forward pass. Scores do not depend on it.
        data_collator: of training and query rows; None: `transformers.default_data_collator`.
        sample_id_column, document_id_column: as in `ShapleyConfig`.
        store_dir: where features are kept, to go on after a kill or to score again without a pass over the training
            set; None: in a temporary folder. (Nothing is stored without a projection, unless the estimator needs it.)
        store_dtype: "float32", or "float16": half the room for rounding to 11 bits.
        seed: of the projection.
        progress: show progress bars.
    """

    def __init_subclass__(cls) -> None:
        """`help` of an estimator explains the settings that all of them share, too."""
        cls.__doc__ = f"{cls.__doc__}\n    Settings of every estimator:\n{Settings.__doc__}"

    members: Any
    _: KW_ONLY
    projection_dim: int | None = None
    projection: ProjectionKind = "auto"
    modules: list[str] | str | None = None
    unit: Unit = "sample"
    partition: Grouping | None = None
    batch_size: int = 8
    data_collator: Collator | None = None
    sample_id_column: str = "sample_id"
    document_id_column: str = "document_id"
    store_dir: str | Path | None = None
    store_dtype: StoreDtype = "float32"
    seed: int = 0
    progress: bool = True

    def __repr__(self) -> str:
        """What was set otherwise than the default; a model is named by its class."""
        members = self.members
        shown = [type(members).__name__ if isinstance(members, nn.Module) else repr(members)]
        for field in fields(self):
            value = vars(self)[field.name]
            if field.name != "members" and value is not field.default and value != field.default:
                text = repr(value)
                shown.append(f"{field.name}={text if len(text) <= LONGEST else type(value).__name__}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings by name, as scikit-learn's estimators have them (so that `sklearn.base.clone` works)."""
        return {field.name: vars(self)[field.name] for field in fields(self)}

    def set_params(self, **settings: Any) -> Settings:
        """Changes settings by name; what was fitted stays until `fit`.

        Raises:
            ValueError: there is no such setting.
        """
        known = self.get_params()
        for name, value in settings.items():
            if name not in known:
                raise ValueError(f"{type(self).__name__} has no setting {name!r}: {', '.join(known)}")
            setattr(self, name, value)
        return self

    def check(self) -> None:
        """Raises `ValueError` for settings that cannot be."""
        if self.projection_dim is not None and self.projection_dim < 1:
            raise ValueError(f"projection_dim={self.projection_dim}: give the number of features, or None for none")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: give at least 1")
        if self.partition is not None and not isinstance(self.partition, Grouping):
            raise ValueError(
                f"partition is a {type(self.partition).__name__}: give a Partition, such as "
                "Partition.from_column(train_dataset, 'source')"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r}: give an integer of 0 or more")
        for name, known in (("projection", ProjectionKind), ("unit", Unit), ("store_dtype", StoreDtype)):
            check_choice(name, vars(self)[name], get_args(known))

    def train_corpus(self, dataset: Any, model: nn.Module) -> Corpus:
        with settings_named_here():
            corpus = Corpus(dataset, self._reading(model, self.unit), self.partition, "train_dataset")
        check_reading(model, corpus)
        return corpus

    def query_corpus(self, dataset: Any, model: nn.Module) -> Corpus:
        return Corpus(dataset, self._reading(model, "sample"), None, "query_dataset")

    def _reading(self, model: nn.Module, unit: Unit) -> Reading:
        collator = default_data_collator if self.data_collator is None else self.data_collator
        return Reading(
            collate=known_columns(collator, model),
            unit=unit,
            columns=IdColumns(self.sample_id_column, self.document_id_column),
            packs=packs_samples(collator),
            shifted=shifts_labels(model),
            batch_size=self.batch_size,
            progress=self.progress,
        )

    @contextmanager
    def captured(self, model: nn.Module) -> Iterator[Capture]:
        """Its layers, ready to be scored and projected."""
        with settings_named_here(), without_cache(model), fused_activations(model):
            with Capture(model, self.modules, "fused").attached() as capture:
                yield capture


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raises `ValueError` for a setting that is none of these."""
    if value not in known:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, known))}")


@contextmanager
def settings_named_here() -> Iterator[None]:
    """Refusals of layers below name the settings of `ShapleyConfig`, which have shorter names here."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("value_modules", "modules").replace("value_unit", "unit")) from error


def launched_ranks() -> Ranks:
    """The processes that `accelerate launch` has started; or this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    # Not told that there is no accelerator, it looks for one and leaves every process by itself.
    state = PartialState(cpu=not torch.accelerator.is_available())
    return Ranks(state.process_index, state.num_processes, state.is_local_main_process)


def known_columns(collate: Collator, model: nn.Module) -> Collator:
    """A collator whose rows lose what the model does not take, as in `Trainer`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = [*inspect.signature(base.forward).parameters, "label", "label_ids"]
    return RemoveColumnsCollator(collate, names)


def check_reading(model: nn.Module, corpus: Corpus) -> None:
    """Holds the first batch's token losses against the model's own, and tries whether units leave each other alone.

    Raises:
        ValueError: they do not.
    """
    reading = corpus.reading
    device = next(model.parameters()).device
    first = corpus.rows[0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**moved(batch, device)).loss

    with settings_named_here(), without_cache(model):
        if reading.packs:
            check_samples_apart(model, loss, reading.collate, reading.columns.without(first))
        elif reading.unit == "document":
            row = reading.columns.without(largest_document(first, reading.columns.document))
            check_documents_apart(model, loss, reading.collate, row, reading.batch_size)
        batch = next(corpus.batches(0, 1))
        inputs = moved(batch.inputs, device)
        with torch.no_grad():
            losses = token_losses(model, inputs, reading.shifted)
        check_token_losses(model, inputs, losses, int(batch.tokens.sum()))


def largest_document(row: Mapping[str, Any], column: str | None) -> dict[str, Any]:
    """A row without its other documents: rows may be longer than what a model has positions for."""
    documents = row_documents(row, column, "document")
    labelled = np.asarray(row["labels"]) != IGNORED if "labels" in row else np.ones(len(documents), bool)
    known, counts = np.unique(documents[1:][labelled[1:]], return_counts=True)
    if not len(known):
        return dict(row)
    own = documents == known[counts.argmax()]
    return {
        key: np.asarray(value)[own]
        if isinstance(value, list | np.ndarray | Tensor) and len(value) == len(own)
        else value
        for key, value in row.items()
    }
