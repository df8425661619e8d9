"""Members that cost no training: subnetworks of a model under fixed dropout masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from .cost import Cost
from .kept import evaluating
from .masks import branches, dropouts, masked
from .models import Models


class DropoutEnsemble:
    """Each model under `passes` dropout masks, instead of as many models that were trained independently (Deng, Li,
    Zhang, Ma, "Efficient Ensembles Improve Training Data Attribution", arXiv 2405.17293).

    A pass is one subnetwork for training units and queries alike: each dropout zeroes channels that are drawn once,
    from (seed, pass, model, module), and scales the others by 1 / (1 - p). Dropout of attention's probabilities has
    no channels, and lies within fused kernels: it stays off, as in eval mode, and does not count. Assumes that the
    model was trained with dropout, or bears it.

    Costs no training and no room; an estimator's own time for each pass.

    Args:
        models: one, or several.
        passes: masks for each model.
        p: None: each module's own, those with 0 stay off. Else that of all of them; and a model without any
            `nn.Dropout` (Llama) gets it on what attention and MLP of every decoder layer add.
        seed: of the masks.
        forward_only: gradients are those of the models without masks, and only `outputs()` have them; members are
            then as many as models.

    Raises:
        ValueError: a model has no dropout that could be used.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        passes: int = 4,
        p: float | None = None,
        seed: int = 0,
        forward_only: bool = False,
    ):
        if passes < 1:
            raise ValueError(f"passes={passes}: at least one is needed")
        if p is not None and not 0 < p < 1:
            raise ValueError(f"p={p} is no dropout probability: give one between 0 and 1, as p=0.1")
        self.base = Models(models)
        self.passes, self.p, self.seed, self.forward_only = passes, p, seed, forward_only
        self._places = [places(model, p) for model in self.base.models]

    @property
    def cost(self) -> Cost:
        own = self.base.cost
        return Cost(len(self), own.models_trained, 0, own.training_seconds, own.model_bytes, 0)

    def __len__(self) -> int:
        return len(self.base) * (1 if self.forward_only else self.passes)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.base) if self.forward_only else self._masked()

    def outputs(self) -> Iterator[nn.Module]:
        return self._masked()

    def fingerprints(self) -> list[str]:
        own = self.base.fingerprints()
        if self.forward_only:
            # Masks count here as well: they are part of what is stored of units.
            return [f"{model}, outputs of {self.passes} masks {self.seed}, p {self.p}" for model in own]
        masks = range(self.passes)
        return [
            f"{model}, mask {self.seed} {number} {index} of {describe(self._places[index])}"
            for index, model in enumerate(own)
            for number in masks
        ]

    def _masked(self) -> Iterator[nn.Module]:
        for index, model in enumerate(self.base.models):
            chances = self._places[index]
            modules = dict(model.named_modules())
            for number in range(self.passes):
                key = f"{self.seed} {number} {index}"
                with evaluating(model), masked({name: modules[name] for name in chances}, chances, key) as masks:
                    yield model
                if any(mask.met for mask in masks) and all(mask.mask_D is None for mask in masks):
                    raise ValueError(no_dropout(model))


def places(model: nn.Module, p: float | None) -> dict[str, float]:
    """Where a model's masks go, with the probability of each."""
    modules = dropouts(model)
    if p is None:
        found = {name: module.p for name, module in modules.items() if module.p > 0}
        if not found:
            raise ValueError(no_dropout(model))
        full = [name for name, chance in found.items() if chance >= 1]
        if full:
            raise ValueError(f"{full[0]} drops everything, p=1: give a p for all of them, as p=0.1")
        return found
    return dict.fromkeys(modules or branches(model), p)


def no_dropout(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has no dropout module with p > 0 beside attention's: give p=0.1, which puts it in "
        "for the time of scoring"
    )


def describe(chances: dict[str, float]) -> str:
    return ", ".join(f"{name} {chance}" for name, chance in chances.items())
