"""Training runs with everything an oracle needs to know about them."""

import copy

import torch
from models import build, collate, dataset, rows_for
from oracles import classification, language_model, regression
from recorder import Recorder, Replay
from torch.optim import SGD, Adam, AdamW

from hf_datashapley import ShapleyConfig


ROW_LOSSES = {"gpt2-classifier": classification, "llama-classifier": classification, "gpt2-regressor": regression}


# Every way to values that keeps other things in memory, or runs other passes.
ORDERS = {
    "first": {"value_order": "first"},
    "second": {"value_order": "second"},
    "path": {"value_order": "path"},
    "replayed": {"value_order": "path", "second_pass": "replay"},
    "owen": {"value_order": "path", "path_slope": "owen"},
}


def config(folder, **settings):
    """Two epochs of two updates of 3 x 2 rows, where a test does not say otherwise."""
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ShapleyConfig(output_dir=str(folder), **{**defaults, **settings})


def prepare(
    folder,
    model_name="gpt2",
    make_optimizer=None,
    *,
    dropout=0.0,
    layers=2,
    attention="sdpa",
    dtype=torch.float32,
    targets=("",),
    row_losses=None,
    trainer_class=Recorder,
    rows=None,
    train_dataset=None,
    data_collator=collate,
    validation_rows=None,
    **settings,
):
    """A recording trainer and the replay that knows the truth about its run.

    train_dataset: how the trainer is given `rows`, if not as a `datasets.Dataset`.
    """
    model = build(model_name, dropout=dropout, layers=layers, attention=attention, dtype=dtype)
    twin = copy.deepcopy(model).double()
    rows = rows_for(model_name, 12) if rows is None else rows
    validation = {
        target: validation_rows or rows_for(model_name, 9, seed=100 + number) for number, target in enumerate(targets)
    }
    arguments = config(folder, **settings)
    custom = {} if make_optimizer is None else {"optimizers": (make_optimizer(model), None)}
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=dataset(rows) if train_dataset is None else train_dataset,
        validation_dataset=(
            dataset(validation[""]) if targets == ("",) else {name: dataset(rows) for name, rows in validation.items()}
        ),
        data_collator=data_collator,
        **custom,
    )
    sgd = "optimizers" in custom and isinstance(custom["optimizers"][0], SGD)
    replay = Replay(
        model=twin,
        rows=rows,
        validation=validation,
        row_losses=row_losses or ROW_LOSSES.get(model_name, language_model),
        optimizer=AdamW if make_optimizer is None else type(custom["optimizers"][0]),
        max_norm=arguments.max_grad_norm,
        momentum=arguments.value_momentum or ("unrolled" if arguments.value_order == "first" else "immediate"),
        order=arguments.value_order,
        nodes=arguments.path_nodes,
        # Plain SGD and SGD with momentum have no other slope.
        slope="secant" if sgd else arguments.path_slope,
        sgd_proxy=arguments.value_optimizer == "sgd",
        interval=arguments.validation_interval,
    )
    return trainer, replay


def two_groups(optimizer, **settings):
    """An optimizer with a learning rate and a weight decay for each half of the parameters."""

    def make(model):
        parameters = list(model.parameters())
        return optimizer(
            [
                {"params": parameters[::2], "lr": 3e-2, "weight_decay": 0.1},
                {"params": parameters[1::2], "lr": 4e-3, "weight_decay": 0.0},
            ],
            **settings,
        )

    return make


OPTIMIZERS = {
    "SGD": two_groups(SGD),
    "SGD momentum": two_groups(SGD, momentum=0.9),
    "SGD dampening": two_groups(SGD, momentum=0.8, dampening=0.3),
    "SGD Nesterov": two_groups(SGD, momentum=0.9, nesterov=True),
    "SGD momentum fused": two_groups(SGD, momentum=0.9, fused=True),
    "AdamW plain": two_groups(AdamW, foreach=False, fused=False),
    "AdamW foreach": two_groups(AdamW, foreach=True),
    "AdamW fused": two_groups(AdamW, fused=True),
    "Adam, coupled L2": two_groups(Adam),
    "Adam, other betas": two_groups(Adam, betas=(0.7, 0.95), eps=1e-4),
}
