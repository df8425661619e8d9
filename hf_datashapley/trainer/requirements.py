"""What cannot be valued exactly is refused here, by name and with the cure, before anything runs."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, is_compiled_module
from peft import PeftModel
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer

from ..directions.optimizers import check_groups, check_optimizer_class
from .compiled import is_compiling
from .config import ShapleyConfig


def check_arguments(args: ShapleyConfig) -> None:
    """Settings of the launch under which values would not be exact, or have not been shown to be."""
    refused = {
        "more than one process": (args.world_size > 1, "launch one process (accelerate launch --num_processes 1)"),
        "DataParallel (n_gpu > 1)": (args.n_gpu > 1, "set CUDA_VISIBLE_DEVICES to one GPU"),
        "fp16": (args.fp16, "set fp16=False"),
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


def check_launch(accelerator: Accelerator) -> None:
    """The same settings where they come from `accelerate launch` or its config file."""
    refused = {
        f"mixed precision {accelerator.mixed_precision}": (
            accelerator.mixed_precision not in ("no", "bf16"),
            "launch with --mixed_precision no or bf16",
        ),
        f"{accelerator.distributed_type.value}": (
            accelerator.distributed_type != DistributedType.NO,
            "launch one process, without FSDP or DeepSpeed (accelerate launch --num_processes 1)",
        ),
    }
    refuse_first(refused)


def check_compilation(args: ShapleyConfig, accelerator: Accelerator) -> None:
    """What goes together with `torch_compile` (or `accelerate launch --dynamo_backend`).

    A compiled backward pass is a pure function: scores leave it as a gradient, but it cannot put tensors aside.
    """
    if not is_compiling(accelerator):
        return
    plugin = accelerator.state.dynamo_plugin
    backend, two_passes = plugin.backend.value.lower(), args.value_order != "first"
    refuse_first(
        {
            f"torch_compile with backend {backend}": (
                plugin.backend not in (DynamoBackend.INDUCTOR, DynamoBackend.AOT_EAGER, DynamoBackend.EAGER),
                "set torch_compile_backend='inductor' (accelerate launch --dynamo_backend inductor)",
            ),
            f"torch_compile with mode {plugin.mode}": (
                plugin.mode not in ("default", "max-autotune-no-cudagraphs"),
                "CUDA graphs write again the memory that scores lie in; set torch_compile_mode='default' (accelerate "
                "launch --dynamo_mode default)",
            ),
            "torch_compile by regions": (
                plugin.use_regional_compilation,
                "launch with --dynamo_use_regional_compilation false",
            ),
            "second_pass='stash' with torch_compile": (
                two_passes and args.second_pass == "stash",
                "set second_pass='auto' or 'replay', or torch_compile=False",
            ),
            "path_slope='owen' with torch_compile": (
                args.value_order == "path" and args.path_slope == "owen",
                "set path_slope='secant', or torch_compile=False",
            ),
        }
    )


def check_model(model: nn.Module) -> None:
    if any(is_compiled_module(module) or module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(
            "ShapleyTrainer does not support a model that is compiled already: hand over the model as it was before "
            "torch.compile, and set torch_compile=True"
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(
            f"ShapleyTrainer does not support PEFT's {kind} yet, which trains tokens that are no sample's: use an "
            "adapter of the layers (LoraConfig)"
        )
    low = {
        str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype not in (torch.float32, torch.float64)
    }
    if low:
        raise ValueError(
            f"ShapleyTrainer does not support parameters in {', '.join(sorted(low))} yet: load the model with "
            "dtype=torch.float32"
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
