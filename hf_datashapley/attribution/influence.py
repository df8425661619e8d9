"""Influence functions: what leaving a unit out would do to a query's loss, to first order, where training has ended.

    score_iq = g_q^T (H + damping)^-1 g_i / N        H the Hessian of the mean token loss over the N training tokens

(Koh, Liang, "Understanding Black-box Predictions via Influence Functions", arXiv 1703.04730.) In nats by which the
query's mean token loss would rise without the unit. g_i is of the sum of the unit's token losses, g_q of the query's
mean; what stands for H is in `curvature`.

Shapes: Q queries, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ..ghost.capture import Capture
from .batched import Directions
from .corpus import Corpus
from .curvature.datainf import DataInf, warn_of_many
from .curvature.fisher import Fisher
from .curvature.identity import Identity, loss_tokens
from .curvature.inverse import FeatureInverse, WholeInverse
from .curvature.kronecker import TrainingRows, fitted
from .estimator import Attribution
from .kernel import FeatureGram, check_damping, kernel_of
from .settings import KernelOf, check_choice
from .stored import StoredFeatures


Curvature = Literal["identity", "fisher", "kfac", "ekfac", "datainf"]


@dataclass(repr=False)
class Influence(Attribution):
    """score_iq = g_q^T (H + damping)^-1 g_i / N: by how many nats the query's mean token loss would rise without unit
    i, to first order, H being the Hessian of the mean token loss over the N loss tokens of the training set.

    Compare scores of one curvature: what stands for H, and how it is damped, sets their scale.

    Args:
        projection_dim: of "identity", "fisher" and "datainf". "kfac" and "ekfac" take whole gradients, and project
            nothing whatever it is.
        curvature: what stands for H.
            "identity": 1; scores of `GradDot` / N.
            "fisher": the empirical Fisher matrix of units' (projected) gradients, sum_i g_i g_i^T / N.
            "kfac": the Fisher matrix of each parameter by itself, taken for a Kronecker product.
            "ekfac": the same with better eigenvalues, for a second pass over the training set: the one to take.
            "datainf": a closed form over units' gradients in each parameter, for adapters; with
                `projection_dim=None`, or `projection="logra"`.
        damping: over the mean eigenvalue of H: of all features together ("fisher": of eigenvalues that are not 0 for
            want of units), or of each parameter's block ("kfac", "ekfac", "datainf"). "identity" has none. None: 1 for
            "fisher" (chosen as `Trak`'s), 0.1 for the others (the paper's rule for "datainf").
        kernel: of whose gradients "fisher" is made where groups are scored (`partition`). "group": the groups'.
            "unit": their members', which takes F^2 numbers more and makes a group's score the sum of its members'.
            "kfac" and "ekfac" are of rows, whatever it is.
        seed: of the projection, and of the labels that "kfac" and "ekfac" draw from the model's predictions.

    Assumes that training has come to a minimum, near which the loss is a quadratic form of the damped H. Cost: a pass
    over the training set to fit, and for "kfac" and "ekfac" another one for every few queries (see `curvature`).
    """

    _: KW_ONLY
    projection_dim: int | None = 2048
    curvature: Curvature = "fisher"
    damping: float | None = None
    kernel: KernelOf = "group"

    def check(self) -> None:
        super().check()
        if self.curvature not in get_args(Curvature):
            known = ", ".join(f'"{name}"' for name in get_args(Curvature))
            raise ValueError(f"curvature={self.curvature!r}: choose one of {known}")
        check_choice("kernel", self.kernel, get_args(KernelOf))
        if self.curvature == "datainf" and self.kernel == "unit" and self.partition is not None:
            raise ValueError(
                "curvature='datainf' keeps the features that it is made of, with kernel='unit' those of every member: "
                "set kernel='group', or fit without partition and add up (group_scores)"
            )
        if self.damping is not None:
            check_damping(self.damping)
        if self.curvature == "datainf" and self.projection_dim is not None and self.projection != "logra":
            raise ValueError(
                f"curvature='datainf' needs each parameter's own features, and projection={self.projection!r} may mix "
                "them: set projection_dim=None (adapters are small), or projection='logra'"
            )

    def _stores(self) -> bool:
        if self.curvature == "identity":
            return self.projection_dim is not None
        return self.curvature in ("fisher", "datainf")

    def kernel_of_members(self) -> bool:
        return self.kernel == "unit" and self.curvature == "fisher" and self.partition is not None

    def described(self) -> dict[str, Any]:
        return {"kernel": "unit", "members": "gradients"} if self.kernel_of_members() else {}

    def _damping(self) -> float:
        if self.damping is not None:
            return self.damping
        return 1.0 if self.curvature == "fisher" else 0.1

    def _fit_member(self, number: int, model: nn.Module, capture: Capture) -> None:
        if number == 0:
            self._features: list[FeatureInverse] = []
            self._whole: list[WholeInverse] = []
        if isinstance(self._engine, StoredFeatures):
            self._features.append(self._feature_inverse(number, model, capture, self._engine))
        else:
            self._whole.append(self._whole_inverse(model, capture))

    def _feature_inverse(
        self, number: int, model: nn.Module, capture: Capture, engine: StoredFeatures
    ) -> FeatureInverse:
        store = engine.store
        if engine.kernel is not None:
            return Fisher(FeatureGram(engine.kernel.total(), engine.members.corpus.count, self._damping()))

        def shards() -> Iterator[Tensor]:
            return (stored.features for stored in store.shards(number))

        if self.curvature == "fisher":
            return Fisher(kernel_of(shards, store.units, store.width, self._damping()))
        tokens = int(store.terms(number).tokens.sum())
        if self.curvature == "identity":
            # Tokens of no group are in none of the terms.
            return Identity(loss_tokens(self._whole_rows()) if self.unit == "group" else tokens)
        warn_of_many(sum(parameter.numel() for parameter in capture.parameters.values()))
        return DataInf(shards, engine.projection(number, model, capture).blocks, store.units, tokens, self._damping())

    def _whole_rows(self) -> Corpus:
        return Corpus(self._train.rows, replace(self._train.reading, unit="sample"), None, self._train.name)

    def _whole_inverse(self, model: nn.Module, capture: Capture) -> WholeInverse:
        corpus = self._whole_rows()
        if self.curvature == "identity":
            return Identity(loss_tokens(corpus))
        rows = TrainingRows(corpus, self._engine.ranks, self.seed, self.progress)
        return fitted(model, capture, rows, self.curvature == "ekfac", self._damping())

    def feature_directions(self, member: int, query_QF: Tensor, loss_Q: Tensor | None) -> Tensor:
        return self._features[member].of_features(query_QF)

    def whole_directions(self, member: int, directions: Directions) -> Directions:
        return self._whole[member].of_whole(directions)
