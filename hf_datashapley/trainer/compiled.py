"""Runs with `torch_compile`: what accelerate compiles, and the model that the validation pass runs.

Training runs the module that `accelerator.prepare` made of the model. Compiled code belongs to the function that was
called first, and so do the shapes that it has seen. Through the same function, the validation pass would teach torch
that the number of rows varies, and the training step would be compiled for any number of them (measured on 2 CPU
cores: half as fast), and either pass would use up the other's recompilations. So the validation pass compiles the
model with the same settings under a function of its own.

Where torch cannot trace a model in one piece, the passes still share the functions after the first break. Many models
break at a warning in the loss function, so for the validation pass logging is left out.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn


LOGGING = {method for method in vars(logging.Logger).values() if callable(method)}


def is_compiling(accelerator: Accelerator) -> bool:
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def compiled_apart(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model, compiled as accelerate compiles it, apart from training; itself where nothing is compiled.

    For first-order gradients, the only ones that compiled graphs have.
    """
    if not is_compiling(accelerator):
        return model
    # A frame of torch's own around the model's.
    with torch._dynamo.config.patch(wrap_top_frame=True):
        return cast(nn.Module, torch.compile(model, **accelerator.state.dynamo_plugin.to_kwargs()))


def traced_apart(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """To run what `compiled_apart` gives in."""
    if not is_compiling(accelerator):
        return nullcontext()
    return torch._dynamo.config.patch(ignore_logging_functions=LOGGING)
