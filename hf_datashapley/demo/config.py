"""The settings of the demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


AUDITED = 25


@dataclass
class DemoConfig:
    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Parquet or JSONL file with a document per row: column `text` and, where there are, `domain` and "
            "`split` (train, validation). Without it: the text of this Python installation."
        },
    )
    targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Domains whose loss is explained; one document in ten of each is held out for it, or those of the "
            "corpus' own split. Default: code and prose; with --corpus, the two largest domains."
        },
    )
    junk_share: float = field(
        default=0.08, metadata={"help": "Share of the training rows that planted junk takes; 0: no junk."}
    )
    model: str = field(
        default="gpt2-2m",
        metadata={
            "help": "gpt2, pythia or llama from scratch, of about 2, 5 or 20 million parameters (gpt2-2m, llama-20m, "
            "...), or the folder of a pretrained model."
        },
    )
    updates: int = field(default=300, metadata={"help": "Updates of the optimizer."})
    batch_size: int = field(default=8, metadata={"help": "Rows of up to 256 tokens per update."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Of AdamW, after warming up over a tenth of the updates; then falls linearly."}
    )
    seed: int = field(
        default=0, metadata={"help": "Of the choice of documents, the junk, the weights and the order of the rows."}
    )
    validation_batch_size: int = field(
        default=2, metadata={"help": "Held-out rows of each target that an update is scored against."}
    )
    validation_interval: int = field(
        default=1, metadata={"help": "Updates between fresh validation gradients; more is faster, and staler."}
    )
    value_order: Literal["first", "second", "path"] = field(
        default="first",
        metadata={
            "help": "first: orders documents, cheapest; second: with the curvature of the loss; path: along each "
            "step, so that values add up to what the documents did."
        },
    )
    path_nodes: int = field(
        default=1, metadata={"help": "Points of each step at which order path takes the validation gradient."}
    )
    path_slope: Literal["secant", "owen"] = field(
        default="secant",
        metadata={
            "help": "What order path counts a unit of gradient for under Adam: secant: that of the whole batch; owen: "
            "averaged over coalitions of rows, right also in the first updates, and dearer."
        },
    )
    value_optimizer: Literal["auto", "sgd"] = field(
        default="auto",
        metadata={"help": "auto: values of what AdamW does; sgd: as if plain SGD had trained, the paper's proxy."},
    )
    value_momentum: Literal["unrolled", "immediate"] | None = field(
        default=None,
        metadata={
            "help": "unrolled: a gradient's weight once momentum has played out; immediate: that in its own update. "
            "Default: unrolled for order first, immediate for the others."
        },
    )
    value_kernel: Literal["auto", "fused", "project"] = field(
        default="auto",
        metadata={"help": "fused (auto's choice) is faster; with project, training is bit-identical to Trainer's."},
    )
    audit_steps: int | None = field(
        default=None,
        metadata={
            "help": "Hold the values against the measured change of the loss every so many updates; 0: never. "
            f"Default: so many that about {AUDITED} are held."
        },
    )
    output_dir: str = field(
        default="runs/demo", metadata={"help": "Each run writes the next free folder in it: run-1, run-2, ..."}
    )

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "validation_batch_size", "validation_interval", "path_nodes"):
            if vars(self)[name] < 1:
                raise ValueError(f"--{name} {vars(self)[name]}: give at least 1")
        if self.audit_steps is None:
            self.audit_steps = max(1, round(self.updates / AUDITED))
        if self.audit_steps < 0:
            raise ValueError(f"--audit_steps {self.audit_steps}: give at least 0")
        if self.value_momentum is None:
            self.value_momentum = "unrolled" if self.value_order == "first" else "immediate"
        if self.value_order != "first" and self.validation_interval > 1:
            raise ValueError(
                f"--validation_interval {self.validation_interval}: order {self.value_order} takes a fresh validation "
                "gradient at every update; give 1, or --value_order first"
            )
        if not 0 <= self.junk_share <= 0.5:
            raise ValueError(f"--junk_share {self.junk_share}: give a share from 0 to 0.5")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning_rate {self.learning_rate}: give more than 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed}: give a whole number from 0 to {2**32 - 1}")
