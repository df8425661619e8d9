"""Which domains teach a model what, early and late in training: values of documents, by domain and stage.

A small GPT-2 and a small Pythia are trained from scratch on documents of several domains, packed into rows that they
share (`pack_documents`). Every document is valued against three targets at once, held-out documents of three domains.
The ledger knows at which update a value came about, so that stages of training can be asked for when all is over; each
stage is twice as long as the one before it.

    relative value of a domain in a stage = its share of the stage's value / its share of the stage's tokens

At 1 a domain's tokens are worth as much as the average token trained on; above 1 its share of value exceeds its share
of tokens; below 0 its documents raised the target's loss. A share of value is of a sum in which helping and hurting
documents are set off against each other. That makes sense where the sum is what training did to the loss, hence
value_order "path", and path_slope "owen", since the early stages lie where Adam's second moments are young.

    python examples/domains_over_training/domains_over_training.py
    python examples/domains_over_training/domains_over_training.py --corpus corpus.parquet --targets code prose letters

The text is that of the Python installation, or a file's with columns `text`, `domain` and, if you like, `split`.
Nothing is downloaded.

Sizes, as suffixes: D documents, G domains, S stages, K targets.
"""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
import transformers
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from transformers import HfArgumentParser, PrinterCallback

import hf_datashapley
from hf_datashapley import ShapleyConfig, ShapleyTrainer, load_updates
from hf_datashapley.demo.corpus import Document, choose_targets, drop_near_duplicates, hold_out, read_corpus
from hf_datashapley.demo.harvest import harvest
from hf_datashapley.demo.job import new_run_folder
from hf_datashapley.demo.models import NAMES, VOCABULARY, make_model
from hf_datashapley.demo.progress import OneLineProgress
from hf_datashapley.demo.rows import train_tokenizer
from hf_datashapley.documents import pack_documents
from hf_datashapley.evaluation import fidelity


Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CHARACTERS_PER_TOKEN = 4  # more than a small vocabulary reaches, so that there is text enough
LEAST_HARVEST = 1_000_000  # characters, so that there are documents enough to hold out
HARVESTED_TARGETS = ("code", "prose", "readme")
AUDITS = 30


