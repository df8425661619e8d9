"""One run of the training loop, valued: what happens to an update between its first micro-batch and the ledger.

`ShapleyTrainer` says when things happen, `passes` how scores come about, `values` what is made of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..directions.first_order import FirstOrder
from ..directions.optimizers import Momentum
from ..directions.owen import OwenOrder
from ..directions.path import NodeWeights, PathOrder
from ..directions.second_order import SecondOrder
from ..directions.update_rule import UpdateRule
from ..directions.validation import Validation
from ..directions.weights import weights_at
from ..full_precision import full_dtype
from ..ghost.capture import Capture
from ..ghost.projection import Projection
from ..ghost.sides import PerParameter
from ..ledger import Ledger
from ..ranks import Ranks
from ..values import features
from ..values.additivity import HALF_TOLERANCE, TOLERANCE, check_shares
from ..values.statistics import LogStatistics
from ..values.update import Update, UpdateAudit
from .checkpoints import save_optimizer_names
from .config import ShapleyConfig
from .passes import OnePass, Pass, SecondPass, TwoPass
from .precision import Precision
from .scorers import BackwardScorer, ForwardScorer, MicroBatch, Scorer


STATE = "shapley.safetensors"


class Valuation:
    """Values the updates of one run, which `optimizer` makes of `model`, into `ledger`.

    `compiled`: whether what trains is compiled; `uncompiled` is the model all the same, for losses in full precision.
    """

    def __init__(
        self,
        model: nn.Module,
        uncompiled: nn.Module,
        args: ShapleyConfig,
        capture: Capture,
        validation: Validation,
        optimizer: Optimizer,
        ledger: Ledger,
        ranks: Ranks,
        precision: Precision,
        compiled: bool,
    ):
        self.model = model
        self.uncompiled = uncompiled
        self.capture = capture
        self.validation = validation
        self.ledger = ledger
        self.ranks = ranks
        self.audit_steps = args.audit_steps
        self.tolerance = HALF_TOLERANCE if precision.half_products else TOLERANCE
        self.momentum = momentum_of(args)
        self.rule = UpdateRule(optimizer, cast(Literal["auto", "sgd"], args.value_optimizer))
        scorer: Scorer = ForwardScorer() if args.scores_forward else BackwardScorer(capture, uncompiled)
        self.scores: Pass = make_pass(args, capture, scorer, validation, optimizer, self.rule, precision, compiled)
        self.statistics = LogStatistics([target.name for target in validation.targets])
        self._precision = precision
        self._stores_features = args.feature_dim > 0
        self._feature_dtype = features.DTYPES[args.feature_dtype]
        self._optimizer = optimizer
        self._step = 0
        self._update: Update | None = None
        # Sum of values, and the losses at w_t and w(0).
        self._audit: tuple[Tensor, Tensor, Tensor] | None = None
        self._shares_checked = False
        # Not a callback: those of the user may still change the gradient, and a step may not come about.
        self._hook = optimizer.register_step_pre_hook(lambda *_: self.before_step())

    def micro_batch(self, step: int, ids: dict[str, Tensor], tokens: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Runs a micro-batch of update number `step`, and gives its loss."""
        if self._update is None:
            self._step = step
            learning_rate = float(self._optimizer.param_groups[0]["lr"])
            self._update = Update(len(self.validation.targets), learning_rate, self.ranks, self._feature_dtype)
            self._update.loss_scale = self._precision.loss_scale()
            self.scores.begin(self.model, self._update, step)
        loss = self.scores.micro_batch(self._update, micro_batch)
        self._update.add(ids, tokens, loss)
        return loss

    def clipped(self, factor: Tensor) -> None:
        """Clipping scaled the gradient by this."""
        assert self._update is not None
        self._update.clip = factor

    def before_step(self) -> None:
        """The optimizer is about to step, with the clipped gradient in `.grad`."""
        update = self._update
        assert update is not None
        directions = self.scores.before_step(self.model, update, self._step)
        if not self._shares_checked:
            own, scored = update.own_values(), self.capture.parameters
            self._shares_checked = check_shares(own, scored, directions, self.ranks, self.tolerance)
        if self.audit_steps and self._step % self.audit_steps == 0:
            if self.momentum == "immediate":
                samples = update.sum_of(update.values())
            else:
                samples = self.rule.immediate_sum(directions, self.capture.parameters, self.momentum)
            # Whatever values are made as if: it is the optimizer's own momentum and weight decay.
            rule = UpdateRule(self._optimizer)
            weights = NodeWeights().of(rule.moving)
            rule.path_weights(0.0, weights)
            with weights_at(weights):
                carried = self._losses()
            self._audit = samples, self._losses(), carried

    def end_update(self, optimizer_skipped: bool) -> None:
        assert self._update is not None
        audit = None
        if self._audit is not None:
            samples, before, carried = self._audit
            audit = UpdateAudit(samples, before - carried, before - self._losses())
        skipped: bool | Tensor = optimizer_skipped
        scale, scale_before = self._precision.loss_scale(), self._update.loss_scale
        if scale is not None and scale_before is not None:
            # A fused optimizer is called on an overflow too, and makes no step: accelerate takes it for one.
            skipped = (scale < scale_before) | optimizer_skipped
        finished = self._update.finish(self._step, skipped, audit)
        self._update = self._audit = None
        self.ledger.append(finished)
        self.statistics.add(finished)

    def save(self, folder: str) -> None:
        """Into a checkpoint's folder, what cannot be computed again when the run goes on from there."""
        kept = self.scores.state()
        if kept:
            save_file(kept, Path(folder) / STATE)
        if self._stores_features:
            save_optimizer_names(folder, self._optimizer, self.uncompiled, self.ledger.run)

    def load(self, folder: str) -> None:
        """
        Raises:
            ValueError: it is not there.
        """
        path = Path(folder) / STATE
        if self.validation.interval > 1 and not path.exists():
            raise ValueError(
                f"{folder} lacks {STATE}, the validation gradient that validation_interval={self.validation.interval} "
                "goes on with: resume from a checkpoint that is whole (save_only_model=False) and that every process "
                "can see"
            )
        if path.exists():
            self.scores.restore(load_file(path, device=str(next(iter(self.capture.parameters.values())).device)))

    def close(self) -> None:
        """Leaves the optimizer alone."""
        self._hook.remove()

    def _losses(self) -> Tensor:
        return self.validation.losses(self.uncompiled, self._step)


