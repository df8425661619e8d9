"""Runs that two processes with batch b and one process with batch 2b make alike."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from loss_scaling import OnCPU, PlainOverflowing
from models import build, collate, dataset, text_rows
from oracles import Float64
from packed_documents import packed_rows, pieces, short_rows
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_datashapley import ShapleyConfig, ShapleyTrainer


@dataclass
class Case:
    """`rows` training rows, of which a process takes `batch` at a time; `tolerance` of the largest in its update."""

    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "gpt2"
    dtype: torch.dtype = torch.float32
    rows: int = 24
    batch: int = 2
    validation: tuple[int, ...] = (3, 2)  # rows of each target
    tolerance: float = 1e-5
    parity: bool = False
    poisoned: bool = False
    own_loss: bool = False
    equal_rows: bool = False
    stream: bool = False
    packed: bool = False
    documents: bool = False
    overflows: bool = False  # the first update, in fp16
    spare: bool = False  # a layer that no loss reaches
    wrapping: dict[str, Any] = field(default_factory=dict)  # what DDP is told that no setting says


SGD = {"optim": "sgd", "learning_rate": 1e-1}
ADAM = {"optim": "adamw_torch_fused", "learning_rate": 1e-3}
PATH = {"value_order": "path"}
OWEN = {"value_order": "path", "path_slope": "owen"}
STATIC = {"ddp_static_graph": True, "gradient_accumulation_steps": 1, "value_kernel": "project"}
DOCUMENTS = {"value_unit": "document"}
DOUBLE: dict[str, Any] = {"dtype": torch.float64, "tolerance": 1e-7}
CASES = {
    "first": Case(SGD, parity=True),
    "first project": Case({**SGD, "value_kernel": "project"}, parity=True),
    "adam": Case({**ADAM, "value_kernel": "project", "validation_interval": 2}, "llama", parity=True, **DOUBLE),
    "features": Case({**SGD, "feature_dim": 200, "feature_dtype": "float32"}),
    "no clipping": Case({**SGD, "max_grad_norm": 0.0, "gradient_accumulation_steps": 1}, "neox"),
    "idle rank": Case({**SGD, "validation_batch_size": 1}, validation=(1,)),
    "second": Case({**SGD, "value_order": "second"}),
    "path": Case({**ADAM, **PATH, "path_nodes": 2, "audit_steps": 2}, **DOUBLE),
    # With buffers, which DDP sends before a forward pass.
    "path replayed": Case(
        {**ADAM, **PATH, "second_pass": "replay", "value_kernel": "project"}, "llama", parity=True, **DOUBLE
    ),
    "owen": Case({**ADAM, **OWEN, "audit_steps": 1}, **DOUBLE),
    "owen replayed": Case({**ADAM, **OWEN, "second_pass": "replay"}, **DOUBLE),
    "own loss": Case(SGD, own_loss=True),
    "plain mean": Case(SGD, "gpt2-plain-mean", equal_rows=True),
    "stream": Case({**SGD, "max_steps": 3}, equal_rows=True, stream=True),
    "stream not dispatched": Case(
        {**SGD, "max_steps": 3, "accelerator_config": {"dispatch_batches": False}}, stream=True
    ),
    "packed": Case(SGD, "llama", packed=True),
    "documents": Case(
        {**SGD, "value_unit": "document", "gradient_accumulation_steps": 1}, batch=1, rows=6, documents=True
    ),
    "tokens": Case({**SGD, "value_unit": "token", "token_sample_ids": [*range(100, 112)]}, "llama"),
    "adapters": Case(SGD, "llama-lora"),
    "bf16": Case({**SGD, "bf16": True}, tolerance=3e-2),
    "fp16": Case({**SGD, "fp16": True}, tolerance=5e-3),
    "fp16 overflowing": Case({**SGD, "fp16": True}, tolerance=5e-3, overflows=True),
    "unused parameters": Case({**SGD, "ddp_find_unused_parameters": True}, spare=True, parity=True),
    "unused parameters not sought": Case(
        {**SGD, "ddp_find_unused_parameters": False, "value_kernel": "project"}, parity=True
    ),
    "gradients in buckets": Case(
        {**ADAM, "value_kernel": "project"}, wrapping={"gradient_as_bucket_view": True}, parity=True, **DOUBLE
    ),
    # With accumulation torch itself fails, also without values.
    "static graph": Case({**SGD, **STATIC}, parity=True),
    "static graph replayed": Case({**ADAM, **PATH, **STATIC, "second_pass": "replay"}, parity=True, **DOUBLE),
    "dispatched": Case({**SGD, "accelerator_config": {"dispatch_batches": True}}, equal_rows=True),
    "ragged": Case({**SGD, "gradient_accumulation_steps": 1}, rows=21, batch=4),
    "poisoned": Case({**SGD, "max_grad_norm": 0.0}, poisoned=True),
}


class Poison(TrainerCallback):
    """The loss of one rank is not finite in update 2."""

    def __init__(self, trainer, rank):
        self.trainer = trainer
        self.own = trainer.args.process_index == rank

    def on_step_begin(self, args, state, control, **kwargs):
        if self.own and state.global_step == 1:
            self.trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: (
                outputs.logits.sum() * 1e39
            )

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.trainer.compute_loss_func = None
        if state.global_step == 1:  # the step was made; go on with sound weights
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.nan_to_num_(0.1, 0.1, 0.1)


def summed_over_count(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    summed = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return summed / num_items_in_batch


def arguments(case, folder, batch):
    defaults = {
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "validation_batch_size": 3,
        "logging_steps": 1,
    }
    fixed = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "lr_scheduler_type": "constant",
        **defaults,
        **fixed,
        **case.settings,
    }


class Scaled(OnCPU, ShapleyTrainer):
    pass


class Overflowing(PlainOverflowing, ShapleyTrainer):
    pass


def trainer_class_of(case):
    """fp16 needs a trainer that brings its scaler along on a CPU."""
    if case.overflows:
        return Overflowing
    return Scaled if case.settings.get("fp16") else ShapleyTrainer


def model_of(case):
    model = build(case.model, dtype=case.dtype)
    if case.spare:
        model.spare = torch.nn.Linear(3, 3)
    return model


def told(trainer, case):
    """DDP wraps the model when training begins."""
    for name, value in case.wrapping.items():
        setattr(trainer.accelerator.ddp_handler, name, value)
    return trainer


def rows_of(case):
    if case.documents:
        return packed_rows(pieces())[: case.rows]
    rows = text_rows(case.rows)
    if case.equal_rows:
        rows = [{"input_ids": (row["input_ids"] * 3)[:8], "labels": (row["input_ids"] * 3)[:8]} for row in rows]
    return rows


def collator_of(case):
    if case.documents:
        return default_data_collator
    return DataCollatorWithFlattening() if case.packed else collate


def make(folder, case, batch):
    targets = {f"t{k}": dataset(text_rows(count, seed=20 + k)) for k, count in enumerate(case.validation)}
    if case.documents:
        targets = {f"t{k}": short_rows(count) for k, count in enumerate(case.validation)}
    rows = dataset(rows_of(case), ids=range(100, 100 + case.rows))
    trainer = trainer_class_of(case)(
        model_of(case),
        ShapleyConfig(**arguments(case, folder, batch)),
        train_dataset=rows.to_iterable_dataset() if case.stream else rows,
        validation_dataset=targets,
        data_collator=collator_of(case),
        compute_loss_func=summed_over_count if case.own_loss else None,
    )
    return told(trainer, case)


def plain(folder, case, batch):
    own = {key: value for key, value in arguments(case, folder, batch).items() if hasattr(TrainingArguments, key)}
    trainer = Trainer(
        model_of(case),
        TrainingArguments(**{**own, "output_dir": str(folder)}),
        train_dataset=dataset(rows_of(case)),
        data_collator=collate,
    )
    return told(trainer, case)


def train(trainer, case):
    with Float64() if case.dtype == torch.float64 else nullcontext():
        trainer.train()


def tables(trainer):
    return {"history": trainer.value_history()[:], "values": trainer.values()[:], "audit": trainer.audit()[:]}
