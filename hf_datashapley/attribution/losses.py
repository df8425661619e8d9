"""Losses of single tokens, in nats, and what of them is differentiated.

A unit's output is a sum over its loss tokens, of which TRAK knows another than the loss (Park et al., arXiv
2303.14186, section 3; Deng et al., arXiv 2405.17293):

    loss     sum_t l_t                      l_t = -log p_t
    margin   sum_t log(1/p_t - 1)           minus the log odds of each token's being right

The second one's gradient is that of the first with token t weighted by 1 / (1 - p_t), so that is how it is computed.

Shapes: R rows, T label positions (one for a model that classifies rows), V classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..full_precision import in_full
from ..loss_tokens import IGNORED


Output = Literal["loss", "margin"]
# 1 - p of a token is not taken to be less: in float32 nothing smaller is left of the difference.
LEAST_MISS = 1e-6
# By how much the tokens' losses may miss the mean that the model itself makes of them.
TOLERANCE = 1e-3
HALF_TOLERANCE = 2e-2


def token_losses(model: nn.Module, inputs: Mapping[str, Any], shifted: bool) -> Tensor:
    """Every label's own loss, [R, T], where the label stands, and 0 where there is none (`IGNORED`).

    `shifted`: whether the model predicts a label one position earlier (`loss_tokens.shifts_labels`).

    Raises:
        ValueError: labels and logits do not pair.
    """
    labels = inputs["labels"]
    if labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype}, and attribution takes cross-entropies of classes or tokens: give integer ones"
        )
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {list(labels.shape)} do not pair with logits {list(logits.shape)}, so losses cannot be told "
            "apart: give a label for each token, or for each row of a model that classifies rows"
        )
    if not shifted:
        return cross_entropy(logits, labels).view(len(labels), -1)
    # The labels are moved, not the logits, which are much larger.
    predicted_RT = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return F.pad(cross_entropy(logits, predicted_RT)[:, :-1], (1, 0))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each label, in full precision; of the labels' shape."""
    flat = F.cross_entropy(in_full(logits.flatten(0, -2)), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(labels.shape)


def misses(losses: Tensor) -> Tensor:
    """1 - p of each token, for its loss; 0 where the loss is 0, as where there is no label."""
    return -torch.expm1(-losses.detach())


def differentiated(losses: Tensor, output: Output) -> Tensor:
    """The sum over tokens whose gradient is that of the output."""
    if output == "loss":
        return losses.sum()
    return (losses / misses(losses).clamp(min=LEAST_MISS)).sum()


def check_token_losses(model: nn.Module, inputs: Mapping[str, Any], losses: Tensor, tokens: int) -> None:
    """Holds the mean of the tokens' losses against the loss that the model makes of the same batch; one forward pass.

    Raises:
        ValueError: it makes another one.
    """
    if not tokens:
        return
    with torch.no_grad():
        own = in_full(model(**inputs).loss)
    mean = losses.detach().sum() / tokens
    if not near(own, mean, model):
        raise ValueError(
            f"the model's own loss of a batch is {float(own):.6g} and the mean cross-entropy of its labels "
            f"{float(mean):.6g}: attribution needs a model whose loss is the plain mean over labelled tokens or rows "
            "(no auxiliary loss, no label smoothing)"
        )


def near(own: Tensor, other: Tensor, model: nn.Module) -> bool:
    """Whether two losses are one, as far as the model's precision goes."""
    half = next(model.parameters()).dtype != other.dtype
    return bool((own - other).abs() <= (HALF_TOLERANCE if half else TOLERANCE) * other.abs().clamp(min=1e-3))


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Beside a cache, models of transformers make no mask that keeps packed documents apart."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    own = [(config, vars(config).get("use_cache")) for config in configs]
    try:
        for config, _ in own:
            config.use_cache = False
        yield
    finally:
        for config, use_cache in own:
            if use_cache is None:
                del config.use_cache
            else:
                config.use_cache = use_cache
