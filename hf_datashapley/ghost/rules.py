"""One rule per kind of layer: the inner products of every unit's gradient with given directions.

All these layers are affine in their parameters: the output is s = f(x; theta) + const with f linear in theta. So the
gradient of unit i with respect to theta, contracted with a direction u, is the contraction of the output gradient
b = dL/ds with f(x_i; u), whatever the layer does with its input:

    <g_i, u> = sum_p b_ip . f(x_ip; u)          Linear: f = U x + u        Embedding: f = U[id]
                                                norms:  f = u_gamma * x_hat + u_beta

Nothing here keeps state or touches training; the functions take tensors and give tensors, and `tests/test_rules.py`
holds each against autograd.

Shapes: R rows, U units in them (`units`), I inputs, O outputs, C channels, K directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..full_precision import in_full
from .projection import ParameterMap
from .units import Units


def linear_scores(x: Tensor, b: Tensor, weight_KOI: Tensor | None, bias_KO: Tensor | None, units: Units) -> Tensor:
    """Linear layer s = x W^T + bias: [U, K] from its input [R, ..., I] and output gradient [R, ..., O].

    One matrix product of the layer's own size for each direction ("project"); `kernels.ScoredLinear` needs none.
    """
    scores = []
    if weight_KOI is not None:
        scores.append(torch.stack([units.dot(F.linear(x, u_OI), b) for u_OI in weight_KOI], dim=1))
    if bias_KO is not None:
        scores.append(units.sum(b) @ bias_KO.T)
    return sum_of(scores)


def embedding_scores(ids: Tensor, b: Tensor, weight_KVC: Tensor, padding_idx: int | None, units: Units) -> Tensor:
    """Embedding: [U, K] from ids [R, ...] and output gradient [R, ..., C]. The padding row gets no gradient."""
    b = without_padding(ids, b, padding_idx)
    return torch.stack([units.dot(F.embedding(ids, u_VC), b) for u_VC in weight_KVC], dim=1)


def without_padding(ids: Tensor, b: Tensor, padding_idx: int | None) -> Tensor:
    return b if padding_idx is None else b.masked_fill((ids == padding_idx).unsqueeze(-1), 0.0)


def norm_scores(x_hat: Tensor, b: Tensor, gamma_KC: Tensor | None, beta_KC: Tensor | None, units: Units) -> Tensor:
    """LayerNorm and RMSNorm: [U, K] from the normalised input and the output gradient, both [R, ..., C]."""
    scores = []
    if gamma_KC is not None:
        scores.append(units.sum(x_hat * b) @ gamma_KC.T)
    if beta_KC is not None:
        scores.append(units.sum(b) @ beta_KC.T)
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
    """How one layer scores: `scores(x, b, directions, units)` -> [U, K], directions by parameter name, [K, *shape].

    And, where a gradient itself is asked for: `gradient(name, x, b)`, that of one unit's share, of whose positions
    x and b are (`Units.parts`); or `features(x, b, projections, units)`, every unit's projected gradient, [U, width]
    for each parameter of `projections`.
    """

    def scores(self, x: Tensor, b: Tensor, directions: dict[str, Tensor], units: Units) -> Tensor:
        raise NotImplementedError

    def gradient(self, name: str, x: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, x: Tensor, b: Tensor, projections: dict[str, ParameterMap], units: Units) -> tuple[Tensor, ...]:
        return tuple(self.feature(name, x, b, projection, units) for name, projection in projections.items())

    def feature(self, name: str, x: Tensor, b: Tensor, projection: ParameterMap, units: Units) -> Tensor:
        raise NotImplementedError


class LinearRule(LayerRule):
    """`torch.nn.Linear`, and transformers' `Conv1D`, which stores the transposed weight."""

    def __init__(self, layer: nn.Module):
        self.transposed = isinstance(layer, Conv1D)

    def scores(self, x: Tensor, b: Tensor, directions: dict[str, Tensor], units: Units) -> Tensor:
        x, b = full_precision(x.to(b.dtype), b, directions)
        weight = directions.get("weight")
        if weight is not None and self.transposed:
            weight = weight.transpose(1, 2)
        return linear_scores(x, b, weight, directions.get("bias"), units)

    def gradient(self, name: str, x: Tensor, b: Tensor) -> Tensor:
        if name == "bias":
            return b.flatten(0, -2).sum(0)
        x = x.to(b.dtype)
        left, right = (x, b) if self.transposed else (b, x)
        return left.flatten(0, -2).t() @ right.flatten(0, -2)

    def feature(self, name: str, x: Tensor, b: Tensor, projection: ParameterMap, units: Units) -> Tensor:
        if name == "bias":
            return projection.of_sums(units.sum(b, dtype=projection.dtype))
        left, right = (x, b) if self.transposed else (b, x)
        return projection.of_outer(left, right, units)


