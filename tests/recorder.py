"""What an oracle has to know about a training run: everything an update depends on, copied before the update.

`Recorder` is a ShapleyTrainer that looks and does not touch. It tells rows apart by their tokens, so that what the
package does with sample ids is not trusted here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from models import collate
from oracles import (
    Float64,
    Gradient,
    RowLosses,
    SummedLoss,
    add,
    clip_factor,
    direction,
    first_order_factor,
    inner,
    loss_tokens,
    per_sample_gradients,
    relative_error,
    summed_loss,
    trainable,
    validation_gradient,
)
from torch import Tensor, nn

from hf_datashapley import ShapleyTrainer


@dataclass
class MicroBatch:
    inputs: dict[str, Tensor]
    num_items: Tensor | None
    random_state: Tensor  # of torch, as the forward pass found it
    loss: float = float("nan")  # what Trainer differentiated, accumulation scaling included


@dataclass
class RecordedUpdate:
    weights: dict[str, Tensor]  # before the update
    state: dict[str, dict[str, Any]]  # the optimizer's, by parameter name, before the update
    groups: dict[str, dict[str, Any]]  # the optimizer's group of each parameter
    micro_batches: list[MicroBatch] = field(default_factory=list)


class Recorder(ShapleyTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.updates: list[RecordedUpdate] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        step = self.state.global_step
        if len(self.updates) > step + 1:
            self.updates.clear()  # auto_find_batch_size entered the loop again
        if len(self.updates) == step:
            self.updates.append(self._before_update(model))
        known: dict[str, Tensor] = {key: inputs[key].clone() for key in ("input_ids", "attention_mask", "labels")}
        micro_batch = MicroBatch(known, num_items_in_batch, torch.get_rng_state())
        self.updates[-1].micro_batches.append(micro_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        micro_batch.loss = float(loss)
        return loss

    def _before_update(self, model: nn.Module) -> RecordedUpdate:
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = {
            names[parameter]: {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        }
        state = {
            names[parameter]: {
                key: value.clone() if isinstance(value, Tensor) else value for key, value in entries.items()
            }
            for parameter, entries in self.optimizer.state.items()
        }
        weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        return RecordedUpdate({name: weight.clone() for name, weight in weights.items()}, state, groups)


@dataclass
class Truth:
    """The oracle's answer for one update: row index -> summed value by target, and -> loss tokens."""

    values: dict[str, dict[int, float]]
    tokens: dict[int, int]
    clip: float
    validation_losses: dict[str, float]


