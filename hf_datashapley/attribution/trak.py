"""TRAK: units scored through a linear model of what the network would say.

    score_iq = mean_m[ Q_i ] * mean_m[ phi(q)^T (sum_j phi(j) phi(j)^T + damping)^-1 phi(i) ]     over members m

with phi the projected gradient of the model's output f, and Q how much the loss of a unit still changes with it
(Park, Georgiev, Ilyas, Leclerc, Madry, "TRAK: Attributing Model Behavior at Scale", arXiv 2303.14186, section 3). For
language models f is the log odds of a text's being said:

    output "mean"    f = log(p / (1 - p)), p = exp(-mean token loss): the whole text as one answer
    output "tokens"  f = sum over tokens of log(p_t / (1 - p_t)): a token as an answer

and Q_i = 1 - p, the derivative of the loss log(1 + exp(-f)) but for its sign: of the text, times its number of tokens,
whose losses are summed in training; or the mean over tokens. So with one member Q_i phi(i) is the gradient of the
unit's loss under "mean", and scores add up over units.

Shapes: u units of a shard, Q queries, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..ghost.capture import Capture
from .corpus import Corpus
from .ensembles import Ensemble, as_ensemble, in_turn
from .estimator import Attribution
from .kernel import FeatureGram, Kernel, check_damping, kernel_of
from .losses import LEAST_MISS, Output, without_cache
from .measures import Sums, forwarded, over_units
from .settings import KernelOf, check_choice
from .store import Stored
from .stored import StoredFeatures


@dataclass(repr=False)
class Trak(Attribution):
    """See the module's description, and `Settings` for what is not listed here.

    Assumes that the model, near where it is, is linear in its parameters, and the training loss convex in f. It needs
    an ensemble: of models trained anew, or of what costs less (`DropoutEnsemble`, `LoraEnsemble`).

    Args:
        projection_dim: None takes whole gradients, which is for models of a few million parameters.
        damping: by how much the kernel is damped, over its mean eigenvalue. It matters as much as ensembling does. The
            default is the best, or nearly, for every kind of ensemble from 2,048 features on, by the LDS of queries
            that no table scores (examples/trak_ensembles).
        output: "mean" or "tokens", what f is.
        kernel: of whose features it is made where groups are scored (`partition`). "group": of the groups', each of
            which is a text to f and Q. "unit": of their members', each a text; a group's score is then the sum of the
            scores that its members would have by themselves, of which only `groups * F` + F^2 numbers are kept.

    Cost: a forward and a backward pass over the training set for each member, without weights' gradients; for the
    kernel F^2 numbers and units * F^2 products (units^2, where that is less).
    """

    _: KW_ONLY
    projection_dim: int | None = 2048
    damping: float = 1.0
    output: Literal["mean", "tokens"] = "mean"
    kernel: KernelOf = "group"

    def check(self) -> None:
        super().check()
        check_choice("output", self.output, ("mean", "tokens"))
        check_choice("kernel", self.kernel, get_args(KernelOf))
        check_damping(self.damping)
        if self.outputs_first() and self.route == "batched":
            raise ValueError(
                "kernel='unit' weighs each member of a group by its own Q (but for one model with output='mean'), and "
                "route='batched' knows no members: set route='summed', or kernel='group'"
            )

    def kernel_of_members(self) -> bool:
        return self.kernel == "unit" and self.partition is not None

    def outputs_first(self) -> bool:
        # Of one model Q_i phi(i) is the gradient of the loss, whatever Q_i is.
        ensemble = as_ensemble(self.members)
        alone = len(ensemble) == 1 and not ensemble.forward_only and self.output == "mean"
        return self.kernel_of_members() and not alone

    def described(self) -> dict[str, Any]:
        if not self.kernel_of_members():
            return {}
        weights = "log odds, times Q in groups" if self.outputs_first() else "log odds"
        return {"kernel": "unit", "members": f"{weights}, of {self.output}"}

    def member_factors(self, unit_U: np.ndarray, sums: Sums) -> tuple[Tensor | None, Tensor | None]:
        phi = None
        if self.output == "mean":
            tokens = sums.tokens.clamp(min=1)
            phi = odds(sums.loss / tokens) / tokens
        if not self.outputs_first():
            return phi, None
        softness = self._softness[torch.from_numpy(unit_U)].to(sums.loss)
        return phi, softness if phi is None else softness * phi

    def _stores(self) -> bool:
        return True

    def objective(self) -> Output:
        return "loss" if self.output == "mean" else "margin"

    def _fit_member(self, number: int, model: nn.Module, capture: Capture) -> None:
        assert isinstance(self._engine, StoredFeatures)
        store = self._engine.store
        if number == 0:
            self._kernels: list[Kernel] = []

        if self._engine.kernel is not None:
            count = self._engine.members.corpus.count
            self._kernels.append(FeatureGram(self._engine.kernel.total(), count, self.damping))
            return

        def features() -> Iterator[Tensor]:
            for stored in store.shards(number):
                weights = self.weights(stored)
                yield stored.features if weights is None else stored.features * weights.unsqueeze(1)

        self._kernels.append(kernel_of(features, store.units, store.width, self.damping))

    def _fit_outputs(self, ensemble: Ensemble) -> None:
        assert isinstance(self._engine, StoredFeatures)
        found: Iterable[Sums]
        if self.kernel_of_members():
            if not self.outputs_first():
                return
            found = forwarded_sums(ensemble, self._train.parted(None), self.progress)
        elif ensemble.forward_only:
            found = forwarded_sums(ensemble, self._engine.train, self.progress)
        else:
            store = self._engine.store
            found = (store.terms(number) for number in range(store.members))
        self._softness = torch.stack([self._softness_of(sums) for sums in found]).mean(0)

    def _softness_of(self, sums: Sums) -> Tensor:
        """Q_i under one model, [U]."""
        tokens = sums.tokens.clamp(min=1)
        if self.output == "tokens":
            return sums.miss / tokens
        return -torch.expm1(-sums.loss / tokens) * sums.tokens

    def feature_directions(self, member: int, query_QF: Tensor, loss_Q: Tensor | None) -> Tensor:
        if self.output == "mean" and loss_Q is not None:
            query_QF = query_QF * odds(loss_Q).unsqueeze(1)
        return self._kernels[member].solve(query_QF)

    def weights(self, stored: Stored) -> Tensor | None:
        """By which a unit's gradient of its summed loss becomes phi."""
        if self.output == "tokens" or self.kernel_of_members():
            return None
        tokens = stored.tokens.clamp(min=1)
        return odds(stored.loss / tokens) / tokens

    def finished(self, start: int, block_uQ: Tensor) -> Tensor:
        if self.kernel_of_members():
            return block_uQ
        return block_uQ * self._softness[start : start + len(block_uQ)].unsqueeze(1)


def forwarded_sums(ensemble: Ensemble, corpus: Corpus, progress: bool) -> Iterator[Sums]:
    """Losses under each of the ensemble's `outputs()`: a forward pass over the training set for each."""
    with in_turn(ensemble.outputs()) as models:
        for model in tqdm(models, "outputs", disable=not progress):
            with without_cache(model):
                measure = forwarded(model, corpus.reading.shifted)
                sums = over_units(corpus, 0, corpus.count, measure, 0, model)
            yield Sums(sums.numbers.cpu(), sums.loss.float().cpu(), sums.miss.float().cpu(), sums.tokens.cpu())


def odds(mean_loss: Tensor) -> Tensor:
    """1 / (1 - p): what the gradient of a mean loss becomes the gradient of minus the log odds by."""
    return 1 / (-torch.expm1(-mean_loss)).clamp(min=LEAST_MISS)
