"""Models as they were: whatever is switched, hung on or put in within a context is undone at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from ...trainer.packed import train_flags_kept


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module's eval flag is set; afterwards each is what it was."""
    with train_flags_kept(model):
        model.eval()
        yield


@contextmanager
def structure_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the model consists of the same modules and parameters, with the attributes, hooks, flags, gradients,
    configuration (Trainer switches `use_cache` off) and device that they had. What was written into a parameter stays.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    tables = [(table, dict(table)) for _, own in attributes for table in own.values() if isinstance(table, dict)]
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    settings = [(config, dict(vars(config))) for config in configs]
    parameters = [(p, p.requires_grad, p.grad, p.device) for p in model.parameters()]
    buffers = [(buffer, buffer.device) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)
        for table, content in tables:
            table.clear()
            table.update(content)
        for config, own in settings:
            vars(config).clear()
            vars(config).update(own)
        for parameter, trains, gradient, device in parameters:
            parameter.requires_grad_(trains)
            parameter.data = parameter.data.to(device)
            parameter.grad = gradient
        for buffer, device in buffers:
            buffer.data = buffer.data.to(device)
