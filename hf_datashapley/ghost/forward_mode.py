"""How fast every token's own loss changes along a direction in weight space, by differentiating forward.

A token's value is <gradient of its own loss, u>. A backward pass of the summed loss does not have it: attention mixes
the losses of later tokens into a position's part of the gradient. One backward pass a token would. But the product is
a directional derivative, and forward-mode differentiation (dual numbers: each tensor of the forward pass and its
derivative along u, side by side) gives it for all tokens of a batch at once, whatever attends to whatever:

    D_btk = d/d eps  loss_bt(w + eps u_k)  at eps = 0

Two things differ from training, and `check_token_losses` holds both against training's own loss and gradient.

- Attention runs in its mathematical form, since fused kernels have no forward derivative. On a CPU training runs that
  form too where it drops attention weights, so the same random state gives the same dropout. A fused CUDA kernel drops
  others.
- `no_grad` within a model stops a backward pass, and is nothing to forward mode (`detach()` stops both).

Cost: for each direction a forward pass with its derivative. Of the products with weights a training step makes three
each, and so does this. Directions go one after the other: `torch.func.vmap` over them would share the forward pass
itself, but was slower on a CPU and takes memory for all of them. No graph is kept; memory is twice that of a forward
pass without one, however many directions.

Shapes: B rows, T label positions, V vocabulary, K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..full_precision import full_dtype, in_full
from ..loss_tokens import IGNORED
from ..random_state import RandomState, random_state_kept


# By how much the tokens' losses and derivatives may miss the means that training has of them. bfloat16 does by up to
# 3e-3 and, on a row of a few tokens, 5e-2.
TOLERANCE = 1e-3
HALF_LOSS_TOLERANCE, HALF_TOLERANCE = 1e-2, 1e-1


def token_derivatives(
    model: nn.Module, inputs: Mapping[str, Any], directions: Mapping[str, Tensor], shifted: bool
) -> tuple[Tensor, Tensor]:
    """Every token's own loss, in nats, [B, T], and its derivatives along the directions, [B, T, K].

    Both stand where the token's label does, in at least float32, and are 0 where there is none (`IGNORED`; the first
    position of models that predict the next token). Sums are not scaled: training's loss is theirs times a factor.

    Random numbers are drawn as one forward pass draws them, from the state that the caller has set: training's, for
    the same dropout. The model runs in the mode it is in; activation checkpointing is passed over, since nothing is
    kept for a backward pass.

    Args:
        model: as it trains (not compiled, not wrapped for data parallelism).
        inputs: what it was given in training, `labels` [B, T] among them.
        directions: [K, *shape] by parameter, as `scored_parameters` names them; all others stand still.
        shifted: whether the model predicts a label one position earlier (`shifts_labels`).

    Raises:
        ValueError: the labels are not one for each token, or an operation of the model has no forward derivative.
    """
    labels_BT = inputs["labels"]
    if labels_BT.ndim != 2 or labels_BT.is_floating_point():
        raise ValueError(
            f"labels {list(labels_BT.shape)} of {labels_BT.dtype} are one for each row, so {type(model).__name__} has "
            "no losses of tokens: set value_unit='sample' and value_kernel='auto'"
        )
    arguments = {key: value for key, value in inputs.items() if key != "labels"}
    state = RandomState()
    by_direction = []
    for number in range(next(iter(directions.values())).shape[0]):
        if number:
            state.restore()
        step = {name: direction[number] for name, direction in directions.items()}
        # Logits and their derivative are let go of before the next ones are made.
        losses_BT, derivative_BT = losses_and_derivative(
            *logits_and_derivative(model, arguments, step), labels_BT, shifted
        )
        by_direction.append(derivative_BT)
    return losses_BT, torch.stack(by_direction, -1)


def logits_and_derivative(
    model: nn.Module, arguments: Mapping[str, Any], step: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The model's logits and their derivative along `step`, [*parameter.shape] by name.

    Raises:
        ValueError: an operation of the model has no forward derivative.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), checkpoints_passed_over(model), forward_ad.dual_level():
        # None of them requires a gradient: an autocast around this would keep its copies of those that do, and a
        # training pass within it would use them, cut off from their parameters.
        weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name, direction in step.items():
            weights[name] = forward_ad.make_dual(weights[name], direction.to(weights[name].dtype))
        try:
            dual = functional_call(model, weights, kwargs=dict(arguments)).logits
        except (RuntimeError, NotImplementedError) as error:
            # As torch words it for its own operations and for autograd functions of somebody.
            if not any(words in str(error) for words in ("forward AD", "forward mode AD", "jvp")):
                raise
            raise ValueError(
                f"value_kernel='jvp' differentiates {type(model).__name__} forward, which one of its operations does "
                f"not allow ({str(error).splitlines()[0]}): load it with attn_implementation='sdpa' or 'eager', or "
                "set value_unit='sample' and value_kernel='auto'"
            ) from error
        logits, moved = forward_ad.unpack_dual(dual)
        return logits, torch.zeros_like(logits) if moved is None else moved


@contextmanager
def checkpoints_passed_over(model: nn.Module) -> Iterator[None]:
    """Within it layers that are checkpointed just run: the reentrant kind has no forward derivative."""
    name = "_gradient_checkpointing_func"
    own = {module: vars(module)[name] for module in model.modules() if name in vars(module)}
    try:
        for module in own:
            vars(module)[name] = lambda function, *args, **kwargs: function(*args, **kwargs)
        yield
    finally:
        for module, function in own.items():
            vars(module)[name] = function


def losses_and_derivative(logits: Tensor, moved: Tensor, labels_BT: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each label, [B, T], and its derivative <softmax - onehot, moved>, [B, T].

    `moved` is the derivative of the logits. One row at a time: logits in float32 are the largest tensor of all.
    """
    if logits.shape[:-1] != labels_BT.shape:
        raise ValueError(
            f"labels {list(labels_BT.shape)} do not pair with logits {list(logits.shape)}, so losses cannot be told "
            "apart by token: set value_unit='sample' and value_kernel='auto'"
        )
    losses_BT = logits.new_zeros(labels_BT.shape, dtype=full_dtype(logits.dtype))
    derivative_BT = torch.zeros_like(losses_BT)
    start = 1 if shifted else 0
    end = labels_BT.shape[1] - start
    for row, labels_T in enumerate(labels_BT[:, start:]):
        logits_TV, moved_TV = in_full(logits[row, :end]), in_full(moved[row, :end])
        labelled_T = labels_T != IGNORED
        own_T1 = torch.where(labelled_T, labels_T, 0).unsqueeze(1)
        slope_T = (logits_TV.softmax(-1) * moved_TV).sum(-1) - moved_TV.gather(1, own_T1).squeeze(1)
        losses_BT[row, start:] = F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="none")
        derivative_BT[row, start:] = torch.where(labelled_T, slope_T, 0.0)
    return losses_BT, derivative_BT


