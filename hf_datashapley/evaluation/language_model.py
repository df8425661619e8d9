"""The retraining that most banks want: a language model from scratch, by `Trainer`, asked for its queries' losses."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..random_state import random_state_kept
from .bank import Indices, RetrainingBank
from .one_update import Floats, Rows
from .query_losses import query_losses


# Of TrainingArguments: what makes no difference to the losses, or is set for each retraining.
NOT_SETTINGS = ("disable_tqdm", "data_seed", "hub_token", "log_level", "output_dir", "run_name", "seed")


@dataclass(frozen=True)
class LanguageModelRetraining:
    """`train` for `RetrainingBank.run`: a model of `config` with weights by the seed, trained on the rows.

        retraining = LanguageModelRetraining(config, train_dataset, query_dataset, args)
        bank = retraining.bank("bank", random_masks(units), labels, seeds=2).run(retraining)
        lds(scores, bank.masks, bank.outputs)

    Costs a training, and a forward pass over the queries in batches of `per_device_eval_batch_size`. With
    `num_train_epochs` a subset is trained on for as many updates as its size gives, with `max_steps` for as many as
    the whole.

    Args:
        config: of a causal language model.
        train_dataset: rows with `input_ids` and `labels`, or what `data_collator` makes these of.
        query_dataset: rows of the same kind, each a query.
        args: as `Trainer` takes them, with save_strategy="no"; their seed is replaced by the retraining's, and nothing
            is written to their output_dir.
        data_collator: as `Trainer` takes it; None: `default_data_collator`, rows of one length.
        measure: `query_losses`, or `query_margins`.

    Raises:
        ValueError: checkpoints would be written; processes that share a folder would overwrite each other's.
    """

    config: PretrainedConfig
    train_dataset: Dataset
    query_dataset: Dataset
    args: TrainingArguments
    data_collator: Callable[[list[Any]], dict[str, Any]] | None = None
    measure: Callable[[nn.Module, Iterable[Rows]], Floats] = query_losses

    def __post_init__(self) -> None:
        if self.args.save_strategy != "no":
            raise ValueError(
                "args would write checkpoints, and retrainings overwrite each other's: set save_strategy='no', since "
                "all that is kept are the losses"
            )

    def __call__(self, rows: Indices, seed: int) -> Floats:
        with random_state_kept():
            trainer = self._trained(rows, seed)
            # Every query, and in their order, whatever was done with the rows of training.
            trainer.args.dataloader_drop_last = False
            trainer.args.train_sampling_strategy = "sequential"
            return self.measure(trainer.model, trainer.get_test_dataloader(self.query_dataset))

    def bank(
        self, folder: str | Path, masks: Any, labels: Any = None, seeds: int | Sequence[int] = 1
    ) -> RetrainingBank:
        """The bank of these retrainings in a folder: `RetrainingBank`, which has the arguments, with these settings.

        Raises:
            ValueError: as `RetrainingBank` does, or there is not a unit for each row.
        """
        known = np.shape(masks)[-1] if labels is None else len(labels)
        if known != len(self.train_dataset):
            raise ValueError(
                f"masks and labels are of {known} rows, and train_dataset has {len(self.train_dataset)}: give labels, "
                "the unit of each row"
            )
        return RetrainingBank(folder, masks, labels, seeds, self.settings)

    def model(self, rows: Indices, seed: int) -> nn.Module:
        """The trained model itself, as in the bank: what an attribution of such a retraining starts from."""
        with random_state_kept():
            return self._trained(rows, seed).model

    def _trained(self, rows: Indices, seed: int) -> Trainer:
        args = copy.copy(self.args)
        args.seed = args.data_seed = seed
        args.disable_tqdm = True
        # Trainer makes the folder even if it never writes to it.
        with tempfile.TemporaryDirectory() as args.output_dir:
            set_seed(seed)
            trainer = Trainer(
                model=AutoModelForCausalLM.from_config(copy.deepcopy(self.config)),
                args=args,
                train_dataset=self.train_dataset.select(rows),
                data_collator=self.data_collator,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer

    @property
    def settings(self) -> dict[str, Any]:
        """What the losses depend on, for `RetrainingBank(settings=...)`; of the data, a hash of the rows."""
        args = {name: value for name, value in self.args.to_dict().items() if name not in NOT_SETTINGS}
        return {
            "config": {k: v for k, v in self.config.to_dict().items() if k != "transformers_version"},
            "train_dataset": fingerprint_of_rows(self.train_dataset),
            "query_dataset": fingerprint_of_rows(self.query_dataset),
            "args": args,
            "data_collator": name_of(self.data_collator),
            "measure": name_of(self.measure),
            "dtype": str(torch.get_default_dtype()),
        }


def name_of(function: object) -> str:
    """Of a function, or of the class of an object that is called."""
    return function.__qualname__ if isinstance(function, FunctionType) else type(function).__qualname__


def fingerprint_of_rows(dataset: Dataset) -> str:
    """Of what the rows hold, wherever they lie; datasets' own fingerprint is of how they came about."""
    found = hashlib.sha256()
    for row in dataset.with_format(None):
        found.update(json.dumps(row, sort_keys=True, default=str).encode())
    return found.hexdigest()
