"""Order "path": the validation gradient along the optimizer's own step, with the secant slope.

    u = - S * integral_0^1 grad l_v( w(0) + s (w(1) - w(0)) ) ds        Gauss-Legendre nodes in s

value_i = <c g_i, u> is the Aumann-Shapley value of the game in which the optimizer moves every coordinate by S per
unit of gradient, S frozen at its value for the whole batch. The sum over samples is l_v(w(0)) - l_v(w(1)) in the limit
of nodes, at any learning rate: what the samples did, with what momentum and weight decay did alone taken out. The
split is Aumann-Shapley's own under SGD, and an approximation under Adam, good once second moments have grown; `owen`
has the slope for the updates before. No Hessian, so every attention kernel will do.

Aumann and Shapley, "Values of Non-Atomic Games" (1974). For a quadratic loss one node is exact, and under SGD the same
as Theorem 4 of Wang et al., arXiv 2406.11011.

Where the weights are in half precision, those at a node are rounded to it, see `update_rule`.

Cost: a validation pass for each node, and two elementwise passes over the parameters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..full_precision import full_dtype
from .optimizers import Momentum
from .update_rule import UpdateRule
from .validation import Validation
from .weights import weights_at


def gauss_legendre(nodes: int) -> list[tuple[float, float]]:
    """Nodes and weights on [0, 1]; exact for polynomials up to degree 2 nodes - 1."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return [(float((point + 1) / 2), float(weight / 2)) for point, weight in zip(points, weights, strict=True)]


class PathOrder:
    """Makes directions of order "path", to be asked when cG lies in `.grad` and the optimizer has not stepped.

    Args:
        rule: the optimizer's.
        parameters: the scored parameters by name.
        nodes: Gauss-Legendre nodes.
        momentum: "unrolled" or "immediate", see `first_order`.
    """

    def __init__(self, rule: UpdateRule, parameters: dict[str, nn.Parameter], nodes: int, momentum: Momentum):
        self.rule = rule
        self.parameters = parameters
        self.nodes = gauss_legendre(nodes)
        self.momentum: Momentum = momentum
        self._memory = NodeWeights()

    def directions(self, model: nn.Module, validation: Validation, update: int) -> tuple[dict[str, Tensor], Tensor]:
        """u, [K, *shape] by name, and the targets' mean losses along the path, [K]."""
        total: dict[str, Tensor] = {}
        mean_losses: Tensor | None = None
        for s, weight in self.nodes:
            node = self._memory.of(self.rule.moving)
            self.rule.path_weights(s, node)
            with weights_at(node):
                gradients, losses = validation.gradients(model, self.parameters, update)
            mean_losses = losses * weight if mean_losses is None else mean_losses + losses * weight
            add_weighted(total, gradients, weight)
        assert mean_losses is not None
        for name, direction in total.items():
            self.rule.scale_by_secant(self.parameters[name], direction, self.momentum)
        return total, mean_losses


class NodeWeights:
    """Memory for the weights at a node, kept from update to update: fresh memory of that size costs page faults.

    `full`: for numbers in full precision, where the weights are in half.
    """

    def __init__(self, full: bool = False) -> None:
        self.full = full
        self._memory: dict[nn.Parameter, Tensor] = {}

    def of(self, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        for parameter in parameters:
            if parameter not in self._memory:
                dtype = full_dtype(parameter.dtype) if self.full else parameter.dtype
                self._memory[parameter] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return {parameter: self._memory[parameter] for parameter in parameters}


def add_weighted(total: dict[str, Tensor], gradients: dict[str, Tensor], weight: float) -> None:
    """total += weight * gradients; takes the first gradients over."""
    for name, gradient in gradients.items():
        if name in total:
            total[name].add_(gradient, alpha=weight)
        else:
            total[name] = gradient if weight == 1 else gradient.mul_(weight)
