"""Order "second": the gradient, and the Hessian's product with the update that is being made.

    u = - S * ( grad l_v(w_t) + H_v d )        d = (w(0) + w(1)) / 2 - w_t

To second order in the update, value_i = <c g_i, u> is sample i's Shapley value of the fall of l_v. Under plain SGD
d = -lr cG / 2 and S = -lr, and the sum is Theorem 4 of Wang et al., "Data Shapley in One Training Run" (arXiv
2406.11011), the gradient-Hessian-gradient products of sample i with all of the batch at once. The Hessian-vector
product is exact, by differentiating twice in reverse; attention runs in its mathematical form for that pass, because
fused kernels have no second derivative.

Cost: one validation pass differentiated twice, about three times a plain one; memory for its graph and one direction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .optimizers import Momentum
from .update_rule import UpdateRule
from .validation import Validation


class SecondOrder:
    """Makes directions of order "second", to be asked when cG lies in `.grad` and the optimizer has not stepped.

    Args:
        rule: the optimizer's.
        parameters: the scored parameters by name.
        momentum: "unrolled" or "immediate", see `first_order`.
    """

    def __init__(self, rule: UpdateRule, parameters: dict[str, nn.Parameter], momentum: Momentum):
        self.rule = rule
        self.parameters = parameters
        self.momentum: Momentum = momentum

    def directions(self, model: nn.Module, validation: Validation, update: int) -> tuple[dict[str, Tensor], Tensor]:
        """u, [K, *shape] by name, and the targets' losses before the update, [K]."""
        moved = {}
        for parameter in self.rule.moving:
            moved[parameter] = torch.empty_like(parameter, requires_grad=False)
            self.rule.path_change(parameter, 0.5, moved[parameter])
        directions, losses = curved_gradients(model, validation, self.parameters, update, moved)
        for name, direction in directions.items():
            self.rule.scale_by_secant(self.parameters[name], direction, self.momentum)
        return directions, losses


def curved_gradients(
    model: nn.Module,
    validation: Validation,
    parameters: dict[str, nn.Parameter],
    update: int,
    moved: dict[nn.Parameter, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """grad l_v + H_v d, [K, *shape] by name, with d given for each parameter it moves, and the losses, [K].

    Raises:
        ValueError: the model cannot be differentiated twice.
    """

    def differentiate(loss: Tensor) -> list[Tensor]:
        everything = list(dict.fromkeys([*parameters.values(), *moved]))
        first = torch.autograd.grad(loss, everything, create_graph=True, materialize_grads=True)
        gradients = dict(zip(everything, first, strict=True))
        slope = torch.stack([torch.dot(gradients[p].flatten(), d.flatten()) for p, d in moved.items()]).sum()
        chosen = list(parameters.values())
        products = torch.autograd.grad(slope, chosen, materialize_grads=True)
        return [gradients[p].detach() + product for p, product in zip(chosen, products, strict=True)]

    with sdpa_kernel(SDPBackend.MATH):
        try:
            return validation.gradients(model, parameters, update, differentiate)
        except RuntimeError as error:
            if "derivative" not in str(error) and "once_differentiable" not in str(error):
                raise
            raise ValueError(
                f"value_order='second' differentiates {type(model).__name__} twice, which one of its operations does "
                f"not allow ({str(error).splitlines()[0]}): load it with attn_implementation='sdpa' or 'eager', or "
                "use value_order='path', which needs no second derivative"
            ) from error
