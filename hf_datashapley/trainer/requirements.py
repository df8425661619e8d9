"""What cannot be valued exactly is refused here, by name and with the cure, before anything runs."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedType, DynamoBackend, is_compiled_module
from peft import PeftModel
from torch import nn
from transformers import Trainer

from ..directions.optimizers import check_groups, check_optimizer_class
from ..directions.validation import needs_half_precision
from ..ghost.capture import Capture
from .compiled import is_compiling
from .config import ShapleyConfig
from .packed import packs_samples
from .samples import is_stream


DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def check_arguments(args: ShapleyConfig) -> None:
    """Settings of the launch under which values would not be exact, or have not been shown to be."""
    refused = {
        "DataParallel (n_gpu > 1)": (args.n_gpu > 1, "set CUDA_VISIBLE_DEVICES to one GPU"),
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
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > accelerator.num_processes:
        # What becomes of CPU processes whose training arguments do not say so: accelerate keeps it to itself.
        raise ValueError(
            f"this is one of {launched} processes that were launched together, but each would train by itself: set "
            "use_cpu=True (--use_cpu True) to train on CPU, or launch one process"
        )
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
            accelerator.distributed_type not in DATA_PARALLEL,
            "launch one process, or several that hold a whole model each (`datashapley accelerate_config multi_gpu`)",
        ),
        "parallelism_config": (
            accelerator.parallelism_config is not None,
            "leave it unset: every process holds a whole model (DDP)",
        ),
    }
    if accelerator.num_processes > 1:
        hook = DDPCommunicationHookType.NO if accelerator.ddp_handler is None else accelerator.ddp_handler.comm_hook
        refused |= {
            # One that runs out of memory would begin again while the others wait for its gradients.
            "auto_find_batch_size in several processes": (
                args.auto_find_batch_size,
                "set auto_find_batch_size=False, and per_device_train_batch_size to what fits",
            ),
            # Then the gradient that steps is not the mean of the samples'.
            f"DDP's communication hook {hook.value}": (
                hook != DDPCommunicationHookType.NO,
                "leave comm_hook of DistributedDataParallelKwargs at its default",
            ),
        }
    refuse_first(refused)


def check_precision(accelerator: Accelerator, model: nn.Module, args: ShapleyConfig) -> None:
    """What holds differences of losses against values needs losses in full precision."""
    if accelerator.mixed_precision == "no" or not needs_half_precision(model):
        return
    wanted = {
        "path_slope='owen'": args.value_order == "path" and args.path_slope == "owen",
        f"audit_steps={args.audit_steps}": args.audit_steps > 0,
    }
    for setting, asked in wanted.items():
        if asked:
            raise ValueError(
                f"{setting} compares losses in full precision, in which flash attention does not run: load the model "
                "with attn_implementation='sdpa', or leave the setting at its default"
            )


def check_forward(accelerator: Accelerator, args: ShapleyConfig) -> None:
    """What goes together with derivatives of single tokens' losses, as far as it cannot be tried."""
    if not args.scores_forward:
        return
    setting = f"value_unit={args.value_unit!r} with value_kernel='jvp'"
    refuse_first(
        {
            f"label_smoothing_factor and {setting}": (
                args.label_smoothing_factor > 0,
                "set label_smoothing_factor=0",
            ),
            # Directions are small, and their products would be lost below float16's range.
            f"fp16 and {setting}": (accelerator.mixed_precision == "fp16", "set bf16=True"),
            f"torch_compile and {setting}": (is_compiling(accelerator), "set torch_compile=False"),
        }
    )


def check_compilation(args: ShapleyConfig, accelerator: Accelerator, collator: Any) -> None:
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
            "torch_compile in several processes": (
                accelerator.num_processes > 1,
                "launch one process, or set torch_compile=False",
            ),
            "torch_compile under fp16": (
                accelerator.mixed_precision == "fp16",
                "set bf16=True, or torch_compile=False",
            ),
            # transformers does not see through the compiled model that its labels have to be shifted.
            "torch_compile with label_smoothing_factor": (
                args.label_smoothing_factor > 0,
                "set label_smoothing_factor=0, or torch_compile=False",
            ),
            "torch_compile with packed samples": (
                packs_samples(collator),
                "use a collator that keeps a row for each sample, or set torch_compile=False",
            ),
            "torch_compile with value_unit='document'": (
                args.value_unit == "document",
                "set value_unit='sample', or torch_compile=False",
            ),
            "feature_dim > 0 with torch_compile": (
                args.feature_dim > 0,
                "set feature_dim=0, or torch_compile=False",
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


def check_features(args: ShapleyConfig, capture: Capture) -> None:
    """Raises `ValueError` where there are fewer features than scored parameters."""
    if args.feature_dim:
        capture.plan(args.feature_dim)


def check_model(model: nn.Module, mixed_precision: str) -> None:
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


def check_loading(accelerator: Accelerator, collator: Any, dataset: Any, args: ShapleyConfig) -> None:
    """What of the loader's settings goes together."""
    dispatches = accelerator.dispatch_batches or (accelerator.dispatch_batches is None and is_stream(dataset))
    if accelerator.num_processes > 1 and not accelerator.even_batches and not args.dataloader_drop_last:
        raise ValueError(
            "ShapleyTrainer does not support even_batches=False in several processes, of which one may then have a "
            "batch less and the others wait for it: leave accelerator_config's even_batches at True, or set "
            "dataloader_drop_last=True"
        )
    shares_rows = {
        "DataCollatorWithFlattening": packs_samples(collator),
        f"value_unit={args.value_unit!r}": args.value_unit != "sample",
    }
    for setting, asked in shares_rows.items():
        if asked and dispatches and accelerator.num_processes > 1:
            raise ValueError(
                f"ShapleyTrainer does not support {setting} with batches that one process hands out to all, which "
                "would have to split what shares a row: set accelerator_config={'dispatch_batches': False}"
            )


def check_rows(dataset: Any, name: str) -> None:
    """`name` is the argument that the rows came in."""
    if dataset is None:
        raise ValueError(f"{name} is missing: give a dataset (datasets.Dataset, a list of rows)")


def check_map_style(dataset: Any, name: str) -> None:
    if is_stream(dataset):
        raise ValueError(
            f"ShapleyTrainer does not support an iterable {name}, whose rows are drawn again and again: give a "
            "map-style dataset, for example datasets.Dataset.from_list(list(dataset.take(n)))"
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
