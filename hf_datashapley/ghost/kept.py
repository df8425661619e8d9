"""What a backward pass leaves behind when its units are to be scored later, against directions not yet known.

A linear layer of the "fused" kernel keeps its units' own weight gradients where they take no more room than its
inputs and output gradients (from which they would have to be formed again); everything else keeps the latter.

Shapes: U units, K directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import weight_gradients
from .rules import EmbeddingRule, LayerRule, LinearRule
from .units import Units


@dataclass
class KeptInputs:
    """One use of a layer: its input and output gradient. `parameters`: the layer's name -> the model's name."""

    parameters: dict[str, str]
    rule: LayerRule
    units: Units
    x: Tensor
    b: Tensor

    def scores(self, directions: dict[str, Tensor]) -> Tensor:
        own = {local: directions[name] for local, name in self.parameters.items()}
        if isinstance(self.rule, LinearRule) and "weight" in own:
            # Forming the gradients takes no more products than the rule's way, and no more for further directions.
            x = self.x.to(self.b.dtype)
            left, right = (x, self.b) if self.rule.transposed else (self.b, x)
            _, scores = weight_gradients(left, right, own["weight"], self.units)
            if "bias" in own:
                scores += self.units.sum(self.b, dtype=scores.dtype) @ own["bias"].T
            return scores
        return self.rule.scores(self.x, self.b, own, self.units)

    def gradient(self, local: str, i: int) -> Tensor:
        return self.rule.gradient(local, self.units.parts(self.x)[i], self.units.parts(self.b)[i])


@dataclass
class KeptGradients:
    """One use of a linear layer: its units' gradients by the layer's names, each [U, *shape]."""

    parameters: dict[str, str]
    gradients: dict[str, Tensor]

    def scores(self, directions: dict[str, Tensor]) -> Tensor:
        some = next(iter(directions.values()))
        scores = some.new_zeros(len(self.gradients["weight"]), some.shape[0])
        for local, gradients in self.gradients.items():
            scores += gradients.flatten(1).to(some.dtype) @ directions[self.parameters[local]].flatten(1).T
        return scores

    def gradient(self, local: str, i: int) -> Tensor:
        return self.gradients[local][i]


class Kept:
    """All uses of all captured layers in one backward pass."""

    def __init__(self, units: Units):
        self.units = units
        self._uses: list[KeptInputs | KeptGradients] = []

    def add_inputs(self, parameters: dict[str, str], rule: LayerRule, x: Tensor, b: Tensor) -> None:
        # Detached, or the input would hold on to the whole graph before it.
        self._uses.append(KeptInputs(parameters, rule, self.units, x.detach(), b))

    def add_gradients(self, parameters: dict[str, str], weight: Tensor, bias: Tensor | None) -> None:
        gradients = {"weight": weight}
        if bias is not None and "bias" in parameters:
            gradients["bias"] = bias
        self._uses.append(KeptGradients(parameters, gradients))

    @torch.no_grad()
    def scores(self, directions: dict[str, Tensor]) -> Tensor:
        """<unit's share of the gradient, direction>, [U, K]; directions [K, *shape] by name."""
        some = next(iter(directions.values()))
        scores = some.new_zeros(self.units.count, some.shape[0])
        for use in self._uses:
            scores += use.scores(directions)
        return scores

    @torch.no_grad()
    def add_squares(self, squares: dict[str, Tensor]) -> None:
        """Adds sum_i g_i^2 to `squares`, elementwise, [*shape] by name; a tied parameter's g_i is that of all uses."""
        uses: dict[str, list[tuple[KeptInputs | KeptGradients, str]]] = {}
        for use in self._uses:
            for local, name in use.parameters.items():
                uses.setdefault(name, []).append((use, local))
        for name, found in uses.items():
            total = squares[name]
            (use, local), *others = found
            if not others and isinstance(use, KeptInputs) and isinstance(use.rule, EmbeddingRule):
                for x, b in zip(self.units.parts(use.x), self.units.parts(use.b), strict=True):
                    rows, sums = use.rule.rows(x, b)
                    total.index_add_(0, rows, sums.to(total.dtype).square_())
                continue
            for i in range(self.units.count):
                gradient = use.gradient(local, i).to(total.dtype)
                for other, other_local in others:
                    gradient = gradient + other.gradient(other_local, i)
                total.addcmul_(gradient, gradient)