class EmbeddingRule(LayerRule):
    """`torch.nn.Embedding`."""

    def __init__(self, layer: nn.Embedding):
        if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
            raise ValueError("an Embedding with max_norm, scale_grad_by_freq or sparse=True cannot be scored exactly")
        self.padding_idx = layer.padding_idx
        self.shape = layer.weight.shape

    def scores(self, x: Tensor, b: Tensor, directions: dict[str, Tensor], units: Units) -> Tensor:
        b = b.to(directions["weight"].dtype)
        return embedding_scores(x, b, directions["weight"], self.padding_idx, units)

    def feature(self, name: str, x: Tensor, b: Tensor, projection: ParameterMap, units: Units) -> Tensor:
        return projection.of_rows(x, without_padding(x, b, self.padding_idx), units)

    def gradient(self, name: str, x: Tensor, b: Tensor) -> Tensor:
        rows, sums = self.rows(x, b)
        return sums.new_zeros(self.shape).index_copy_(0, rows, sums)

    def rows(self, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [R] of one unit's gradient that are not zero, and what they hold, [R, C]."""
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

    def scores(self, x: Tensor, b: Tensor, directions: dict[str, Tensor], units: Units) -> Tensor:
        x, b = full_precision(x, b, directions)
        gamma, beta = directions.get("weight"), directions.get("bias")
        x_hat = self.normalise(x) if gamma is not None else x
        if self.ndim > 1:
            x_hat, b = x_hat.flatten(-self.ndim), b.flatten(-self.ndim)
        return norm_scores(
            x_hat, b, None if gamma is None else gamma.flatten(1), None if beta is None else beta.flatten(1), units
        )

    def gradient(self, name: str, x: Tensor, b: Tensor) -> Tensor:
        if name == "weight":
            b = self.normalise(in_full(x)) * b
        return b.reshape(-1, *b.shape[-self.ndim :]).sum(0)

    def feature(self, name: str, x: Tensor, b: Tensor, projection: ParameterMap, units: Units) -> Tensor:
        b = b.to(projection.dtype)
        if name == "weight":
            b = self.normalise(x.to(projection.dtype)) * b
        return projection.of_sums(units.sum(b.flatten(-self.ndim)))


class LayerNormRule(NormRule):
    """`torch.nn.LayerNorm`. With one direction it is quickest to run the layer with the direction for its weight."""

    def __init__(self, layer: nn.LayerNorm):
        self.shape, self.eps = layer.normalized_shape, layer.eps
        super().__init__(lambda x: F.layer_norm(x, self.shape, eps=self.eps), len(self.shape))

    def scores(self, x: Tensor, b: Tensor, directions: dict[str, Tensor], units: Units) -> Tensor:
        if directions.keys() == {"weight", "bias"} and len(directions["weight"]) == 1:
            x, b = full_precision(x, b, directions)
            output = F.layer_norm(x, self.shape, directions["weight"][0], directions["bias"][0], self.eps)
            return units.dot(output, b).unsqueeze(1)
        return super().scores(x, b, directions, units)


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
