"""Values on validation rows that arrive when the run is over.

A run with `feature_dim` > 0 has stored P g_i, every unit's projected gradient, with its values. For new validation
rows with mean token loss l_v

    value_i(t) = < c g_i , u >  is estimated by  c_t lr_t < P g_i , P (A_t * grad l_v(w_t)) >

(Wang et al., "Data Shapley in One Training Run", arXiv 2406.11011, Theorem 3, through the optimizer's own step as in
`directions.first_order`), with the weights and second moments of the checkpoints around update t, and everything else
as the ledger has it. With a checkpoint before every update the estimate is unbiased over draws of P, and with as many
features as parameters it is the value itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..directions.optimizers import Momentum
from ..directions.validation import Batch, Validation, ValidationTarget
from ..full_precision import full_dtype
from ..ghost.sides import PerParameter, described_sides
from ..ledger import load_values
from ..ledger.layout import MANIFEST, complete_parts, read_manifest
from ..loss_tokens import shifts_labels
from ..trainer.batches import IdColumns
from ..trainer.checkpoints import OPTIMIZER_NAMES, load_optimizer_names, updates_of
from ..trainer.packed import packs_samples
from ..trainer.targets import read_targets
from .late_directions import CheckpointDirections, LateDirections, SavedOptimizer, checkpoint_directions
from .late_ledger import write_late_ledger
from .measures import moved
from .settings import known_columns


logger = logging.get_logger(__name__)

Checkpoints = str | Path | Sequence[str | Path] | Mapping[int, str | Path]


class LateValues:
    """Values of a run's training data on validation rows that did not exist while it trained.

    The run was made with `feature_dim` > 0 and `value_order="first"`, and has kept checkpoints. A validation gradient
    is computed at each of them, with the second moments that it holds under Adam, and interpolated in between: the
    more checkpoints, the nearer late values are to those of a run that had known the rows. The first updates, where
    second moments are young, change fastest: a checkpoint after the first few is worth several later ones.
    The noise of the projection falls with the root of `feature_dim`; sums over samples (sources, documents) have less.

    Costs one pass over the validation rows for each checkpoint, and reads the run's features once. Memory holds one
    checkpoint, a few batches of features, and the table of values.

    Args:
        run_dir: the run's `output_dir`, or its `value_dir`.
        data_collator: of the validation rows, as the run's; None: `transformers.default_data_collator`.
        batch_size: validation rows of a forward pass.
        load_model: makes the model of a checkpoint's folder, with the names of parameters that it had in training;
            None: `AutoModelForCausalLM.from_pretrained`.
        loss: (model, batch) -> the mean token loss of a batch on the model's device; None: the model's own.
        device: that computes; None: a GPU, if there is one.
        progress: show progress bars.

    Raises:
        FileNotFoundError: there is no ledger.
        ValueError: the ledger has no features, or is of a run with a loss function of its own and `loss` is missing.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        data_collator: Callable[[list[Any]], Any] | None = None,
        batch_size: int = 8,
        load_model: Callable[[str], nn.Module] | None = None,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
    ):
        run_dir = Path(run_dir)
        self.value_dir = run_dir if (run_dir / MANIFEST).is_file() else run_dir / "values"
        self.data_collator = default_data_collator if data_collator is None else data_collator
        self.batch_size = batch_size
        self.load_model = AutoModelForCausalLM.from_pretrained if load_model is None else load_model
        self.loss = own_loss if loss is None else loss
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.progress = progress
        self.manifest = read_manifest(self.value_dir)
        if self.manifest.get("features") is None:
            raise ValueError(
                f"{self.value_dir} holds values and no features of the units' gradients: train with feature_dim > 0"
            )
        if self.manifest["settings"]["compute_loss_func"] and loss is None:
            raise ValueError(
                "the run trained with a compute_loss_func of its own, which the ledger does not hold: give the mean "
                "token loss of a batch as `loss`"
            )

    def score(
        self, model_checkpoints: Checkpoints, validation_dataset: Any, value_dir: str | Path | None = None
    ) -> datasets.Dataset:
        """The table of `ShapleyTrainer.values()`, as if the rows had been the run's `validation_dataset`.

        Args:
            model_checkpoints: folders of the run's checkpoints, or the folder that they lie in (the run's
                `output_dir`); or a mapping to them from the number of updates that had been made. The model as it was
                before the first update counts under SGD, as {0: folder}.
            validation_dataset: rows with labels, or a dict of them by the targets' names; all of them are used for
                every checkpoint.
            value_dir: where to keep the late values, as a ledger of their own, which everything that reads a run's
                reads (`load_values` with windows and groups, `load_value_history`, the report). Its updates have a
                validation loss where there was a checkpoint right before them. None: nowhere.

        Raises:
            ValueError: a checkpoint is not this run's, or lacks its optimizer; the ledger or its features are not
                whole; or there is something at `value_dir`.
        """
        folders = folders_of(model_checkpoints)
        if value_dir is not None and Path(value_dir).exists():
            raise ValueError(f"value_dir {value_dir} is there already: name a new folder, or move the old one away")
        targets, directions = self._directions(folders, validation_dataset)
        if value_dir is not None:
            write_late_ledger(self.value_dir, Path(value_dir), targets, directions, self.progress)
            return load_values(value_dir)
        with tempfile.TemporaryDirectory() as folder:
            write_late_ledger(self.value_dir, Path(folder) / "values", targets, directions, self.progress)
            return load_values(Path(folder) / "values")

    def _directions(
        self, folders: dict[int, Path], validation_dataset: Any
    ) -> tuple[list[ValidationTarget], LateDirections]:
        """One checkpoint in memory after the other."""
        settings = self.manifest["settings"]
        proxy = settings["value_optimizer"] == "sgd"
        optimizer = SavedOptimizer.load(folders[max(folders)], torch.device("cpu"))
        optimizer.state.clear()  # only its groups are wanted here
        adaptive = optimizer.kind != "SGD" and not proxy
        if adaptive and 0 in folders:
            raise ValueError(
                f"model_checkpoints: before the first update {optimizer.kind} has no second moments, and samples have "
                "no values of order 'first': leave out the checkpoint of 0 updates"
            )
        for folder in folders.values():
            if (folder / OPTIMIZER_NAMES).is_file() and load_optimizer_names(folder)["run"] != self.manifest["run"]:
                raise ValueError(
                    f"model_checkpoints: {folder} and the ledger in {self.value_dir} are of different runs: name the "
                    "run's own checkpoints"
                )
        warn_of_gaps(folders, complete_parts(self.value_dir).last)
        found: list[CheckpointDirections] = []
        validation: Validation | None = None
        projection: PerParameter | None = None
        for updates, folder in tqdm(folders.items(), "validation gradients", disable=not self.progress):
            model = self.load_model(str(folder)).to(self.device)
            disable_cache(model)
            parameters = self._parameters(model, folder)
            if validation is None or projection is None:
                dtype = full_dtype(next(iter(parameters.values())).dtype)
                projection = described_sides(self.manifest["features"], self.device, dtype)
                validation = self._validation(model, validation_dataset)
            moments = SavedOptimizer.load(folder, self.device) if adaptive else None
            found.append(checkpoint_directions(updates, model, parameters, validation, moments, projection))
        assert validation is not None and projection is not None
        momentum = cast(Momentum, settings["value_momentum"])
        return validation.targets, LateDirections(found, optimizer, projection, momentum, proxy)

    def _parameters(self, model: nn.Module, folder: Path) -> dict[str, nn.Parameter]:
        """The parameters that the run has scored.

        Raises:
            ValueError: the model lacks one, or has it in another shape.
        """
        own = dict(model.named_parameters())
        parameters = {}
        for name, described in self.manifest["features"]["parameters"].items():
            if name not in own or list(own[name].shape) != described["shape"]:
                has = f"has it as {list(own[name].shape)}" if name in own else "has none of that name"
                raise ValueError(
                    f"the run trained {name} {described['shape']}, and the model of {folder} {has}: name the run's "
                    "own checkpoints, or give `load_model`, which makes the model as it was trained (for adapters "
                    "peft.AutoPeftModelForCausalLM.from_pretrained)"
                )
            own[name].requires_grad_(True)
            parameters[name] = own[name]
        return parameters

    def _validation(self, model: nn.Module, validation_dataset: Any) -> Validation:
        shifted = shifts_labels(model)
        targets = read_targets(
            validation_dataset,
            lambda dataset: (dataset, known_columns(self.data_collator, model)),
            IdColumns("sample_id", "document_id"),
            shifted,
            packs_samples(self.data_collator),
            self.progress,
        )

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return self.loss(model, moved(batch, self.device))

        most = max(len(target.usable) for target in targets)
        return Validation(targets, loss, shifted, size=most, chunk=self.batch_size, interval=1, seed=0)


