"""What an oracle has to know about a training run: everything an update depends on, copied before the update.

`Recorder` is a ShapleyTrainer that looks and does not touch. It tells rows apart by their tokens, so that what the
package does with sample ids is not trusted here.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
    real_step,
    relative_error,
    secant,
    smoothed_slope,
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
    window: int  # micro-batches that Trainer fetched together with it, itself included
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
            self.updates.append(self._before_update(self.model))
        window = self.current_gradient_accumulation_steps
        micro_batch = MicroBatch(self.padded(inputs), num_items_in_batch, torch.get_rng_state(), window)
        self.updates[-1].micro_batches.append(micro_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        micro_batch.loss = float(loss)
        return loss

    def padded(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What the oracle is told of a micro-batch: a row for each sample, and which of its positions are real."""
        return {key: inputs[key].clone() for key in ("input_ids", "attention_mask", "labels")}

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
    validation_losses: dict[str, float]  # by target
    ends: dict[str, tuple[float, float, float]]  # by target, at w_t, w(0), w(1); if asked for


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
    order: str = "first"
    nodes: int = 1
    slope: str = "secant"
    closes_gap: bool = True  # the smoothed slope's; not in half precision
    audited: bool = False
    loss_tolerance: float = 1e-5  # to which the oracle's training loss is Trainer's
    validation_loss: SummedLoss = summed_loss
    scored: Sequence[str] | None = None  # names of scored parameters; None: all that train

    def truth(self, updates: Sequence[RecordedUpdate], step: int, validation_rows: Mapping[str, Any]) -> Truth:
        """Update number `step`, from 1, scored on the given row indices of every target."""
        update = updates[step - 1]
        self._load(update.weights)
        samples: list[tuple[int, int, Gradient]] = []
        for micro_batch in update.micro_batches:
            samples.extend(self._samples(micro_batch))
        total = add([sample for _, _, sample in samples])
        clip = clip_factor(total, self.max_norm)
        clipped = {name: clip * gradient for name, gradient in total.items()}
        squares = add([{name: (clip * g).square() for name, g in sample.items()} for _, _, sample in samples])
        names = list(trainable(self.model)) if self.scored is None else list(self.scored)
        truth = Truth({}, {}, clip, {}, {})
        for row, count, _ in samples:
            truth.tokens[row] = truth.tokens.get(row, 0) + count
        for target, rows in validation_rows.items():
            if self.order == "first":
                refreshed = updates[(step - 1) // self.interval * self.interval]
                self._load(refreshed.weights)
                gradient, loss = self._validation_gradient(target, rows)
                u = direction(gradient, {name: self._factor(update, name) for name in gradient})
            else:
                players = sum(count > 0 for _, count, _ in samples)
                u, loss = self._two_pass_direction(update, clipped, squares, players, target, rows)
            sums: dict[int, float] = {}
            for row, _, sample in samples:
                sums[row] = sums.get(row, 0.0) + clip * inner(sample, u, names)
            ends = {}
            if self.closes_gap and self.slope == "owen" or self.audited:
                ends = {s: self._loss_at(update, clipped, s, target, rows) for s in (None, 0.0, 1.0)}
                truth.ends[target] = (ends[None], ends[0.0], ends[1.0])
            if self.slope == "owen" and self.closes_gap:
                gap = ends[0.0] - ends[1.0] - sum(sums.values())
                all_tokens = sum(truth.tokens.values())
                sums = {row: value + gap * truth.tokens[row] / all_tokens for row, value in sums.items()}
            truth.values[target] = sums
            truth.validation_losses[target] = loss
        return truth

    def _two_pass_direction(
        self, update: RecordedUpdate, clipped: Gradient, squares: Gradient, samples: int, target: str, rows: Any
    ) -> tuple[Gradient, float]:
        """u of orders "second" and "path", and the loss that the ledger shows (at w_t; mean along the path)."""
        slopes: dict[str, Tensor | float] = {name: self._slope(update, name, clipped[name]) for name in clipped}
        if self.order == "second":
            self._load(update.weights)
            at_start, loss = self._validation_gradient(target, rows)
            half = {name: w - update.weights[name] for name, w in self._weights(update, clipped, 0.5).items()}
            size = max(float(d.abs().max()) for d in half.values())
            step = 1e-5 / size if size else 0.0
            sides = []
            for sign in (1, -1):
                self._load({name: w + sign * step * half.get(name, 0.0) for name, w in update.weights.items()})
                sides.append(self._validation_gradient(target, rows)[0])
            curvature = {
                name: (sides[0][name] - sides[1][name]) / (2 * step) if step else torch.zeros_like(gradient)
                for name, gradient in at_start.items()
            }
            return direction({name: at_start[name] + curvature[name] for name in at_start}, slopes), loss
        points, weights = np.polynomial.legendre.leggauss(self.nodes)
        parts, mean_loss = [], 0.0
        for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
            at = self._weights(update, clipped, float(point))
            if self.slope == "owen":
                for name, gradient in clipped.items():
                    if name in at and self._moves(update, name, gradient):
                        change = self._change(update, name)
                        found = smoothed_slope(change, gradient, squares[name], samples, float(point))
                        slopes[name] = self._unrolled(update, name) * found[0]
                        at[name] = update.weights[name] + found[1]
            self._load({**update.weights, **at})
            there, loss = self._validation_gradient(target, rows)
            parts.append({name: float(weight) * u for name, u in direction(there, slopes).items()})
            mean_loss += float(weight) * loss
        return add(parts), mean_loss

    def _change(self, update: RecordedUpdate, name: str) -> Callable[[Tensor], Tensor]:
        """D of one parameter."""
        if self.sgd_proxy:
            return lambda x: -float(update.groups[name]["lr"]) * x
        group, state, weight = update.groups[name], update.state.get(name, {}), update.weights[name]
        return lambda x: real_step(self.optimizer, group, state, weight, x)

    def _moves(self, update: RecordedUpdate, name: str, gradient: Tensor) -> bool:
        """torch passes over a parameter that the loss does not reach; here it has a gradient of zeros."""
        return name in update.groups and bool(gradient.any())

    def _weights(self, update: RecordedUpdate, clipped: Gradient, s: float) -> dict[str, Tensor]:
        """w(s)."""
        weights = dict(update.weights)
        for name, gradient in clipped.items():
            if self._moves(update, name, gradient):
                change = self._change(update, name)
                weights[name] = weights[name] + (1 - s) * change(torch.zeros_like(gradient)) + s * change(gradient)
        return weights

    def _slope(self, update: RecordedUpdate, name: str, gradient: Tensor) -> Tensor | float:
        """S, or what it is once momentum has played out."""
        if not self._moves(update, name, gradient):
            return 0.0
        return self._unrolled(update, name) * secant(self._change(update, name), gradient)

    def _unrolled(self, update: RecordedUpdate, name: str) -> float:
        """The weight of a gradient once momentum has played out, over that in its own step."""
        group, state = update.groups[name], update.state.get(name, {})
        if self.momentum == "immediate" or self.sgd_proxy:
            return 1.0
        if "betas" in group:
            beta1 = group["betas"][0]
            return (1 - beta1 ** (float(state.get("step", 0)) + 1)) / (1 - beta1)
        mu = group["momentum"]
        if not mu:
            return 1.0
        enters = 1.0 if state.get("momentum_buffer") is None else 1 - group["dampening"]
        return enters / (1 - mu) / (1 + mu * enters if group["nesterov"] else enters)

    def _loss_at(self, update: RecordedUpdate, clipped: Gradient, s: float | None, target: str, rows: Any) -> float:
        """l_v(w_t) for None, l_v(w(s)) otherwise."""
        self._load(update.weights if s is None else self._weights(update, clipped, s))
        return self._validation_gradient(target, rows)[1]

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

    def _validation_gradient(self, target: str, rows: Any) -> tuple[Gradient, float]:
        batches = (collate([self.validation[target][int(row)]]) for row in rows)
        return validation_gradient(self.model, batches, self.validation_loss)

    def _samples(self, micro_batch: MicroBatch) -> list[tuple[int, int, Gradient]]:
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
        losses = self.row_losses(logits, labels, micro_batch.num_items, micro_batch.window)
        total = float(losses.sum().detach())
        assert relative_error([micro_batch.loss], [total]) < self.loss_tolerance, "these are not Trainer's shares"
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


def assert_history(
    trainer: Recorder,
    replay: Replay,
    tolerance: float,
    row_of_id: Mapping[Any, int] | None = None,
    steps: Collection[int] | None = None,
    keys: Sequence[str] = ("sample_id",),
):
    """Every update of the run: the same samples, tokens and values as the oracle's. Returns the worst error seen.

    row_of_id: row index of each sample id, or of its values of several `keys`; None: the ids are the row indices.
    steps: the updates that are compared; None: all.
    """
    history = history_of(trainer)
    assert sorted(history) == list(range(1, len(trainer.updates) + 1))
    worst = 0.0
    for step, rows in history.items():
        if steps is not None and step not in steps:
            continue
        truth = replay.truth(trainer.updates, step, trainer.validation_rows(step))
        ids = [row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys) for row in rows]
        indices: list[Any] = ids if row_of_id is None else [row_of_id[one] for one in ids]
        assert sorted(indices) == sorted(truth.tokens), f"update {step} scored other samples than it trained on"
        assert [row["tokens"] for row in rows] == [truth.tokens[index] for index in indices]
        for target, values in truth.values.items():
            column = f"value_{target}" if target else "value"
            error = relative_error([row[column] for row in rows], [values[index] for index in indices])
            worst = max(worst, error)
            assert error <= tolerance, f"update {step}, target {target!r}: relative error {error:.1e}"
    return worst
