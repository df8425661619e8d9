"""Runs as people launch them: adapters, recomputed activations."""

from collections import Counter

import pytest
import torch
from models import ADAPTERS, build, collate, dataset, text_rows
from oracles import Float64, relative_error
from prepared import ORDERS, config, prepare, two_groups
from recorder import assert_history
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Trainer

from hf_datashapley import ShapleyTrainer


FLOAT32 = 1e-5
FLOAT64 = 2e-6


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(tmp_path, name, order):
    """Only what PEFT trains is valued; the base gets no gradient."""
    trainer, replay = prepare(tmp_path, name, two_groups(AdamW), dtype=torch.float64, max_steps=3, **order)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    assert frozen
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64)
    for n, parameter in trainer.model.named_parameters():
        if n in frozen:
            assert parameter.grad is None and torch.equal(parameter, frozen[n])
    assert all(site.parameters.keys() <= {"weight", "bias"} for site in trainer._capture._sites.values())
    assert not any("base_layer" in site.name for site in trainer._capture._sites.values())


class CountedProducts(TorchDispatchMode):
    """FLOPs of matrix products, by the memory of the weight among their factors; of all others under None."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.flops = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), kwargs=None):
        out = operator(*arguments, **(kwargs or {}))
        if operator._overloadpacket in flop_registry:
            flops = flop_registry[operator._overloadpacket](*arguments, **(kwargs or {}), out_val=out)
            factors = [x.untyped_storage().data_ptr() for x in arguments if isinstance(x, torch.Tensor)]
            self.flops[next((self.weights[f] for f in factors if f in self.weights), None)] += flops
        return out


@pytest.mark.parametrize("kernel", ["fused", "project"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_frozen_weights_cost_nothing(tmp_path, name, kernel):
    """Counted, not timed, in an update whose validation rows are its training rows.

    With a frozen weight the products are those of plain training and of the validation gradient, not one more. A
    frozen layer's weight gradient would be among the products of no weight; "fused" adds its inner products to those,
    of each sample with each weight that trains, and "project" a product as large as each weight gradient.
    """
    rows = text_rows(4, ragged_labels=False)
    counts = []
    for trainer_class in (Trainer, ShapleyTrainer):
        model = build(name)
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 1}
        values = {"validation_dataset": dataset(rows)} if trainer_class is ShapleyTrainer else {}
        trainer = trainer_class(
            model,
            config(tmp_path / trainer_class.__name__, validation_batch_size=4, value_kernel=kernel, **settings),
            train_dataset=dataset(rows),
            data_collator=collate,
            **values,
        )
        matrices = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters() if p.ndim == 2}
        with CountedProducts(matrices) as counted:
            trainer.train()
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        assert all(parameter.grad is None for parameter in frozen.values())
        counts.append(counted.flops)
    plain, valued = counts
    assert any("base_layer.weight" in n for n in plain if n)
    assert {n: valued[n] for n in frozen} == {n: 2 * plain[n] for n in frozen}
    inner = 2 * len(rows) * sum(p.numel() for p in model.parameters() if p.requires_grad)
    extra = valued[None] - 2 * plain[None]
    assert extra == inner if kernel == "fused" else plain[None] <= extra <= plain[None] + inner


@pytest.mark.parametrize(("kernel", "reentrant"), [("fused", False), ("fused", True), ("project", False)])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_recomputed_activations(tmp_path, order, kernel, reentrant):
    """The second forward pass of a block draws the first one's dropout again, and is not scored twice."""
    values = []
    for recompute in (False, True):
        trainer, replay = prepare(
            tmp_path / str(recompute),
            "gpt2",
            two_groups(SGD, momentum=0.9),
            dropout=0.1,
            gradient_checkpointing=recompute,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if recompute else None,
            value_kernel=kernel,
            max_steps=2,
            **order,
        )
        forwards = []
        trainer.model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *_: forwards.append(None))  # noqa: B023
        trainer.train()
        assert_history(trainer, replay, FLOAT32)
        values.append((trainer.value_history()["value"][:], len(forwards)))
    (plain, once), (recomputed, twice) = values
    assert twice > once, "nothing was recomputed"
    assert relative_error(recomputed, plain) < 1e-6