def folders_of(model_checkpoints: Checkpoints) -> dict[int, Path]:
    """Folders of checkpoints by the number of updates that had been made.

    Raises:
        ValueError: there is none, or two are of the same update.
    """
    if isinstance(model_checkpoints, Mapping):
        folders = {int(updates): Path(folder) for updates, folder in model_checkpoints.items()}
    else:
        if isinstance(model_checkpoints, str | Path):
            found = [Path(model_checkpoints)]
            if not (found[0] / TRAINER_STATE_NAME).is_file():
                found = sorted(found[0].glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        else:
            found = [Path(folder) for folder in model_checkpoints]
        folders = {updates_of(str(folder)): folder for folder in found}
        if len(folders) < len(found):
            raise ValueError("model_checkpoints: two of the folders are of the same update: leave one out")
    if not any(folders):
        raise ValueError(
            f"model_checkpoints={model_checkpoints!r} names no checkpoint after an update: give folders that the run "
            "has written (save_steps, save_total_limit)"
        )
    return dict(sorted(folders.items()))


def warn_of_gaps(folders: dict[int, Path], updates: int) -> None:
    """Warns where most of a run lies before its first checkpoint, or after its last."""
    first, last = min(folders), max(folders)
    if first + updates - last > updates / 2:
        logger.warning(
            f"model_checkpoints are of the updates {first} to {last} of {updates}, and the direction of all others is "
            "taken from the nearest: keep more of them (save_total_limit=None), or read the values of that window "
            "only (value_dir=..., load_values(from_step=..., to_step=...))"
        )


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def disable_cache(model: nn.Module) -> None:
    """Beside a cache, models of transformers make no mask that keeps packed samples apart."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False
