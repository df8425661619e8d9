"""The truth, slow and obvious: loops over samples, in float64, written from the definitions and from nothing else.

    g_i      sample i's own share of the gradient that the optimizer receives; sum_i g_i = G
    c        = min(1, max_norm / (|G| + 1e-6)), the clipping factor
    S_0      the optimizer's step per unit of gradient, as far as it is known before the step
    l_v      mean token loss on the validation rows in use, dropout off
    D(x)     what the optimizer's own step makes of gradient x, by running it
    w(s)     w_t + D(0) + s (D(cG) - D(0))
    u        = - S_0 * grad l_v                      order "first"
             = - S * (grad l_v + H_v (w(1/2) - w_t))  order "second", S = (D(cG) - D(0)) / (cG)
             = - S * sum_nodes grad l_v(w(s))         order "path"
    value_i  = <c g_i, u>, in nats of l_v, positive where the sample lowers it

Nothing here imports hf_datashapley. A gradient is a dict from parameter name to tensor; a tied parameter appears once.
Shapes: B micro-batch, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


Gradient = dict[str, Tensor]
# (logits, labels, num_items_in_batch or None, micro-batches in the update) -> [B] losses that sum to Trainer's loss
RowLosses = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
# (logits, labels) -> summed loss and number of loss tokens
SummedLoss = Callable[[Tensor, Tensor], tuple[Tensor, int]]


class Float64(TorchFunctionMode):
    """Lets a float64 model stay in float64 where its code asks for float32 (losses, norms, softmax, rotary angles).

    NEFTune's noise is the exception: it is drawn in float32 as the training run drew it, since a uniform draw in
    float64 consumes other bits of the generator. Dropout masks come out the same in both precisions.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.uniform_ and args[0].dtype == torch.float64:
            return args[0].copy_(torch.empty(args[0].shape, dtype=torch.float32).uniform_(*args[1:], **kwargs))
        for argument in args:  # a plain loop: this runs at every look at a tensor, and seldom finds one
            if argument is torch.float32:
                args = tuple(torch.float64 if each is torch.float32 else each for each in args)
                break
        if kwargs:
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


# Losses, row by row. Their sum over the rows of all micro-batches is the loss that Trainer differentiates.


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, T-1]: cross-entropy of each next token, 0 where the label is ignored."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")


def loss_tokens(labels: Tensor) -> Tensor:
    """[B]: how many tokens of each row have a loss. A row with a class or a number to predict counts as one."""
    if labels.dim() == 1:
        return torch.ones_like(labels, dtype=torch.int64)
    return (labels[:, 1:] != -100).sum(1)


def language_model(logits: Tensor, labels: Tensor, num_items: Tensor | None, micro_batches: int) -> Tensor:
    """Summed token losses over `num_items`; a model without `num_items` gets its share of the micro-batch's mean."""
    total = loss_tokens(labels).sum() * micro_batches if num_items is None else num_items
    return token_losses(logits, labels).sum(1) / total


def label_smoothed(epsilon: float) -> RowLosses:
    """(1 - epsilon) of the token's loss and epsilon of the mean loss over the vocabulary, at labelled positions."""

    def losses(logits: Tensor, labels: Tensor, num_items: Tensor | None, micro_batches: int) -> Tensor:
        assert num_items is not None
        uniform = -F.log_softmax(logits[:, :-1], -1).mean(-1) * (labels[:, 1:] != -100)
        return ((1 - epsilon) * token_losses(logits, labels) + epsilon * uniform).sum(1) / num_items

    return losses


def classification(logits: Tensor, labels: Tensor, num_items: Tensor | None, micro_batches: int) -> Tensor:
    """The share of the micro-batch's mean. These heads accept `num_items` and ignore it, and so does Trainer."""
    return F.cross_entropy(logits, labels, reduction="none") / len(labels)


def regression(logits: Tensor, labels: Tensor, num_items: Tensor | None, micro_batches: int) -> Tensor:
    return (logits[:, 0] - labels).square() / len(labels)


def summed_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Summed loss and its number of loss tokens, for the validation mean."""
    if labels.dim() == 2:
        return token_losses(logits, labels).sum(), int(loss_tokens(labels).sum())
    if labels.is_floating_point():
        return (logits[:, 0] - labels).square().sum(), len(labels)
    return F.cross_entropy(logits, labels, reduction="sum"), len(labels)


# Gradients.


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradient(loss: Tensor, parameters: Mapping[str, Tensor]) -> Gradient:
    """d loss / d parameters; zeros for a parameter that the loss does not reach."""
    grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
    }


def per_sample_gradients(losses: Tensor, parameters: Mapping[str, Tensor]) -> list[Gradient]:
    """One gradient per entry of `losses` [B], each by its own backward pass."""
    return [gradient(loss, parameters) for loss in losses]


def token_slopes(losses: Tensor, parameters: Mapping[str, Tensor], directions: Sequence[Gradient]) -> Tensor:
    """[B, T, K]: <gradient of the token's own loss, u_k>, each of the losses [B, T] by a backward pass of its own."""
    slopes = torch.zeros(*losses.shape, len(directions), dtype=torch.float64)
    for b, t, k in np.ndindex(slopes.shape):
        slopes[b, t, k] = inner(gradient(losses[b, t], parameters), directions[k], directions[k])
    return slopes


