"""Attach the scoring kernels to a model's layers, and take them off again.

Only the layers that own a scored parameter are touched: each gets an instance-level `forward` for the time of
training. While nothing is being scored (evaluation, generation, the validation pass) it runs the layer's own forward.
Copies of a model that is being trained are ordinary models: a layer's site does not travel with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .kept import Kept
from .kernels import KeptLinear, KeptOutput, ProjectOutput, ScoredLinear, ScoreOutput
from .plans import Plan, plan
from .projection import ParameterMap, Projection
from .rules import EmbeddingRule, LayerRule, LinearRule, rule_for
from .units import Units


Kernel = Literal["fused", "project"]
SITE = "_datashapley_site"


class Site:
    """What a captured layer needs to score itself, or to be scored later, and to project its gradients.

    Idle while `units` is None. Copies and pickles of it are idle.
    """

    def __init__(self) -> None:
        self.name = ""
        self.rule: LayerRule | None = None
        self.kernel: Kernel = "project"
        self.parameters: dict[str, str] = {}  # the layer's name of a scored parameter -> the model's name of it
        self.units: Units | None = None
        self.tap: Tensor | None = None
        self.directions: dict[str, Tensor] = {}  # by the layer's names
        self.kept: Kept | None = None
        self.projections: dict[str, ParameterMap] = {}  # by the layer's names, and their taps
        self.taps: list[Tensor] = []

    def __reduce__(self) -> tuple[type[Site], tuple[()]]:
        return (Site, ())


# The name matters: a pickled instance-level `forward` is looked up by it, and so becomes the layer's own again.
def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The `forward` of a captured layer."""
    site: Site = self.__dict__[SITE]
    own = type(self).forward
    units = site.units
    if units is None:
        return own(self, *args, **kwargs)
    x = args[0] if args else next(iter(kwargs.values()))
    if x.ndim == 1 and not x.is_floating_point():
        raise ValueError(
            f"{site.name}: its input has no batch dimension, so its gradient cannot be told apart by sample; look up "
            "ids of shape [1, positions], leave it out with `value_modules`, or freeze it"
        )
    shape = units.shape
    if x.shape[: len(shape)] != shape:
        # GPT-2 looks its position ids [1, P] up once for all rows: without a batch dimension, autograd would hand
        # over the position gradients already summed over the samples.
        if x.shape[0] != 1 or x.shape[1 : len(shape)] != shape[1:] or x.is_floating_point():
            raise ValueError(
                f"{site.name}: its input {list(x.shape)} does not begin with the micro-batch's {list(shape)}, so its "
                "gradient cannot be told apart by sample; leave it out with `value_modules` or freeze it"
            )
        x = x.expand(shape[0], *x.shape[1:])
    output = captured(self, site, units, x, args, kwargs)
    if site.projections:
        assert site.rule is not None
        project = partial(site.rule.features, projections=site.projections, units=units)
        return ProjectOutput.apply(output, x, project, *site.taps)
    return output


