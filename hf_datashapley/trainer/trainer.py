"""`ShapleyTrainer`: the seams between `transformers.Trainer` and the floors below.

What happens at an update:

    first micro-batch    order "first": validation gradient at the present weights -> directions u
    each micro-batch     Trainer's own forward and backward, under capture: every sample's <g_i, u>, or what it takes
                         to score it later (`passes`)
    clipping             the factor c
    optimizer.step       just before it, orders "second" and "path": directions from the step that is about to be made,
                         then the scores; audit: losses at w_t and w(0)
    after the step       values c <g_i, u>, skipped or not -> ledger; audit: loss at w_{t+1}

Nothing of this touches what `Trainer` computes; the private methods that are overridden stand together at the end of
the class, and `tests/test_parity.py` notices when one of them changes.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..directions.second_order import check_twice_differentiable
from ..directions.validation import Batch, Validation
from ..full_precision import in_full
from ..ghost.capture import Capture, Kernel
from ..ghost.forward_mode import check_token_losses, token_derivatives
from ..ghost.units import Runs
from ..grouping import Grouping
from ..hub import check_values_repo, push_values_to_hub
from ..hub.model_card import link_values
from ..ledger import Ledger, load_audit, load_value_history, load_values
from ..ledger.groups import COUNTED, By, Groups
from ..ledger.layout import unit_keys
from ..ledger.writer import refuse_existing
from ..loss_tokens import count_loss_tokens, shifts_labels
from ..random_state import random_state_kept
from ..ranks import Ranks
from . import requirements
from .batches import IdColumns, IdentifyingCollator, UnitPlan, take_units
from .boundaries import row_documents
from .checkpoints import check_whole, chosen_checkpoint, last_checkpoint, updates_of
from .compiled import compiled_apart, is_compiling, traced_apart
from .config import ShapleyConfig
from .description import describe, describe_training
from .feature_size import announce_size
from .packed import check_documents_apart, check_no_cache, check_samples_apart, packs_samples, train_flags_kept
from .precision import Precision
from .pushing import Background, source_of
from .samples import IdentifiedRows, check_chosen, drawn_samples, is_stream, read_sample_ids
from .scorers import MicroBatch
from .targets import read_targets
from .valuation import Valuation


logger = logging.get_logger(__name__)


class ShapleyTrainer(Trainer):
    """A `Trainer` that gives every training sample its In-Run Data Shapley value.

    A value is the part of the fall of the validation loss, in nats per token, that a sample's gradients brought about
    through the steps of the optimizer (`ShapleyConfig.value_order`: to first order, to second, or along each step's
    path); positive helped. Values add up over updates, samples, groups.
    Training itself is that of `Trainer`: the same batches, losses and weights (see `ShapleyConfig.value_kernel`).

    Wang, Mittal, Song, Jia: "Data Shapley in One Training Run", ICLR 2025, arXiv 2406.11011.

    Args:
        model, args, train_dataset, ...: as `Trainer` takes them; `args` is a `ShapleyConfig`. `train_dataset` is
            map-style, and its rows may have a column of ids (`ShapleyConfig.sample_id_column`), or a stream, whose
            rows must have one.
        validation_dataset: rows whose mean token loss is to be explained, or a dict of them by the targets' names.
            They are collated like training rows.

    Raises:
        ValueError: a setting, the model, a dataset or the optimizer is one whose values would not be exact; the
            message names it and the cure.
    """

    # Trainer's own, which it does not annotate.
    data_collator: Any
    label_smoother: Any
    current_gradient_accumulation_steps: int

    def __init__(
        self,
        model: Any = None,
        args: ShapleyConfig | None = None,
        *positional: Any,
        validation_dataset: Any = None,
        **kwargs: Any,
    ):
        if args is None:
            args = ShapleyConfig(output_dir="tmp_trainer")
        if not isinstance(args, ShapleyConfig):
            raise ValueError(f"args is a {type(args).__name__}: give a ShapleyConfig, which takes the same arguments")
        requirements.check_arguments(args)
        super().__init__(model, args, *positional, **kwargs)
        self.args: ShapleyConfig = args
        requirements.check_launch(self.accelerator, args)
        requirements.check_forward(self.accelerator, args)
        requirements.check_compilation(args, self.accelerator, self.data_collator)
        self._ranks = Ranks(
            self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.is_local_main_process
        )
        requirements.check_model(self.model, self.accelerator.mixed_precision)
        requirements.check_precision(self.accelerator, self.model, args)
        requirements.check_rows(self.train_dataset, "train_dataset")
        requirements.check_loading(self.accelerator, self.data_collator, self.train_dataset, args)
        requirements.check_optimizer_choice(self, args)
        if last_checkpoint(args.output_dir) is None:  # else the run may go on
            refuse_existing(Path(self.value_dir))
        self._make_capture()
        requirements.check_features(args, self._capture)
        self._sample_ids = read_sample_ids(self.train_dataset, args.sample_id_column, progress=self._shows_progress)
        self._training = self._describe_training()
        self._unit_plan = self._make_unit_plan()
        self._targets = read_targets(
            validation_dataset,
            lambda dataset: self._rows_and_collator(dataset, "validation"),
            IdColumns(args.sample_id_column, args.document_id_column),
            shifts_labels(self.model),
            packs_samples(self.data_collator),
            self._shows_progress,
        )
        self._validation = self._make_validation()
        target = self._targets[0]
        row = target.rows[int(target.usable[0])]
        if packs_samples(self.data_collator):
            check_samples_apart(self.model, self._validation_loss, target.collate, row)
        if args.scores_forward:
            batch = self._prepare_inputs(target.collate([row]))
            with train_flags_kept(self.model):
                self.model.train()
                check_token_losses(
                    self.model,
                    self._capture.parameters,
                    self._validation_loss,
                    batch,
                    shifts_labels(self.model),
                    self._precision().half_products,
                )
        elif args.value_unit == "document":
            rows = min(2, self._train_batch_size)
            check_documents_apart(self.model, self._validation_loss, target.collate, row, rows)
        if args.value_order == "second":
            # Every rank on all rows: each has to see for itself.
            alone = replace(self._validation, ranks=Ranks())
            check_twice_differentiable(self.model, alone, self._capture.parameters)
        self._pushes = Background()
        self._values_repo = self._check_values_repo()
        self._linked_repo = self._values_repo
        self._ledger: Ledger | None = None
        self._valuation: Valuation | None = None
        self._checkpoint: str | None = None
        # First of all: when the user's callbacks look at the values, the update they follow is among them.
        self.callback_handler.callbacks.insert(0, UpdateBoundaries(self))

    # What users ask for

    @property
    def value_dir(self) -> str:
        """The folder of this run's ledger."""
        return self.args.value_dir or os.path.join(self.args.output_dir, "values")

    def values(
        self,
        from_step: int | None = None,
        to_step: int | None = None,
        normalize: str | None = None,
        by: By | None = None,
        dataset: datasets.Dataset | None = None,
        key: str | None = None,
        id_column: str | None = None,
    ) -> datasets.Dataset:
        """One row for each unit trained on so far, or each group of them, see `load_values`.

        A column that `by` names without a `dataset` is one of `train_dataset`, and groups are of samples. So is a
        `Partition`: of its documents, where values have these, or of its rows (or with key="sample_id").
        """
        self._flush()
        by, key = self._groups(by, dataset, key)
        return load_values(self.value_dir, from_step, to_step, normalize, by, dataset, key, id_column)

    def value_history(self, from_step: int | None = None, to_step: int | None = None) -> datasets.Dataset:
        """One row for each update and unit in it, see `load_value_history`."""
        self._flush()
        return load_value_history(self.value_dir, from_step, to_step)

    def validation_rows(self, step: int) -> dict[str, np.ndarray]:
        """Indices into each target's dataset of the rows that update number `step` (from 1) is scored against.

        The target of a `validation_dataset` that is not a dict is called "".
        """
        return self._validation.rows_of(step)

    def audit(self, from_step: int | None = None, to_step: int | None = None) -> datasets.Dataset:
        """One row for each audited update and target, see `load_audit`."""
        self._flush()
        return load_audit(self.value_dir, from_step, to_step)

    def push_values_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        by: By | None = None,
        dataset: datasets.Dataset | None = None,
        key: str | None = None,
        id_column: str | None = None,
    ) -> CommitInfo | None:
        """Makes a dataset repo of the values so far, or brings it up to date, see `hub.push_values_to_hub`.

        Its card says what the settings `source_dataset`, `source_revision` and `source_license` do; the model card of
        the run links to it from now on (`push_to_hub` pushes that). `by` and what follows are those of `values`. With
        `token` None, that of the settings (`hub_token`), then the one that is logged in.

        Of several processes the first one pushes, the others return None; in the midst of a run all have to call it.
        """
        self._write_all()
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        by, key = self._groups(by, dataset, key)
        groups = {"by": by, "dataset": dataset, "key": key, "id_column": id_column}
        pushed = self._values_push(repo_id, private, revision, token, **groups)()
        self._linked_repo = pushed.repo_url.repo_id
        link_values(self.args.output_dir, self._linked_repo)
        return pushed

    # A run

    def _begin_run(self) -> None:
        """The optimizer exists and the batch size is settled; also called when the loop is entered again."""
        assert self._ledger is not None
        self._end_run()
        self._ledger.restart()
        if self.args.feature_dim and self.is_world_process_zero():
            updates = self.state.max_steps - self.state.global_step
            rows = updates * self._rows_of_an_update
            announce_size(self.args, self._capture, self.value_dir, rows, self._units_of_a_row())
        self._validation = self._make_validation()
        optimizer = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        twice = self.args.value_order == "second"  # differentiates twice, which compiled graphs do not
        self._valuation = Valuation(
            self.model if twice else compiled_apart(self.model, self.accelerator),
            self.model,
            self.args,
            self._capture,
            self._validation,
            optimizer,
            self._ledger,
            self._ranks,
            self._precision(),
            compiled=is_compiling(self.accelerator),
        )
        if self._checkpoint is not None:
            self._valuation.load(self._checkpoint)

    def _end_update(self) -> None:
        assert self._valuation is not None
        self._valuation.end_update(self.accelerator.optimizer_step_was_skipped)

    def _end_run(self) -> None:
        """Lets go of everything as large as the model."""
        if self._valuation is not None:
            self._valuation.close()
            self._valuation = None

    # Parts

    def _groups(self, by: By | None, dataset: Any, key: str | None) -> tuple[By | None, str | None]:
        """Of the run's own rows, where `by` says no others."""
        own = dataset is None and key in (None, "sample_id")
        if own and isinstance(by, str) and by not in unit_keys(self.args.value_unit):
            return Groups.of_column(self.train_dataset, by, self.args.sample_id_column), "sample_id"
        if dataset is None and isinstance(by, Grouping) and (key is None or key in COUNTED):
            columns = {"sample_id": self.args.sample_id_column, "document_id": self.args.document_id_column}
            key = key or ("document_id" if self._values_have_documents() else "sample_id")
            return Groups.of_partition(by, self.train_dataset, key, columns[key]), key
        return by, key

    def _values_have_documents(self) -> bool:
        if self.args.value_unit != "token":
            return self.args.value_unit == "document"
        rows = self.train_dataset
        return isinstance(rows, datasets.Dataset) and self.args.document_id_column in rows.column_names

    def _check_values_repo(self) -> str | None:
        """The repo that values are pushed to with the model, by the process that does so, if it can be."""
        args, source = self.args, source_of(self.args)
        if not (args.push_to_hub and self.is_world_process_zero()):
            return None
        if args.hub_token is not None:
            logger.warning(
                "hub_token: Trainer writes its arguments into training_args.bin, the token among them, and pushes "
                "that file: log in (`hf auth login`) or set HF_TOKEN instead"
            )
        repo_id = args.hub_values_id or f"{self.hub_model_id}-values"
        return check_values_repo(repo_id, args.hub_private_repo, args.hub_revision, args.hub_token, source)

    def _values_push(
        self, repo_id: str | None, private: bool | None, revision: str | None, token: str | None, **what: Any
    ) -> Callable[[], CommitInfo]:
        """It holds nothing of the trainer, which it may outlive in the background."""
        assert repo_id is not None
        source = source_of(self.args)
        return partial(
            push_values_to_hub,
            self.value_dir,
            repo_id,
            private=private,
            revision=revision,
            token=token or self.args.hub_token,
            source_dataset=source.dataset,
            source_revision=source.revision,
            source_license=source.license,
            model_id=self.hub_model_id,
            **what,
        )

    def _make_unit_plan(self) -> UnitPlan:
        args = self.args
        chosen: frozenset[int] = frozenset()
        if args.value_unit == "token" and args.token_sample_ids is not None:
            chosen = frozenset(args.token_sample_ids)
            check_chosen(chosen, self.train_dataset, self._sample_ids)
        elif args.value_unit == "token" and args.token_samples:
            chosen = drawn_samples(self.train_dataset, self._sample_ids, args.token_samples, args.seed)
        return UnitPlan(
            args.value_unit,
            IdColumns(args.sample_id_column, None if args.value_unit == "sample" else args.document_id_column),
            packs=packs_samples(self.data_collator),
            shifted=shifts_labels(self.model),
            forward=args.scores_forward,
            token_samples=chosen,
        )

    def _describe_training(self) -> dict[str, Any]:
        """Before `Trainer` makes what it was not given: what there is now is the user's."""
        optimizer = str(self.args.optim.value)
        if self.optimizer is not None:
            optimizer = type(self.optimizer).__name__
        elif self.optimizer_cls_and_kwargs is not None:
            optimizer = self.optimizer_cls_and_kwargs[0].__name__
        schedule = self.args.lr_scheduler_type.value if self.lr_scheduler is None else type(self.lr_scheduler).__name__
        has_ids = self._sample_ids is not None or is_stream(self.train_dataset)
        return describe_training(self.args, optimizer, str(schedule), has_ids)

    def _units_of_a_row(self) -> float:
        """About how many, by the first rows; of a stream, 1."""
        unit, column = self.args.value_unit, self.args.document_id_column
        if unit == "sample" or is_stream(self.train_dataset):
            return 1.0
        with random_state_kept():
            rows = [self.train_dataset[i] for i in range(min(len(self.train_dataset), 64))]
        return sum(len(np.unique(row_documents(row, column, unit))) for row in rows) / len(rows)

    def _precision(self) -> Precision:
        return Precision(self.accelerator, self.model.parameters())

    @property
    def _shows_progress(self) -> bool:
        return not self.args.disable_tqdm

    def _make_capture(self) -> None:
        # With "jvp" the layers only say which parameters are scored.
        kernel: Kernel = "project" if self.args.value_kernel == "project" else "fused"
        self._capture = Capture(self.model, self.args.value_modules, kernel)

    def _rows_and_collator(self, dataset: Any, description: str) -> tuple[Any, Callable[[list[Any]], Any]]:
        """Rows and collator as `Trainer` would pair them, unused columns removed in the one or the other."""
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator, description)

    @property
    def _rows_of_an_update(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _make_validation(self) -> Validation:
        trainer = weakref.proxy(self)  # as in `UpdateBoundaries`
        precision = self._precision()
        rows = self._rows_of_an_update
        size = self.args.validation_batch_size or max(1, rows // 16)

        def loss_scale() -> Tensor | None:
            scale = precision.loss_scale()
            # The scaler goes to the limit of training's gradients. With fewer rows a token weighs more in the mean;
            # and some tokens' gradients are larger than others.
            return None if scale is None else scale * (min(1.0, size / rows) / 4)

        return Validation(
            self._targets,
            lambda model, batch: trainer._validation_loss(model, batch),
            shifted=shifts_labels(self.model),
            size=size,
            chunk=self._train_batch_size,
            interval=self.args.validation_interval,
            seed=self.args.seed,
            ranks=self._ranks,
            loss_scale=loss_scale,
        )

    def _validation_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean token loss of a batch, by the run's own loss, but not smoothed."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            with self.compute_loss_context_manager(), traced_apart(self.accelerator):
                inputs = self._prepare_inputs(cast(dict[str, Any], batch))
                # A model gives the mean by itself; a loss function of the user's is told over how many tokens.
                count = None
                if self.compute_loss_func is not None:
                    count = count_loss_tokens(inputs["labels"], shifts_labels(self.model)).sum()
                loss = self.compute_loss(model, inputs, num_items_in_batch=count)
                # Trainer undoes the averaging over ranks, which is not made here.
                scaled = count is not None and self.args.average_tokens_across_devices
                return loss / self._ranks.count if scaled else loss
        finally:
            self.label_smoother = smoother

    def _flush(self) -> None:
        if self._ledger is not None:
            self._ledger.flush()

    def _write_all(self) -> None:
        """What all ranks have is in the ledger; in the midst of a run, where all of them come here."""
        self._flush()
        if self._valuation is not None:
            self._ranks.wait()

    # Overridden methods of Trainer: public, then private

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As `Trainer.train`. The ledger is complete when it returns, on every rank, or raises.

        With `resume_from_checkpoint` the ledger in `value_dir` goes on after the checkpoint's update; what an
        interrupted run wrote after it is discarded. The values are those of a run that was never interrupted.

        Raises:
            ValueError: `value_dir` holds the ledger of an earlier run; or, resuming, it does not hold this run's, or
                not all updates up to the checkpoint, or the checkpoint lacks what the run would go on with.
        """
        self._checkpoint = chosen_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if self._checkpoint is not None:
            check_whole(self._checkpoint)
        self._ranks.wait()  # until all have looked for a ledger that is in the way
        self._ledger = Ledger(
            self.value_dir,
            [target.name for target in self._targets],
            {
                **describe(self.args, self.model, self._capture, self._validation, self.compute_loss_func is not None),
                "training": self._training,
            },
            after=0 if self._checkpoint is None else updates_of(self._checkpoint),
            ranks=self._ranks,
        )
        try:
            result = super().train(self._checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._end_run()
            self._ledger.close()
        self._ranks.wait()
        return result

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        batch = take_units(inputs, shifts_labels(self.model))
        if isinstance(batch.units, Runs):
            check_no_cache(self.model)
        assert self._valuation is not None
        positions = max((x.shape[:2].numel() for x in inputs.values() if isinstance(x, Tensor)), default=1)
        train = super().training_step
        accumulation_steps = self.current_gradient_accumulation_steps

        def run(module: nn.Module = model) -> Tensor:
            # Trainer takes some of the inputs out of their dict.
            return train(module, {**inputs}, num_items_in_batch)

        def run_again() -> Tensor:
            # The window may be another's by now: of a stream that ended within one, and began again.
            self.current_gradient_accumulation_steps = accumulation_steps
            # Not through DDP, which would have a word with the other ranks: it sends buffers before a forward pass.
            return run(model.module if isinstance(model, DistributedDataParallel) else model)

        def derivatives(directions: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            with self.compute_loss_context_manager():
                return token_derivatives(
                    self.model, self._prepare_inputs({**inputs}), directions, shifts_labels(self.model)
                )

        micro_batch = MicroBatch(
            units=batch.units,
            positions=positions,
            micro_batches=accumulation_steps,
            run=run,
            run_again=run_again,
            token_derivatives=derivatives,
        )
        return self._valuation.micro_batch(self.state.global_step + 1, batch.ids, batch.tokens, micro_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._valuation is not None:
            logs |= self._valuation.statistics.drain()
            self._valuation.ledger.collect()
        super().log(logs, start_time)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`. With the setting of that name the values so far follow, to a repo of their own."""
        # Some versions of Trainer have a further argument, `private`.
        pushed = super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        if self.args.push_to_hub:
            self._write_all()
            if self.is_world_process_zero():
                private = kwargs.get("private", self.args.hub_private_repo)
                push = self._values_push(self._values_repo, private, revision or self.args.hub_revision, token)
                if blocking:
                    push()
                else:
                    self._pushes.start(push)
        return pushed

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self._linked_repo is not None and self.is_world_process_zero():
            link_values(self.args.output_dir, self._linked_repo)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Here, not at construction: `model_init` may have made another model by now.
        self._make_capture()
        with self._capture.attached():
            return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that goes on from its own last checkpoint is over; `Trainer` would make one more update.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        if not is_training:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        rows, collate = self._rows_and_collator(dataset, description)
        column = self._unit_plan.columns.document
        if column is not None and isinstance(rows, datasets.Dataset) and column in dataset.column_names:
            # The model does not know the column, so it went with those that are not used.
            rows = dataset.select_columns([*dict.fromkeys([*rows.column_names, column])])
        own_collator = self.data_collator
        self.data_collator = IdentifyingCollator(collate, self._unit_plan)
        try:
            return super()._get_dataloader(
                rows if is_stream(rows) else IdentifiedRows(rows, self._sample_ids),
                description,
                batch_size,
                # The sampler looks at the rows themselves: their lengths, their columns.
                None if sampler_fn is None else lambda _: sampler_fn(rows),
                is_training,
                dataloader_key,
            )
        finally:
            self.data_collator = own_collator

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if isinstance(data_collator, IdentifyingCollator):
            return data_collator  # which removes them after it has taken the ids
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        assert self._valuation is not None
        # As torch.nn.utils.clip_grad_norm_ computes it, in the gradient's precision.
        factor = torch.clamp(self.args.max_grad_norm / (torch.as_tensor(norm) + 1e-6), max=1.0)
        self._valuation.clipped(in_full(factor))
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._flush()
        self._ranks.wait()
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._valuation is not None and self.args.should_save:
            self._valuation.save(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state file, which Trainer writes next, makes the checkpoint complete: ledger and files of all ranks too.
        self._ranks.wait()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero():
            return super()._push_from_checkpoint(checkpoint_folder)
        before = self.push_in_progress
        jobs = 0 if before is None else len(before.jobs)
        super()._push_from_checkpoint(checkpoint_folder)
        begun = self.push_in_progress
        # Not at this time (`hub_strategy`), or an earlier push goes on still.
        if begun is None or (begun is before and len(begun.jobs) == jobs):
            return
        # All ranks have written their parts for the checkpoint. Where one waits for the model's push, so it does here.
        args = self.args
        step = self.state.global_step
        push = self._values_push(self._values_repo, args.hub_private_repo, args.hub_revision, None, to_step=step)
        begun.jobs.append(self._pushes.start(push))


class UpdateBoundaries(TrainerCallback):
    """Tells the trainer when a run begins and when an update is over, between the step and the log row."""

    def __init__(self, trainer: ShapleyTrainer):
        # A cycle would keep the model, and the loader's persistent workers, until the garbage collector comes by.
        self.trainer = weakref.proxy(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._begin_run()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._end_update()
