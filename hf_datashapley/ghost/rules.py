"""One rule per kind of layer: the inner products of every sample's gradient with given directions.

All these layers are affine in their parameters: the output is s = f(x; theta) + const with f linear in theta. So the
gradient of sample i with respect to theta, contracted with a direction u, is the contraction of the output gradient
b = dL/ds with f(x_i; u), whatever the layer does with its input:

    <g_i, u> = sum_p b_ip . f(x_ip; u)          Linear: f = U x + u        Embedding: f = U[id]
                                                norms:  f = u_gamma * x_hat + u_beta

Nothing here keeps state or touches training; the functions take tensors and give tensors, and `tests/test_rules.py`
holds each against autograd.

Shapes: B samples, P positions (all dimensions between the first and the last), I inputs, O outputs, C channels,
K directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..full_precision import in_full


def sample_dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each sample's entries: [B, ...], [B, ...] -> [B], in one pass over both.

    A loop, because on CPU it takes a tenth of the time of one batched product. What is compiled is fused, and must not
    unroll it; summed up in two steps, which round less.
    """
    if torch.compiler.is_compiling():
        return (x * y).sum(-1).reshape(len(x), -1).sum(1)
    return torch.stack([torch.dot(x_i, y_i) for x_i, y_i in zip(x.flatten(1), y.flatten(1), strict=True)])


def positions(x: Tensor) -> Tensor:
    """[B, ..., C] -> [B, P, C]; a row without position dimensions has one position."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def linear_scores(x: Tensor, b: Tensor, weight_KOI: Tensor | None, bias_KO: Tensor | None) -> Tensor:
    """Linear layer s = x W^T + bias: [B, K] from its input [B, ..., I] and output gradient [B, ..., O].

    One matrix product of the layer's own size for each direction ("project"); `kernels.ScoredLinear` needs none.
    """
    scores = []
    if weight_KOI is not None:
        scores.append(torch.stack([sample_dot(F.linear(x, u_OI), b) for u_OI in weight_KOI], dim=1))
    if bias_KO is not None:
        scores.append(positions(b).sum(1) @ bias_KO.T)
    return sum_of(scores)


def embedding_scores(ids: Tensor, b: Tensor, weight_KVC: Tensor, padding_idx: int | None) -> Tensor:
    """Embedding: [B, K] from ids [B, ...] and output gradient [B, ..., C]. The padding row gets no gradient."""
    if padding_idx is not None:
        b = b.masked_fill((ids == padding_idx).unsqueeze(-1), 0.0)
    return torch.stack([sample_dot(F.embedding(ids, u_VC), b) for u_VC in weight_KVC], dim=1)


def norm_scores(x_hat: Tensor, b: Tensor, gamma_KC: Tensor | None, beta_KC: Tensor | None) -> Tensor:
    """LayerNorm and RMSNorm: [B, K] from the normalised input and the output gradient, both [B, ..., C]."""
    scores = []
    if gamma_KC is not None:
        scores.append(positions(x_hat * b).sum(1) @ gamma_KC.T)
    if beta_KC is not None:
        scores.append(positions(b).sum(1) @ beta_KC.T)
    return sum_of(scores)


def sum_of(scores: list[Tensor]) -> Tensor:
    assert len(scores) > 0, "a layer without a scored parameter was captured"
    total = scores[0]
    for more in scores[1:]:
        total = total + more
    return total


def full_precision(x: Tensor, b: Tensor, directions: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Products of what a layer saw in half precision accumulate in the directions' type."""
    dtype = next(iter(directions.values())).dtype
    return x.to(dtype), b.to(dtype)


