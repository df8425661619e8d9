"""Runs with `torch_compile`: what accelerate compiles, and the model that the validation pass runs.

Training runs the module that `accelerator.prepare` made of the model. What is compiled is kept by the function that was
called first, not by the module, and so are the shapes it has seen: the validation pass through the same module would
teach torch that the number of rows varies, and the training step would be compiled anew for any number of them
(measured on CPU: 2 times slower), and its recompilations would count towards the limit of training's. So the
validation pass compiles the same model with the same settings under a function of its own.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn


def is_compiling(accelerator: Accelerator) -> bool:
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def compiled_apart(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model compiled as accelerate compiles it, sharing nothing with training but its modules; for first-order
    gradients, the only ones that compiled graphs have. The model itself where nothing is compiled."""
    if not is_compiling(accelerator):
        return model
    with torch._dynamo.config.patch(wrap_top_frame=True):  # torch's own frame around the model's
        return torch.compile(model, **accelerator.state.dynamo_plugin.to_kwargs())