def validation_gradient(
    model: nn.Module, rows: Iterable[Mapping[str, Tensor]], loss_of: SummedLoss = summed_loss
) -> tuple[Gradient, float]:
    """Gradient and value of the mean token loss of the rows, dropout off. Each row is a batch of its own, unpadded."""
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        with Float64():
            logits = model(input_ids=row["input_ids"]).logits
        loss, tokens = loss_of(logits, row["labels"])
        total, count = total + loss, count + tokens
    model.train(was_training)
    return gradient(total / count, trainable(model)), float(total.detach()) / count


def add(gradients: Sequence[Gradient]) -> Gradient:
    return {name: torch.stack([grad[name] for grad in gradients]).sum(0) for name in gradients[0]}


def inner(left: Gradient, right: Gradient, names: Iterable[str]) -> float:
    return float(sum((left[name] * right[name]).sum() for name in names))


def clip_factor(total: Gradient, max_norm: float) -> float:
    """The factor by which `torch.nn.utils.clip_grad_norm_` multiplies the update's gradient; Trainer's 0 means off."""
    norm = torch.sqrt(sum((grad.square().sum() for grad in total.values()), torch.zeros((), dtype=torch.float64)))
    return min(1.0, max_norm / (float(norm) + 1e-6)) if max_norm > 0 else 1.0


# The optimizer.


def first_order_factor(
    optimizer: type, group: Mapping[str, Any], state: Mapping[str, Any], momentum: str
) -> Tensor | float:
    """S_0: parameter change per unit of clipped gradient, from the optimizer's state before the step.

    momentum: "immediate", what acts in this step; "unrolled", what the gradient will have done to the weights once
    momentum has played out, learning rate and second moment as they are now.
    """
    rate = float(group["lr"])
    if optimizer is torch.optim.SGD:
        mu = group["momentum"]
        if mu == 0:
            return -rate
        first_step = state.get("momentum_buffer") is None
        enters_buffer = 1.0 if first_step else 1.0 - group["dampening"]
        if momentum == "unrolled":
            return -rate * enters_buffer / (1 - mu)
        return -rate * (1 + mu * enters_buffer if group["nesterov"] else enters_buffer)

    assert optimizer in (torch.optim.Adam, torch.optim.AdamW)
    if "exp_avg_sq" not in state:
        return 0.0
    beta1, beta2 = group["betas"]
    steps_before = float(state["step"])
    second_moment = state["exp_avg_sq"].double()
    root = (second_moment / (1 - beta2**steps_before)).sqrt()
    share = 1.0 if momentum == "unrolled" else (1 - beta1) / (1 - beta1 ** (steps_before + 1))
    return torch.where(second_moment > 0, -rate * share / (root + group["eps"]), 0.0)


@cache
def settings_of(optimizer: type) -> frozenset[str]:
    return frozenset(inspect.signature(optimizer).parameters)


def real_step(
    optimizer: type, group: Mapping[str, Any], state: Mapping[str, Any], weight: Tensor, gradient: Tensor
) -> Tensor:
    """D(gradient): the change that torch's own optimizer makes, in float64, from a copy of its state."""
    known = settings_of(optimizer)
    parameter = nn.Parameter(weight.double().clone())
    instance = optimizer([parameter], **{key: value for key, value in group.items() if key in known})
    for key, value in state.items():
        copied = value.clone() if isinstance(value, Tensor) else value
        is_moment = isinstance(value, Tensor) and key != "step"
        instance.state[parameter][key] = copied.double() if is_moment else copied
    parameter.grad = gradient.double().clone()
    instance.step()
    return parameter.detach() - weight.double()


def secant(change: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
    """S of one parameter by its definition; where the gradient is 0 its limit, by a small difference."""
    x = torch.where(gradient == 0, 1e-9, gradient)
    return (change(x) - change(torch.zeros_like(x))) / x


def smoothed_slope(
    change: Callable[[Tensor], Tensor], gradient: Tensor, squares: Tensor, samples: int, p: float, nodes: int = 12
) -> tuple[Tensor, Tensor]:
    """S_p and E[D] of x = p cG + sigma xi by Gauss-Hermite quadrature; S_p is 0 where sigma is."""
    sigma = (p * (1 - p) * squares * (samples - 1) / samples).sqrt()
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    changes = [change(p * gradient + float(point) * sigma) for point in points]
    mean = add([{"": float(w) * d} for w, d in zip(weights, changes, strict=True)])[""]
    tilt = add([{"": float(w * point) * d} for w, point, d in zip(weights, points, changes, strict=True)])[""]
    return torch.where(sigma > 0, tilt / sigma, 0.0), mean


def direction(validation: Gradient, factors: Mapping[str, Tensor | float]) -> Gradient:
    """u = - S_0 * grad l_v."""
    return {name: -factors[name] * grad for name, grad in validation.items()}


def relative_error(measured: Sequence[float] | Tensor, truth: Sequence[float] | Tensor) -> float:
    """max |measured - truth| / max |truth|; both all zero is no error, anything against a zero truth is all error."""
    measured = torch.as_tensor(measured, dtype=torch.float64).detach()
    truth = torch.as_tensor(truth, dtype=torch.float64).detach()
    assert measured.shape == truth.shape, (measured.shape, truth.shape)
    difference = float((measured - truth).abs().max())
    if difference == 0.0:
        return 0.0
    scale = float(truth.abs().max())
    return difference / scale if scale > 0 else float("inf")
