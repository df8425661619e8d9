"""A check that costs one pass over the parameters, once a run: the samples' shares add up to the gradient.

It catches what no list of layers can: a parameter that the model also uses outside of its own layer's forward (a fused
loss that reads `lm_head.weight`, say), whose samples would silently get a part of their value only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..full_precision import inner_products
from ..ranks import Ranks


TOLERANCE = 1e-3
# With products, or the gradient itself, in half precision.
HALF_TOLERANCE = 3e-2


def check_shares(
    values: Tensor,
    parameters: dict[str, nn.Parameter],
    directions: dict[str, Tensor],
    ranks: Ranks,
    tolerance: float = TOLERANCE,
) -> bool:
    """Holds the sum over samples of <c g_i, u_k> against <c G, u_k>, with c G in `.grad`.

    `values` [N, K] of a whole update, of this rank's samples. Returns whether there was anything to compare (the
    directions may be zero, the gradient may have overflowed); waits for the device.

    Raises:
        RuntimeError: the two differ by more than rounding.
    """
    expected = torch.zeros_like(values[0])
    for name, direction in directions.items():
        gradient = parameters[name].grad
        if gradient is not None:
            expected += inner_products(direction, gradient)
    total, size = values.sum(0), values.abs().sum(0)
    ranks.sum_([total, size])
    scale = torch.maximum(size, expected.abs())
    error = (total - expected).abs()
    # A loss that is not finite compares false: it is the ledger's business, not this check's.
    if bool((error > tolerance * scale).any()):
        raise RuntimeError(
            f"The samples' shares add up to {total.tolist()}, the gradient gives {expected.tolist()} along "
            "the same directions: the model uses a scored parameter outside of its layer's forward (a fused loss, or "
            "F.linear(x, layer.weight) elsewhere), or its gradient is changed by a hook. Score other modules with "
            "`value_modules`, or turn the fused path off."
        )
    return bool(((scale > 0) & scale.isfinite()).any())
