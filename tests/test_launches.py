"""Runs as people launch them: adapters, recomputed activations."""

import pytest
import torch
from models import ADAPTERS
from oracles import Float64, relative_error
from prepared import ORDERS, prepare, two_groups
from recorder import assert_history
from torch.optim import SGD, AdamW


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