@dataclass
class Setting:
    """What is trained, and on what."""

    corpus: str | None = field(
        default=None,
        metadata={
            "help": "Parquet or JSONL file with a document per row: columns `text`, `domain` and, where there is one, "
            "`split` (train, validation). Without it: the text of this Python installation."
        },
    )
    targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Domains whose loss is explained. Default: code, prose and readme; with --corpus, the two largest."
        },
    )
    models: list[str] = field(
        default_factory=lambda: ["gpt2-2m", "pythia-2m"], metadata={"help": f"Any of {', '.join(NAMES)}."}
    )
    updates: int = 320
    batch_size: int = field(default=8, metadata={"help": "Rows in an update."})
    length: int = field(default=256, metadata={"help": "Tokens in a row."})
    vocabulary: int = field(
        default=VOCABULARY, metadata={"help": "Of the byte-level BPE that is trained on the text."}
    )
    validation_rows: int = field(default=2, metadata={"help": "Rows of each target that an update is scored against."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Of AdamW, after warming up over a tenth of the updates; then falls linearly."}
    )
    stages: int = field(default=6, metadata={"help": "Into which training is divided, each twice as long."})
    seed: int = field(default=0, metadata={"help": "Of the choice and order of text, and of the weights."})
    threads: int = 1
    output_dir: str = field(
        default="runs/domains_over_training",
        metadata={"help": "Each run writes the next free folder in it: run-1, ..."},
    )

    def __post_init__(self) -> None:
        unknown = [name for name in self.models if name not in NAMES]
        if unknown:
            raise ValueError(f"--models {' '.join(unknown)}: choose among {', '.join(NAMES)}")
        if self.stages < 2 or self.updates < 2**self.stages:
            raise ValueError(
                f"--stages {self.stages} of --updates {self.updates}: give at least 2 stages, and {2**self.stages} "
                "updates for so many"
            )


# Text


@dataclass(frozen=True)
class Data:
    """`documents` has a row for each: its number is the document's id, its domain what values are summed by."""

    documents: Dataset
    train: Dataset
    validation: dict[str, Dataset]


def make_data(setting: Setting) -> Data:
    """Documents in random order, without near-duplicates, in as many rows as the updates take."""
    rows = setting.updates * setting.batch_size
    characters = rows * setting.length * CHARACTERS_PER_TOKEN
    if setting.corpus is None:
        found = harvest(max(characters, LEAST_HARVEST), setting.seed)
    else:
        found = read_corpus(setting.corpus)
        random.Random(setting.seed).shuffle(found)
    documents = drop_near_duplicates(found)
    targets = choose_targets(documents, setting.targets, HARVESTED_TARGETS if setting.corpus is None else ())
    train, held_out = hold_out(documents, targets, setting.seed)
    enough = len(train)
    for number, document in enumerate(train):
        characters -= len(document.text)
        if characters <= 0:
            enough = number + 1
            break
    train = train[:enough]
    tokenizer = train_tokenizer([document.text for document in train], setting.vocabulary, setting.length)
    packed = pack_documents(table_of(train), tokenizer, setting.length)
    return Data(
        table_of(train),
        packed.select(range(min(rows, len(packed)))),
        {target: pack_documents(table_of(kept), tokenizer, setting.length) for target, kept in held_out.items()},
    )


def table_of(documents: Sequence[Document]) -> Dataset:
    columns = ("domain", "title", "text")
    return Dataset.from_dict({name: [vars(document)[name] for document in documents] for name in columns})


# Training


def train(model: str, data: Data, setting: Setting, folder: str) -> ShapleyTrainer:
    """One pass over the rows where the text is enough, with a value for each document and target."""
    trainer = ShapleyTrainer(
        make_model(model, setting.vocabulary, setting.length, setting.seed),
        ShapleyConfig(
            output_dir=folder,
            max_steps=setting.updates,
            per_device_train_batch_size=setting.batch_size,
            learning_rate=setting.learning_rate,
            warmup_steps=setting.updates // 10,
            weight_decay=0.1,
            max_grad_norm=1.0,
            value_unit="document",
            value_order="path",
            path_slope="owen",
            validation_batch_size=setting.validation_rows,
            audit_steps=max(1, setting.updates // AUDITS),
            logging_steps=10,
            disable_tqdm=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=setting.seed,
        ),
        train_dataset=data.train,
        validation_dataset=data.validation,
    )
    for callback in (PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(OneLineProgress())
    trainer.train()
    return trainer


# Stages and shares


def stages(updates: int, count: int) -> list[tuple[int, int]]:
    """The first and the last update of each stage. The last one is the second half of training, the one before it the
    second half of the first half, and so on."""
    ends = [round(updates / 2**halvings) for halvings in reversed(range(count))]
    return list(zip([1, *(end + 1 for end in ends[:-1])], ends, strict=True))


def relative_value(value_G: Floats, tokens_G: Floats) -> Floats:
    """Share of value by share of tokens; nan for a domain without tokens."""
    with np.errstate(invalid="ignore"):
        return (value_G / value_G.sum()) / (tokens_G / tokens_G.sum())


def standard_error(value_D: Floats, tokens_D: Floats, group_D: Ints, groups: int) -> Floats:
    """Of `relative_value`, over documents; nan for a domain of fewer than two.

    What a document contributes to the error of a ratio of sums is its residual (the infinitesimal jackknife). Here are
    two such ratios: a domain's value by its tokens, and that by the same of all domains.
    """
    documents_G, tokens_G = np.bincount(group_D, minlength=groups), np.bincount(group_D, tokens_D, groups)
    mean = value_D.sum() / tokens_D.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        rate_G = np.bincount(group_D, value_D, groups) / tokens_G
        correction_G = np.where(documents_G > 1, documents_G / (documents_G - 1), np.nan)
    own_D = (value_D - rate_G[group_D] * tokens_D) / tokens_G[group_D]
    all_D = (value_D - mean * tokens_D) / tokens_D.sum()
    influence_DG = np.eye(groups)[group_D] * own_D[:, None] - all_D[:, None] * rate_G / mean
    error_G: Floats = np.sqrt(correction_G * np.square(influence_DG).sum(0)) / abs(mean)
    return error_G


@dataclass(frozen=True)
class Stage:
    """Sums over its updates, or means where that is said."""

    first: int
    last: int
    tokens_G: Floats  # loss tokens trained on
    loss_K: Floats  # mean
    value_KG: Floats  # nats
    relative_KG: Floats
    error_KG: Floats

    @property
    def name(self) -> str:
        return f"{self.first}-{self.last}"


@dataclass(frozen=True)
class Run:
    """One model's training in numbers; `domains` are the targets first, then the largest."""

    model: str
    parameters: int
    targets: list[str]
    domains: list[str]
    documents_G: Ints
    tokens_G: Floats
    stages: list[Stage]
    audit: dict[str, dict[str, float]]  # by target; sums over audited updates, nats
    cpu_minutes: float


def measure(model: str, data: Data, setting: Setting, folder: Path) -> Run:
    """Trains a model, whose ledger stays in the folder, and reads out of it."""
    started = time.process_time()
    trainer = train(model, data, setting, str(folder))
    minutes = (time.process_time() - started) / 60
    targets = list(data.validation)
    whole = trainer.values(by="domain", dataset=data.documents).to_pandas().set_index("domain")
    others = whole.tokens.drop(targets, errors="ignore").sort_values(ascending=False)
    domains = [*(target for target in targets if target in whole.index), *others.index]
    audit = trainer.audit().to_pandas().groupby("target")[["samples", "carried", "predicted", "actual"]].sum()
    return Run(
        model=model,
        parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
        targets=targets,
        domains=domains,
        documents_G=whole.documents[domains].to_numpy(),
        tokens_G=whole.tokens[domains].to_numpy(np.float64),
        stages=[
            read_stage(trainer, data.documents, domains, targets, *span)
            for span in stages(setting.updates, setting.stages)
        ],
        audit=audit.to_dict("index"),
        cpu_minutes=minutes,
    )


def read_stage(
    trainer: ShapleyTrainer, documents: Dataset, domains: list[str], targets: list[str], first: int, last: int
) -> Stage:
    """What the ledger says about these updates: sums by domain, and by document for the errors of their ratios."""
    columns = [f"value_{target}" for target in targets]
    by_domain = trainer.values(first, last, by="domain", dataset=documents).to_pandas().set_index("domain")
    by_domain = by_domain.reindex(domains, fill_value=0)
    by_document = trainer.values(first, last, by="document_id").to_pandas()
    place = {domain: number for number, domain in enumerate(domains)}
    domain_of = documents["domain"]
    group_D = np.array([place[domain_of[number]] for number in by_document.document_id])
    tokens_D, tokens_G = (table.tokens.to_numpy(np.float64) for table in (by_document, by_domain))
    losses = load_updates(trainer.value_dir, first, last).to_pandas()
    return Stage(
        first,
        last,
        tokens_G,
        losses[[f"validation_loss_{target}" for target in targets]].mean().to_numpy(),
        by_domain[columns].to_numpy().T,
        np.stack([relative_value(by_domain[column].to_numpy(), tokens_G) for column in columns]),
        np.stack([standard_error(by_document[c].to_numpy(), tokens_D, group_D, len(domains)) for c in columns]),
    )


# Tables and pictures


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def corpus_table(run: Run) -> str:
    header = ["domain", "documents", "loss tokens", "share", *(f"updates {stage.name}" for stage in run.stages)]
    rows = []
    for g, domain in enumerate(run.domains):
        shares = [f"{stage.tokens_G[g] / stage.tokens_G.sum():.1%}" for stage in run.stages]
        share = run.tokens_G[g] / run.tokens_G.sum()
        rows.append([domain, f"{run.documents_G[g]:,}", f"{run.tokens_G[g]:,.0f}", f"{share:.1%}", *shares])
    return table(header, rows)


def stage_table(run: Run, k: int) -> str:
    """Relative values of all domains for one target."""
    rows = [
        ["(loss of the target, nats)", *(f"{stage.loss_K[k]:.2f}" for stage in run.stages)],
        ["(sum of all values, nats)", *(f"{stage.value_KG[k].sum():+.3f}" for stage in run.stages)],
    ]
    for g, domain in enumerate(run.domains):
        cells = [cell(stage.relative_KG[k, g], stage.error_KG[k, g]) for stage in run.stages]
        rows.append([f"**{domain}**" if domain == run.targets[k] else domain, *cells])
    return table(["domain", *(f"updates {stage.name}" for stage in run.stages)], rows)


def cell(relative: float, error: float) -> str:
    if np.isnan(relative):
        return "-"
    return f"{relative:+.2f}" if np.isnan(error) else f"{relative:+.2f} ± {error:.2f}"


def audit_table(runs: Sequence[Run]) -> str:
    header = ["model", "target", "documents", "momentum, decay", "predicted", "measured"]
    rows = [
        [run.model, target, *(f"{sums[name]:+.4f}" for name in ("samples", "carried", "predicted", "actual"))]
        for run in runs
        for target, sums in run.audit.items()
    ]
    return table(header, rows)


def agreement(runs: Sequence[Run]) -> str:
    """How alike two models' relative values are, over all domains and targets: rank correlation in each stage."""
    one, other = runs[:2]
    found = []
    for left, right in zip(one.stages, other.stages, strict=True):
        pairs = np.stack([left.relative_KG.ravel(), right.relative_KG.ravel()])
        pairs = pairs[:, ~np.isnan(pairs).any(0)]
        found.append(f"{fidelity(pairs[0], pairs[1]).spearman:.2f} (updates {left.name})")
    return f"Rank correlation of the relative values of {one.model} and {other.model}: {', '.join(found)}."


# Blue from 1 on, and red below, to where colours end; the numbers are written.
COLORS, LEAST, MOST = "RdBu", -1.0, 3.0
LINES = ("#0b6aa8", "#c04d0a", "#1d2127", "#7a6fac")  # of models
MUTED = "#626a75"


def draw_stages(path: Path, runs: Sequence[Run]) -> None:
    """A row of panels for each model, one for each target: relative value by domain and stage."""
    targets, domains = runs[0].targets, runs[0].domains
    with matplotlib.rc_context({"font.size": 8}):
        size = 1.5 + 3.4 * len(targets), 1.0 + len(runs) * (0.8 + 0.23 * len(domains))
        figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
        panels = figure.subplots(len(runs), len(targets), squeeze=False, sharey="row")
        for run, row in zip(runs, panels, strict=True):
            for k, axes in enumerate(row):
                draw_panel(axes, run, k)
        colors = ScalarMappable(Normalize(LEAST, MOST), COLORS)
        bar = figure.colorbar(colors, ax=panels, location="bottom", fraction=0.03, aspect=60, extend="both")
        bar.set_label(
            "share of value / share of tokens (1: worth as much per token as the average; below 0: raised the loss; "
            "bold: more than two standard errors from 1)"
        )
        figure.savefig(path)


def draw_panel(axes: Axes, run: Run, k: int) -> None:
    relative_GS = np.stack([stage.relative_KG[k] for stage in run.stages], axis=1)
    error_GS = np.stack([stage.error_KG[k] for stage in run.stages], axis=1)
    axes.imshow(relative_GS, cmap=COLORS, vmin=LEAST, vmax=MOST, aspect="auto")
    for (g, s), relative in np.ndenumerate(relative_GS):
        if np.isnan(relative):
            continue
        strong = not LEAST + 0.6 <= relative <= MOST - 0.6
        sure = abs(relative - 1) > 2 * error_GS[g, s]
        axes.text(
            s,
            g,
            f"{round(relative, 1) + 0.0:.1f}".replace("-", "−"),  # + 0.0: no sign before a zero
            ha="center",
            va="center",
            color="white" if strong else "#1d2127",
            weight="bold" if sure else "normal",
            fontsize=7.5,
        )
    if run.targets[k] in run.domains:
        own = (-0.5, run.domains.index(run.targets[k]) - 0.5)
        axes.add_patch(Rectangle(own, len(run.stages), 1, fill=False, edgecolor="#1d2127", linewidth=1.6))
    axes.set_title(f"{run.model}, target: {run.targets[k]}", fontsize=9)
    axes.set_yticks(range(len(run.domains)), run.domains)
    axes.set_xticks(range(len(run.stages)), [stage.name for stage in run.stages])
    axes.set_xlabel("updates")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_own(path: Path, runs: Sequence[Run]) -> None:
    """A panel for each target: what share of value its own domain has over training, beside its share of tokens."""
    targets = [target for target in runs[0].targets if target in runs[0].domains]
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(1.0 + 3.0 * len(targets), 3.0), dpi=110, layout="constrained", facecolor="white")
        panels = figure.subplots(1, len(targets), squeeze=False, sharey=True)[0]
        place = np.arange(len(runs[0].stages))
        for axes, target in zip(panels, targets, strict=True):
            for number, run in enumerate(runs):
                k, g = run.targets.index(target), run.domains.index(target)
                tokens_S = np.array([stage.tokens_G[g] / stage.tokens_G.sum() for stage in run.stages])
                axes.errorbar(
                    place + 0.06 * (2 * number - len(runs) + 1),  # apart, so that both bars are seen
                    100 * tokens_S * [stage.relative_KG[k, g] for stage in run.stages],
                    yerr=100 * tokens_S * [stage.error_KG[k, g] for stage in run.stages],
                    color=LINES[number % len(LINES)],
                    marker="os^D"[number % 4],
                    markersize=4,
                    linewidth=1.4,
                    elinewidth=1,
                    capsize=2,
                    label=f"share of value, {run.model}",
                )
            # The same rows for all models.
            axes.plot(place, 100 * tokens_S, color=MUTED, linestyle="--", linewidth=1.2, label="share of tokens")
            axes.set_title(f"{target} for the target {target}", fontsize=9)
            axes.set_xticks(place, [stage.name for stage in run.stages])
            axes.set_xlabel("updates")
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
            axes.grid(axis="y", color="#e4e6e9")
            axes.set_axisbelow(True)
        panels[0].set_ylabel("percent of the stage")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        figure.savefig(path)


def describe(setting: Setting, run: Run) -> str:
    return (
        f"`python {' '.join(sys.argv)}`, seed {setting.seed}: {os.cpu_count()} CPU cores ({setting.threads} used), "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"hf_datashapley {hf_datashapley.__version__}. {setting.updates} updates of {setting.batch_size} rows of "
        f"{setting.length} tokens, scored against {setting.validation_rows} rows of each target; AdamW, learning rate "
        f"{setting.learning_rate:g}, {setting.updates // 10} updates of warm-up, clipping at 1; vocabulary "
        f"{setting.vocabulary}."
    )


def main() -> None:
    (setting,) = HfArgumentParser(Setting).parse_args_into_dataclasses()
    torch.set_num_threads(setting.threads)
    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    data = make_data(setting)
    folder = new_run_folder(setting.output_dir)
    data.documents.select_columns(["domain", "title"]).to_parquet(folder / "documents.parquet")
    runs = [measure(model, data, setting, folder / model) for model in setting.models]
    parts = [
        describe(setting, runs[0]),
        "## What was trained on",
        corpus_table(runs[0]),
        *(
            text
            for run in runs
            for k, target in enumerate(run.targets)
            for text in (f"## {run.model}, target {target}: share of value / share of tokens", stage_table(run, k))
        ),
        "## Sums over audited updates, nats",
        audit_table(runs),
        *([agreement(runs)] if len(runs) > 1 else []),
        " ".join(
            f"{run.model}: {run.parameters:,} parameters, {run.cpu_minutes:.0f} minutes of CPU time." for run in runs
        ),
    ]
    written = "\n\n".join(parts)
    (folder / "domains.md").write_text(written + "\n", encoding="utf-8")
    draw_stages(folder / "domains.png", runs)
    draw_own(folder / "own_domain.png", runs)
    print(f"\n{written}\n\nWritten into {folder}: domains.md, domains.png, own_domain.png, documents.parquet, ledgers")


if __name__ == "__main__":
    main()
