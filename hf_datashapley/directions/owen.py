"""Order "path" with the smoothed slope: Shapley values through Adam's own nonlinearity.

The secant slope S = (D(cG) - D(0)) / (cG) is that of the whole batch. What a sample adds to a coalition depends on the
coalition, through Adam's denominator, and while second moments are young the two are far apart. In Owen's multilinear
form (Owen, "Multilinear Extensions of Games", 1972) the Shapley value of sample i is

    phi_i = integral_0^1 E[ U(T + i) - U(T) ] dp        T: each other sample with probability p

In one coordinate a coalition's gradient x_T = sum_{j in T} c g_j has mean p cG and variance p (1-p) sum_j (c g_j)^2.
With sample i left out the sum is over n - 1 samples: on average over i, Q (n-1)/n with Q = sum_j (c g_j)^2. Taking x_T
as Gaussian, x = p cG + sigma_p xi, what c g_i more gradient adds to the step is on average c g_i E[D'(x)], and Stein's
lemma, E[D'(x)] = E[D(x) xi] / sigma_p, gives that average slope without a derivative of D:

    sigma_p = sqrt( p (1-p) Q (n-1)/n )        S_p = E[ D(p cG + sigma_p xi) xi ] / sigma_p
    w_p = w_t + E[ D(p cG + sigma_p xi) ]      u = - integral_0^1 S_p * grad l_v(w_p) dp

xi by 12 Gauss-Hermite nodes, p by Gauss-Legendre. D is taken coordinate by coordinate and l_v at the mean weights,
which leaves a gap between the sum of the values and l_v(w(0)) - l_v(w(1)); it is shared by the samples' loss tokens.
For a linear D, S_p is S: under SGD this is order "path", and nothing is computed twice.

The two losses are computed in the precision of the weights, also under autocast: in half precision they differ by
their rounding, far more than by the gap (AdamW at learning rates up to 3e-4, 2-layer Llama: values off by up to 3
times the largest). With weights in half precision the gap is left alone for that reason.

Cost beside order "path": 12 evaluations of the update rule for each node, two validation losses, Q.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from .optimizers import row_blocks
from .path import NodeWeights, add_weighted, gauss_legendre
from .update_rule import AdamStep, Block, UpdateRule, adam_secant, blocks_of
from .validation import Validation
from .weights import weights_at


HERMITE_NODES = 12


class OwenOrder:
    """Makes directions of order "path" with the smoothed slope, for Adam and AdamW; to be asked as `PathOrder`.

    Args:
        rule: the optimizer's, one that is not linear.
        parameters: the scored parameters by name; all that the optimizer moves.
        nodes: Gauss-Legendre nodes.
        closes_gap: whether losses are exact enough for the gap to be shared.

    Values are of "immediate" momentum: the gap is that of one update.

    Raises:
        ValueError: the optimizer trains other parameters too.
    """

    def __init__(self, rule: UpdateRule, parameters: dict[str, nn.Parameter], nodes: int, closes_gap: bool):
        strangers = sum(p.requires_grad for p in set(rule.parameters) - set(parameters.values()))
        if strangers:
            raise ValueError(
                f"path_slope='owen' shares out the whole change of the loss, but the optimizer trains {strangers} "
                "parameters that are not the model's own: freeze them, or set path_slope='secant'"
            )
        self.rule = rule
        self.parameters = parameters
        self.nodes = gauss_legendre(nodes)
        self.closes_gap = closes_gap
        self._weights, self._slopes = NodeWeights(), NodeWeights(full=True)

    def directions(
        self, model: nn.Module, validation: Validation, update: int, squares: dict[str, Tensor], samples: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """u, [K, *shape] by name, and the targets' mean losses along the path, [K].

        `squares`: Q by name, [*shape], in full precision; `samples`: n, 0-dimensional, of the samples that have a loss
        token.
        """
        moving = self.rule.moving
        names = {parameter: name for name, parameter in self.parameters.items()}
        total: dict[str, Tensor] = {}
        mean_losses: Tensor | None = None
        for p, weight in self.nodes:
            weights, slopes = self._weights.of(moving), self._slopes.of(moving)
            for parameter in moving:
                variance = p * (1 - p) * (samples - 1).clamp(min=0) / samples.clamp(min=1)
                self._fill(parameter, p, variance, squares[names[parameter]], weights[parameter], slopes[parameter])
            with weights_at(weights):
                gradients, losses = validation.gradients(model, self.parameters, update)
            mean_losses = losses * weight if mean_losses is None else mean_losses + losses * weight
            for name, gradient in gradients.items():
                slope = slopes.get(self.parameters[name])
                if slope is None:
                    gradient.zero_()
                else:
                    gradient.mul_(slope)
            add_weighted(total, gradients, weight)
        assert mean_losses is not None
        return total, mean_losses

    def path_ends(self, model: nn.Module, validation: Validation, update: int) -> Tensor:
        """The losses l_v(w(0)) and l_v(w(1)), [2, K]."""
        losses = []
        for s in (0.0, 1.0):
            weights = self._weights.of(self.rule.moving)
            self.rule.path_weights(s, weights)
            with weights_at(weights):
                losses.append(validation.losses(model, update))
        return torch.stack(losses)

    @torch.no_grad()
    def _fill(
        self, parameter: nn.Parameter, p: float, variance: Tensor, squares: Tensor, weights: Tensor, slopes: Tensor
    ) -> None:
        """Writes w_p and -S_p."""
        step = self.rule.step_of(parameter)
        assert isinstance(step, AdamStep) and parameter.grad is not None
        blocks = zip(
            blocks_of(step, parameter),
            row_blocks(squares, 0),
            row_blocks(weights, 0),
            row_blocks(slopes, 0),
            strict=True,
        )
        for block, q, weight, slope in blocks:
            sigma = (q * variance).sqrt_()
            change, found = smoothed(step, block, p, sigma)
            if not self.closes_gap:
                # A single sample's value, which is otherwise the gap.
                found = torch.where(sigma == 0, adam_secant(step, block), found)
            torch.add(block.weight, change, out=weight)
            torch.neg(found, out=slope)


def smoothed(step: AdamStep, block: Block, p: float, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """E[D(x)] and S_p = E[D'(x)] of x = p cG + sigma xi, both of the block's shape.

    S_p is 0 where sigma is: there no sample has a gradient, or there is but one sample (and the gap is its value).
    D is taken in units in which the second moment is A + x^2 and the first M + x, which saves two scalings a node.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(HERMITE_NODES)
    unit = ((1 - step.beta2) / step.bias2).sqrt()
    mean = block.gradient * p
    if step.coupled_decay:
        mean.add_(block.weight, alpha=step.coupled_decay)
    mean.mul_(unit)
    spread = sigma * unit
    old_square = block.second_moment * (step.beta2 / step.bias2)
    old_mean = block.first_moment * (step.beta1 / (1 - step.beta1) * unit)
    change, slope = torch.zeros_like(mean), torch.zeros_like(mean)
    for point, weight in zip(points, weights / math.sqrt(2 * math.pi), strict=True):
        x = torch.add(mean, spread, alpha=point)
        root = torch.addcmul(old_square, x, x).sqrt_().add_(step.eps)
        x.add_(old_mean).div_(root)
        change.add_(x, alpha=weight)
        slope.add_(x, alpha=weight * point)
    scale = -step.lr * (1 - step.beta1) / (step.bias1 * unit)
    change.mul_(scale)
    if step.decoupled_decay:
        change.add_(block.weight * (-step.lr * step.decoupled_decay))
    return change, slope.mul_(scale).div_(sigma).masked_fill_(sigma == 0, 0.0)