class LayerRule:
    """How one layer scores: `scores(x, b, directions)` -> [B, K], directions by parameter name, each [K, *shape].

    And, where a gradient itself is asked for: `gradient(name, x, b)`, that of one sample's share, with x and b a batch
    of this one sample.
    """

    def scores(self, x: Tensor, b: Tensor, directions: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def gradient(self, name: str, x: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError


class LinearRule(LayerRule):
    """`torch.nn.Linear`, and transformers' `Conv1D`, which stores the transposed weight."""

    def __init__(self, layer: nn.Module):
        self.transposed = isinstance(layer, Conv1D)

    def scores(self, x: Tensor, b: Tensor, directions: dict[str, Tensor]) -> Tensor:
        x, b = full_precision(x.to(b.dtype), b, directions)
        weight = directions.get("weight")
        if weight is not None and self.transposed:
            weight = weight.transpose(1, 2)
        return linear_scores(x, b, weight, directions.get("bias"))

    def gradient(self, name: str, x: Tensor, b: Tensor) -> Tensor:
        if name == "bias":
            return positions(b)[0].sum(0)
        x = x.to(b.dtype)
        left, right = (x, b) if self.transposed else (b, x)
        return positions(left)[0].t() @ positions(right)[0]


class EmbeddingRule(LayerRule):
    """`torch.nn.Embedding`."""

    def __init__(self, layer: nn.Embedding):
        if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
            raise ValueError("an Embedding with max_norm, scale_grad_by_freq or sparse=True cannot be scored exactly")
        self.padding_idx = layer.padding_idx
        self.shape = layer.weight.shape

    def scores(self, x: Tensor, b: Tensor, directions: dict[str, Tensor]) -> Tensor:
        b = b.to(directions["weight"].dtype)
        return embedding_scores(x, b, directions["weight"], self.padding_idx)

    def gradient(self, name: str, x: Tensor, b: Tensor) -> Tensor:
        rows, sums = self.rows(x, b)
        return sums.new_zeros(self.shape).index_copy_(0, rows, sums)

    def rows(self, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [R] of one sample's gradient that are not zero, and what they hold, [R, C]."""
        b = in_full(b)
        rows, place = x.flatten().unique(return_inverse=True)
        sums = b.new_zeros(len(rows), b.shape[-1]).index_add_(0, place, b.reshape(-1, b.shape[-1]))
        if self.padding_idx is not None:
            sums.masked_fill_((rows == self.padding_idx).unsqueeze(1), 0.0)
        return rows, sums


class NormRule(LayerRule):
    """RMSNorm, and LayerNorm in general: `normalise` gives x_hat, the factor of the weight."""

    def __init__(self, normalise: Callable[[Tensor], Tensor], ndim: int):
        self.normalise = normalise
        self.ndim = ndim

    def scores(self, x: Tensor, b: Tensor, directions: dict[str, Tensor]) -> Tensor:
        x, b = full_precision(x, b, directions)
        gamma, beta = directions.get("weight"), directions.get("bias")
        x_hat = self.normalise(x) if gamma is not None else x
        if self.ndim > 1:
            x_hat, b = x_hat.flatten(-self.ndim), b.flatten(-self.ndim)
        return norm_scores(
            x_hat, b, None if gamma is None else gamma.flatten(1), None if beta is None else beta.flatten(1)
        )

    def gradient(self, name: str, x: Tensor, b: Tensor) -> Tensor:
        if name == "weight":
            b = self.normalise(in_full(x)) * b
        return b.reshape(-1, *b.shape[-self.ndim :]).sum(0)


class LayerNormRule(NormRule):
    """`torch.nn.LayerNorm`. With one direction it is quickest to run the layer with the direction for its weight."""

    def __init__(self, layer: nn.LayerNorm):
        self.shape, self.eps = layer.normalized_shape, layer.eps
        super().__init__(lambda x: F.layer_norm(x, self.shape, eps=self.eps), len(self.shape))

    def scores(self, x: Tensor, b: Tensor, directions: dict[str, Tensor]) -> Tensor:
        if directions.keys() == {"weight", "bias"} and len(directions["weight"]) == 1:
            x, b = full_precision(x, b, directions)
            output = F.layer_norm(x, self.shape, directions["weight"][0], directions["bias"][0], self.eps)
            return sample_dot(output, b).unsqueeze(1)
        return super().scores(x, b, directions)


def rms_norm_rule(layer: nn.Module) -> NormRule:
    """RMSNorm as each model family writes it anew (weight * x_hat, or Gemma's (1 + weight) * x_hat).

    x_hat is what the layer's own forward adds per unit of weight. A probe makes sure that the layer is what its name
    says; it draws from a generator of its own.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)

    def with_weight(value: Tensor) -> Callable[[Tensor], Tensor]:
        plain = copy.copy(layer)
        plain._parameters = {"weight": nn.Parameter(value, requires_grad=False)}
        return lambda x: type(layer).forward(plain, x)

    full = in_full(weight.detach())
    zero, one = with_weight(torch.zeros_like(full)), with_weight(torch.ones_like(full))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, 3, *weight.shape, generator=generator).to(full)
    drawn = torch.randn(weight.shape, generator=generator).to(full)
    with torch.no_grad():
        offset, x_hat, got = zero(probe), one(probe) - zero(probe), with_weight(drawn)(probe)
        expected = offset + drawn * x_hat
        affine = got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-2, atol=1e-2)
    if not affine:
        raise ValueError("its forward is not a normalised input times its weight, which its name promises")
    if offset.any():
        return NormRule(lambda x: one(x) - zero(x), weight.ndim)
    return NormRule(one, weight.ndim)


def rule_for(layer: nn.Module) -> LayerRule | None:
    """The rule of a layer that owns parameters, or None. A layer counts as of a kind if it runs that kind's forward.

    Raises `ValueError` for a layer of a known kind in a setting that cannot be scored.
    """
    forward = type(layer).forward
    if forward in (nn.Linear.forward, Conv1D.forward):
        return LinearRule(layer)
    if isinstance(layer, nn.Embedding) and forward is nn.Embedding.forward:
        return EmbeddingRule(layer)
    if isinstance(layer, nn.LayerNorm) and forward is nn.LayerNorm.forward:
        return LayerNormRule(layer)
    if type(layer).__name__.endswith("RMSNorm") and set(layer._parameters) == {"weight"}:
        return rms_norm_rule(layer)
    return None
