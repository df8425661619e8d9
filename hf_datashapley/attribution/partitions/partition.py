"""Training data in groups that are credited together, and ways to make them.

(Ley et al., "Generalized Group Data Attribution", arXiv 2410.09940, which compares random groups with clusters of
representations and of gradients.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import nn

from ...grouping import Grouping
from ...random_state import random_state_kept
from ..corpus import Corpus
from ..document_rows import document_pieces, in_order
from ..ensembles.kept import evaluating
from ..fingerprint import dataset_fingerprint
from ..settings import Collator, Settings
from . import saved
from .clusters import kmeans_labels
from .columns import Encode, column_labels, encoded_texts
from .documents import packed_groups
from .points import Features
from .pooled import body_of, gradients, layer_of, representations


@dataclass(frozen=True, eq=False, repr=False)
class Partition(Grouping):
    """Which group each sample belongs to; or each document, in the order in which they first appear in packed rows.

    Groups depend on the settings, the seed and the data alone. Clusters are `clusters`' (its costs and its `balanced`
    sizes are described there) and need the extra "grouping".

    Attributes:
        fingerprint: of all rows of the dataset that was parted, in their order; None: it is not known.
    """

    fingerprint: str | None = None

    @classmethod
    def from_labels(cls, labels: Sequence[Any] | np.ndarray) -> Partition:
        """Any values, one for each sample; equal ones are a group. Groups are in the order of their sorted values.

        Raises:
            ValueError: there are none, they are not a list, some are missing, or they cannot be compared.
        """
        found = as_values(labels)
        missing = np.flatnonzero(pd.isna(found))
        if len(missing):
            raise ValueError(f"{len(missing)} labels are missing (None, NaN), number {missing[0]} first: fill them in")
        try:
            values, own = np.unique(found, return_inverse=True)
        except TypeError as error:
            raise ValueError(f"labels cannot be compared ({error}): give all as strings, say") from error
        return cls(own, len(values), tuple(str(value) for value in values))

    @classmethod
    def from_column(cls, dataset: Any, column: str) -> Partition:
        """The samples of each value of a column, in the order of the sorted values.

        Raises:
            ValueError: there is no such column, it has gaps, or lists.
        """
        labels, names = column_labels(dataset, column)
        return cls(labels, len(names), names).bound_to(dataset) if len(labels) else cls.from_labels([])

    @classmethod
    def random(
        cls, n: int, num_groups: int | None = None, *, group_size: int | None = None, seed: int = 0
    ) -> Partition:
        """`n` samples in `num_groups` groups, or in as few as have `group_size` members at most, drawn at random.

        Sizes differ by one at most.

        Raises:
            ValueError: not one of the two is given, or there are more groups than samples.
        """
        check_numbers(n=n, num_groups=num_groups, group_size=group_size, seed=seed)
        if (num_groups is None) == (group_size is None):
            raise ValueError(f"num_groups={num_groups} and group_size={group_size}: give one of them")
        if group_size is not None:
            if group_size < 1:
                raise ValueError(f"group_size={group_size}: give at least 1")
            num_groups = -(-n // group_size)
        assert num_groups is not None
        if not 1 <= num_groups <= n:
            raise ValueError(f"num_groups={num_groups} of {n} samples: ask for at least 1 and at most one for each")
        return cls(np.random.default_rng(seed).permutation(np.arange(n) % num_groups), num_groups)

    @classmethod
    def kmeans(cls, features: Features, num_groups: int, *, balanced: bool = False, seed: int = 0) -> Partition:
        """Clusters of any features.

        Args:
            features: an array [n, features]; or an iterator over blocks of one, in order, each by itself or in a pair
                with the number of its first point. So `GradDot(model, projection_dim=512).fit(train).features()` gives
                clusters of projected parameter gradients. Blocks are laid down in a temporary file, so a corpus may be
                larger than memory.
            balanced: make sizes that differ by one at most.

        Raises:
            ValueError: features are not finite, or there are fewer different points than groups.
            ImportError: the extra "grouping" is not installed.
        """
        check_numbers(num_groups=num_groups, seed=seed)
        return cls(kmeans_labels(features, num_groups, balanced, seed), num_groups)

    @classmethod
    def of_representations(
        cls,
        model: nn.Module | Encode,
        dataset: Any,
        num_groups: int,
        *,
        balanced: bool = False,
        seed: int = 0,
        unit: Literal["sample", "document"] = "sample",
        batch_size: int = 8,
        data_collator: Collator | None = None,
        document_id_column: str = "document_id",
        text_column: str = "text",
        progress: bool = True,
    ) -> Partition:
        """Clusters of what a model makes of the samples: its last hidden state, meaned over each one's tokens.

        Costs a forward pass. The model is left as it was.

        Args:
            model: a model of transformers, of rows with labels (`fit` asks for the same); or a sentence encoder, any
                function that makes vectors [texts, width] of a list of texts (`SentenceTransformer(...).encode`).
            unit: "document": clusters of the documents of packed rows, for estimators with unit="document".
            batch_size, data_collator, document_id_column: of the rows that a model reads, as in `Settings`.
            text_column: of the texts that an encoder reads.

        Raises:
            ValueError: a setting, the rows or the model do not allow it; the message says what would.
            ImportError: the extra "grouping" is not installed.
        """
        if isinstance(model, nn.Module):
            body = body_of(model)
            corpus = corpus_of(model, dataset, unit, batch_size, data_collator, document_id_column, progress)
            features: Features = representations(model, body, corpus)
        elif unit != "sample":
            raise ValueError(
                f"unit={unit!r}, and an encoder reads texts, not packed rows: part the documents before they are "
                "packed, Partition.of_documents(packed, Partition.of_representations(encode, documents, ...))"
            )
        else:
            features = encoded_texts(model, dataset, text_column, progress)
        return cls.kmeans(features, num_groups, balanced=balanced, seed=seed).bound_to(dataset)

    @classmethod
    def of_gradients(
        cls,
        model: nn.Module,
        dataset: Any,
        num_groups: int,
        *,
        balanced: bool = False,
        seed: int = 0,
        unit: Literal["sample", "document"] = "sample",
        output_layer: str | None = None,
        batch_size: int = 8,
        data_collator: Collator | None = None,
        document_id_column: str = "document_id",
        progress: bool = True,
    ) -> Partition:
        """Clusters of gradients with respect to penultimate activations, as in the paper.

        Of a language model: the gradient of the sample's summed loss with respect to what enters the output layer,
        meaned over its loss tokens (see `pooled`). Costs a forward pass, and a backward one through the output layer.
        The model is left as it was. For clusters of parameters' gradients, see `kmeans`.

        Args:
            unit: "document": clusters of the documents of packed rows, for estimators with unit="document".
            output_layer: the name of the module; None: the one that the model itself calls its output embeddings.
            batch_size, data_collator, document_id_column: as in `Settings`.

        Raises:
            ValueError: a setting, the rows or the model do not allow it; the message says what would.
            ImportError: the extra "grouping" is not installed.
        """
        layer = layer_of(model, output_layer)
        corpus = corpus_of(model, dataset, unit, batch_size, data_collator, document_id_column, progress)
        features = gradients(model, layer, corpus)
        return cls.kmeans(features, num_groups, balanced=balanced, seed=seed).bound_to(dataset)

    @classmethod
    def of_documents(
        cls,
        rows: Any,
        groups: Grouping | None = None,
        *,
        ids: Sequence[int] | np.ndarray | None = None,
        document_id_column: str = "document_id",
        progress: bool = True,
    ) -> Partition:
        """Groups of the documents that lie in packed rows, for estimators with unit="document".

            documents = load_dataset(...)
            packed = pack_documents(documents, tokenizer, 1024)
            Partition.of_documents(packed, Partition.from_column(documents, "source"))

        Groups of which no document is in the rows (all are empty) are left out. Costs a look at each row.

        Args:
            rows: as `pack_documents` makes them; map-style.
            groups: of the corpus that was packed, made in whichever way; None: each document is a group, named by its
                id.
            ids: of the corpus' documents, where it has a column of them (`documents["document_id"]`).

        Raises:
            ValueError: rows do not say which documents they hold, or a document has no group, or two.
        """
        _, documents = document_pieces(rows, document_id_column, "rows", progress)
        known, units = in_order(documents)
        unit_ids = known[np.argsort(units)]
        if groups is None:
            return cls(np.arange(len(unit_ids)), len(unit_ids), tuple(map(str, unit_ids))).bound_to(rows)
        kept, labels = np.unique(packed_groups(unit_ids, groups, ids), return_inverse=True)
        names = tuple(str(group) if groups.names is None else groups.names[group] for group in kept)
        return cls(labels, len(kept), names).bound_to(rows)

    def bound_to(self, dataset: Any) -> Partition:
        """The same groups, which say of which dataset they are: they are saved with its fingerprint."""
        return replace(self, fingerprint=dataset_fingerprint(dataset))

    def save(self, path: str | Path) -> None:
        """Writes one file, whole or not at all."""
        saved.write(path, saved.Saved(self.labels, self.num_groups, self.names, self.fingerprint))

    @classmethod
    def load(cls, path: str | Path, dataset: Any = None) -> Partition:
        """What `save` has written.

        Args:
            dataset: that it has to be of; None: whichever.

        Raises:
            ValueError: it is of another dataset or does not say of which, or the file is no partition.
        """
        found = saved.read(path)
        if dataset is not None and found.fingerprint is None:
            raise ValueError(
                f"{path} does not say of which dataset it is: load it without, or save partition.bound_to(dataset)"
            )
        if dataset is not None and dataset_fingerprint(dataset) != found.fingerprint:
            raise ValueError(
                f"{path} is a partition of another dataset: give the one that it was made of, its rows and columns in "
                "the same order, or make it again"
            )
        return cls(found.labels, found.num_groups, found.names, found.fingerprint)


def as_values(labels: Sequence[Any] | np.ndarray) -> np.ndarray:
    """One value for each sample, each as it is: numpy would make strings of numbers that stand beside one.

    Raises:
        ValueError: there are none, or they are lists.
    """
    found = np.asarray(labels) if hasattr(labels, "dtype") else np.empty(len(labels), dtype=object)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"labels have shape {list(found.shape)}: give one for each sample")
    if not hasattr(labels, "dtype"):
        for number, value in enumerate(labels):
            if isinstance(value, list | tuple | set | dict | np.ndarray):
                raise ValueError(f"label {number} is a {type(value).__name__}: give one value for each sample")
            found[number] = value
    return found


def check_numbers(**numbers: Any) -> None:
    """Raises `ValueError` for what is given and no integer of 0 or more."""
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0):
            raise ValueError(f"{name}={value!r}: give an integer of 0 or more")


def corpus_of(
    model: nn.Module,
    dataset: Any,
    unit: Literal["sample", "document"],
    batch_size: int,
    data_collator: Callable[[list[Any]], Any] | None,
    document_id_column: str,
    progress: bool,
) -> Corpus:
    if unit not in ("sample", "document"):
        raise ValueError(f"unit={unit!r}: groups are of samples or of documents")
    settings = Settings(
        model,
        unit=unit,
        batch_size=batch_size,
        data_collator=data_collator,
        document_id_column=document_id_column,
        progress=progress,
    )
    settings.check()
    with evaluating(model), random_state_kept():
        return settings.train_corpus(dataset, model)
