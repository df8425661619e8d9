"""`fit`, `score` and `top`, and the places where estimators differ.

Shapes: U units, u of a shard, Q queries, K of them at a time, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from ..ghost.capture import Capture
from ..grouping import Grouping
from .batched import Directions
from .ensembles import Ensemble, as_ensemble, in_turn
from .group_sums import check_sums, summed_scores
from .losses import Output
from .mapped import UnitMap
from .measures import Sums
from .queries import Asked
from .retrieval import top_table
from .settings import Settings, launched_ranks
from .store import Stored
from .stored import StoredFeatures
from .whole import WholeGradients


@dataclass(repr=False)
class Attribution(Settings):
    """An estimator of what each training unit did to each query's loss; see `Settings` for what all of them take.

    `additive`: whether scores add up over units.
    """

    additive: ClassVar[bool] = True

    def fit(self, train_dataset: Any) -> Any:
        """Reads the training set under every member.

        Args:
            train_dataset: map-style, rows with labels (after the collator).

        Returns:
            The estimator itself. `units_`: what the units are called, a numpy array for each kind of id.

        Raises:
            ValueError: a setting, the rows, or the model's layers do not allow it; the message says what would.
        """
        # What is fitted keeps the settings that it was fitted with, whatever `set_params` makes of these.
        fitted = type(self)(**self.get_params())
        with torch.enable_grad():
            fitted._fit(train_dataset)
        vars(self).update({name: value for name, value in vars(fitted).items() if name not in self.get_params()})
        return self

    def score(self, query_dataset: Any, *, mean: bool = False) -> np.ndarray:
        """How much each training unit lowers each query's loss; positive: it does.

        Args:
            query_dataset: map-style, rows with labels; each row is a query, of which the mean token loss is explained.
                Or what else is asked about: a property function, or a list of them, that makes a scalar of the model,
                one that is better when it is smaller (`lambda model: model(**batch).loss`).
            mean: explain the mean of the queries' losses, as one query.

        Returns:
            float32 [units, queries], in the order of `units_`; of property functions, a column for each.

        Raises:
            ValueError: `fit` was not called, a query has no loss token, or a property function gives no scalar that
                depends on the model.
        """
        with torch.enable_grad():
            blocks = self._blocks(query_dataset, mean)
            return np.concatenate([block.float().cpu().numpy() for _, block in blocks])

    def group_scores(self, query_dataset: Any, partition: Grouping, *, mean: bool = False) -> np.ndarray:
        """`score` added up over groups of the fitted units, of an estimator whose scores add up (see `group_sums`).

        Args:
            query_dataset, mean: as in `score`.
            partition: of the units, in the order of `units_`.

        Returns:
            float32 [groups, queries], summed in float64. Of stored features no matrix [units, queries] is made.

        Raises:
            ValueError: scores do not add up, groups were fitted, or the partition is not of the units; or as `score`.
        """
        self._fitted()
        check_sums(type(self).__name__, self.additive, partition, self._train)
        with torch.enable_grad():
            return summed_scores(self._blocks(query_dataset, mean), partition)

    def top(
        self, query_dataset: Any, k: int, *, lowest: bool = False, tokenizer: Any = None, text_column: str = "text"
    ) -> datasets.Dataset:
        """The `k` units with the highest scores for each query (with `lowest` the k lowest), a row for each.

        Columns: `query` (its number), `rank` (from 0), the unit's ids, `score`, and `text`: that of `text_column`
        where the training set has it and samples are units, else the unit's tokens as `tokenizer` decodes them, else
        none.
        """
        with torch.enable_grad():
            return top_table(self._blocks(query_dataset), self._train, k, lowest, tokenizer, text_column)

    def features(self, member: int = 0) -> Iterator[tuple[int, Tensor]]:
        """The stored features of one member's units, float32 [u, features], block by block, each with the number of
        its first unit: of the gradient of the unit's summed output (with kernel="unit" and several models, `Trak`'s
        are of its members' outputs, each times its weight).

        Raises:
            ValueError: `fit` was not called, or nothing is stored (projection_dim=None).
        """
        engine = self._fitted()
        if not isinstance(engine, StoredFeatures):
            raise ValueError("projection_dim=None stores no features: set projection_dim")

        def blocks() -> Iterator[tuple[int, Tensor]]:
            # The engine has the folder: it has to live as long as what is read from there.
            for stored in engine.store.shards(member):
                yield stored.start, stored.features

        return blocks()

    def _blocks(self, query_dataset: Any, mean: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Scores [u, Q] of units one after the other, each block with the number of its first."""
        return self._fitted().blocks(Asked(query_dataset, mean))

    def _fit(self, train_dataset: Any) -> None:
        self.check()
        ensemble, ranks = as_ensemble(self.members), launched_ranks()
        make = StoredFeatures if self._stores() else WholeGradients
        self._begin(ensemble)
        self._engine: StoredFeatures | WholeGradients = make(self, self, ensemble, ranks)
        if self.outputs_first():
            with in_turn(ensemble) as models:
                self._read(train_dataset, next(models))
            self._fit_outputs(ensemble)
        with in_turn(ensemble) as models:
            for number, model in enumerate(models):
                if number == 0 and not self.outputs_first():
                    self._read(train_dataset, model)
                with self.captured(model) as capture:
                    self._begin_member(number, model, capture)
                    self._engine.fit_member(number, model, capture)
                    self._fit_member(number, model, capture)
        if not self.outputs_first():
            self._fit_outputs(ensemble)

    def _read(self, train_dataset: Any, model: nn.Module) -> None:
        self._train = self._engine.train = self.train_corpus(train_dataset, model)
        self.units_ = self._train.ids

    def _fitted(self) -> StoredFeatures | WholeGradients:
        if "_engine" not in vars(self):
            raise ValueError(f"{type(self).__name__} was not fitted: call fit(train_dataset) first")
        return self._engine

    # What an estimator is made of, beside its settings.

    def _stores(self) -> bool:
        """Whether features of units are stored, or units' whole gradients are met with the queries'."""
        return self.projection_dim is not None

    def objective(self) -> Output:
        """What is differentiated of a unit and of a query, see `losses`."""
        return "loss"

    def _begin(self, ensemble: Ensemble) -> None:
        """What has to be known of the ensemble first."""

    def _begin_member(self, number: int, model: nn.Module, capture: Capture) -> None:
        """What has to be known of a member before its features are made."""

    def described(self) -> dict[str, Any]:
        """What stored features depend on, beside the settings, as JSON."""
        return {}

    def unit_map(self, member: int, capture: Capture) -> UnitMap | None:
        """What is projected instead of units' gradients; None: they are."""
        return None

    def whole_queries(self) -> bool:
        """Whether `whole_directions` are to be made of queries also where features are stored: they are projected."""
        return False

    def kernel_of_members(self) -> bool:
        """Whether a kernel is made of the members of groups, while the groups' features are, see `unit_kernel`."""
        return False

    def member_factors(self, unit_U: np.ndarray, sums: Sums) -> tuple[Tensor | None, Tensor | None]:
        """By which features of these members are multiplied in this kernel, and in their group's."""
        return None, None

    def outputs_first(self) -> bool:
        """Whether the ensemble's outputs have to be known before features are made."""
        return False

    def _fit_member(self, number: int, model: nn.Module, capture: Capture) -> None:
        """What has to be known of a member beside its features, if they are stored: they are there."""

    def _fit_outputs(self, ensemble: Ensemble) -> None:
        """What has to be known of the ensemble's `outputs()`."""

    def feature_directions(self, member: int, query_QF: Tensor, loss_Q: Tensor | None) -> Tensor:
        """What units' features are matched with, [Q, F], from features of queries' mean outputs, and their losses
        (None where they are of something else, see `queries`)."""
        return query_QF

    def whole_directions(self, member: int, directions: Directions) -> Directions:
        """What units' gradients are matched with, [K, *shape] by name, from gradients of queries' mean outputs."""
        return directions

    def weights(self, stored: Stored) -> Tensor | None:
        """By which a unit's score under a member is multiplied, [u]; None: 1."""
        return None

    def finished(self, start: int, block_uQ: Tensor) -> Tensor:
        """The scores of units from the `start`-th on, from the mean over members."""
        return block_uQ