def captured(
    self: nn.Module, site: Site, units: Units, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The layer's output, whose backward pass scores the layer or keeps what scoring takes; if either is wanted."""
    own, shape = type(self).forward, units.shape
    assert site.rule is not None
    wanted = site.tap is not None or site.kept is not None
    if wanted and site.kernel == "fused" and isinstance(site.rule, LinearRule) and "weight" in site.parameters:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if site.kept is None:
            u, u_bias = site.directions["weight"], site.directions.get("bias")
            return ScoredLinear.apply(x, weight, bias, site.tap, u, u_bias, site.rule.transposed, units)
        if gradients_are_smaller(weight, x, units):
            keep = partial(site.kept.add_gradients, site.parameters)
            return KeptLinear.apply(x, weight, bias, site.rule.transposed, units, keep)
    output = own(self, *args, **kwargs)
    if output.shape[0] != shape[0]:
        output = output.expand(shape[0], *output.shape[1:])
    if site.kept is not None:
        return KeptOutput.apply(output, x, partial(site.kept.add_inputs, site.parameters, site.rule))
    if not wanted:
        return output
    score = partial(site.rule.scores, directions=site.directions, units=units)
    return ScoreOutput.apply(output, x, site.tap, score)


def gradients_are_smaller(weight: Tensor, x: Tensor, units: Units) -> bool:
    """Whether the units' own weight gradients take no more room than their inputs and output gradients."""
    return units.count * weight.numel() <= x.shape[:-1].numel() * sum(weight.shape)


class Capture:
    """The scored layers of a model.

    A layer's input is taken for one sample a row; an embedding's ids of shape [1, positions] for ids that all samples
    look up. A table that is looked up by ids of another kind, with as many rows as the micro-batch has samples (T5's
    relative positions, [positions, positions]), cannot be told from that, and its rows would be taken for samples:
    leave such a table out with `modules`, or freeze it.

    Args:
        model: any module made of linear layers (`nn.Linear`, `Conv1D`), embeddings and norms, as far as it trains.
        modules: which modules' parameters are scored, as PEFT's `target_modules`: a list of names or name endings, or
            a regular expression for whole names; None: every parameter that trains. Other uses of a chosen (tied)
            parameter are scored with it.
        kernel: "fused" or "project", see `kernels`.

    Raises:
        ValueError: a chosen parameter trains in a layer that no rule covers, samples are coupled by batch
            normalisation, or `modules` matches nothing.
    """

    def __init__(self, model: nn.Module, modules: list[str] | str | None = None, kernel: Kernel = "fused"):
        self.parameters = scored_parameters(model, modules)
        names = {parameter: name for name, parameter in self.parameters.items()}
        self._sites: dict[nn.Module, Site] = {}
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                raise ValueError(
                    f"{name}: {type(module).__name__} makes a sample's loss depend on the rest of its batch, so "
                    "samples have no values of their own; use a model without batch normalisation"
                )
            own = {
                local: names[parameter]
                for local, parameter in module._parameters.items()
                if parameter is not None and parameter in names
            }
            if not own:
                continue
            if "forward" in vars(module):
                raise ValueError(
                    f"{name}: its forward was replaced on the instance, so what it computes is unknown; take the "
                    "replacement off, leave the module out with `value_modules`, or freeze it"
                )
            site = Site()
            site.name, site.kernel, site.parameters = name, kernel, own
            site.rule = covering_rule(name, module, own)
            self._sites[module] = site

    @contextmanager
    def attached(self) -> Iterator[Capture]:
        """Within it the layers can score; afterwards the model is as it was, also after an exception."""
        try:
            for module, site in self._sites.items():
                module.__dict__[SITE] = site
                module.__dict__["forward"] = MethodType(forward, module)
            yield self
        finally:
            for module in self._sites:
                module.__dict__.pop("forward", None)
                module.__dict__.pop(SITE, None)

    @contextmanager
    def scoring(self, directions: dict[str, Tensor], units: Units) -> Iterator[Tensor]:
        """Score every backward pass of a forward pass that runs within it; yields the tap, [U, K] zeros.

        `directions`: for each of `self.parameters`, K directions, [K, *parameter.shape]. After `loss.backward()` the
        tap's `.grad` holds, for each unit and direction, the sum over parameters of <unit's share of the gradient of
        `loss`, direction>.
        """
        some = next(iter(directions.values()))
        tap = torch.zeros(units.count, some.shape[0], dtype=some.dtype, device=some.device, requires_grad=True)
        try:
            for site in self._sites.values():
                site.units = units
                site.tap = tap
                site.directions = {local: directions[name] for local, name in site.parameters.items()}
            yield tap
        finally:
            self._rest()

    @contextmanager
    def keeping(self, units: Units) -> Iterator[Kept]:
        """Keep what scoring needs, of every backward pass of a forward pass that runs within it."""
        kept = Kept(units)
        try:
            for site in self._sites.values():
                site.units = units
                site.kept = kept
            yield kept
        finally:
            self._rest()

    @contextmanager
    def projecting(self, projection: Projection, units: Units) -> Iterator[dict[str, Tensor]]:
        """Project every unit's gradient, in every backward pass of a forward pass that runs within it, beside
        `scoring` or `keeping` of the same units or by itself; yields each parameter's tap, [U, width] zeros.

        After `loss.backward()` `features_of(taps)` are the units' features. So are, of `found =
        torch.autograd.grad(loss, leaves(taps), allow_unused=True)`, `features_of(taps, found)`, and that computes no
        weight's gradient.
        """
        taps = projection.taps(units)
        try:
            for site in self._sites.values():
                site.units = units
                site.projections = {local: projection.parameters[name] for local, name in site.parameters.items()}
                site.taps = [taps[name] for name in site.parameters.values()]
            yield taps
        finally:
            self._rest()

    def plan(self, width: int, both_sides: bool = False, setting: str = "feature_dim") -> dict[str, Plan]:
        """How `width` features are shared out among the parameters, see `plans.plan`."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        embeddings, matrices = self.weights_of(EmbeddingRule), self.weights_of(LinearRule)
        return plan(shapes, embeddings, matrices, width, both_sides, setting)

    def weights_of(self, rule: type[LayerRule]) -> set[str]:
        """The scored weights of layers of one kind; a tied one may be of several."""
        return {
            site.parameters["weight"]
            for site in self._sites.values()
            if isinstance(site.rule, rule) and "weight" in site.parameters
        }

    def _rest(self) -> None:
        for site in self._sites.values():
            site.units, site.tap, site.directions, site.kept = None, None, {}, None
            site.projections, site.taps = {}, []

    def kept_bytes(self, positions: int) -> int:
        """About how much room `keeping` takes for so many positions: inputs and output gradients."""
        total = 0
        for module, site in self._sites.items():
            some = next(p for local, p in module._parameters.items() if local in site.parameters and p is not None)
            # A norm's input and output have the size of its weight each, an embedding keeps ids and outputs.
            width = sum(some.shape) if isinstance(site.rule, LinearRule) and some.ndim == 2 else 2 * some.shape[-1]
            total += positions * width * some.element_size()
        return total


def scored_parameters(model: nn.Module, modules: list[str] | str | None) -> dict[str, nn.Parameter]:
    """The trainable parameters that `modules` chooses, by name, a tied one once."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if modules is not None:
        chosen: set[nn.Parameter] = set()
        for pattern in [modules] if isinstance(modules, str) else modules:
            matched = [
                module
                for name, module in model.named_modules()
                if (
                    re.fullmatch(pattern, name)
                    if isinstance(modules, str)
                    else name == pattern or name.endswith(f".{pattern}")
                )
            ]
            if not matched:
                raise ValueError(f"value_modules: {pattern!r} matches no module of {type(model).__name__}")
            chosen.update(p for module in matched for p in module.parameters())
        trainable = {name: p for name, p in trainable.items() if p in chosen}
    if not trainable:
        raise ValueError(
            "no parameter that is to be scored trains: set requires_grad, or choose other modules with `value_modules`"
        )
    return trainable


def covering_rule(name: str, module: nn.Module, own: dict[str, str]) -> LayerRule:
    """The layer's rule, or a `ValueError` that names the parameters which it would have to cover."""
    cure = "leave the module out with `value_modules`, or freeze it (requires_grad_(False))"
    parameters = ", ".join(own.values())
    for local, parameter in own.items():
        # A layer that is linear by its class may compute something else with such a weight (torchao, bitsandbytes).
        kind = type(module._parameters[local])
        if kind is not nn.Parameter:
            raise ValueError(
                f"{parameter} trains and is a {kind.__module__}.{kind.__name__}, not a plain tensor: a quantised or "
                "distributed weight cannot be scored; train an adapter over a frozen quantised base (PEFT's "
                f"LoraConfig), load the model unquantised, or {cure}"
            )
    try:
        rule = rule_for(module)
    except ValueError as error:
        raise ValueError(f"{type(module).__name__} {name} cannot be scored ({parameters}): {error}; {cure}") from None
    if rule is None or not own.keys() <= {"weight", "bias"}:
        raise ValueError(f"no rule covers {type(module).__name__} {name}, whose {parameters} trains: {cure}")
    return rule
