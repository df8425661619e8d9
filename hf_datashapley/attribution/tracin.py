"""TracIn: what a run's own steps, seen at its checkpoints, did to a query's loss. And LESS, which compares directions.

    TracIn   score_iq = sum over checkpoints c of  eta_c <g_i(w_c), A_c g_q(w_c)>
    LESS     score_iq = sum over checkpoints c of  eta_c cos(P Gamma_c(g_i / n_i), P g_q(w_c))

with eta_c the learning rate, A_c = 1 or Adam's factor, n_i the unit's loss tokens, and Gamma_c the update of Adam with
the unit's gradient taken up (see `saved_adam`). Sums over members, where other estimators take means.

Shapes: U units, u of a shard, Q queries, K of them at a time, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..ghost.capture import Capture
from .ensembles import CheckpointEnsemble, Ensemble
from .estimator import Attribution
from .grad_dot import norms
from .mapped import UnitMap
from .saved_adam import Directions, SavedAdam, checkpoint_rates, optimizer_description
from .store import Stored


# Entries of a unit's gradient, which LESS forms whole.
MOST_ENTRIES = 2**28


@dataclass(repr=False)
class OverCheckpoints(Attribution):
    """
    Args:
        learning_rates: of each member; None: the mean of those of the updates since the member before, as `Trainer`
            logged them (members are a `CheckpointEnsemble` then).

    Attributes:
        learning_rates_: what they are, after `fit`.
    """

    _: KW_ONLY
    learning_rates: Sequence[float] | None = None

    def needs_moments(self) -> bool:
        raise NotImplementedError

    def _begin(self, ensemble: Ensemble) -> None:
        self._folders = ensemble.paths if isinstance(ensemble, CheckpointEnsemble) else None
        self._optimizers: list[dict[str, Any]] = []
        if self.learning_rates is not None:
            if len(self.learning_rates) != len(ensemble):
                raise ValueError(
                    f"learning_rates has {len(self.learning_rates)} entries and members {len(ensemble)}: give one each"
                )
            self.learning_rates_ = [float(rate) for rate in self.learning_rates]
        elif self._folders is None:
            raise ValueError(
                "learning_rates=None is read from checkpoints, and members are none: give learning_rates, one for "
                "each member, or members=CheckpointEnsemble(paths)"
            )
        else:
            self.learning_rates_ = checkpoint_rates(self._folders)
        if self.needs_moments() and self._folders is None:
            raise ValueError(
                f"{type(self).__name__} reads Adam's moments here: give members=CheckpointEnsemble(paths), of "
                "checkpoints with their optimizers (save_only_model=False)"
            )

    def _begin_member(self, number: int, model: nn.Module, capture: Capture) -> None:
        if self._folders is not None and self.needs_moments():
            self._optimizers.append(optimizer_description(self._folders[number], model))

    def moments(self, member: int, shapes: dict[str, torch.Size], device: torch.device) -> SavedAdam:
        assert self._folders is not None
        return SavedAdam(self._folders[member], self._optimizers[member], shapes, device)

    def rate(self, member: int) -> float:
        """The engines take the mean over members of what is a sum here."""
        return self.learning_rates_[member] * len(self.learning_rates_)


@dataclass(repr=False)
class TracIn(OverCheckpoints):
    """By how much steps on unit i at the checkpoints lower the loss of query q, in nats; adds up over units.

    (Pruthi, Liu, Sundararajan, Kale, "Estimating Training Data Influence by Tracing Gradient Descent", arXiv
    2002.08484, TracInCP.) As there, each checkpoint stands for one visit to each unit; how many updates lie between
    them does not count.

    Args:
        learning_rates: see `OverCheckpoints`.
        preconditioner: "adam": A_c = 1 / (sqrt(v_hat) + eps), of the second moments that the checkpoint's optimizer
            has; None: 1, which is for SGD.

    Assumes that between checkpoints gradients stay as they are there. Costs what `GradDot` costs, for each member;
    with "adam" and a projection, also a whole gradient for each query.
    """

    _: KW_ONLY
    preconditioner: Literal["adam"] | None = None

    def check(self) -> None:
        super().check()
        if self.preconditioner not in (None, "adam"):
            raise ValueError(f"preconditioner={self.preconditioner!r}: choose 'adam' or None")

    def needs_moments(self) -> bool:
        return self.preconditioner == "adam"

    def whole_queries(self) -> bool:
        return self.needs_moments()

    def whole_directions(self, member: int, directions: Directions) -> Directions:
        if self.needs_moments():
            some = next(iter(directions.values()))
            shapes = {name: own.shape[1:] for name, own in directions.items()}
            directions = self.moments(member, shapes, some.device).scaled(directions)
        return directions if self._stores() else {name: self.rate(member) * own for name, own in directions.items()}

    def feature_directions(self, member: int, query_QF: Tensor, loss_Q: Tensor | None) -> Tensor:
        return self.rate(member) * query_QF


@dataclass(repr=False)
class Less(OverCheckpoints):
    """Which units' Adam updates point where a query's gradient does; for choosing data to tune a model on.

    (Xia, Malladi, Gururangan, Arora, Chen, "LESS: Selecting Influential Data for Targeted Instruction Tuning", arXiv
    2402.04333, section 3.) Members are checkpoints of a LoRA adapter's warm-up, one each epoch, whose learning rate
    eta is its mean over the epoch. A unit's gradient is here that of its mean token loss, as there: an update is not
    linear in it. Moments are corrected for their bias, as torch's Adam does. Not additive. A unit without a loss token
    has score 0.

    Cost: a pass over the training set for each member that forms units' whole gradients, a gigabyte of them at a time.
    """

    additive: ClassVar[bool] = False

    _: KW_ONLY
    projection_dim: int | None = 8192

    def needs_moments(self) -> bool:
        return True

    def _stores(self) -> bool:
        return True

    def described(self) -> dict[str, Any]:
        assert self._folders is not None
        return {"updates of": [file_hash(folder / "optimizer.pt") for folder in self._folders]}

    def unit_map(self, member: int, capture: Capture) -> UnitMap | None:
        shapes = {name: parameter.shape for name, parameter in capture.parameters.items()}
        entries = sum(shape.numel() for shape in shapes.values())
        if entries > MOST_ENTRIES:
            raise ValueError(
                f"Less forms whole gradients of units, and {entries:,} parameters count: give checkpoints of a LoRA "
                "adapter, or choose modules"
            )
        moments = self.moments(member, shapes, next(iter(capture.parameters.values())).device)

        def update(gradients: Directions, tokens_U: Tensor) -> Directions:
            count = tokens_U.clamp(min=1)
            means = {name: own / count.view(-1, *[1] * (own.ndim - 1)) for name, own in gradients.items()}
            return {
                name: own * (tokens_U > 0).view(-1, *[1] * (own.ndim - 1))
                for name, own in moments.updates(means).items()
            }

        return update

    def feature_directions(self, member: int, query_QF: Tensor, loss_Q: Tensor | None) -> Tensor:
        return self.rate(member) * query_QF / norms(query_QF).unsqueeze(1)

    def weights(self, stored: Stored) -> Tensor | None:
        return 1 / norms(stored.features)


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    if not path.is_file():
        raise ValueError(f"{path.parent} lacks {path.name}: take a checkpoint with it (save_only_model=False)")
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
