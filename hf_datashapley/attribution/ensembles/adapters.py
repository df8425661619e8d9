"""LoRA adapters as plain data, put into a base model and taken out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...loss_tokens import shifts_labels
from ...random_state import random_state_kept
from .fingerprints import tensors_fingerprint
from .kept import evaluating, structure_kept


WEIGHTS = "adapter_model.safetensors"
# Others (PiSSA, OLoRA, LoftQ, ...) change the base's weights.
HARMLESS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """
    Attributes:
        base: the number of the model that it belongs to.
        config: as PEFT takes it.
        weights: by PEFT's names, on the CPU.
    """

    base: int
    config: LoraConfig
    weights: dict[str, Tensor]

    def fingerprint(self) -> str:
        scale = f"{self.config.lora_alpha} {self.config.use_rslora} {self.config.alpha_pattern}"
        return f"{tensors_fingerprint(sorted(self.weights.items()))} {scale}"

    def bytes(self) -> int:
        return sum(weight.numel() * weight.element_size() for weight in self.weights.values())

    def save(self, folder: Path) -> None:
        """As PEFT's `save_pretrained` does."""
        folder.mkdir(parents=True)
        weights = {name: weight.contiguous() for name, weight in self.weights.items()}
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
        saved = copy.deepcopy(self.config)
        saved.inference_mode = True
        saved.save_pretrained(str(folder))


def load_adapter(folder: Path, base: int) -> Adapter:
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder} is a {type(config).__name__}'s adapter: give adapters of LoRA")
    config.inference_mode = False
    check_config(config)
    adapter = Adapter(base, config, load_peft_weights(str(folder), device="cpu"))
    check_trained(adapter, str(folder))
    return adapter


def check_config(config: LoraConfig) -> None:
    """Refuses what would change the base."""
    if config.bias != "none":
        raise ValueError(f"lora_config: bias={config.bias!r} trains the base, which members share: set bias='none'")
    if config.target_parameters:
        raise ValueError("lora_config: target_parameters is not supported: name layers as target_modules")
    if config.init_lora_weights not in HARMLESS:
        raise ValueError(
            f"lora_config: init_lora_weights={config.init_lora_weights!r} changes the base, which members share: "
            "set it to True or 'gaussian'"
        )


def check_trained(adapter: Adapter, name: str) -> None:
    outer = [weight for key, weight in adapter.weights.items() if "lora_B" in key or "lora_embedding_B" in key]
    if not any(weight.any() for weight in outer):
        raise ValueError(f"{name}: B is 0 everywhere and gradients of A vanish: an untrained adapter; train it first")


def config_for(model: nn.Module, config: LoraConfig | None) -> LoraConfig:
    """A copy of the configuration, or the default one, that fits the model's kind of layers."""
    if config is None:
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task_of(model))
    config = copy.deepcopy(config)
    check_config(config)
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    config.inference_mode = False
    return config


def task_of(model: nn.Module) -> str | None:
    """PEFT's name of it, where it matters: only language models generate."""
    return "CAUSAL_LM" if shifts_labels(model) else None


@contextmanager
def injected(model: nn.Module, config: LoraConfig) -> Iterator[PeftModel]:
    """Within it the model has an adapter, of which alone parameters require grad; afterwards it is as it was."""
    with structure_kept(model):
        yield get_peft_model(model, copy.deepcopy(config))


@contextmanager
def adapted(model: nn.Module, adapter: Adapter) -> Iterator[PeftModel]:
    """Within it the model is the member with this adapter, in eval mode."""
    with structure_kept(model):
        with random_state_kept():  # PEFT draws an adapter before it can be overwritten
            member = get_peft_model(model, copy.deepcopy(adapter.config))
        own = get_peft_model_state_dict(member, save_embedding_layers=False)
        differing = sorted(adapter.weights.keys() ^ own.keys())
        if differing:
            raise ValueError(
                f"{differing[0]}: the adapter does not fit {type(model).__name__}: give the model that it is of"
            )
        set_peft_model_state_dict(member, adapter.weights)
        with evaluating(member):
            yield member


def weights_of(member: PeftModel) -> dict[str, Tensor]:
    found = get_peft_model_state_dict(member, save_embedding_layers=False)
    return {name: weight.detach().cpu().clone() for name, weight in found.items()}
