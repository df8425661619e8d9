"""How much of `Trainer`'s throughput is kept, measured: short blocks of both, in turn, in this process.

Machines change speed while they run, so the two are compared block by block and the median of the ratios counts. The
first update of a block is not timed: allocations and the first batch are made in it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..trainer import ShapleyConfig, ShapleyTrainer
from .rows import pad_rows


BLOCKS = 3
UPDATES = 5  # timed, of a block


@dataclass(frozen=True)
class Throughput:
    """Seconds an update (medians over blocks); `kept` is the median of the blocks' own ratios."""

    plain: float
    shapley: float
    kept: float


class Stopwatch(TrainerCallback):
    """Notes when the first update and the last one are over."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step in (1, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def measure_throughput(
    make_model: Callable[[], PreTrainedModel],
    rows: Dataset,
    targets: dict[str, Dataset],
    training: dict[str, Any],
    valuation: dict[str, Any],
) -> Throughput:
    """`training` are settings of `TrainingArguments`, `valuation` those that `ShapleyConfig` adds."""

    def seconds(shapley: bool, folder: str) -> float:
        stopwatch = Stopwatch()
        settings = training | {
            "output_dir": folder,
            "max_steps": 1 + UPDATES,
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        common = {
            "model": make_model(),
            "train_dataset": rows,
            "data_collator": pad_rows,
            "callbacks": [stopwatch],
        }
        trainer = (
            ShapleyTrainer(args=ShapleyConfig(**settings, **valuation), validation_dataset=targets, **common)
            if shapley
            else Trainer(args=TrainingArguments(**settings), **common)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return (stopwatch.times[1] - stopwatch.times[0]) / UPDATES

    pairs = []
    with tqdm(total=2 * BLOCKS, desc="throughput", unit="block") as bar:
        for _ in range(BLOCKS):
            pair = []
            for shapley in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    pair.append(seconds(shapley, folder))
                bar.update()
            pairs.append(pair)
    plain, shapley = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Throughput(plain, shapley, kept=statistics.median(a / b for a, b in pairs))
