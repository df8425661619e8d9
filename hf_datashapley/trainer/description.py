"""What a ledger's manifest says of the run that writes it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from .. import __version__
from ..directions.validation import Validation
from ..ghost.capture import Capture
from ..ghost.sides import described_plans
from .config import ShapleyConfig
from .valuation import momentum_of


def describe(
    args: ShapleyConfig, model: nn.Module, capture: Capture, validation: Validation, own_loss: bool
) -> dict[str, Any]:
    """As JSON. A run that goes on has to have the same, but for the versions."""
    follows_path = args.value_order == "path"
    return {
        "unit": args.value_unit,
        "features": described_features(args, capture),
        "settings": {
            "model": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "scored_parameters": sum(parameter.numel() for parameter in capture.parameters.values()),
            "value_order": args.value_order,
            "value_optimizer": args.value_optimizer,
            "value_momentum": momentum_of(args),
            **({"path_nodes": args.path_nodes, "path_slope": args.path_slope} if follows_path else {}),
            **({"token_samples": args.token_sample_ids or args.token_samples} if args.value_unit == "token" else {}),
            "value_modules": args.value_modules,
            "value_kernel": args.value_kernel,
            "compute_loss_func": own_loss,
            "validation_rows": {
                target.name or "validation": min(validation.size, len(target.usable)) for target in validation.targets
            },
            "validation_interval": args.validation_interval,
            "audit_steps": args.audit_steps,
            "feature_dim": args.feature_dim,
            "feature_dtype": args.feature_dtype,
            "seed": args.seed,
            "hf_datashapley": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def describe_training(args: ShapleyConfig, optimizer: str, scheduler: str, has_ids: bool) -> dict[str, Any]:
    """How the model is trained, for those who read the values; a run may go on otherwise."""
    return {
        "optimizer": optimizer,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": scheduler,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "rows_of_an_update": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        "sample_ids": "column" if has_ids else "row numbers",
    }


def described_features(args: ShapleyConfig, capture: Capture) -> dict[str, Any] | None:
    """What it takes to project other gradients as the run has projected its own."""
    if not args.feature_dim:
        return None
    plans = capture.plan(args.feature_dim)
    width = sum(plan.width for plan in plans.values())
    return {"dtype": args.feature_dtype, "width": width, **described_plans(plans, args.seed)}