@dataclass
class Replay:
    """Recomputes recorded updates sample by sample in float64.

    model: a float64 copy of the model, as it was before training (NEFTune's hook on it where the run had one).
    rows: the training rows, to tell which row a recorded one is.
    validation: by target, the rows of its dataset.
    """

    model: nn.Module
    rows: Sequence[Mapping[str, Any]]
    validation: Mapping[str, Sequence[dict[str, Any]]]
    row_losses: RowLosses
    optimizer: type
    max_norm: float = 1.0
    momentum: str = "unrolled"
    sgd_proxy: bool = False
    interval: int = 1
    validation_loss: SummedLoss = summed_loss
    scored: Sequence[str] | None = None  # names of scored parameters; None: all that train

    def truth(self, updates: Sequence[RecordedUpdate], step: int, validation_rows: Mapping[str, Any]) -> Truth:
        """Update number `step`, from 1, scored on the given row indices of every target."""
        update = updates[step - 1]
        refreshed = updates[(step - 1) // self.interval * self.interval]
        targets = {name: self._validation_gradient(refreshed, name, rows) for name, rows in validation_rows.items()}
        self._load(update.weights)
        samples: list[tuple[int, int, Gradient]] = []
        for micro_batch in update.micro_batches:
            samples.extend(self._samples(micro_batch, len(update.micro_batches)))
        clip = clip_factor(add([sample for _, _, sample in samples]), self.max_norm)
        names = list(trainable(self.model)) if self.scored is None else list(self.scored)
        values: dict[str, dict[int, float]] = {}
        for target, (gradient, _) in targets.items():
            u = direction(gradient, {name: self._factor(update, name) for name in gradient})
            values[target] = {}
            for row, _, sample in samples:
                values[target][row] = values[target].get(row, 0.0) + clip * inner(sample, u, names)
        tokens: dict[int, int] = {}
        for row, count, _ in samples:
            tokens[row] = tokens.get(row, 0) + count
        return Truth(values, tokens, clip, {target: loss for target, (_, loss) in targets.items()})

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])

    def _factor(self, update: RecordedUpdate, name: str) -> Tensor | float:
        if name not in update.groups:
            return 0.0  # the optimizer does not train it
        group = update.groups[name]
        if self.sgd_proxy:
            return -float(group["lr"])
        return first_order_factor(self.optimizer, group, update.state.get(name, {}), self.momentum)

    def _validation_gradient(self, update: RecordedUpdate, target: str, rows: Any) -> tuple[Gradient, float]:
        self._load(update.weights)
        batches = (collate([self.validation[target][int(row)]]) for row in rows)
        return validation_gradient(self.model, batches, self.validation_loss)

    def _samples(self, micro_batch: MicroBatch, micro_batches: int) -> list[tuple[int, int, Gradient]]:
        """(row index, loss tokens, gradient share) of each sample, from the forward pass that training made."""
        labels = micro_batch.inputs["labels"]
        inputs = {key: value for key, value in micro_batch.inputs.items() if key != "labels"}
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(micro_batch.random_state)
            with Float64():
                logits = self.model(**inputs).logits
        if labels.is_floating_point():
            labels = labels.double()
        losses = self.row_losses(logits, labels, micro_batch.num_items, micro_batches)
        total = float(losses.sum().detach())
        assert relative_error([micro_batch.loss], [total]) < 1e-5, "these are not Trainer's shares"
        gradients = per_sample_gradients(losses, trainable(self.model))
        return list(zip(self._rows_of(inputs), loss_tokens(labels).tolist(), gradients, strict=True))

    def _rows_of(self, inputs: Mapping[str, Tensor]) -> list[int]:
        index = {tuple(row["input_ids"]): number for number, row in enumerate(self.rows)}
        assert len(index) == len(self.rows)
        return [
            index[tuple(tokens[mask.bool()].tolist())]
            for tokens, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]


def history_of(trainer: ShapleyTrainer) -> dict[int, list[dict[str, Any]]]:
    """Rows of `value_history()` by update."""
    history: dict[int, list[dict[str, Any]]] = {}
    for row in trainer.value_history():
        history.setdefault(row["step"], []).append(row)
    return history


def assert_history(trainer: Recorder, replay: Replay, tolerance: float, row_of_id: Mapping[int, int] | None = None):
    """Every update of the run: the same samples, tokens and values as the oracle's. Returns the worst error seen.

    row_of_id: row index of each sample id; None: the ids are the row indices.
    """
    history = history_of(trainer)
    assert sorted(history) == list(range(1, len(trainer.updates) + 1))
    worst = 0.0
    for step, rows in history.items():
        truth = replay.truth(trainer.updates, step, trainer.validation_rows(step))
        indices = [row["sample_id"] if row_of_id is None else row_of_id[row["sample_id"]] for row in rows]
        assert sorted(indices) == sorted(truth.tokens), f"update {step} scored other samples than it trained on"
        assert [row["tokens"] for row in rows] == [truth.tokens[index] for index in indices]
        for target, values in truth.values.items():
            column = f"value_{target}" if target else "value"
            error = relative_error([row[column] for row in rows], [values[index] for index in indices])
            worst = max(worst, error)
            assert error <= tolerance, f"update {step}, target {target!r}: relative error {error:.1e}"
    return worst
