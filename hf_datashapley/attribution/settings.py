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
from transformers import PreTrainedModel, default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from ..ghost.capture import Capture
from ..grouping import Grouping
from ..loss_tokens import IGNORED, shifts_labels
from ..ranks import Ranks
from ..trainer.batches import IdColumns
from ..trainer.boundaries import row_documents
from ..trainer.packed import check_documents_apart, check_samples_apart, documents_apart, packs_samples
from .activations import fused_activations
from .collation import Reading, Unit
from .corpus import Corpus
from .group_passes import longest_piece
from .losses import check_token_losses, near, token_losses, without_cache
from .measures import moved
from .projection import ProjectionKind


Collator = Callable[[list[Any]], Any]
Loss = Callable[[nn.Module, Any], Tensor]
StoreDtype = Literal["float32", "float16"]
Route = Literal["summed", "batched"]
KernelOf = Literal["group", "unit"]
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
        unit: "sample", "document" (rows of `pack_documents`), "token" (its own loss, a backward pass for each) or
            "group": the loss tokens of one group, wherever they stand. Exact whatever attends to whatever. A row is
            passed once for each group that has loss tokens in it; where documents of packed rows are kept apart
            (position_ids begin again at each, no attention_mask, a model that heeds it: it is tried), only as often
            as the document with the most groups has them: once, where each document is of one group.
        partition: groups of samples, of documents or of groups of tokens, that are the units instead.
        route: how the gradient of a unit, a group say, comes about. "summed": of what its members give in shared
            backward passes, whatever else is in the batch. "batched": of backward passes of its own, which know
            nothing of members. Both are exact.
        batch_size: rows of a forward pass. Scores do not depend on it.
        data_collator: of training and query rows; None: `transformers.default_data_collator`.
        sample_id_column, document_id_column: as in `ShapleyConfig`.
        group_id_column: of each token's group where groups are units, integers; negative: of none, and not scored. A
            loss token is the one that is predicted.
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
    route: Route = "summed"
    batch_size: int = 8
    data_collator: Collator | None = None
    sample_id_column: str = "sample_id"
    document_id_column: str = "document_id"
    group_id_column: str = "group_id"
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
        for name, known in (
            ("projection", ProjectionKind),
            ("unit", Unit),
            ("route", Route),
            ("store_dtype", StoreDtype),
        ):
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
            columns=IdColumns(self.sample_id_column, self.document_id_column, self.group_id_column),
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
        text = str(error).replace("value_modules", "modules").replace("value_unit", "unit")
        jvp = "set value_kernel='jvp', which tells them apart all the same"
        own = "give tokens their documents' ids as groups (unit='group'), which tells them apart all the same"
        raise ValueError(text.replace(jvp, own)) from error


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
        # Groups of tokens are passed only where they have a loss: the first ones, prompts say, may have none.
        batch = next(corpus.batches(0, corpus.count if reading.unit == "group" else 1), None)
        if batch is None:
            return
        if reading.unit == "group":
            corpus.apart = keeps_documents_apart(model, loss, batch.inputs, reading.batch_size)
        inputs = moved(batch.inputs, device)
        with torch.no_grad():
            losses = token_losses(model, inputs, reading.shifted)
        check_token_losses(model, inputs, losses, int(batch.tokens.sum()))
        check_padding(model, corpus, device)


def check_padding(model: nn.Module, corpus: Corpus, device: torch.device) -> None:
    """Holds the loss of a row that is padded on the left against its loss alone.

    Raises:
        ValueError: they differ, as with a model that counts padding as positions.
    """
    inputs, _ = corpus.collated(np.arange(min(len(corpus.rows), corpus.reading.batch_size)))
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != inputs["labels"].shape:
        return
    padded = (mask[:, 0] == 0).nonzero().flatten().tolist()
    if not padded:
        return
    alone, _ = corpus.collated(np.array(padded[:1]))
    with torch.no_grad():
        together = token_losses(model, moved(inputs, device), corpus.reading.shifted)[padded[0]].sum()
        single = token_losses(model, moved(alone, device), corpus.reading.shifted).sum()
    if not near(together, single, model):
        raise ValueError(
            f"data_collator pads on the left, and this model's loss of a row depends on it ({float(single):.4g} alone"
            f", {float(together):.4g} beside longer ones), so scores would depend on batches: pad on the right "
            "(tokenizer.padding_side='right'), or have the collator make position_ids"
        )


def keeps_documents_apart(model: nn.Module, loss: Loss, inputs: dict[str, Any], rows: int) -> bool:
    """Whether positions that begin again keep documents of a row apart; no, where there are none, or no model of
    transformers to ask."""
    places = inputs.get("position_ids")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if places is None or places.shape != inputs["input_ids"].shape or not isinstance(base, PreTrainedModel):
        return False
    tokens = longest_piece(inputs)
    return documents_apart(model, loss, {"input_ids": tokens, "labels": tokens}, rows)


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
