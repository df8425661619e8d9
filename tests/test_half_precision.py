"""Half precision: bf16 autocast."""

import pytest
import torch
from accelerate.state import AcceleratorState
from models import build, collate, dataset, text_rows
from oracles import relative_error
from prepared import config, prepare, two_groups
from recorder import assert_history
from torch.optim import SGD
from transformers import Trainer

from hf_datashapley import ShapleyTrainer


ORDERS = {
    "first": {"value_order": "first"},
    "second": {"value_order": "second"},
    "path": {"value_order": "path"},
    "replayed": {"value_order": "path", "second_pass": "replay"},
    "owen": {"value_order": "path", "path_slope": "owen"},
}


@pytest.mark.parametrize(
    ("name", "kernel"), [("gpt2", "fused"), ("gpt2", "project"), ("neox", "fused"), ("llama", "fused")]
)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_bf16_autocast(tmp_path, order, name, kernel):
    """Against values in full precision: within 5 % of the largest of an update (up to 3.8 % seen).

    Each number has 0.4 % in bf16; what makes more of it is the validation gradient, rounded through all layers.
    """
    trainer, replay = prepare(
        tmp_path, name, two_groups(SGD, momentum=0.9), bf16=True, value_kernel=kernel, max_steps=3, **order
    )
    replay.loss_tolerance = 1e-2
    trainer.train()
    worst = assert_history(trainer, replay, 5e-2)
    assert worst > 1e-4, "this was not half precision"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bf16_autocast_trains_as_plain_trainer_does(tmp_path, name):
    """ "project" bit for bit; "fused" forms the same products, and sums them up in full precision."""
    losses = {}
    for trainer_class in (Trainer, ShapleyTrainer):
        for kernel in ("project", "fused"):
            model = build(name, dropout=0.1)
            settings = {} if trainer_class is Trainer else {"validation_dataset": dataset(text_rows(4, seed=2))}
            trainer = trainer_class(
                model,
                config(tmp_path / trainer_class.__name__ / kernel, bf16=True, value_kernel=kernel),
                train_dataset=dataset(text_rows(12)),
                data_collator=collate,
                **settings,
            )
            trainer.train()
            found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
            losses[trainer_class, kernel] = found, [parameter.detach() for parameter in model.parameters()]
    truth, weights = losses[Trainer, "project"]
    assert len(truth) == 4
    found, own = losses[ShapleyTrainer, "project"]
    assert found == truth and all(torch.equal(w, t) for w, t in zip(own, weights, strict=True))
    assert relative_error(losses[ShapleyTrainer, "fused"][0], truth) < 5e-3


def test_bf16_from_accelerate_launch(tmp_path, monkeypatch):
    """Rows one by one, where the shares' rounding shows most; the arguments do not say bf16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        trainer, _ = prepare(
            tmp_path,
            "llama",
            two_groups(SGD, momentum=0.9),
            value_kernel="project",
            per_device_train_batch_size=1,
            max_steps=2,
        )
        assert trainer.accelerator.mixed_precision == "bf16" and not trainer.args.bf16
        trainer.train()
        assert any(trainer.values()["value"])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