def momentum_of(args: ShapleyConfig) -> Momentum:
    default = "unrolled" if args.value_order == "first" else "immediate"
    return cast(Momentum, args.value_momentum or default)


def make_pass(
    args: ShapleyConfig,
    capture: Capture,
    scorer: Scorer,
    validation: Validation,
    optimizer: Optimizer,
    rule: UpdateRule,
    precision: Precision,
    compiled: bool,
) -> Pass:
    scored, momentum = capture.parameters, momentum_of(args)
    if args.value_order == "first":
        directions = FirstOrder(optimizer, scored, rule.proxy, momentum)
        return OnePass(capture, scorer, validation, directions, make_projection(args, capture))
    order: SecondOrder | PathOrder | OwenOrder
    if args.value_order == "second":
        order = SecondOrder(rule, scored, momentum)
    elif args.path_slope == "owen" and not rule.is_linear:
        order = OwenOrder(rule, scored, args.path_nodes, closes_gap=not precision.half_weights)
    else:
        order = PathOrder(rule, scored, args.path_nodes, momentum)
    replays = compiled or args.scores_forward
    return TwoPass(capture, scorer, validation, order, "replay" if replays else cast(SecondPass, args.second_pass))


def make_projection(args: ShapleyConfig, capture: Capture) -> Projection | None:
    """On the device of the scored parameters, in their full precision."""
    if not args.feature_dim:
        return None
    some = next(iter(capture.parameters.values()))
    return PerParameter(capture.plan(args.feature_dim), args.seed, some.device, full_dtype(some.dtype))
