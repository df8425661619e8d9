"""The settings of a run that values its training data."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


CHOICES = {
    "value_order": ("first", "second", "path"),
    "value_unit": ("sample", "document", "token"),
    "value_optimizer": ("auto", "sgd"),
    "value_momentum": (None, "unrolled", "immediate"),
    "value_kernel": ("auto", "fused", "project", "jvp"),
    "path_slope": ("secant", "owen"),
    "second_pass": ("auto", "stash", "replay"),
    "feature_dtype": ("float16", "float32"),
}


@dataclass
class ShapleyConfig(TrainingArguments):
    """`TrainingArguments` and what is to be valued, and how.

    > Parameters that control the values

    Args:
        value_order: "first", the inner product of a sample's gradient with the validation gradient through the
            optimizer's step (arXiv 2406.11011, Theorem 3): cheapest, orders samples well, does not add up. "second",
            with the exact gradient-Hessian-gradient products of the step (Theorem 4). "path", the validation gradient
            averaged along the step, whose values add up to what the samples did to the loss at any learning rate.
        value_unit: what gets a value: "sample", a row of `train_dataset`; "document", what a document has in one row
            (`document_id_column`), where documents that share a row attend to themselves only; "token", a token whose
            loss is trained on, in the samples that `token_samples` and `token_sample_ids` choose (in others, and where
            there are ids of documents, what a document has in one row).
        value_optimizer: "auto", the optimizer that runs (SGD, Adam, AdamW); "sgd", the paper's proxy: values as if
            plain SGD with the same learning rates had trained.
        value_momentum: "unrolled", a gradient counts with the weight it will have had once momentum has played out;
            "immediate", with what it moves in its own update. None: "unrolled" for order "first", "immediate" for the
            others, whose sums are those of single updates.
        value_modules: modules whose parameters are scored, as PEFT's `target_modules`: names or name endings, or one
            regular expression. None: every parameter that trains.
        value_kernel: "fused" forms weight gradients sample by sample and needs no further matrix product; "project"
            takes one for each layer and target, and leaves the training run bit for bit what it is without values;
            "jvp" differentiates every token's own loss forward, about one more training step for each target, for unit
            "token", and for documents that attend to each other; training is left as it is. "auto": "jvp" for unit
            "token", else "fused".
        value_dir: folder of the ledger; None: `<output_dir>/values`.
        validation_batch_size: validation rows for each target at an update; None: one for every 16 training rows of
            an update, at least 1.
        validation_interval: updates between fresh validation gradients.
            Orders "second" and "path" take a fresh one at every update.
        path_nodes: Gauss-Legendre nodes of order "path", a validation pass each.
        path_slope: "secant", the step that Adam makes of the whole batch, per unit of gradient; "owen", averaged over
            coalitions of samples: right also in the first updates and for rarely touched rows, and dearer. The same
            under SGD. With weights in half precision, frozen ones too, its values add up to the change of the loss
            only nearly.
        second_pass: how orders "second" and "path" score when the step is known: "stash" keeps every layer's inputs
            and output gradients until then, "replay" runs the update's micro-batches again. "auto": "stash" if it
            takes no more than half of the memory that is free at the first update.
        audit_steps: every so many updates, measure what the update did to the validation losses, and hold the values
            against it (`ShapleyTrainer.audit`); three forward passes of the validation rows. 0: never. With
            `value_modules` what the other modules did is in `actual` only. With weights in half precision, frozen ones
            too, the measured losses are rounded, by more than a small step changes them.
        feature_dim: numbers of each unit's randomly projected gradient that are stored with its values, so that it can
            be valued on validation rows that arrive later (`LateValues`); as many as the parameters have entries lose
            nothing. 0: none. With order "first" only. A unit takes 2 bytes a number on the disk each time that it is
            trained on. In memory, a weight's projection takes 64 to 128 floats for each entry of its longer side, and
            five bytes for as many of each of its shorter one.
        feature_dtype: "float16", each unit's scaled to its range, or "float32".
        sample_id_column: int64 column with the samples' ids; a dataset without it is numbered by row. A stream must
            have it: integers from 0 on, each row's own, made where the rows are made. Rows of a stream that have the
            same id get one value.
        document_id_column: for unit "document", a column with the document of each token of a row: integers from 0
            on, -1 for padding. `pack_documents` makes it.
        token_samples: for unit "token", how many samples have a value for each token, drawn with `seed`; tables of all
            tokens would grow with the corpus.
        token_sample_ids: the ids of these samples, instead of a draw.
        hub_values_id: the dataset repo that values are pushed to where `push_to_hub` pushes the model: with each
            checkpoint, as `hub_strategy` says, and at the end. None: the model repo's id and "-values".
        source_dataset: the dataset on the Hub that is trained on, which the card of the values names.
        source_revision: its commit, branch or tag.
        source_license: its licence, as the Hub calls it ("cc-by-4.0"), which the values inherit. None: what the
            dataset's card says, if it says any.

    Raises:
        ValueError: a setting has a value that is not offered.
    """

    value_order: str = field(default="first", metadata={"help": "Order of the values: 'first', 'second' or 'path'."})
    value_unit: str = field(
        default="sample",
        metadata={"help": "What gets a value: 'sample', a row; 'document', a document's part of a row; 'token'."},
    )
    value_optimizer: str = field(
        default="auto",
        metadata={
            "help": "'auto': values for the optimizer that runs; 'sgd': as if plain SGD had trained (the paper)."
        },
    )
    value_momentum: str | None = field(
        default=None,
        metadata={
            "help": "'unrolled': a gradient's weight once momentum has played out; 'immediate': its weight in its own "
            "update. Default: 'unrolled' for order 'first', else 'immediate'."
        },
    )
    value_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules whose parameters are scored: names or name endings, or one regular expression. Default: "
            "every parameter that trains."
        },
    )
    value_kernel: str = field(
        default="auto",
        metadata={
            "help": "'fused' (fast; the default), 'project' (training stays bit-identical to Trainer's) or 'jvp' (for "
            "tokens, and documents that attend to each other)."
        },
    )
    value_dir: str | None = field(
        default=None, metadata={"help": "The ledger's folder. Default: <output_dir>/values."}
    )
    validation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Validation rows of each target at an update. Default: one for every 16 training rows."},
    )
    validation_interval: int = field(default=1, metadata={"help": "Updates between fresh validation gradients."})
    path_nodes: int = field(
        default=1, metadata={"help": "Gauss-Legendre nodes of order 'path', a validation pass each."}
    )
    path_slope: str = field(
        default="secant",
        metadata={"help": "Adam's step per unit of gradient: 'secant' or 'owen' (smoothed; dearer)."},
    )
    second_pass: str = field(
        default="auto",
        metadata={"help": "Orders 'second' and 'path' score from what they kept ('stash') or from a 'replay'."},
    )
    audit_steps: int = field(
        default=0, metadata={"help": "Hold the values against the change of the loss every so many updates; 0: never."}
    )
    feature_dim: int = field(
        default=0,
        metadata={
            "help": "Numbers of each unit's projected gradient to store, for validation sets that arrive later; 0: "
            "none."
        },
    )
    feature_dtype: str = field(
        default="float16", metadata={"help": "What the projected gradients are stored in: 'float16' or 'float32'."}
    )
    sample_id_column: str = field(
        default="sample_id",
        metadata={
            "help": "Integer column with the samples' ids; without it, rows are numbered, which those of a stream "
            "cannot be."
        },
    )
    document_id_column: str = field(
        default="document_id",
        metadata={"help": "Column with the document of each token of a row, for unit 'document'."},
    )
    token_samples: int = field(
        default=1000, metadata={"help": "Samples whose tokens have values of their own, for unit 'token'."}
    )
    token_sample_ids: list[int] | None = field(
        default=None, metadata={"help": "The ids of these samples. Default: they are drawn."}
    )
    hub_values_id: str | None = field(
        default=None,
        metadata={
            "help": "With push_to_hub: the dataset repo for the values. Default: the model repo's name and '-values'."
        },
    )
    source_dataset: str | None = field(
        default=None, metadata={"help": "The dataset on the Hub that is trained on, for the card of the values."}
    )
    source_revision: str | None = field(default=None, metadata={"help": "Its commit, branch or tag."})
    source_license: str | None = field(
        default=None,
        metadata={"help": "Its licence, which the values inherit. Default: what the dataset's card says."},
    )

    @property
    def scores_forward(self) -> bool:
        return self.value_unit == "token" or self.value_kernel == "jvp"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, offered in CHOICES.items():
            if vars(self)[name] not in offered:
                raise ValueError(f"{name}={vars(self)[name]!r} is not offered: choose one of {offered}")
        if self.validation_batch_size is not None and self.validation_batch_size < 1:
            raise ValueError(f"validation_batch_size={self.validation_batch_size}: give at least 1 row, or None")
        if self.validation_interval < 1:
            raise ValueError(f"validation_interval={self.validation_interval}: give at least 1 update")
        if self.path_nodes < 1:
            raise ValueError(f"path_nodes={self.path_nodes}: give at least 1 node")
        if self.audit_steps < 0:
            raise ValueError(f"audit_steps={self.audit_steps}: give a number of updates, or 0 for no audit")
        if self.feature_dim < 0:
            raise ValueError(f"feature_dim={self.feature_dim}: give a number of features, or 0 for none")
        if self.feature_dim and self.value_order != "first":
            raise ValueError(
                f"feature_dim={self.feature_dim} stores what values of order 'first' are made of, not those of "
                f"value_order={self.value_order!r}, whose directions follow each step: set value_order='first', or "
                "feature_dim=0"
            )
        if self.feature_dim and self.scores_forward:
            raise ValueError(
                f"feature_dim={self.feature_dim} projects gradients of samples and of documents apart, which a "
                "backward pass gives: set feature_dim=0, or value_unit='sample' or 'document' with "
                "value_kernel='auto' instead of value_unit='token' or value_kernel='jvp'"
            )
        if self.value_order != "first" and self.validation_interval > 1:
            raise ValueError(
                f"value_order={self.value_order!r} follows the step of every update: set validation_interval=1, or "
                "value_order='first'"
            )
        if self.value_order == "path" and self.path_slope == "owen" and self.value_momentum == "unrolled":
            raise ValueError(
                "path_slope='owen' shares out what one update did to the loss, so a gradient counts with what it did "
                "in it: set value_momentum='immediate' (or None), or path_slope='secant'"
            )
        if self.value_order == "path" and self.path_slope == "owen" and self.value_modules is not None:
            raise ValueError(
                "path_slope='owen' shares out the whole change of the loss, so every parameter that trains is scored: "
                "set value_modules=None, freeze the others, or set path_slope='secant'"
            )
        if self.value_unit == "token" and self.value_kernel not in ("auto", "jvp"):
            raise ValueError(
                f"value_unit='token' takes value_kernel='jvp' (or 'auto'), not {self.value_kernel!r}: a backward pass "
                "gives no token's own gradient"
            )
        if self.value_unit == "sample" and self.value_kernel == "jvp":
            raise ValueError(
                "value_kernel='jvp' is for value_unit='document' or 'token': samples need no more than "
                "value_kernel='auto'"
            )
        if self.scores_forward and self.second_pass == "stash":
            raise ValueError("second_pass='stash' keeps what value_kernel='jvp' does not use: set second_pass='auto'")
        if self.scores_forward and self.value_order == "path" and self.path_slope == "owen":
            raise ValueError(
                "path_slope='owen' needs the squares of single gradients, which value_kernel='jvp' does not form: set "
                "path_slope='secant'"
            )
        if self.token_samples < 0:
            raise ValueError(f"token_samples={self.token_samples}: give a number of samples")
        if self.hub_values_id is not None and not self.push_to_hub:
            raise ValueError(
                f"hub_values_id={self.hub_values_id!r} is for runs that push: set push_to_hub=True, or call "
                "push_values_to_hub when the run is over"
            )
