"""Members that cost little training and room: LoRA adapters of a model."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from ...random_state import random_state_kept
from .adapters import Adapter, adapted, check_trained, config_for, injected, load_adapter, weights_of
from .cost import Cost, model_bytes
from .models import Models


MANIFEST = "ensemble.json"


class LoraEnsemble:
    """LoRA adapters that were trained on the training set with different seeds, instead of models (Deng, Li, Zhang,
    Ma, "Efficient Ensembles Improve Training Data Attribution", arXiv 2405.17293).

    A member's gradients are those of its adapter's parameters. Members share the base, which is in memory once: an
    adapter is put in for its turn and taken out after it. Make one by `train` or `load`.

    Costs the adapters' training, and their room beside the base's.

    Args:
        models: the bases.
        adapters: of these.
        training_seconds: how long training the adapters took, if it is known.
    """

    forward_only = False

    def __init__(
        self, models: nn.Module | Sequence[nn.Module], adapters: list[Adapter], training_seconds: float | None = None
    ):
        self.base = bases(models)
        self.adapters, self.training_seconds = adapters, training_seconds
        if not adapters:
            raise ValueError("there is no adapter: members, or folders, has to be at least one")
        for number, adapter in enumerate(adapters):
            check_trained(adapter, f"member {number}")

    @classmethod
    def train(
        cls,
        models: nn.Module | Sequence[nn.Module],
        dataset: Any,
        members: int = 4,
        *,
        lora_config: LoraConfig | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
    ) -> LoraEnsemble:
        """Trains `members` adapters for each model, by `transformers.Trainer`.

        Args:
            models: one, or several; left as they are.
            dataset: the training set.
            members: adapters for each model.
            lora_config: None: rank 8, alpha 16, all linear layers. `fan_in_fan_out` is set to what the model needs.
            args: None: 3 epochs, batches of 8, learning rate 2e-4, nothing saved. Seeds are replaced, and each member
                writes to a folder of its own in `output_dir`.
            data_collator: None: Trainer's.
            seed: member k of all is trained with seed + k: for its adapter's first weights and the order of data.

        Raises:
            ValueError: `lora_config` would change the base, or an adapter did not move from 0.
        """
        base, seconds = bases(models), 0.0
        adapters: list[Adapter] = []
        for index, model in enumerate(base.models):
            for _ in range(members):
                number = len(adapters)
                with tempfile.TemporaryDirectory() as folder:
                    own = member_args(args, folder, number, seed + number)
                    start = time.perf_counter()
                    adapters.append(train_adapter(index, model, lora_config, own, dataset, data_collator))
                    seconds += time.perf_counter() - start
        return cls(base.models, adapters, seconds)

    @property
    def cost(self) -> Cost:
        beside = sum(adapter.bytes() for adapter in self.adapters)
        kept = sum(model_bytes(model) for model in self.base.models)
        return Cost(len(self), len(self.base), len(self), self.training_seconds, kept, beside)

    def __len__(self) -> int:
        return len(self.adapters)

    def __iter__(self) -> Iterator[PeftModel]:
        for adapter in self.adapters:
            with adapted(self.base.models[adapter.base], adapter) as member:
                yield member

    def outputs(self) -> Iterator[PeftModel]:
        return iter(self)

    def fingerprints(self) -> list[str]:
        own = self.base.fingerprints()
        return [f"{own[adapter.base]}, adapter {adapter.fingerprint()}" for adapter in self.adapters]

    def save(self, folder: str | Path) -> None:
        """Ordinary PEFT adapters, `member-0` and so on, and what they belong to."""
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds something already: name a new folder")
        for number, adapter in enumerate(self.adapters):
            adapter.save(folder / f"member-{number}")
        described = {
            "format": 1,
            "bases": self.base.fingerprints(),
            "members": [adapter.base for adapter in self.adapters],
            "training_seconds": self.training_seconds,
        }
        (folder / MANIFEST).write_text(json.dumps(described, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path | Sequence[str | Path], models: nn.Module | Sequence[nn.Module]) -> LoraEnsemble:
        """What `save` wrote; or a list of adapters' folders, whose members are shared out evenly among the models.

        Raises:
            ValueError: the models are not those that the adapters were trained on, or an adapter is untrained.
        """
        base = bases(models)
        if isinstance(folder, str | Path):
            described = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
            if described["bases"] != base.fingerprints():
                raise ValueError(f"{folder} holds adapters of other models: give those that they were trained on")
            belongs, seconds = described["members"], described["training_seconds"]
            folders = [Path(folder) / f"member-{number}" for number in range(len(belongs))]
        else:
            folders, seconds = [Path(own) for own in folder], None
            each, rest = divmod(len(folders), len(base))
            if rest or not each:
                raise ValueError(
                    f"{len(folders)} adapters cannot be shared out evenly among {len(base)} models: give as many for "
                    "each, in the models' order"
                )
            belongs = [number // each for number in range(len(folders))]
        adapters = [load_adapter(own, index) for own, index in zip(folders, belongs, strict=True)]
        return cls(base.models, adapters, seconds)


def bases(models: nn.Module | Sequence[nn.Module]) -> Models:
    base = Models(models)
    for model in base.models:
        if isinstance(model, PeftModel):
            raise ValueError(
                "a base has an adapter already: give the model without it, as unload() or merge_and_unload() makes"
            )
    return base


def member_args(args: TrainingArguments | None, folder: str, number: int, seed: int) -> TrainingArguments:
    """The settings of one member's training, which has a seed and a folder of its own."""
    if args is None:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=3,
            per_device_train_batch_size=8,
            learning_rate=2e-4,
            save_strategy="no",
            report_to=[],
        )
    own = copy.copy(args)
    own.seed, own.data_seed = seed, seed
    own.output_dir = str(Path(str(args.output_dir)) / f"member-{number}")
    return own


def train_adapter(
    index: int,
    model: nn.Module,
    lora_config: LoraConfig | None,
    args: TrainingArguments,
    dataset: Any,
    data_collator: Callable[[list[Any]], Any] | None,
) -> Adapter:
    with random_state_kept():
        set_seed(args.seed)
        with injected(model, config_for(model, lora_config)) as member:
            member.train()
            Trainer(model=member, args=args, train_dataset=dataset, data_collator=data_collator).train()
            return Adapter(index, member.peft_config[member.active_adapter], weights_of(member))