def check_token_losses(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    mean_loss: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    inputs: Mapping[str, Any],
    shifted: bool,
    half_precision: bool,
) -> None:
    """Holds the tokens' losses, and their derivatives along a random direction, against training's.

    `mean_loss(model, inputs)` is the mean loss of the labelled tokens, of which there are some, as training computes
    it; in the mode in which the model is, so it should be the one it trains in. It has to be tried: a loss function of
    the user's may weigh tokens or add terms that are no token's, a kernel may drop other attention weights for the
    same random state, a part of the model may stop gradients. What changes less than rounding is not noticed.

    One forward and backward pass and one derivative; no `.grad` is touched and no global random state is drawn from.

    Raises:
        ValueError: the two differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, generator=generator).to(p) for name, p in parameters.items()}
    with random_state_kept():
        state = RandomState()
        losses, derivatives = token_derivatives(
            model, inputs, {name: u.unsqueeze(0) for name, u in direction.items()}, shifted
        )
        state.restore()
        loss = mean_loss(model, dict(inputs))  # Trainer takes the labels out
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    products = [
        torch.dot(in_full(gradient).flatten(), in_full(u).flatten())
        for gradient, u in zip(gradients, direction.values(), strict=True)
    ]
    labels = inputs["labels"][:, 1:] if shifted else inputs["labels"]
    count = labels.ne(IGNORED).sum()
    compared = {
        "loss": (losses, loss.detach(), HALF_LOSS_TOLERANCE),
        "derivative along a random direction": (derivatives, torch.stack(products).sum(), HALF_TOLERANCE),
    }
    for what, (of_tokens, trained, half_tolerance) in compared.items():
        found, scale = of_tokens.sum() / count, of_tokens.abs().sum() / count
        if not bool((found - trained).abs() <= (half_tolerance if half_precision else TOLERANCE) * scale):
            raise ValueError(
                f"the tokens' own losses do not make up training's: their mean {what} is {float(found):.6g}, "
                f"training's {float(trained):.6g}. value_kernel='jvp' needs a loss that is the plain mean of the "
                "tokens' cross-entropies (no label smoothing, no loss function that weighs tokens, no auxiliary "
                "loss), no part of the model that stops gradients by torch.no_grad, and, where attention weights "
                "are dropped on an accelerator, attn_implementation='eager' or an attention dropout of 0; or set "
                "value_unit='sample' and value_kernel='auto'"
            )
