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
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..ghost.capture import Capture
from .corpus import Corpus
from .ensembles import Ensemble, in_turn
from .estimator import Attribution
from .kernel import Kernel
from .losses import LEAST_MISS, Output, without_cache
from .measures import Sums, forwarded, over_units
from .settings import check_choice
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

    Cost: a forward and a backward pass over the training set for each member, without weights' gradients; for the
    kernel F^2 numbers and units * F^2 products (units^2, where that is less).
    """

    _: KW_ONLY
    projection_dim: int | None = 2048
    damping: float = 1.0
    output: Literal["mean", "tokens"] = "mean"

    def check(self) -> None:
        super().check()
        check_choice("output", self.output, ("mean", "tokens"))

    def _stores(self) -> bool:
        return True

    def objective(self) -> Output:
        return "loss" if self.output == "mean" else "margin"

    def _fit_member(self, number: int, model: nn.Module, capture: Capture) -> None:
        assert isinstance(self._engine, StoredFeatures)
        store = self._engine.store
        if number == 0:
            self._kernels: list[Kernel] = []

        def features() -> Iterator[Tensor]:
            for stored in store.shards(number):
                weights = self.weights(stored)
                yield stored.features if weights is None else stored.features * weights.unsqueeze(1)

        self._kernels.append(Kernel(features, store.units, store.width, self.damping))

    def _fit_outputs(self, ensemble: Ensemble) -> None:
        assert isinstance(self._engine, StoredFeatures)
        store, corpus = self._engine.store, self._engine.train
        found: Iterable[Sums]
        if not ensemble.forward_only:
            found = (store.terms(number) for number in range(store.members))
        else:
            found = forwarded_sums(ensemble, corpus, self.progress)
        self._softness = torch.stack([self._softness_of(sums) for sums in found]).mean(0)

    def _softness_of(self, sums: Sums) -> Tensor:
        """Q_i under one model, [U]."""
        tokens = sums.tokens.clamp(min=1)
        if self.output == "tokens":
            return sums.miss / tokens
        return -torch.expm1(-sums.loss / tokens) * sums.tokens

    def feature_directions(self, member: int, query_QF: Tensor, loss_Q: Tensor) -> Tensor:
        if self.output == "mean":
            query_QF = query_QF * odds(loss_Q).unsqueeze(1)
        return self._kernels[member].solve(query_QF)

    def weights(self, stored: Stored) -> Tensor | None:
        """By which a unit's gradient of its summed loss becomes phi."""
        if self.output == "tokens":
            return None
        tokens = stored.tokens.clamp(min=1)
        return odds(stored.loss / tokens) / tokens

    def finished(self, start: int, block_uQ: Tensor) -> Tensor:
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
