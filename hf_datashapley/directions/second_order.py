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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..full_precision import HALF, full_dtype, in_full
from .optimizers import Momentum
from .update_rule import UpdateRule
from .validation import Validation


# Directions in which the Hessian's symmetry is looked at, and by how much it may be off; float32 is by 1e-6, bfloat16
# by up to 2e-2.
PROBES = 3
ASYMMETRY = 1e-2
HALF_ASYMMETRY = 1e-1


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
            moved[parameter] = torch.empty_like(parameter, dtype=full_dtype(parameter.dtype), requires_grad=False)
            self.rule.path_change(parameter, 0.5, moved[parameter])
        directions, losses = curved_gradients(model, validation, self.parameters, update, moved)
        for name, direction in directions.items():
            self.rule.scale_by_secant(self.parameters[name], direction, self.momentum)
        return directions, losses


def check_twice_differentiable(model: nn.Module, validation: Validation, parameters: dict[str, nn.Parameter]) -> None:
    """Makes Hessian-vector products on the rows of the first update, and looks whether the Hessian is symmetric.

    It has to be looked at: an autograd function whose backward is not differentiable (a fused attention kernel in
    Python, `once_differentiable`) need not raise, it can as well leave its part of the second derivative out.

    Raises:
        ValueError: the model cannot be differentiated twice.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = list(parameters.values())
    allowed = HALF_ASYMMETRY if any(p.dtype in HALF for p in chosen) else ASYMMETRY
    probes = [[torch.randn(p.shape, generator=generator).to(p) for p in chosen] for _ in range(PROBES)]

    def differentiate(loss: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad(loss, chosen, create_graph=True, materialize_grads=True)
        products = [
            torch.autograd.grad(inner(gradients, probe), chosen, retain_graph=True, materialize_grads=True)
            for probe in probes
        ]
        table = torch.stack([torch.stack([inner(product, probe) for probe in probes]) for product in products])
        if bool((table - table.T).abs().sum() > allowed * table.abs().sum()):
            raise RuntimeError("the second derivative is not symmetric: a part of it is missing")
        return [gradient.detach() for gradient in gradients]

    twice(model, lambda: validation.gradients(model, parameters, 1, differentiate))


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
        chosen = list(parameters.values())
        slope = inner([gradients[parameter] for parameter in moved], list(moved.values()))
        products = torch.autograd.grad(slope, chosen, materialize_grads=True)
        return [in_full(gradients[p].detach()) + product for p, product in zip(chosen, products, strict=True)]

    return twice(model, lambda: validation.gradients(model, parameters, update, differentiate))


def twice(
    model: nn.Module, compute: Callable[[], tuple[dict[str, Tensor], Tensor]]
) -> tuple[dict[str, Tensor], Tensor]:
    """What `compute` gives, under attention by its definition, whatever kernel the model trains with."""
    with sdpa_kernel(SDPBackend.MATH):
        try:
            return compute()
        except RuntimeError as error:
            # As torch words it for fused kernels, for autograd functions of somebody, for compiled code.
            if not any(words in str(error) for words in ("derivative", "differentia", "double backward")):
                raise
            raise ValueError(
                f"value_order='second' differentiates {type(model).__name__} twice, which one of its operations does "
                f"not allow ({str(error).splitlines()[0]}): load it with attn_implementation='sdpa' or 'eager', or "
                "use value_order='path', which needs no second derivative"
            ) from error


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    pairs = zip(left, right, strict=True)
    return torch.stack([torch.dot(in_full(x).flatten(), in_full(y).flatten()) for x, y in pairs]).sum()
