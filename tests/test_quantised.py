"""Quantised weights: frozen below adapters they are no obstacle; where one trains, it is refused."""

import prepared
import pytest
import torch
import torch.nn.functional as F
from models import build, collate, dataset, text_rows
from oracles import Float64
from prepared import ORDERS, prepare, two_groups
from recorder import assert_history
from torch import nn
from torch.optim import AdamW

from hf_datashapley import ShapleyConfig, ShapleyTrainer
from hf_datashapley.ghost.capture import Capture


FLOAT64 = 2e-6


class Int8Linear(nn.Linear):
    """A linear layer as quantising libraries make it: linear by its class, int8 weights, a forward of its own."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        scale_O1 = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale_O1).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale_O1", scale_O1)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale_O1)


def quantised(model):
    """The model with every frozen linear layer in int8."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and not layer.weight.requires_grad:
                setattr(parent, name, Int8Linear(layer))
    return model


@pytest.mark.parametrize(
    ("order", "kernel"),
    [*((order, "fused") for order in ORDERS.values()), (ORDERS["first"], "project")],
    ids=[*ORDERS, "project"],
)
def test_adapters_over_a_quantised_base(tmp_path, monkeypatch, order, kernel):
    """The adapters' values are the oracle's, through the quantised weights; nothing else is scored or trained."""
    monkeypatch.setattr(prepared, "build", lambda *name, **settings: quantised(build(*name, **settings)))
    trainer, replay = prepare(
        tmp_path, "llama-lora", two_groups(AdamW), dtype=torch.float64, max_steps=3, value_kernel=kernel, **order
    )
    base = {n: p for n, p in trainer.model.named_parameters() if p.dtype == torch.int8}
    assert len(base) == 15, "seven linear layers in each of two blocks, and the head"
    before = {n: p.clone() for n, p in base.items()}
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64)
    assert all("lora_" in name or ".modules_to_save." in name for name in trainer._capture.parameters)
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in base.items())


class FakeQuantised(nn.Linear):
    """Rounds its weight in every forward pass; the gradient goes straight through."""

    def forward(self, x):
        rounded = (self.weight * 8).round() / 8
        return F.linear(x, self.weight + (rounded - self.weight).detach())


class QuantisedTensor(torch.Tensor):
    """torchao keeps `nn.Linear` and gives it a weight whose products are its own."""


class QuantisedParameter(nn.Parameter):
    """bitsandbytes keeps what it takes to dequantise at the parameter."""

    quant_state = None


def own_forward(layer):
    layer.__class__ = FakeQuantised


def tensor_subclass(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(QuantisedTensor))


def parameter_subclass(layer):
    layer.weight = QuantisedParameter(layer.weight.detach())


TRAINS = {
    "a forward of its own": (own_forward, "no rule covers FakeQuantised"),
    "a tensor of its own": (tensor_subclass, "QuantisedTensor, not a plain tensor.*adapter"),
    "a parameter of its own": (parameter_subclass, "QuantisedParameter, not a plain tensor.*adapter"),
}


@pytest.mark.parametrize(("quantise", "said"), TRAINS.values(), ids=TRAINS)
def test_a_quantised_weight_that_trains_is_refused(tmp_path, quantise, said):
    model = build("llama")
    quantise(model.model.layers[1].mlp.up_proj)
    rows = dataset(text_rows(4))
    arguments = ShapleyConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=said) as refusal:
        ShapleyTrainer(model, arguments, train_dataset=rows, validation_dataset=rows, data_collator=collate)
    assert "model.layers.1.mlp.up_proj" in str(refusal.value) and "freeze it" in str(refusal.value)


@pytest.mark.parametrize(("quantise", "said"), TRAINS.values(), ids=TRAINS)
def test_frozen_or_left_out_it_is_no_obstacle(quantise, said):
    model = build("llama")
    quantise(model.model.layers[1].mlp.up_proj)
    assert "model.layers.1.mlp.up_proj.weight" not in Capture(model, ["q_proj", "down_proj"]).parameters
    model.model.layers[1].mlp.up_proj.requires_grad_(False)
    assert len(Capture(model).parameters) == len(list(model.parameters())) - 1
