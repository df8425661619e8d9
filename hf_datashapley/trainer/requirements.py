"""What cannot be valued exactly is refused here, by name and with the cure, before anything runs."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from peft import PeftModel
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer

from ..directions.optimizers import check_groups, check_optimizer_class
from .config import ShapleyConfig


def check_arguments(args: ShapleyConfig) -> None:
    """Settings of the launch under which values would not be exact, or have not been shown to be."""
    refused = {
        "more than one process": (args.world_size > 1, "launch one process (accelerate launch --num_processes 1)"),
        "DataParallel (n_gpu > 1)": (args.n_gpu > 1, "set CUDA_VISIBLE_DEVICES to one GPU"),
        "torch_compile": (args.torch_compile, "set torch_compile=False"),
        "FSDP": (bool(args.fsdp), "leave `fsdp` unset"),
        "DeepSpeed": (args.deepspeed is not None, "leave `deepspeed` unset"),
        "use_liger_kernel": (args.use_liger_kernel, "set use_liger_kernel=False: its fused loss bypasses lm_head"),
    }
    refuse_first(refused)


def refuse_first(refused: dict[str, tuple[bool, str]]) -> None:
    """Raises `ValueError` for the first setting that was asked for; its name -> (asked for, cure)."""
    for name, (asked, cure) in refused.items():
        if asked:
            raise ValueError(f"ShapleyTrainer does not support {name} yet: {cure}")


def check_launch(accelerator: Accelerator, args: ShapleyConfig) -> None:
    """The same settings where they come from `accelerate launch` or its config file."""
    refused = {
        f"mixed precision {accelerator.mixed_precision}": (
            accelerator.mixed_precision not in ("no", "bf16", "fp16"),
            "launch with --mixed_precision no, bf16 or fp16",
        ),
        # A step is small, and its product with the Hessian would be lost below float16's range.
        "value_order='second' under fp16": (
            accelerator.mixed_precision == "fp16" and args.value_order == "second",
            "set bf16=True, or value_order='path'",
        ),
        f"{accelerator.distributed_type.value}": (
            accelerator.distributed_type != DistributedType.NO,
            "launch one process, without FSDP or DeepSpeed (accelerate launch --num_processes 1)",
        ),
        "a dynamo backend": (
            accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
            "launch with --dynamo_backend no",
        ),
    }
    refuse_first(refused)


def check_model(model: nn.Module, mixed_precision: str) -> None:
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(
            f"ShapleyTrainer does not support PEFT's {kind} yet, which trains tokens that are no sample's: use an "
            "adapter of the layers (LoraConfig)"
        )
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    low = dtypes - {torch.bfloat16, torch.float32, torch.float64}
    if low:
        raise ValueError(
            f"ShapleyTrainer does not support parameters in {', '.join(sorted(map(str, low)))}, whose gradients leave "
            "its range: load the model with dtype=torch.bfloat16, or with dtype=torch.float32 and set fp16=True"
        )
    if torch.bfloat16 in dtypes and mixed_precision == "fp16":
        raise ValueError(
            "ShapleyTrainer does not support fp16 with parameters in torch.bfloat16 yet: set bf16=True, or load the "
            "model with dtype=torch.float32"
        )


def check_collator(collator: Any) -> None:
    if isinstance(collator, DataCollatorWithFlattening):
        raise ValueError(
            "ShapleyTrainer does not support DataCollatorWithFlattening yet, which packs the samples of a batch into "
            "one row: use DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )


def check_rows(dataset: Any, name: str) -> None:
    """`name` is the argument that the rows came in."""
    if dataset is None:
        raise ValueError(f"{name} is missing: give a map-style dataset (datasets.Dataset, a list of rows)")
    if isinstance(dataset, torch.utils.data.IterableDataset | datasets.IterableDataset):
        raise ValueError(
            f"ShapleyTrainer does not support an iterable {name} yet: give a map-style dataset, for example "
            "datasets.Dataset.from_list(list(dataset.take(n)))"
        )


def check_optimizer_choice(trainer: Trainer, args: ShapleyConfig) -> None:
    """The optimizer that `Trainer` is going to make, or was given, has a known step, if it is asked for.

    The proxy does not ask for it, an audit does.
    """
    if args.value_optimizer == "sgd" and not args.audit_steps:
        return
    if trainer.optimizer is not None:
        check_optimizer_class(type(trainer.optimizer))
        check_groups(trainer.optimizer)
    elif trainer.optimizer_cls_and_kwargs is not None:
        check_optimizer_class(trainer.optimizer_cls_and_kwargs[0])
    else:
        check_optimizer_class(Trainer.get_optimizer_cls_and_kwargs(args, trainer.model)[0])
