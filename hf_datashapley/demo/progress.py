"""Trainer's progress bar with the losses on its own line, instead of a printed dict every few updates."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class OneLineProgress(ProgressCallback):
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description("training")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or logs is None or "loss" not in logs:
            return
        shown = {"loss": f"{float(logs['loss']):.2f}"}
        for key, value in logs.items():
            if key.startswith("shapley/") and key.endswith("/validation_loss"):
                shown[key.split("/", 2)[1]] = f"{value:.2f}"
        self.training_bar.set_postfix(shown)
